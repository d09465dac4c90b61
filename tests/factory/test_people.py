"""Laws of the sources of people: folders, Parquet and tars give the same people; a bad row costs only itself."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_diffusion.factory.people import RawPhoto, open_people
from lora_diffusion.storage import StoreError, open_store

NAMES = ["ana", "Zoë 😀", "bo.b"]


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTOS = {(name, f"{i}.jpg"): jpeg(40 * n + 10 * i) for n, name in enumerate(NAMES) for i in range(3)}
CAPTIONS = {key: f"a photo of sks person, {key[0]} {key[1]}" for key in PHOTOS}


def make_folder(root: str) -> str:
    store = open_store(root)
    for (name, file), data in PHOTOS.items():
        store.write(f"{name}/{file}", data)
    table = pa.table({"file": ["/".join(key) for key in CAPTIONS], "caption": list(CAPTIONS.values())})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.write("faces.parquet", sink.getvalue())
    return root


def make_parquet(root: str, whole: bool = False, hugging_face: bool = False) -> str:
    """Two files, small row groups; `whole`: one row is one person, otherwise one photo."""
    wrap = (lambda data: {"bytes": data, "path": None}) if hugging_face else (lambda data: data)
    if whole:
        rows = [
            {
                "identity": name,
                "image": [wrap(data) for (n, _), data in PHOTOS.items() if n == name],
                "caption": [caption for (n, _), caption in CAPTIONS.items() if n == name],
            }
            for name in NAMES
        ]
    else:
        rows = [{"identity": key[0], "image": wrap(data), "caption": CAPTIONS[key]} for key, data in PHOTOS.items()]
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part), sink, row_group_size=2)
        open_store(root).write(f"part-{number}.parquet", sink.getvalue())
    return root


def make_tar(root: str) -> str:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for key, data in PHOTOS.items():
            for name, content in (("/".join(key), data), ("/".join(key)[:-4] + ".txt", CAPTIONS[key].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    open_store(root).write("000.tar", sink.getvalue())
    return root


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
@pytest.mark.parametrize(
    "make",
    [
        make_folder,
        make_parquet,
        lambda root: make_parquet(root, whole=True),
        lambda root: make_parquet(root, hugging_face=True),
        make_tar,
    ],
    ids=["folder", "parquet", "parquet of people", "hugging face", "tar"],
)
def test_every_source_gives_the_same_people(request, tmp_path: Path, make, place: str) -> None:  # type: ignore[no-untyped-def]
    root = str(tmp_path) if place == "local" else f"s3://{request.getfixturevalue('bucket')}/people"
    source = open_people(make(root))
    people = sorted(source.list_people(), key=lambda person: person.identity)
    assert [person.identity for person in people] == sorted(NAMES)
    for person in people:
        photos = source.photos(person, limit=10)
        keys = [key for key in PHOTOS if key[0] == person.identity]
        assert [photo.data for photo in photos] == [PHOTOS[key] for key in keys]
        assert [photo.caption for photo in photos] == [CAPTIONS[key] for key in keys]
        assert source.photos(person, limit=2) == photos[:2]


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    make_tar(str(tmp_path))
    assert len(open_people(f"{tmp_path}/000.tar").list_people()) == 3
    make_parquet(str(tmp_path / "p"))
    assert len(open_people(f"{tmp_path}/p/part-0.parquet").list_people()) == 2


def test_nothing_to_read_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no people found at .* a folder for each person"):
        open_people(str(tmp_path))
    for missing in ("missing", "missing.tar", "missing.parquet"):
        with pytest.raises(ValueError, match=r"missing\S* does not exist .* a folder for each person .*synthetic:40"):
            open_people(str(tmp_path / missing))
    pq.write_table(pa.table({"name": ["a"], "image": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet lacks the column identity; it has name, image"):
        open_people(str(tmp_path)).list_people()
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_people(str(tmp_path)).list_people()
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"b.tar is no whole tar file"):
        open_people(str(tmp_path / "b.tar")).list_people()


def test_namesakes_and_rows_without_a_name_are_named_and_cost_nobody_else(tmp_path: Path) -> None:
    rows = [{"identity": name, "image": [jpeg(1)]} for name in ("a", "../x", "a", None, "", "b/c")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    people = {person.identity: person for person in open_people(str(tmp_path)).list_people()}
    assert people["a"].problem is not None
    assert people["a"].problem[0] == "duplicate_identity"
    assert people["../x"].problem is None
    assert people["b/c"].problem is None
    assert sorted(p.problem[0] for p in people.values() if p.problem) == ["duplicate_identity", *["no_identity"] * 2]


def test_what_lies_beside_the_photos_is_no_photo(tmp_path: Path) -> None:
    make_folder(str(tmp_path))
    for name in ("ana/.DS_Store", "ana/notes.txt", "ana/._0.jpg", ".git/x.jpg", "readme.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "nobody").mkdir()
    source = open_people(str(tmp_path))
    people = {person.identity: person for person in source.list_people()}
    assert set(people) == {*NAMES, "nobody"}
    assert [photo.name for photo in source.photos(people["ana"], 9)] == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.photos(people["nobody"], 9) == []
    assert people["nobody"].problem == ("no_photos", f"{tmp_path}/nobody is empty")


def test_a_photo_that_cannot_be_read_is_a_photo_without_data(tmp_path: Path) -> None:
    make_folder(str(tmp_path))
    os.symlink(tmp_path / "gone.jpg", tmp_path / "ana/9.jpg")
    person = next(p for p in open_people(str(tmp_path)).list_people() if p.identity == "ana")
    photos = open_people(str(tmp_path)).photos(person, 9)
    assert [photo.data is None for photo in photos] == [False, False, False, True]
    assert "9.jpg" in photos[3].error
    pq.write_table(pa.table({"identity": ["a"], "image": pa.array([None], pa.binary())}), tmp_path / "x.parquet")
    source = open_people(f"{tmp_path}/x.parquet")
    assert source.photos(source.list_people()[0], 9) == [
        RawPhoto("x.parquet:0:0", None, None, "the row holds no image bytes")
    ]


@pytest.mark.timeout(20)
def test_a_pipe_among_the_photos_is_waited_for_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "people" / "ada").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "people" / "ada" / "0.png")
    for name in ("faces.parquet", "faces.tar", "ada/1.png"):
        os.mkfifo(tmp_path / "people" / name)
    source = open_people(str(tmp_path / "people"))
    (ada,) = source.list_people()
    good, pipe = source.photos(ada, 9)
    assert (good.name, good.data is None, pipe.name, pipe.data) == ("0.png", False, "1.png", None)
    assert "pipe" in str(pipe.error)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_file_that_comes_later_gives_nobody_anothers_photos(tmp_path: Path, kind: str) -> None:
    """Workers list anew: a file's place in the list is another one then."""

    def write(file: str, name: str, number: int) -> None:
        if kind == "tar":
            write_tar(tmp_path / f"{file}.tar", {f"{name}/0.jpg": jpeg(number)})
        else:
            table = pa.table({"identity": [name], "image": [jpeg(number)]})
            pq.write_table(table, tmp_path / f"{file}.parquet")

    write("b", "ben", 1)
    write("c", "cid", 2)
    listed = open_people(str(tmp_path)).list_people()
    write("a", "ada", 3)
    worker = open_people(str(tmp_path))
    for person, number in zip(sorted(listed, key=lambda person: person.identity), (1, 2), strict=True):
        assert [photo.data for photo in worker.photos(person, 5)] == [jpeg(number)]
    write("b", "dan", 4)
    ben, cid = sorted(listed, key=lambda person: person.identity)
    worker = open_people(str(tmp_path))
    for ask in (worker.consent, lambda person: worker.photos(person, 5)):
        with pytest.raises(StoreError, match="was changed since its people were listed: give the same command again"):
            ask(ben)
    assert [photo.data for photo in worker.photos(cid, 5)] == [jpeg(2)]


def test_consent_that_was_rewritten_is_nobodys(tmp_path: Path) -> None:
    """In a tar of its own it had no stamp: the place of one person's was read as another's."""
    write_tar(tmp_path / "a.tar", {"ada/0.jpg": jpeg(1), "bob/0.jpg": jpeg(2)})
    write_tar(tmp_path / "b.tar", {"ada/consent.txt": b"yes", "bob/consent.txt": b"no!"})
    source = open_people(str(tmp_path))
    ada, bob = sorted(source.list_people(), key=lambda person: person.identity)
    assert (source.consent(ada), source.consent(bob)) == ("yes", "no!")
    write_tar(tmp_path / "b.tar", {"bob/consent.txt": b"no!", "ada/consent.txt": b"yes", "more": b"1"})
    with pytest.raises(StoreError, match=r"b.tar was changed since"):
        open_people(str(tmp_path)).consent(bob)


def test_a_tar_that_is_replaced_while_it_is_listed_is_not_believed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"ada/0.jpg": jpeg(1)})
    source = open_people(str(tmp_path))
    read = source._members

    def replaced(name: str) -> Any:
        yield from list(read(name))
        write_tar(tmp_path / "a.tar", {"bob/0.jpg": jpeg(2), "more": b"1"})

    source._members = replaced
    with pytest.raises(StoreError, match=r"a.tar was changed since"):
        source.list_people()


def test_members_of_one_name_in_two_tars_keep_their_own_words(tmp_path: Path) -> None:
    for tar, number, consent, words in (("x", 1, "no", "on a beach"), ("y", 2, "yes", "in a forest")):
        members = {"jpg": jpeg(number), "json": f'{{"consent": "{consent}"}}'.encode(), "txt": words.encode()}
        write_tar(tmp_path / f"{tar}.tar", {f"ada.0.{suffix}": data for suffix, data in members.items()})
    source = open_people(str(tmp_path))
    (ada,) = source.list_people()
    assert [(p.data, p.caption) for p in source.photos(ada, 5)] == [(jpeg(1), "on a beach"), (jpeg(2), "in a forest")]
    assert source.consent(ada) is None


def test_a_photo_in_a_tar_that_nothing_speaks_of_is_no_consent(tmp_path: Path) -> None:
    members = {f"ada.{i}.jpg": jpeg(i) for i in range(3)} | {"ada.0.json": b'{"consent": "form 7"}'}
    for count in (1, 3):
        write_tar(tmp_path / "x.tar", {name: data for name, data in members.items() if int(name[4]) < count})
        source = open_people(str(tmp_path))
        assert source.consent(source.list_people()[0]) == ("form 7" if count == 1 else None)


@pytest.mark.parametrize(
    "table", [{"file_name": ["ada/0.jpg"], "text": ["x"]}, {"file": ["ada/0.jpg"], "caption": [["x"]]}]
)
def test_captions_that_cannot_be_read_are_nobodys_fault(tmp_path: Path, table: dict[str, list[Any]]) -> None:
    """They made everybody a failure that no later run would make good."""
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "0.jpg").write_bytes(jpeg(1))
    source = open_people(str(tmp_path))
    (ada,) = source.list_people()
    pq.write_table(pa.table(table), tmp_path / "faces.parquet")
    with pytest.raises(ValueError, match=r"faces.parquet must be Parquet with columns file and caption, both text"):
        open_people(str(tmp_path)).list_people()
    with pytest.raises(StoreError, match="Mend it, and give the same command again"):
        open_people(str(tmp_path)).photos(ada, 5)


def test_consent_is_carried_from_every_kind_of_source(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, text in {"ada": "form 17, 2026-11-28\n", "ben": "", "cleo": None, "dora": "no"}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "1.jpg").write_bytes(jpeg(1))
        if text is not None:
            (folder / name / "consent.txt").write_text(text)
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(folder, arcname=".")
    names = ["ada", "ada", "ben", "cleo", "cleo", "dora"]
    table = pa.table({"identity": names, "image": [jpeg(i) for i in range(6)]})
    given = ["form 17, 2026-11-28"] * 2 + [None, "form 18", None, ""]
    pq.write_table(table.append_column("consent", pa.array(given)), tmp_path / "rows.parquet")
    flat = tmp_path / "flat.tar"
    with tarfile.open(flat, "w") as tar:
        for key, text in {
            "ada.0": '{"consent": "form 17, 2026-11-28"}',
            "ben.0": '{"consent": false}',
            "cleo.0": "{",
        }.items():
            for suffix, data in ((".jpg", jpeg(3)), (".json", text.encode())):
                member = tarfile.TarInfo(key + suffix)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for uri in (folder, whole, tmp_path / "rows.parquet", flat):
        source = open_people(str(uri))
        people = source.list_people()
        found = {person.identity: source.consent(person) for person in people}
        assert found == {"ada": "form 17, 2026-11-28", **{name: None for name in found if name != "ada"}}, uri
        assert not source.found.skipped.get("text file")
    pq.write_table(table.append_column("consent", pa.array([True] * 2 + [False] * 4)), tmp_path / "rows.parquet")
    source = open_people(str(tmp_path / "rows.parquet"))
    assert [source.consent(person) for person in source.list_people()] == ["yes", None, None, None]
