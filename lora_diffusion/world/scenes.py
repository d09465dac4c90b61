"""Does a picture show what its prompt asked for? A small classifier of scenes, for evaluation only.

It reads the five phrases that every caption of ``captions.py`` has: expression, pose, light, background and clothes, of
64 px pictures. Trained on rendered people of the base split; its accuracy on held-out photos is the ceiling of any render.

Axes: B pictures, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_diffusion.world.people.views import BACKGROUNDS, CLOTH_COLOURS, EXPRESSIONS, LIGHTS

ASSET = Path(__file__).resolve().parents[1] / "assets" / "scenes" / "model.safetensors"

POSES = (
    "facing the camera",
    "turned slightly left",
    "turned slightly right",
    "in profile facing left",
    "in profile facing right",
)
HEADS: dict[str, tuple[str, ...]] = {
    "expression": tuple(EXPRESSIONS),
    "pose": POSES,
    "light": tuple(LIGHTS),
    "background": tuple(BACKGROUNDS),
    "cloth": tuple(CLOTH_COLOURS),
}


def labels_of_prompt(prompt: str) -> dict[str, int]:
    """Which class of each head a prompt asks for; heads that it does not mention are left out."""
    phrases = [phrase.strip() for phrase in prompt.split(",")]
    found: dict[str, int] = {}
    for phrase in phrases:
        for head in ("expression", "pose", "light"):
            if phrase in HEADS[head]:
                found[head] = HEADS[head].index(phrase)
        if phrase.endswith(" background") and phrase[: -len(" background")] in HEADS["background"]:
            found["background"] = HEADS["background"].index(phrase[: -len(" background")])
        if phrase.startswith("wearing "):
            words = phrase.split(" ", 2)[2]
            colours = [colour for colour in HEADS["cloth"] if words.startswith(colour + " ")]
            if colours:
                found["cloth"] = HEADS["cloth"].index(max(colours, key=len))
    return found


class SceneClassifier(nn.Module):
    """(B, 3, 64, 64) RGB in [-1, 1] -> logits by head. 0.3 M parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.trunk = nn.Sequential(
            *[
                nn.Sequential(
                    nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 2 if a == 3 else 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
                )
                for a, b in pairwise(widths)
            ]
        )
        self.hidden = nn.Linear(widths[-1] * 16, 96)
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(classes)) for name, classes in HEADS.items()})

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.hidden(self.trunk(images_BCHW).flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, pictures_BHWC: NDArray[np.uint8]) -> dict[str, NDArray[np.int64]]:
        """uint8 RGB (B, 64, 64, 3) -> the most likely class of each head (B,)."""
        if pictures_BHWC.ndim != 4 or pictures_BHWC.shape[1:] != (64, 64, 3) or pictures_BHWC.dtype != np.uint8:
            raise ValueError(f"expected uint8 pictures (B, 64, 64, 3), got {pictures_BHWC.dtype} {pictures_BHWC.shape}")
        logits = self.eval()(torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2) / 127.5 - 1)
        return {name: value.argmax(1).numpy() for name, value in logits.items()}

    @classmethod
    def from_pretrained(cls, path: Path = ASSET) -> SceneClassifier:
        from safetensors.torch import load_file

        model = cls()
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return model.eval()


def prompt_accuracy(
    model: SceneClassifier, pictures_BHWC: NDArray[np.uint8], prompts: Sequence[str]
) -> dict[str, float]:
    """Share of pictures that show what their prompt asked for, by head, and their mean as ``all``."""
    predicted = model.classify(pictures_BHWC)
    wanted = [labels_of_prompt(prompt) for prompt in prompts]
    result = {}
    for head in HEADS:
        hits = [predicted[head][i] == labels[head] for i, labels in enumerate(wanted) if head in labels]
        if hits:
            result[head] = float(np.mean(hits))
    result["all"] = float(np.mean(list(result.values())))
    return result


class Scenes:
    """The prompt scorer of the embedded world: `rendering.PromptScorer`."""

    def __init__(self) -> None:
        self.model = SceneClassifier.from_pretrained()

    def hits(self, pictures_BHWC: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.int8]:
        """(B, H): 1 shown, 0 not, -1 not asked; all -1 for pictures of another size than 64 px."""
        hits = np.full((len(pictures_BHWC), len(HEADS)), -1, np.int8)
        if pictures_BHWC.shape[1:3] != (64, 64):
            return hits
        seen = self.model.classify(pictures_BHWC)
        for i, prompt in enumerate(prompts):
            wanted = labels_of_prompt(prompt)
            for h, head in enumerate(HEADS):
                if head in wanted:
                    hits[i, h] = seen[head][i] == wanted[head]
        return hits
