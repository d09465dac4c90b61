"""A person leaves: nothing of them stays, nobody else changes, killed anywhere it ends, and no later run makes them again."""

from __future__ import annotations

import hashlib
import hmac
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from small_corpus import MANIFEST, NAMES, RECIPE, build, make

from lora_diffusion import cli
from lora_diffusion.corpus import CorpusReader, ShardWriter, Statistics, finish_corpus, matrix
from lora_diffusion.corpus.forget import forget
from lora_diffusion.corpus.hub import HubDataset
from lora_diffusion.corpus.tombstone import is_tombstone, keyed_hash, make_key, tombstone
from lora_diffusion.factory import planning
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.jobs.claim import claimed
from lora_diffusion.storage import Store, open_store
from lora_diffusion.synthesis.folder import Neighbours
from lora_diffusion.synthesis.forget import forget_neighbour
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.snapshot import take_snapshot
from lora_diffusion.verify import examine, repair


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "corpus")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/corpus")


def corpus_with_pictures(store: Store) -> CorpusReader:
    """As the job leaves it, of `small_corpus`."""
    make_key(store)
    reader = build(store, NAMES)
    for name in ("summary.txt", "contact_sheet.png"):
        store.write(name, b"dee is on it")
    return reader


def rows(store: Store) -> dict[str, bytes]:
    """identity -> all of the vector's bits."""
    reader = CorpusReader(store)
    return {name: row.tobytes() for name, row in zip(reader.identities, reader.vectors(), strict=True)}


def all_text(store: Store) -> str:
    """Everything in the folder that is or holds text."""
    names = [f"{folder}/{name}" for folder in ("plan", "shards", "failures") for name in store.files(folder)]
    tables = [pq.read_table(store.open(name)) for name in names]
    return "".join(
        f"{table.schema.metadata}{table.drop_columns(['vector'] if 'vector' in table.column_names else []).to_pylist()}"
        for table in tables
    ) + "".join(store.read(name).decode(errors="replace") for name in store.files())


@pytest.mark.parametrize("name", ["dee", "cy", "bo"])  # a row, a failure, a row and a failed photo
def test_nothing_of_a_person_stays_and_nobody_else_changes_by_a_bit(store: Store, name: str) -> None:
    before = corpus_with_pictures(store)
    vectors, embedding = rows(store), dict(zip(before.identities, before.embeddings(), strict=True)).get(name)
    failures = [one for one in before.failures() if one.identity != name]
    assert repr(name) in all_text(store)

    assert forget(store, name)
    reader = CorpusReader(store)
    assert rows(store) == {other: bits for other, bits in vectors.items() if other != name}
    assert repr(name) not in all_text(store)
    assert not any(store.exists(left) for left in ("summary.txt", "contact_sheet.png"))
    assert embedding is None or not np.isin(embedding, reader.embeddings()).all()
    kept, stones = (
        [one for one in reader.failures() if one.reason != "forgotten"],
        [one for one in reader.failures() if one.reason == "forgotten"],
    )
    assert kept == failures
    assert [(one.position, is_tombstone(one.identity), one.photo) for one in stones] == [
        (sorted(NAMES).index(name), True, None)
    ]
    assert reader.verify()[1] == {}
    assert (reader.manifest.state, reader.manifest.counts["num_people"]) == ("complete", len(reader.identities))
    parts = [Statistics.of(matrix(table["vector"])) for table in reader.tables(["vector"])]
    expected = Statistics.merged(parts, reader.layout.size)
    assert reader.statistics().to_bytes() == expected.to_bytes()
    assert forget(store, name), "once more is no error"


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


class DyingStore(Store):
    """A store whose process dies at its n-th change, before it (`whole` false) or right after it."""

    def __init__(self, folder: Path, changes: int, whole: bool) -> None:
        store = open_store(folder)
        super().__init__(store.uri, store.filesystem, store.root, store.local)
        self._left, self._whole = changes, whole

    def write(self, name: str, data: bytes) -> None:
        self._change(lambda: Store.write(self, name, data))

    def delete(self, name: str) -> None:
        self._change(lambda: Store.delete(self, name))

    def _change(self, change) -> None:  # type: ignore[no-untyped-def]
        self._left -= 1
        if self._left >= 0 or self._whole:
            change()
        if self._left < 0:
            raise Killed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_job(folder: Path) -> int:
    """What the corpus job does to a folder, without fine-tuning; returns how many shards it had to make."""
    config = CorpusConfig("nowhere", str(folder), **RECIPE["groups"])
    people = planning.Listed({name: PersonRef(name) for name in sorted(NAMES)})
    begun = planning.begin(config, MANIFEST, people)
    for shard, refs in begun.work():
        made, failures = make(shard)
        assert [ref.identity for ref in refs] == list(shard.identities)
        ShardWriter(begun.store, MANIFEST).commit(shard, made, failures)
    finish_corpus(begun.store, begun.manifest, CorpusReader(begun.store).verify()[0])
    return len(begun.work())


def test_killed_between_any_two_changes_the_same_command_ends_it_and_so_does_the_job(tmp_path: Path) -> None:
    corpus_with_pictures(open_store(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "calm")
    assert forget(open_store(tmp_path / "calm"), "bo")
    calm, deaths = contents(tmp_path / "calm"), 0
    stone = tombstone(make_key(open_store(tmp_path / "calm")), "bo")
    for changes in range(14):
        for whole in (False, True):
            folder, other = tmp_path / f"{changes}{whole}", tmp_path / f"{changes}{whole}job"
            shutil.copytree(tmp_path / "whole", folder)
            try:
                forget(DyingStore(folder, changes, whole), "bo")
            except Killed:
                deaths += 1
            shutil.copytree(folder, other)
            begun = stone in CorpusReader(other).plan.identities
            assert run_job(other) == 0
            if begun:
                assert contents(other) == calm
            assert forget(open_store(folder), "bo")
            assert contents(folder) == calm
    assert deaths >= 20, "forgetting takes more changes than were tried to die at"


def test_nobody_trains_on_or_exports_a_person_whom_a_killed_forget_has_left(tmp_path: Path) -> None:
    corpus_with_pictures(open_store(tmp_path))
    with pytest.raises(Killed):
        forget(DyingStore(tmp_path, 5, False), "bo")
    reader = CorpusReader(tmp_path)
    assert "bo" in reader.identities
    assert "bo" not in reader.plan.identities, "it died too early to show anything"
    with pytest.raises(ValueError, match="a person of it was forgotten: give the command lora-diffusion forget again"):
        take_snapshot(str(tmp_path))
    assert "bo" not in [name for table in HubDataset(reader).tables() for name in table["identity"].to_pylist()]
    assert forget(open_store(tmp_path), "bo")
    assert take_snapshot(str(tmp_path)).num_rows == len(CorpusReader(tmp_path))


def test_a_person_leaves_what_a_killed_writer_left_of_a_shard(tmp_path: Path) -> None:
    """Failures and statistics are written before the shard: they named a person who was forgotten, for ever."""
    store = open_store(tmp_path)
    corpus_with_pictures(store)
    shard = next(shard for shard in CorpusReader(store).plan.shards if "bo" in shard.identities)
    store.delete(f"shards/{shard.name}.parquet")
    assert "'bo'" in all_text(store)
    assert not forget(store, "bo")
    assert "'bo'" not in all_text(store)
    assert not store.exists(f"statistics/{shard.name}.safetensors")


def test_a_smaller_limit_gives_up_nobody_whom_an_earlier_run_planned(tmp_path: Path) -> None:
    """They became failures, and the corpus complete without them."""
    people, config = sorted(NAMES), CorpusConfig("nowhere", str(tmp_path), **RECIPE["groups"])
    listed = planning.Listed({name: PersonRef(name) for name in people})
    planning.begin(config, MANIFEST, listed)
    few = planning.Listed({name: PersonRef(name) for name in people[:2]})
    few.beyond = frozenset(people[2:])
    for start in (planning.begin, planning.preview):
        with pytest.raises(ValueError, match=f"limit leaves out {len(people) - 2} people whom an earlier run planned"):
            start(config, MANIFEST, few)
    assert run_job(tmp_path) > 0
    planning.begin(config, MANIFEST, few)  # all are there


def test_no_later_run_makes_them_again_and_without_the_key_none_begins(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    corpus_with_pictures(store)
    forget(store, "dee")
    before = contents(tmp_path)
    assert run_job(tmp_path) == 0
    assert contents(tmp_path) == before
    people = planning.Listed({name: PersonRef(name) for name in [*NAMES, "new"]})
    config = CorpusConfig("nowhere", str(tmp_path), **RECIPE["groups"])
    assert planning.preview(config, MANIFEST, people).plan.identities[len(NAMES) :] == ("new",)
    (tmp_path / "identity.key").unlink()
    with pytest.raises(
        ValueError, match=r"identity.key is gone: without it nobody can tell which 1 people were forgotten"
    ):
        build(store, [*NAMES, "new"])


def test_a_damaged_shard_of_a_forgotten_person_goes_and_is_made_without_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    corpus_with_pictures(store)
    vectors = rows(store)
    shard = tmp_path / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert not forget(store, "bo")
    assert not shard.exists()
    config = CorpusConfig("nowhere", str(tmp_path), **RECIPE["groups"])
    begun = planning.begin(config, MANIFEST, planning.Listed({name: PersonRef(name) for name in NAMES}))
    ((again, refs),) = begun.work()
    assert [ref.problem and ref.problem[0] for ref in refs].count("forgotten") == 1
    assert "bo" not in again.identities
    assert set(again.identities) < {*vectors, "cy", tombstone(make_key(store), "bo")}


def damages(whole: bytes) -> dict[str, bytes | None]:
    """What a disk, or a person with an editor, makes of a file; None: it is gone."""
    middle = len(whole) // 2
    flipped = {
        f"byte {at}": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 3, middle, len(whole) - 2)
    }
    return {"gone": None, "empty": b"", "cut": whole[:middle], "zeros": bytes(len(whole)), "list": b"[]", **flipped}


def test_no_damage_makes_anybody_come_back_or_ends_in_a_traceback(tmp_path: Path) -> None:
    store = open_store(tmp_path / "whole")
    corpus_with_pictures(store)
    forget(store, "bo")
    for name in contents(tmp_path / "whole"):
        for kind, data in damages((tmp_path / "whole" / name).read_bytes()).items():
            folder = tmp_path / f"{name.replace('/', '-')} {kind}"
            shutil.copytree(tmp_path / "whole", folder)
            (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
            with suppress(ValueError):
                repair(str(folder), [*examine(str(folder))])
            with suppress(ValueError):
                run_job(folder)
            with suppress(ValueError):
                forget(open_store(folder), "dee")
            assert "bo" not in named(folder), f"{name}: {kind}"


def named(folder: Path) -> set[str]:
    """Everybody whom a plan or a shard that can be read names."""
    found: set[str] = set()
    for path in [*folder.glob("plan/*.parquet"), *folder.glob("shards/*.parquet")]:
        with suppress(OSError, ValueError):
            found.update(pq.read_table(path)["identity"].to_pylist())
    return found


def test_a_lost_or_damaged_key_is_named_and_nothing_goes_on_without_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    corpus_with_pictures(store)
    key = tmp_path / "identity.key"
    whole = key.read_bytes()
    key.unlink()
    assert not [*examine(str(tmp_path))], "nobody was forgotten yet: the next run makes another"
    key.write_bytes(whole)
    forget(store, "dee")
    for damaged in (None, whole[:40], whole.replace(whole[5:6], b"f" if whole[5:6] != b"f" else b"0"), b"[]"):
        key.unlink() if damaged is None else key.write_bytes(damaged)
        (finding,) = examine(str(tmp_path))
        assert (finding.kind, finding.name, finding.remove) == (
            "missing" if damaged is None else "damaged",
            key.name,
            (),
        )
        for go_on in (lambda: run_job(tmp_path), lambda: forget(store, "ana"), lambda: build(store, [*NAMES, "new"])):
            with pytest.raises(ValueError, match=r"identity.key.*[Rr]estore it from a copy"):
                go_on()
        assert key.exists() == (damaged is not None), "no other key is made"
    key.write_bytes(whole)
    assert run_job(tmp_path) == 0
    key.write_bytes(whole[:65])  # as of an earlier release
    assert run_job(tmp_path) == 0
    assert not [*examine(str(tmp_path))]


@pytest.mark.parametrize("name", ["dee", "cy", "bo"])
def test_who_was_forgotten_and_came_back_with_a_backup_is_named_and_taken_out(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / "corpus")
    corpus_with_pictures(store)
    shutil.copytree(tmp_path / "corpus", tmp_path / "backup")
    forget(store, name)
    calm = contents(tmp_path / "corpus")
    for folder in ("shards", "failures", "statistics"):
        shutil.copytree(tmp_path / "backup" / folder, tmp_path / "corpus" / folder, dirs_exist_ok=True)
    findings = [*examine(store.uri)]
    back = {finding.name for finding in findings if finding.kind == "forgotten"}
    assert back == {"dee": {"shards/00001.parquet"}, "cy": {"failures/00001.parquet"}}.get(
        name, {"shards/00001.parquet", "failures/00001.parquet"}
    )
    assert all(repr(name) in finding.what for finding in findings if finding.kind == "forgotten")
    with claimed(store.uri, "corpus"), pytest.raises(ValueError, match="a job is at work"):
        repair(store.uri, findings)
    repair(store.uri, findings)
    assert contents(tmp_path / "corpus") == calm, "and nobody else was fine-tuned again"
    assert not [*examine(store.uri)]


def test_verify_names_what_a_killed_forget_left_and_repair_ends_it(tmp_path: Path) -> None:
    corpus_with_pictures(open_store(tmp_path / "whole"))
    for changes in range(12):
        folder = tmp_path / str(changes)
        shutil.copytree(tmp_path / "whole", folder)
        with suppress(Killed):
            forget(DyingStore(folder, changes, whole=True), "bo")
        stone = tombstone(make_key(open_store(folder)), "bo")
        begun = stone in CorpusReader(folder).plan.identities
        findings = [*examine(str(folder))]
        assert "bo" not in named(folder) or not begun or any(finding.kind == "forgotten" for finding in findings)
        repair(str(folder), findings)
        assert "bo" not in named(folder) or not begun
        assert run_job(folder) == 0, "nobody is fine-tuned again"
        assert not [*examine(str(folder))]


def test_the_command_says_what_it_did_and_who_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(tmp_path / "corpus")
    corpus_with_pictures(store)
    made = Synthesizer.from_pretrained("tiny")
    names = ["ana", "dee", "flo"]
    hashes = torch.tensor([list(keyed_hash(make_key(store), name)) for name in names], dtype=torch.uint8)
    made.neighbours = Neighbours(torch.eye(3, 512), torch.zeros(3, made.code_size), hashes)
    made.save_pretrained(tmp_path / "synthesizer", torch.float16)
    whole = safetensors.torch.load_file(tmp_path / "synthesizer" / "neighbours.safetensors")

    words = ["forget", "dee", "--corpus", str(tmp_path / "corpus"), "--synthesizer", str(tmp_path / "synthesizer")]
    with claimed(store.uri, "corpus"), pytest.raises(SystemExit, match="another"):
        cli.main(words)
    cli.main(words)
    assert "dee is gone" in (said := capsys.readouterr().out)
    assert "1 neighbour removed" in said
    left = safetensors.torch.load_file(tmp_path / "synthesizer" / "neighbours.safetensors")
    assert all(torch.equal(left[name], tensor[[0, 2]]) for name, tensor in whole.items())
    assert not [*examine(store.uri), *examine(str(tmp_path / "synthesizer"))]
    assert Synthesizer.from_pretrained(tmp_path / "synthesizer").nearest(np.eye(3, 512)[2:])[0].tolist() == [1]
    cli.main(words)
    assert "0 neighbours removed" in capsys.readouterr().out
    for name in ("ana", "flo"):
        assert forget_neighbour(str(tmp_path / "synthesizer"), store.uri, name) == 1
    assert Synthesizer.from_pretrained(tmp_path / "synthesizer").neighbours is None

    made.neighbours = Neighbours(torch.eye(3, 512), torch.zeros(3, made.code_size))
    made.save_pretrained(tmp_path / "old")
    with pytest.raises(
        SystemExit, match=r"the neighbours of .*old carry no hashes of names.*neighbours=false\), or train again"
    ):
        cli.main([*words[:-1], str(tmp_path / "old")])
    with pytest.raises(SystemExit, match=r"nobody at .* is called 'nobody'"):
        cli.main(["forget", "nobody", *words[2:]])


def test_what_a_killed_writer_left_half_written_goes_although_nothing_else_is_to_be_done(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    corpus_with_pictures(store)
    for _ in range(2):  # the second time nothing is written into these folders
        for folder in ("plan", "shards", "failures", "statistics"):
            (tmp_path / folder / ".x.0123456789ab.tmp").write_bytes(b"bo")
        assert forget(store, "bo")
        assert not [*tmp_path.rglob(".*.tmp")]


def test_a_tombstone_is_the_names_keyed_hash_and_stays_what_it_is() -> None:
    """Who was forgotten by an earlier release is known to every later one, and nobody else is taken for them."""
    key = bytes(range(32))
    assert tombstone(key, "Zoë 😀") == f"forgotten:{hmac.new(key, 'Zoë 😀'.encode(), hashlib.sha256).hexdigest()[:32]}"
    assert len({tombstone(key, name) for name in ("ana", "Ana", "ana ", "aná", "a\udcffna")}) == 5
