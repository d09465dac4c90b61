#!/usr/bin/env python
"""Each export, loaded by the program that it is for, draws what our own renderer draws.

    python examples/04_everywhere.py

Two LoRAs are made from two photos. diffusers and peft load their files themselves. Of kohya's scripts and of ComfyUI the
published rules are written out below, since neither is a library: which keys they take, and what they add to a weight.
Prints a table and writes work/everywhere.jpg. Exit code 1 if a picture differs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pictures import grid
from PIL import Image
from torch import Tensor, nn

from lora_diffusion import BaseModel, LoRABank, Synthesizer, load_lora, render, save_lora
from lora_diffusion.lora.rendering import initial_noise, make_scheduler
from lora_diffusion.world.people import render as photograph
from lora_diffusion.world.people import sample_person, sample_view

WORK = Path(__file__).parent / "work"
PROMPT = "a photo of sks person, slight smile, facing the camera, beach background"
SEED, STEPS, GUIDANCE = 3, 15, 1.25
SAME = 2  # levels of 255: float error, and the rounding of pixels

Picture = NDArray[np.uint8]


# --- kohya: networks/lora.py, `merge_to`


def kohya_merge(unet: nn.Module, tensors: dict[str, Tensor]) -> int:
    """Add each layer's update to its weight; returns how many. A layer is called `lora_unet_` and its name with `_`."""
    layers = {f"lora_unet_{name.replace('.', '_')}": module for name, module in unet.named_modules()}
    names = {key.partition(".")[0] for key in tensors}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        weight, scale = layers[name].weight.data, float(tensors[f"{name}.alpha"]) / len(down)
        if weight.ndim == 2:
            weight += scale * up @ down
        elif down.shape[2:] == (1, 1):
            weight += scale * (up[:, :, 0, 0] @ down[:, :, 0, 0])[:, :, None, None]
        else:
            weight += scale * nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    return len(names)


# --- ComfyUI: comfy/lora.py, `model_lora_keys_unet` and `load_lora`; comfy/weight_adapter/lora.py

SUFFIXES = [(".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"), (".lora_B.weight", ".lora_A.weight")]  # fmt: skip


def comfyui_patch(unet: nn.Module, tensors: dict[str, Tensor]) -> int:
    """Add what ComfyUI finds in a file. It looks for each layer of the model under these names, and ignores other keys."""
    left, patched = dict(tensors), 0
    for layer, module in unet.named_modules():
        flat, old = layer.replace(".", "_"), layer.replace(".to_", ".processor.to_").removesuffix(".0")
        for name in (f"lora_unet_{flat}", f"lycoris_{flat}", old, f"unet.{old}"):
            found = [(up, down) for up, down in SUFFIXES if name + up in left and hasattr(module, "weight")]
            for up, down in found:
                B, A = left.pop(name + up), left.pop(name + down)
                alpha = left.pop(f"{name}.alpha", None)
                scale = 1.0 if alpha is None else float(alpha) / len(A)
                module.weight.data += scale * (B.flatten(1) @ A.flatten(1)).view_as(module.weight)
                patched += 1
    if left:
        print(f"ComfyUI would ignore {len(left)} keys, such as {next(iter(left))}")
    return patched


# --- the comparison


@dataclass
class Row:
    program: str
    file: str
    how: str
    ours: Picture
    theirs: Picture

    @property
    def difference(self) -> int:
        return int(np.abs(self.ours.astype(int) - self.theirs.astype(int)).max())


class Everywhere:
    """Ada's and Cora's files, our pictures of them, and theirs."""

    def __init__(self) -> None:
        WORK.mkdir(exist_ok=True)
        self.synthesizer = Synthesizer.from_pretrained("tiny")
        self.layout = self.synthesizer.layout
        self.base = BaseModel.from_pretrained("tiny-sd")
        self.bank = LoRABank(self.base.unet, self.layout)
        photos = [
            photograph(sample_person(n), sample_view(n, view), size=192).image for n, view in ((80512, 39), (80500, 11))
        ]
        self.ada_N, self.cora_N = (torch.from_numpy(self.synthesizer.from_photo(photo)[0]) for photo in photos)
        self.files = {f: save_lora(self.ada_N, self.layout, WORK / "everywhere" / f / "", f) for f in ("kohya", "diffusers", "peft", "vector")}  # fmt: skip
        self.cora = save_lora(self.cora_N, self.layout, WORK / "everywhere" / "cora.safetensors")
        self.rows: list[Row] = []

    def ours(self, vector_N: Tensor | None) -> Picture:
        """By our renderer: the LoRA beside the frozen weights, as a vector."""
        one = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        vectors = None if vector_N is None else vector_N[None]
        return render(self.base, vectors, [PROMPT], [SEED], bank=self.bank, **one)[0]

    def times(self, vector_N: Tensor, strength: float) -> Tensor:
        """The vector of a LoRA that is `strength` times as strong: its B is."""
        return torch.where(self.layout.mask_B(), vector_N * strength, vector_N)

    def pipeline(self) -> Any:
        import diffusers
        import transformers

        from lora_diffusion.models.stable_diffusion import resolve_model

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(resolve_model("tiny-sd"), safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(self.base)
        return pipe

    def drawn(self, pipe: Any) -> Picture:
        """By diffusers, from the same noise."""
        how = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
        made = pipe(PROMPT, latents=initial_noise(self.base, [SEED]), **how).images[0]
        return (255 * made).round().astype(np.uint8)

    def compare(self, program: str, file: str, how: str, vector_N: Tensor | None, theirs: Picture) -> None:
        self.rows.append(Row(program, file, how, self.ours(vector_N), theirs))
        print(".", end="", flush=True)

    def ourselves(self) -> None:
        self.compare("LoRA Diffusion", "vector", "load_lora", self.ada_N, self.ours(load_lora(self.files["vector"])))

    def diffusers(self) -> None:
        pipe = self.pipeline()
        for file in ("kohya", "diffusers"):
            pipe.load_lora_weights(self.files[file], adapter_name="ada")
            self.compare("diffusers", file, "load_lora_weights", self.ada_N, self.drawn(pipe))
            if file == "kohya":
                pipe.delete_adapters("ada")
        pipe.set_adapters("ada", 0.5)
        self.compare(
            "diffusers", "diffusers", "set_adapters, half strength", self.times(self.ada_N, 0.5), self.drawn(pipe)
        )
        pipe.load_lora_weights(self.cora, adapter_name="cora")
        pipe.set_adapters(["ada", "cora"], [0.6, 0.4])
        # All LoRAs of this synthesiser share A, so that a sum of updates is a sum of B.
        both_N = self.times(self.ada_N, 0.6) + torch.where(self.layout.mask_B(), 0.4 * self.cora_N, 0)
        self.compare("diffusers", "both", "set_adapters, Ada 0.6 and Cora 0.4", both_N, self.drawn(pipe))
        pipe.set_adapters("ada", 1.0)
        pipe.fuse_lora(adapter_names=["ada"])
        self.compare("diffusers", "diffusers", "fuse_lora", self.ada_N, self.drawn(pipe))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        self.compare("diffusers", "diffusers", "unfuse_lora, unload_lora_weights", None, self.drawn(pipe))

    def peft(self) -> None:
        from peft import PeftModel

        pipe = self.pipeline()
        pipe.unet = PeftModel.from_pretrained(pipe.unet, self.files["peft"]).base_model.model
        self.compare("peft", "peft", "PeftModel.from_pretrained", self.ada_N, self.drawn(pipe))

    def merged(self, program: str, add: Callable[[nn.Module, dict[str, Tensor]], int]) -> None:
        from safetensors.torch import load_file

        pipe = self.pipeline()
        with torch.no_grad():
            count = add(pipe.unet, load_file(self.files["kohya"]))
        how = f"added to the weights of {count} of {len(self.layout.entries)} layers"
        self.compare(program, "kohya", how, self.ada_N, self.drawn(pipe))

    def report(self) -> int:
        print(f"\n\n{'program':<15} {'file':<10} {'how':<42} largest difference, of 255")
        for row in self.rows:
            verdict = "" if row.difference <= SAME else "  DIFFERS"
            print(f"{row.program:<15} {row.file:<10} {row.how:<42} {row.difference}{verdict}")
        stranger = int(np.abs(self.ours(self.ada_N).astype(int) - self.ours(None).astype(int)).max())
        print(f"(with the LoRA and without it our pictures differ by {stranger})")
        names = [f"{row.program}: {row.how.removeprefix('PeftModel.').partition(' to ')[0]}" for row in self.rows]
        middle = (len(names) + 1) // 2
        sheets = [
            grid([[r.ours, r.theirs] for r in self.rows[half]], names[half], [["ours", "theirs"]] * middle, side=128)
            for half in (slice(middle), slice(middle, None))
        ]
        whole = Image.new("RGB", (sum(s.width for s in sheets) + 12, max(s.height for s in sheets)), "white")
        whole.paste(sheets[0], (0, 0))
        whole.paste(sheets[1], (sheets[0].width + 12, 0))
        whole.save(WORK / "everywhere.jpg", quality=88)
        return int(any(row.difference > SAME for row in self.rows) or stranger <= SAME)


def main() -> int:
    warnings.filterwarnings("ignore", module="peft")  # that a model has two adapters
    here = Everywhere()
    here.ourselves()
    here.diffusers()
    here.peft()
    here.merged("kohya's scripts", kohya_merge)
    here.merged("ComfyUI", comfyui_patch)
    return here.report()


if __name__ == "__main__":
    sys.exit(main())
