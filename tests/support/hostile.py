"""Every reader of bytes from outside, with good files to begin from; `mutations.py` makes hostile ones of them.

Shared by `tests/test_hostile.py`, some hundred cases a reader, and `python -m tests.fuzz`, as many as one likes.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import hostile_http
import numpy as np
import torch
from hostile_corpus import OF_A_CORPUS
from hostile_people import OF_PEOPLE, jpeg
from mutations import Reader, plain, put
from safetensors.torch import save
from small_corpus import LAYOUT

from lora_diffusion.artifacts import checksum
from lora_diffusion.config import CONFIGS, load_config
from lora_diffusion.corpus import Statistics
from lora_diffusion.evaluation.scoring import Scores
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.lora import formats
from lora_diffusion.models.kinds import shapes_of
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.pca import PCA, fit_pca
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.train_config import TrainConfig
from lora_diffusion.training.checkpoint import pack, unpack
from lora_diffusion.training.loop import LoopConfig
from lora_diffusion.training.state import TrainingState


def _lora_seeds(folder: Path) -> list[bytes]:
    vector_N = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(0))
    ours = [formats.to_bytes(vector_N, LAYOUT, format) for format in ("kohya", "diffusers", "vector")]  # type: ignore[arg-type]
    tensors = {
        f"base_model.model.a.to_q.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 5)), ("B", (4, 2)))
    }
    return [*ours, *plain(ours[0], "safetensors"), save(tensors, {"format": "pt"})]


def _read_lora(folder: Path, data: bytes) -> None:
    formats.read(put(folder, "x.safetensors", data), LAYOUT, partial=True, ignore_extra=True, svd=True)


def _read_peft(folder: Path, data: bytes) -> None:
    put(folder, "adapter_config.json", data)
    formats.read(folder, LAYOUT)


def _peft(folder: Path) -> None:
    formats.save(torch.ones(LAYOUT.size), LAYOUT, folder, "peft")


def _scores(folder: Path) -> list[bytes]:
    array = np.ones((2, 1, 1, 2), np.float32)
    found, hits = np.ones((2, 1, 1), bool), np.ones((2, 1, 3), np.int8)
    data = Scores(np.arange(2), array, found, hits, array[:, 0, 0], np.zeros((0, 0, 0, 0, 3), np.uint8)).to_bytes()
    return [data, *plain(data, "safetensors")]


def _statistics(folder: Path) -> list[bytes]:
    data = Statistics.of(np.ones((2, 3))).to_bytes()
    return [data, *plain(data, "safetensors")]


def _checkpoint(folder: Path) -> list[bytes]:
    tensors = {"a": torch.ones(3, 2), "b": torch.ones((), dtype=torch.int64), "c": torch.zeros(0, 4)}
    data = pack(tensors, {"step": 3})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return [data, save(tensors, {key: text for key, text in header.items() if key not in ("checksum", "sha256")})]


def _pca(folder: Path) -> list[bytes]:
    fitted = fit_pca(lambda: [np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)], 2)
    return [pack(dict(fitted.state_dict()), {"data": {"rows": "x"}})]


def _read_pca(folder: Path, data: bytes) -> None:
    saved = unpack(open_store(put(folder, "pca.safetensors", data).parent), "pca.safetensors")
    assert saved is not None
    PCA.from_tensors(saved[0])


def _training_state(folder: Path) -> TrainingState:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return TrainingState("x", open_store(folder), dict(model.named_parameters()), optimizer, LoopConfig(), {})


def _states(folder: Path) -> list[bytes]:
    _training_state(folder).save(True)
    data = (folder / "checkpoints/x.safetensors").read_bytes()
    return [data, *plain(data, "safetensors")]


def _read_state(folder: Path, data: bytes) -> None:
    put(folder, "checkpoints/x.safetensors", data)
    _training_state(folder).restore()


def _yaml_seeds(folder: Path) -> list[bytes]:
    """The sections of all files: a whole file takes 25 ms to parse."""
    sections = [part for path in sorted(CONFIGS.glob("*.yaml")) for part in re.split(r"\n(?=\w)", path.read_text())]
    return [re.sub(r" *#.*", "", part).encode()[:400] for part in sections] + [
        b"a: &a0 [x, x]\nbase: &b [" + b", ".join(b"&a%d [*a%d, *a%d]" % (i + 1, i, i) for i in range(30)) + b"]\n",
        b"a: &a {b: *a}\nfinetune: *a\n", b"finetune: !!bool x\n", b"device: !!int ''\n", b"base: !!timestamp x\n", b"? [1]\n: 2\n",
    ]  # fmt: skip


def _read_yaml(folder: Path, data: bytes) -> None:
    path = put(folder, "x.yaml", data)
    with suppress(ValueError):
        load_config(CorpusConfig, None, [f"finetune={data[:200].decode('utf-8', 'replace')}"])
    load_config((CorpusConfig, TrainConfig, ServeConfig)[len(data) % 3], path)


def _synthesizer(folder: Path) -> None:
    from synthesis_world import SMALL, untrained

    small = replace(SMALL, width=4, depth=1, condition_width=4, rank=1, generator_width=2)
    untrained("pca", config=small).save_pretrained(folder)
    store = open_store(folder)
    config = checksum.unsealed(store.read_json("config.json"))
    config.pop("belong")  # or else nothing behind it is reached
    store.write_json("config.json", checksum.seal_json(config))
    Synthesizer.from_pretrained(folder)  # what it imports takes seconds


def _of_synthesizer(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        put(folder, name, data)
        Synthesizer.from_pretrained(folder)

    change = "json" if name == "config.json" else "safetensors"

    def seeds(folder: Path) -> list[bytes]:
        data = (folder / name).read_bytes()
        return [data, *plain(data, change)]

    return Reader(seeds, read, _synthesizer, change)


READERS = {
    **OF_A_CORPUS,
    **OF_PEOPLE,
    "lora": Reader(_lora_seeds, _read_lora, change="safetensors"),
    "peft_config": Reader(lambda folder: [(folder / "adapter_config.json").read_bytes()], _read_peft, _peft, "json"),
    "statistics": Reader(_statistics, lambda _, data: Statistics.from_bytes(data), change="safetensors"),
    "checkpoint": Reader(
        _checkpoint,
        lambda folder, data: unpack(open_store(put(folder, "x.safetensors", data).parent), "x.safetensors"),
        change="safetensors",
    ),
    "pca": Reader(_pca, _read_pca, change="safetensors"),
    "training_state": Reader(_states, _read_state, change="safetensors"),
    "scores": Reader(_scores, lambda _, data: Scores.from_bytes(data), change="safetensors"),
    "yaml": Reader(_yaml_seeds, _read_yaml, change="text"),
    "synthesizer_config": _of_synthesizer("config.json"),
    "synthesizer_codes": _of_synthesizer("codes.safetensors"),
    "synthesizer_denoiser": _of_synthesizer("denoiser.safetensors"),
    "model_file": Reader(
        _lora_seeds, lambda folder, data: shapes_of(put(folder, "x.safetensors", data)), change="safetensors"
    ),
    "http": Reader(
        lambda folder: hostile_http.requests(jpeg(0, "PNG"), _lora_seeds(folder)[0]),
        lambda folder, data: hostile_http.answers(folder).ask(data),
        change="http",
    ),
}
