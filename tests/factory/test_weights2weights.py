"""Rows of weights2weights -> a corpus: the same numbers, whatever their file, and nothing unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusReader, finish_corpus
from lora_diffusion.corpus.forget import forget
from lora_diffusion.factory import planning
from lora_diffusion.factory.weights2weights import ImportConfig, ShardImporter, Source, layout, read_names, read_rows
from lora_diffusion.jobs.run import main
from lora_diffusion.storage import open_store
from lora_diffusion.verify import examine, repair

N, M = 99_648, 7


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    generator = torch.Generator().manual_seed(0)
    rows_MN = torch.randn(M, N, generator=generator) * 0.01
    rows_MN[3, 5] = torch.inf
    torch.save(rows_MN, folder / "all_weights.pt")
    torch.save(rows_MN.bfloat16(), folder / "half.pt")
    np.save(folder / "faces.npy", torch.randn(M, 512, generator=generator).numpy())
    (folder / "names.csv").write_text(",Male\n" + "".join(f"celeba/{9 - i},1\n" for i in range(M)))
    torch.save(torch.randn(M, 3, generator=generator), folder / "proj.pt")
    for name, tensor in {
        "mean": torch.randn(N, generator=generator),
        "std": torch.rand(N, generator=generator),
        "V": torch.randn(N, 5, generator=generator).bfloat16(),
    }.items():
        torch.save(tensor, folder / f"{name}.pt")
    return folder


def build(folder: Path, output: Path, stop_after: int = 99, **more: Any) -> CorpusReader:
    """The job without Ray; `stop_after` so many shards."""
    values = {"weights": f"{folder}/all_weights.pt", "embeddings": f"{folder}/faces.npy", "people_per_shard": 3}
    config = from_dict(ImportConfig, {**values, "output": str(output), **more})
    source = Source(config)
    begun = planning.begin(config.corpus, source.manifest(), source.people())
    copy = ShardImporter(config)
    for shard, people in begun.work()[:stop_after]:
        copy(shard, people)
    infos, problems = CorpusReader(output).verify()
    assert not problems
    if len(infos) == len(begun.plan.shards):
        finish_corpus(begun.store, begun.manifest, infos)
    return CorpusReader(output)


def test_each_row_becomes_a_row_by_its_name_in_float16(files: Path, tmp_path: Path) -> None:
    reader = build(files, tmp_path / "corpus", identities=f"{files}/names.csv")
    assert reader.layout == layout()
    assert reader.manifest.counts["failed_by_reason"] == {"not_finite": 1}
    rows = reader.table()
    theirs, faces = torch.load(files / "all_weights.pt"), np.load(files / "faces.npy")
    assert rows["identity"].to_pylist() == [f"celeba/{i}" for i in (3, 4, 5, 7, 8, 9)]
    for name, vector, face in zip(reader.identities, reader.vectors(), reader.embeddings(), strict=True):
        row = 9 - int(name.removeprefix("celeba/"))
        assert np.array_equal(vector, theirs[row].numpy().astype(np.float16))
        assert np.allclose(face, faces[row] / np.linalg.norm(faces[row]))
    assert [failure.identity for failure in reader.failures()] == ["celeba/6"]
    assert not reader.manifest.recipe_differences(reader.manifest)


def test_it_goes_on_where_it_stopped_and_gives_the_same_bytes(files: Path, tmp_path: Path) -> None:
    whole = build(files, tmp_path / "whole")
    build(files, tmp_path / "twice", stop_after=1)
    first = (tmp_path / "twice/shards/00000.parquet").stat().st_mtime_ns
    twice = build(files, tmp_path / "twice")
    assert (tmp_path / "twice/shards/00000.parquet").stat().st_mtime_ns == first
    assert twice.manifest.state == "complete"
    for index in range(3):
        name = f"shards/{index:05d}.parquet"
        assert whole.store.read(name) == twice.store.read(name)
    with pytest.raises(ValueError, match=r"weights2weights: '.*' there, '.*' now"):
        build(files, tmp_path / "twice", weights=f"{files}/half.pt")


def test_coefficients_of_their_pca_become_the_rows_that_their_code_makes_of_them(files: Path, tmp_path: Path) -> None:
    reader = build(files, tmp_path / "corpus", weights=f"{files}/proj.pt", pca=str(files))
    proj, V, std, mean = (torch.load(files / f"{name}.pt").float() for name in ("proj", "V", "std", "mean"))
    theirs = proj @ V[:, :3].T * std + mean
    assert np.allclose(reader.vectors(), theirs.numpy(), atol=2e-3, rtol=1e-3)


def test_an_export_is_their_file_again(files: Path, tmp_path: Path) -> None:
    build(files, tmp_path / "corpus", identities=f"{files}/names.csv")
    assert main("export", [str(tmp_path / "corpus"), f"output={tmp_path}/back", "dtype=float16"]) == 0
    back, theirs = torch.load(tmp_path / "back/all_weights.pt"), torch.load(files / "all_weights.pt")
    assert torch.equal(back, theirs[[6, 5, 4, 2, 1, 0]].half())
    mean, std = (torch.load(tmp_path / f"back/{name}.pt") for name in ("mean", "std"))
    assert torch.allclose(mean, back.float().mean(0), atol=1e-6)
    assert torch.allclose(std, back.float().std(0, correction=0), atol=1e-6)
    again = build(tmp_path / "back", tmp_path / "again", embeddings=f"{tmp_path}/back/embeddings.npy")
    assert np.array_equal(again.vectors(), back.numpy())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "all_weights.pt", "embeddings.npy", "identity_df.csv", "mean.pt", "std.pt",
    ]  # fmt: skip


def test_names_are_read_as_they_are_written(tmp_path: Path) -> None:
    """0012 was read as the number 12: of other photos, or of nobody."""
    names = ["0012", "12", "1e5", "", "a,b", 'c "d"']
    for place, table in (
        ("export.csv", pa.table({"identity": names})),
        ("two.csv", pa.table({"n": names, "identity": names})),
    ):
        pa.csv.write_csv(table, tmp_path / place)
        assert read_names(str(tmp_path / place)) == names
    (tmp_path / "bad.csv").write_text("n,identity\n1,ada\n2\n")
    with pytest.raises(ValueError, match="row 3 has no column 2"):
        read_names(str(tmp_path / "bad.csv"))


def test_an_export_holds_those_alone_whose_consent_the_corpus_has(files: Path, tmp_path: Path, capsys: Any) -> None:
    build(files, tmp_path / "corpus", identities=f"{files}/names.csv")
    assert main("export", [str(tmp_path / "corpus"), f"output={tmp_path}/back", "require_consent=true"]) == 1
    assert "has consent in the corpus: there is nothing to write" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_damaged_shard_is_made_anew_without_who_was_forgotten_or_is_in_no_row_any_more(
    files: Path, tmp_path: Path
) -> None:
    build(files, tmp_path, identities=f"{files}/names.csv")
    before = dict(zip(CorpusReader(tmp_path).identities, CorpusReader(tmp_path).vectors(), strict=True))
    forget(open_store(tmp_path), "celeba/4")
    for shard in sorted((tmp_path / "shards").iterdir()):
        shard.write_bytes(shard.read_bytes()[:-40])
        assert [finding.name for finding in examine(str(tmp_path))] == [f"shards/{shard.name}"]
        repair(str(tmp_path), examine(str(tmp_path)))
        build(files, tmp_path, identities=f"{files}/names.csv")
        assert not [*examine(str(tmp_path))]
    after = dict(zip(CorpusReader(tmp_path).identities, CorpusReader(tmp_path).vectors(), strict=True))
    assert after.keys() == before.keys() - {"celeba/4"}
    assert all((before[name] == vector).all() for name, vector in after.items())

    (tmp_path / "shards/00000.parquet").unlink()
    with pytest.raises(
        ValueError, match="limit leaves out 1 people whom an earlier run planned"
    ):  # the last name is celeba/3
        build(files, tmp_path, identities=f"{files}/names.csv", limit=6)
    renamed = tmp_path / "renamed.csv"
    renamed.write_text((files / "names.csv").read_text().replace("celeba/3", "celeba/new"))
    fewer = build(files, tmp_path, identities=str(renamed))
    reasons = {failure.identity: failure.reason for failure in fewer.failures()}
    assert reasons["celeba/3"] == "photos_gone"
    assert "forgotten" in reasons.values()


def test_half_precision_is_read_as_it_is(files: Path) -> None:
    assert np.array_equal(read_rows(f"{files}/half.pt", [4, 2]), torch.load(files / "half.pt")[[4, 2]].float().numpy())


class Evil:
    def __reduce__(self) -> tuple[Any, Sequence[Any]]:
        return (Path.touch, (Path("opened"),))


def test_nothing_is_unpickled(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "torch.pt")
    np.save(tmp_path / "objects.npy", np.array([Evil()], object))
    for name in ("plain.pt", "torch.pt", "objects.npy"):
        with pytest.raises(ValueError, match="A pickle is not opened"):
            read_rows(f"{tmp_path}/{name}")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["{files}/faces.npy", "embeddings={files}/faces.npy"],
            "has rows of 512 numbers; a LoRA of weights2weights has 99,648",
        ),
        (["{files}/all_weights.pt"], "give embeddings=FILE"),
        (["{files}/all_weights.pt", "embeddings={files}/mean.pt"], "expected (7, 512)"),
        (["{files}/proj.pt", "pca={files}", "embeddings={files}/proj.pt"], "expected (7, 512)"),
        (["{files}/gone.pt", "embeddings={files}/faces.npy"], "gone.pt cannot be read: No such file"),
        (["s3://bucket/all_weights.pt", "embeddings={files}/faces.npy"], "must lie on this machine"),
        (
            ["{files}/all_weights.pt", "embeddings={files}/faces.npy", "identities={files}/V.pt"],
            "their identity_df.pt is a pickle",
        ),
        (["a.pt", "b.pt"], "'b.pt' is neither a setting"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    files: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(files=files) for word in words]
    assert main("import-weights2weights", [*given, f"output={tmp_path}/corpus", "--dry-run"]) == 1
    assert said.lower() in capsys.readouterr().err.lower()
    assert not (tmp_path / "corpus").exists()


def test_photos_of_the_same_names_give_the_embeddings(files: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"person-0200{i:02d}\n" for i in range(2, 2 + M)))
    words = {
        "embeddings": None,
        "photos": str(world / "people"),
        "identities": f"{tmp_path}/names.txt",
        "embedder": {"model": "tiny"},
    }
    config = from_dict(ImportConfig, {"weights": f"{files}/all_weights.pt", "output": f"{tmp_path}/c", **words})
    source = Source(config)
    assert source.people()["person-020008"].problem == ("no_photos", f"nobody of this name at {world / 'people'}")
    begun = planning.begin(config.corpus, source.manifest(), source.people())
    from lora_diffusion.factory.attempts import InMemoryAttempts
    from lora_diffusion.factory.embed import PersonEmbedder
    from lora_diffusion.factory.isolate import embed_people

    ((shard, people),) = begun.work()
    placed = list(zip(shard.positions, people, strict=True))
    ShardImporter(config)(shard, embed_people(PersonEmbedder(config.corpus, 64), placed, InMemoryAttempts(), 3))
    reader = CorpusReader(tmp_path / "c")
    assert reader.manifest.recogniser["fingerprint"]
    assert [(failure.identity, failure.reason) for failure in reader.failures()] == [
        ("person-020005", "not_finite"),
        ("person-020008", "no_photos"),
    ]
    assert reader.table()["num_photos"].to_pylist() == [2] * 5
    with pytest.raises(ValueError, match="identities=FILE names the rows"):
        Source(from_dict(ImportConfig, {**config.__dict__, "identities": None, "embedder": {"model": "tiny"}})).people()
