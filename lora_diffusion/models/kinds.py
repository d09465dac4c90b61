"""What a file or folder of weights is, in the words of its users: told from names of tensors and configurations, no weights.

Order matters: the first clue that is found decides, and the more special kinds come first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor -> its shape

CHECKPOINT = "a Stable Diffusion checkpoint"
XL = "a Stable Diffusion XL model"

# in the name of any tensor
_CLUES = (
    (r"lora_(up|down|A|B)\b|\.lora\.|\bhada_w|\blokr_w|\.oft_", "a LoRA, which changes a base model and is none"),
    (r"^(control_model|zero_convs|controlnet_)|controlnet_cond_embedding", "a ControlNet"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion (the embedding of a word)"),
    (r"^edm_(mean|vpred)", "a model with noise levels of EDM, such as Playground 2.5"),
    (r"conditioner\.embedders\.|^add_embedding\.", XL),
    (
        r"\blabel_emb\.",
        "a model that needs more than a prompt (label_emb), as Stable Diffusion XL, unCLIP and upscalers do",
    ),
    (r"double_blocks\.\d|single_transformer_blocks\.\d", "a FLUX model, a transformer"),
    (r"joint_blocks\.\d|\.norm1_context\.linear", "a Stable Diffusion 3 model, a transformer"),
    (r"^model\.diffusion_model\.input_blocks\.", CHECKPOINT),
    (r"^(down_blocks|input_blocks)\.", "a UNet alone"),
    (r"^(first_stage_model\.)?encoder\.(conv_in|down)", "a VAE alone"),
    (r"^(cond_stage_model\.|text_model\.|embeddings\.token_embedding)", "a text encoder alone"),
)

# `_class_name` of model_index.json or of a part's config.json, in the same way
_CLASSES = (
    ("StableDiffusionXL", XL),
    ("StableDiffusion3|SD3", "a Stable Diffusion 3 model, a transformer"),
    ("Flux", "a FLUX model, a transformer"),
    ("Inpaint", "a model for inpainting"),
    ("ControlNet", "a ControlNet"),
    ("UNet", "a UNet alone"),
    ("Autoencoder", "a VAE alone"),
    ("CLIPText", "a text encoder alone"),
    ("Transformer2D|DiT", "a diffusion transformer"),
)

_CHANNELS = {
    5: "a depth-to-image UNet (5 input channels)",
    7: "an upscaling UNet (7 input channels)",
    8: "an instruct-pix2pix UNet (8 input channels)",
    9: "an inpainting UNet (9 input channels)",
}


def shapes_of(path: str | Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes of all tensors of a .safetensors file, and its metadata. Raises ValueError if it is none, or is cut off."""
    check_pointer(Path(path))
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole .safetensors file ({error}): download it again") from error


def check_pointer(path: Path) -> None:
    """Raises ValueError if the file is not there, but only a note of where Git keeps it."""
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path.name} is only a pointer to the weights: fetch them by git lfs pull")


def kind_of_tensors(shapes: Shapes) -> str:
    for clue, kind in _CLUES:
        if any(re.search(clue, name) for name in shapes):
            return kind
    some = ", ".join(sorted(shapes)[:2]) or "no tensors"
    return f"a file of another kind (it holds {some})"


def kind_of_class(name: str) -> str:
    for clue, kind in _CLASSES:
        if re.search(clue, name):
            return f"{kind} ({name})"
    return f"a {name}" if name else "no model that says what it is"


def kind_of_unet(in_channels: int, latent_channels: int) -> str | None:
    """What takes so many channels instead of a latent; None if it takes a latent and nothing else."""
    if in_channels == latent_channels:
        return None
    return _CHANNELS.get(in_channels, f"a UNet of {in_channels} input channels")


def kind_of_folder(folder: Path) -> str:
    """What lies in a folder that has no model_index.json."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return "an empty folder"
    if "adapter_config.json" in names:
        return "a LoRA, which changes a base model and is none"
    if "config.json" in names:
        config = read_json(folder / "config.json")
        return kind_of_class(str(config.get("_class_name") or (config.get("architectures") or [""])[0]))
    weights = [name for name in names if name.endswith(".safetensors")]
    if weights:
        kind = kind_of_tensors(shapes_of(folder / weights[0])[0])
        return (
            f"a folder without model_index.json; {weights[0]} in it is {kind}: give that file itself if it is the base"
        )
    return f"a folder without model_index.json (it holds {', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is missing, or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent.name}/{path.name} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path.parent.name}/{path.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.parent.name}/{path.name} holds no JSON object")
    return value
