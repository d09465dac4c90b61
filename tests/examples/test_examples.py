"""The examples: what lies in the repository is whole and small, and all of it runs from nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def pictures(path: Path) -> list[str]:
    data = [output.get("data", {}) for cell in cells(path) for output in cell["outputs"]]
    return [content for one in data for kind, content in one.items() if kind.startswith("image/")]


def test_the_notebooks_are_there() -> None:
    assert NOTEBOOKS == ["01_photo_to_lora.ipynb", "02_edit_blend_sample.ipynb", "03_your_corpus.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_its_results(name: str) -> None:
    path = EXAMPLES / name
    assert path.stat().st_size < 500_000
    assert [cell["execution_count"] for cell in cells(path)] == [*range(1, len(cells(path)) + 1)], "run it from the top"
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert len(pictures(path)) >= 3
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(outputs)), "a path of the machine that it ran on"


@pytest.mark.parametrize("name", [*NOTEBOOKS, "04_everywhere.py"])
def test_the_readme_shows_each_example(name: str) -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert f"]({name})" in text
    assert f"](images/{name[:2]}.jpg)" in text


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, without anything that they made before; commands of this environment are on the path."""
    copy = tmp_path / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("work", "__pycache__"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return copy


# A corpus and a training of minutes, at a size where all of it still happens.
SHORTER = {
    "range(20100, 20124)": "range(20100, 20106)",
    "finetune.steps=60": "finetune.steps=4",
    "denoiser_training.steps=200": "denoiser_training.steps=30",
    "pca.num_components=8": "pca.num_components=3",
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.ray] if n.startswith("03") else []) for n in NOTEBOOKS]
)
def test_a_notebook_runs_from_the_top(name: str, examples: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(examples / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            for long, short in SHORTER.items():
                cell.source = cell.source.replace(long, short)
    (examples / name).unlink()
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(examples)}}
    ).execute()
    nbformat.write(notebook, examples / name)
    assert len(pictures(examples / name)) == len(pictures(EXAMPLES / name))


@pytest.mark.slow
def test_every_export_draws_the_same_in_the_program_that_it_is_for(examples: Path) -> None:
    command = [sys.executable, str(examples / "04_everywhere.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    for program in ("diffusers", "peft", "kohya's scripts", "ComfyUI"):
        assert program in done.stdout
    assert (examples / "work" / "everywhere.jpg").exists()


def test_a_merge_with_another_alpha_would_be_seen() -> None:
    """Of the rules that the script has for kohya's and ComfyUI's programs: alpha counts, and both read it alike."""
    import torch
    from safetensors.torch import load
    from tiny_unet import tiny_unet

    from lora_diffusion import LoRALayout
    from lora_diffusion.lora.formats import to_bytes

    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("everywhere", EXAMPLES / "04_everywhere.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["everywhere"] = script
    spec.loader.exec_module(script)
    layout = LoRALayout.from_unet(tiny_unet(), rank=2, target_modules=("to_q", "conv1"), alpha=3.0)
    vector_N = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    tensors = load(to_bytes(vector_N, layout))
    changed = {key: 2 * value if key.endswith("alpha") else value for key, value in tensors.items()}
    weights = []
    for add, given in ((script.kohya_merge, tensors), (script.comfyui_patch, tensors), (script.kohya_merge, changed)):
        unet = tiny_unet()
        with torch.no_grad():
            assert add(unet, given) == len(layout.entries)
        weights.append(torch.cat([weight.flatten() for weight in unet.state_dict().values()]))
    kohya, comfyui, other = weights
    torch.testing.assert_close(kohya, comfyui)
    assert (kohya - other).abs().max() > 0.1
