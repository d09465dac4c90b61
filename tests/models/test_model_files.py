"""Models in a bucket, against a real S3 server."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_pipeline import tiny_pipeline

from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.embedder import BUNDLED, EmbedderConfig, FaceEmbedder
from lora_diffusion.models import files as model_files
from lora_diffusion.models.files import fetch_folder
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import open_store, partial_folder

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(model_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_fetched_once_and_again_when_it_has_changed(bucket: str, cache: Path) -> None:
    store = open_store(f"s3://{bucket}/model")
    files = {"index.json": b"{}", "unet/weights": bytes(range(256)) * 9}
    for name, data in files.items():
        store.write(name, data)
    first = fetch_folder(store.uri)
    assert contents(first) == files
    written = (first / "unet/weights").stat().st_mtime_ns
    assert fetch_folder(store.uri + "/") == first
    assert (first / "unet/weights").stat().st_mtime_ns == written

    files["unet/weights"] = files["unet/weights"][::-1]  # of the same size
    store.write("unet/weights", files["unet/weights"])
    second = fetch_folder(store.uri)
    assert second != first
    assert contents(second) == files
    assert sorted(path.name for path in cache.iterdir()) == sorted([first.name, second.name])


def test_processes_that_fetch_at_once_leave_one_whole_folder(bucket: str, cache: Path) -> None:
    store = open_store(f"s3://{bucket}/model")
    for i in range(20):
        store.write(f"{i}", bytes([i]) * 1000)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch_folder(store.uri), range(4)))
    assert len(folders) == 1
    assert contents(folders.pop()) == {f"{i}": bytes([i]) * 1000 for i in range(20)}
    assert len(list(cache.iterdir())) == 1


def test_a_fetch_that_breaks_leaves_nothing_behind(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    store = open_store(f"s3://{bucket}/model")
    store.write("a", b"a")
    store.write("b", b"b")
    whole = s3fs.S3FileSystem.get_file

    def half(self: Any, source: str, target: str) -> None:
        if source.endswith("b"):
            raise OSError("connection lost")
        whole(self, source, target)

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", half)
    with pytest.raises(ValueError, match=r"cannot fetch s3://.*connection lost"):
        fetch_folder(store.uri)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv(model_files.CACHE_VARIABLE, str(cache))
    assert contents(fetch_folder(store.uri)) == {"a": b"a", "b": b"b"}


def test_what_a_killed_fetch_left_goes_with_the_next_fetch_and_nothing_of_others(bucket: str, cache: Path) -> None:
    """A killed fetch of Stable Diffusion leaves gigabytes."""
    store = open_store(f"s3://{bucket}/model")
    store.write("a", b"a")
    program = """
import os, signal, sys
import s3fs
from lora_diffusion.models.files import fetch_folder

s3fs.S3FileSystem.get_file = lambda self, source, target: os.kill(os.getpid(), signal.SIGKILL)
fetch_folder(sys.argv[1])
"""
    dead = subprocess.run([sys.executable, "-c", program, store.uri], check=False)
    assert dead.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    others = [cache / ".notes.tmp", cache / ".0123456789abcdef.0123456789AB.tmp"]
    for other in others:
        other.mkdir()
    with partial_folder(cache / ("0" * 16)) as running:
        assert not left.exists()
        (running / "half").write_bytes(b"half")
        whole = fetch_folder(store.uri)
        assert (running / "half").exists()
    assert set(cache.iterdir()) == {whole, *others}


def test_a_base_model_loads_from_a_bucket_and_is_the_one_that_was_put_there(bucket: str, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    store = open_store(f"s3://{bucket}/models/tiny")
    for name, data in contents(tmp_path / "tiny").items():
        store.write(name, data)
    expected = BaseModel.from_pretrained(str(tmp_path / "tiny")).fingerprint
    assert BaseModel.from_pretrained(store.uri).fingerprint == expected


def test_of_a_bucket_only_what_is_used_is_fetched_and_of_another_family_no_weights(
    bucket: str, cache: Path, tmp_path: Path
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    store = open_store(f"s3://{bucket}/models/tiny")
    unused = {"safety_checker/model.safetensors": b"x", "v1-5-pruned.ckpt": b"x", "model.safetensors": b"x"}
    for name, data in (contents(tmp_path / "tiny") | unused).items():
        store.write(name, data)
    BaseModel.from_pretrained(store.uri)
    fetched = {name for folder in cache.iterdir() for name in contents(folder)}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert not fetched & unused.keys()

    xl = open_store(f"s3://{bucket}/models/xl")
    for name, data in contents(tmp_path / "tiny").items():
        xl.write(name, data)
    xl.write_json("model_index.json", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": [], "unet": []})
    before = set(cache.iterdir())
    with pytest.raises(ValueError, match=r"cannot load a base model from 's3://.*it is a Stable Diffusion XL model"):
        BaseModel.from_pretrained(xl.uri)
    (new,) = set(cache.iterdir()) - before
    assert not list(new.rglob("*.safetensors"))


def test_a_single_file_of_a_bucket_is_fetched_and_judged_and_a_pickle_is_not_fetched(
    bucket: str, cache: Path, tmp_path: Path
) -> None:
    store = open_store(f"s3://{bucket}")
    store.write("lora.safetensors", safetensors.numpy.save({"unet.lora_A.weight": np.zeros((1, 4), np.float32)}))
    with pytest.raises(ValueError, match=r"lora.safetensors': it is a LoRA"):
        BaseModel.from_pretrained(f"{store.uri}/lora.safetensors")
    assert [path.name for folder in cache.iterdir() for path in folder.iterdir()] == ["lora.safetensors"]
    with pytest.raises(ValueError, match=r"it is a pickle \(.ckpt\)"):
        BaseModel.from_pretrained(f"{store.uri}/model.ckpt")


def test_a_recogniser_loads_from_a_bucket(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/models/recogniser")
    for name, data in contents(BUNDLED["tiny"]).items():
        store.write(name, data)
    picture = np.zeros((64, 64, 3), np.uint8)
    (answer,) = FaceEmbedder(EmbedderConfig(model=store.uri)).embed_batch([picture])
    assert isinstance(answer, FaceError)
    assert answer.reason == "no_face"


def test_an_empty_place_is_an_error_that_names_it(bucket: str) -> None:
    with pytest.raises(
        ValueError, match=rf"cannot load a base model from 's3://{bucket}/none': cannot fetch.*no files"
    ):
        BaseModel.from_pretrained(f"s3://{bucket}/none")
