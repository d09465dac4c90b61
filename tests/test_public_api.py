"""`import lora_diffusion`: quick, lazy, and everything it names is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lora_diffusion


def test_import_is_quick_and_brings_neither_torch_nor_ray() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import lora_diffusion; spent = time.perf_counter() - start; "
        "print(spent, *{'torch', 'ray', 'numpy', 'diffusers'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(answer[0]) < 0.3, "seconds"
    assert answer[1:] == []


def test_nothing_is_reported_to_others_unless_a_user_wants_it() -> None:
    code = (
        "import os, lora_diffusion; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    for given, expected in (({}, "1 0"), ({"ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}, "0 1")):
        kept = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")}
        done = subprocess.run([sys.executable, "-c", code], env={**kept, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lora_diffusion.corpus", "torch ray diffusers insightface onnxruntime"),
        ("lora_diffusion.jobs.corpus", "torch diffusers insightface onnxruntime"),
        ("lora_diffusion.factory.embed", "torch ray diffusers insightface onnxruntime"),
        ("lora_diffusion.jobs.train", "torch.distributed.tensor diffusers transformers insightface onnxruntime"),
        ("lora_diffusion.jobs.evaluate", "torch.distributed.tensor diffusers transformers insightface onnxruntime"),
        ("lora_diffusion.endpoint.graph", "torch diffusers insightface onnxruntime"),
    ],
)
def test_a_process_imports_what_it_needs(module: str, heavy: str) -> None:
    """Each of Ray's processes pays for its imports: seconds, on cores that the work waits for."""
    code = f"import sys, {module}; print(*set({heavy.split()}) & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.split() == []


@pytest.mark.parametrize("name", lora_diffusion.__all__)
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    value = getattr(lora_diffusion, name)
    assert callable(value)
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Synthesiser'; there are .*Synthesizer"):
        lora_diffusion.Synthesiser  # noqa: B018


def test_what_a_notebook_shows_of_an_object_is_one_short_line() -> None:
    from lora_diffusion import BaseModel, FaceEmbedder, LoRABank, LoRALayout

    base = BaseModel.from_pretrained("tiny-sd")
    layout = LoRALayout.from_unet(base.unet)
    for thing, part in (
        (base, "BaseModel('tiny-sd', 64 px, torch.float32, device='cpu')"),
        (layout, f"rank={layout.rank}, alpha={layout.alpha:g}, size={layout.size})"),
        (LoRABank(base.unet, layout), f"LoRABank(LoRALayout({layout.layout_id}: "),
        (FaceEmbedder("tiny"), "FaceEmbedder('tiny', "),
    ):
        assert part in repr(thing)
        assert len(repr(thing)) < 200
