"""Nobody vanishes: what lies at `people` is a photo, a person, a row with a reason, or counted by kind before anything runs."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_corpus import MANIFEST

from lora_diffusion.factory import planning
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.people import Found, PersonRef, RawPhoto, open_people
from lora_diffusion.factory.planning import find
from lora_diffusion.storage import open_store


def picture(value: int, kind: str = "JPEG") -> bytes:
    """Of about 400 bytes, another size for another value: the same bytes are the same photo."""
    pixels = np.random.default_rng(value).integers(0, 256, (20, 20 + value % 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def lay(root: str | Path, files: dict[str, bytes]) -> str:
    """A folder or a bucket."""
    store = open_store(root)
    for name, data in files.items():
        store.write(name, data)
    return str(root)


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return sink.getvalue()


def parquet(rows: list[dict[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, object]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def look(uri: str | Path) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]], Found]:
    """People with the names of their photos that have data, those with a problem, and what was counted."""
    source = open_people(str(uri))
    people = source.list_people()
    assert len({person.identity for person in people}) == len(people)
    good = {p.identity: [f.name for f in source.photos(p, 99) if f.data] for p in people if not p.problem}
    return good, {p.identity: p.problem for p in people if p.problem}, source.found


MESSY = {
    "ada/1.jpg": picture(1),
    "ada/1.txt": b"\xef\xbb\xbfa photo of sks person, smiling\n",
    "ada/a copy.jpg": picture(1),
    "ada/2019/summer/2.heic.jpg": picture(2),
    "ada/no suffix": picture(3, "PNG"),
    "ada/4.dat": picture(4, "WEBP"),
    "ada/5.txt": picture(5),
    "ada/IMG_6.MOV": b"\0\0\0\x14ftypqt  ",
    "ada/7.jpg": b"",
    "ada/8.nef": b"II*\0 holds a small preview",
    "ada/1.jpg.json": b"{}",
    "ada/._1.jpg": b"\0\5\x16\7",
    "ada/.DS_Store": b"x",
    "ada/Thumbs.db": b"x",
    "ada/desktop.ini": b"x",
    "ada/notes.md": b"my photos",
    "ada/rest.zip": b"PK\3\4",
    "__MACOSX/ada/._1.jpg": b"\0\5\x16\7",
    ".cache/huggingface/x.jpg": picture(9),
    "bob/clip.mp4": b"x",
    "eve/1.jfif": picture(11),
    "eve/2.jp2": picture(12, "JPEG2000"),
    "eve/3.mpo": picture(13),
    "eve/4.ppm": picture(14, "PPM"),
    "eve/5.avif": picture(15, "AVIF"),
    "eve/6.JPE": picture(16),
}
MESSY_PHOTOS = {
    "ada": ["1.jpg", "2019/summer/2.heic.jpg", "4.dat", "5.txt", "no suffix"],
    "eve": ["1.jfif", "2.jp2", "3.mpo", "4.ppm", "5.avif", "6.JPE"],
}
MESSY_SKIPPED = (
    "2 people, 11 photos; skipped: 6 hidden files, 2 videos, 1 archive, 1 duplicate, 1 empty file, 1 raw photo, "
    "1 sidecar file, 1 text file"
)


@pytest.mark.parametrize("place", ["folder", "tar", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_messy_place_gives_the_same_people_and_counts_everywhere(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if place == "tar":
        root = lay(tmp_path, {"people.tar": tar_of(MESSY)})
    else:
        root = lay(tmp_path if place == "folder" else f"s3://{request.getfixturevalue('bucket')}", MESSY)
    good, problems, found = look(root)
    shortened = {who: [n.removeprefix(f"{who}/") for n in names] for who, names in good.items()}
    assert {who: sorted(names) for who, names in shortened.items()} == MESSY_PHOTOS
    assert list(problems) == ["bob"]
    assert problems["bob"][0] == "no_photos"
    assert "only 1 video" in problems["bob"][1]
    assert str(found) == MESSY_SKIPPED
    source = open_people(root)
    ada = next(person for person in source.list_people() if person.identity == "ada")
    photos = {photo.name.removeprefix("ada/"): photo for photo in source.photos(ada, 99)}
    assert photos["1.jpg"].caption == "a photo of sks person, smiling"
    assert (photos["a copy.jpg"].data, photos["a copy.jpg"].reason) == (None, "duplicate")
    assert photos["a copy.jpg"].error.endswith("1.jpg")
    assert photos["7.jpg"].data == b"", "a row of its own, not a silent gap"
    assert [photo.reason == "duplicate" for photo in source.photos(ada, 2)].count(False) == 2


def test_a_linked_folder_is_followed_once_and_loops_are_named(tmp_path: Path) -> None:
    root = tmp_path / "people"
    lay(tmp_path / "elsewhere", {"1.jpg": picture(1), "in/2.jpg": picture(2)})
    lay(root, {"bob/1.jpg": picture(3)})
    os.symlink(tmp_path / "elsewhere", root / "ada")
    os.symlink(tmp_path / "elsewhere", root / "twin")
    os.symlink("bob", root / "robert")
    os.symlink(tmp_path / "gone", root / "eve")
    os.symlink(root, root / "all")
    os.symlink("..", root / "bob/up")
    os.symlink(".", tmp_path / "elsewhere/self")
    os.symlink(tmp_path / "elsewhere/in", root / "bob/album")
    os.symlink(tmp_path / "elsewhere/1.jpg", root / "bob/2.jpg")
    good, problems, found = look(root)
    assert good == {"ada": ["1.jpg", "in/2.jpg"], "bob": ["1.jpg", "2.jpg", "album/2.jpg"]}
    reasons = {"all": "repeated_link", "twin": "repeated_link", "robert": "repeated_link", "eve": "broken_link"}
    assert {name: reason for name, (reason, _) in problems.items()} == reasons
    assert "leads back to a folder above it" in problems["all"][1]
    assert (found.people, found.photos) == (2, 5)
    assert any("bob/up leads back" in note for note in found.notes)
    assert any("ada/self leads back" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("p.tar.gz", gzip.compress),
        ("p.tgz", gzip.compress),
        ("p.tar.bz2", bz2.compress),
        ("p.tar.xz", lzma.compress),
        ("p.tar.zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
        ("gzip under a wrong name.tar", gzip.compress),
    ],
)
def test_a_compressed_tar_is_read(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    whole = pack(tar_of({"ada/1.jpg": picture(1), "ada/2.jpg": picture(2), "bob/1.jpg": picture(3)}))
    lay(tmp_path, {name: whole})
    for uri in (tmp_path, tmp_path / name):
        source = open_people(str(uri))
        people = {person.identity: person for person in source.list_people()}
        assert [photo.data for photo in source.photos(people["ada"], 9)] == [picture(1), picture(2)]
        assert str(source.found) == "2 people, 3 photos"
    lay(tmp_path, {name: whole[: len(whole) // 2]})
    with pytest.raises(ValueError, match=rf"{name} is cut short or damaged"):
        open_people(str(tmp_path)).list_people()


def test_links_within_a_tar_are_photos_too(tmp_path: Path) -> None:
    links = {"ada/2.jpg": "1.jpg", "bob/1.jpg": "../ada/1.jpg", "bob/2.jpg": "/etc/passwd", "eve": "nobody"}
    lay(tmp_path, {"p.tar": tar_of({"ada/1.jpg": picture(1), "bob/3.jpg": picture(3)}, links)})
    good, problems, found = look(tmp_path)
    assert good == {"ada": ["ada/1.jpg"], "bob": ["bob/1.jpg", "bob/3.jpg"]}
    assert {name: reason for name, (reason, _) in problems.items()} == {"eve": "broken_link"}
    assert found.skipped["broken link"] == 2
    assert found.skipped["duplicate"] == 1


W2W = {
    f"celeba_generated{i}/{i}{j}/{k}.png": picture(9 * i + 3 * j + k, "PNG")
    for i in (0, 1)
    for j in (0, 1)
    for k in (0, 1)
}


@pytest.mark.parametrize(
    ("files", "people"),
    [
        (W2W, ["00", "01", "10", "11"]),
        ({"train/ada/1.jpg": picture(1), "test/bob/1.jpg": picture(2)}, ["ada", "bob"]),
        ({"data/train/ada/1.jpg": picture(1), "data/train/bob/1.jpg": picture(2)}, ["ada", "bob"]),
        ({"lfw/ada/1.jpg": picture(1), "lfw/bob/1.jpg": picture(2), "lfw.tgz": b"x"}, ["ada", "bob"]),
        ({"identity=ada/1.jpg": picture(1), "identity=bo%20b/1.jpg": picture(2)}, ["ada", "bo b"]),
        ({"split=train/identity=ada/1.jpg": picture(1), ".cache/x/1.jpg": picture(2)}, ["ada"]),
        ({"ada/2019/1.jpg": picture(1), "ada/2020/1.jpg": picture(2), "bob/1.jpg": picture(3)}, ["ada", "bob"]),
        ({"train/1.jpg": picture(1), "test/1.jpg": picture(2)}, ["test", "train"]),
    ],
    ids=[
        "weights2weights",
        "splits",
        "data and splits",
        "one wrapper",
        "hive",
        "hive split",
        "albums",
        "names of people",
    ],
)
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_layouts_of_hubs_are_recognised(files: dict[str, bytes], people: list[str], place: str, tmp_path: Path) -> None:
    good, problems, found = look(lay(tmp_path, files if place == "folder" else {"p.tar": tar_of(files)}))
    assert sorted(good) == people
    assert not problems
    assert found.people == len(people)
    assert (
        sum(map(len, good.values()))
        == found.photos
        == sum(name[-3:] in ("jpg", "png") for name in files) - (".cache/x/1.jpg" in files)
    )


ROWS = [
    {"identity": "ada", "image": {"bytes": picture(1), "path": "1.jpg"}},
    {"identity": "bob", "image": {"bytes": picture(2), "path": None}},
]


@pytest.mark.parametrize(
    "files",
    [
        {"x.parquet": parquet(ROWS), ".cache/huggingface/download/x.parquet.metadata": b"x", "README.md": b"# x"},
        {
            "data/train-00000-of-00002.parquet": parquet(ROWS[:1]),
            "data/train-00001-of-00002.parquet": parquet(ROWS[1:]),
        },
        {f"identity={row['identity']}/0.parquet": parquet([{"image": row["image"]}]) for row in ROWS},
        {"data/0.parquet": parquet(ROWS), "assets/teaser.jpg": picture(3), "_temporary/0/0.parquet": b"half"},
        {
            "train/data-00000-of-00001.arrow": arrow(ROWS),
            "train/cache-12.arrow": arrow(ROWS),
            "train/state.json": b"{}",
        },
    ],
    ids=["cache beside", "data folder", "hive", "pictures beside", "save_to_disk"],
)
def test_parquet_of_hubs_is_recognised(files: dict[str, bytes], tmp_path: Path) -> None:
    good, problems, found = look(lay(tmp_path, files))
    assert sorted(good) == ["ada", "bob"]
    assert not problems
    assert (found.people, found.photos) == (2, 2)
    assert found.skipped.get("stray photo", 0) == ("assets/teaser.jpg" in files)


def test_folders_of_photos_and_parquet_of_people_in_one_place_are_refused(tmp_path: Path) -> None:
    lay(tmp_path, {"ada/1.jpg": picture(1), "more/x.parquet": parquet(ROWS), "ada/scores.parquet": parquet([{"x": 1}])})
    with pytest.raises(ValueError, match=r"both folders of photos and Parquet files of people \(more/x.parquet\)"):
        open_people(str(tmp_path)).list_people()
    (tmp_path / "more/x.parquet").unlink()
    good, _, found = look(tmp_path)
    assert list(good) == ["ada"]
    assert found.skipped == {"Parquet file": 1, "stray photo": 0, "empty folder": 1}


def test_a_row_that_cannot_be_used_says_why_and_hides_no_photo(tmp_path: Path) -> None:
    rows = [
        {"identity": b"ada", "image": [picture(1), None, picture(2), picture(1)], "caption": ["one"]},
        {"identity": b"caf\xe9", "image": [picture(3)], "caption": []},
        {"identity": None, "image": [picture(4)], "caption": []},
    ]
    lay(tmp_path, {"x.parquet": parquet(rows)})
    source = open_people(str(tmp_path))
    people = {person.identity: person for person in source.list_people()}
    assert {name: person.problem and person.problem[0] for name, person in people.items()} == {
        "ada": None,
        "caf\\xe9 (x.parquet, row group 0, row 1)": "name_not_utf8",
        "(no identity: x.parquet, row group 0, row 2)": "no_identity",
    }
    photos = source.photos(people["ada"], 9)
    assert [(photo.caption, photo.reason) for photo in photos if not photo.data] == [
        (None, "unreadable"),
        (None, "duplicate"),
    ]
    assert [photo.caption for photo in photos if photo.data] == ["one", None]
    path = {"identity": "bob", "image": {"bytes": None, "path": "images/1.jpg"}}
    lay(tmp_path / "other", {"x.parquet": parquet([path])})
    bob = open_people(str(tmp_path / "other"))
    assert bob.photos(bob.list_people()[0], 9)[0].error == "the row holds no image bytes, only the path 'images/1.jpg'"


def test_a_name_that_is_not_utf8_costs_that_person_alone(tmp_path: Path) -> None:
    lay(tmp_path, {"ada/1.jpg": picture(1)})
    for name in (b"caf\xe9/1.jpg", b"ada/caf\xe9.jpg"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(picture(2))
    good, problems, found = look(tmp_path)
    assert good == {"ada": ["1.jpg", "caf\\xe9.jpg"]}
    assert list(problems) == ["caf\\xe9"]
    assert problems["caf\\xe9"] == ("name_not_utf8", f"the folder's name is not UTF-8: {tmp_path}/caf\\xe9. Rename it")
    assert found.people == 1


@pytest.mark.timeout(30)
def test_pipes_sockets_devices_and_huge_files_are_named_and_never_read(tmp_path: Path) -> None:
    lay(tmp_path, {"ada/1.jpg": picture(1)})
    os.mkfifo(tmp_path / "ada/2.jpg")
    os.mkfifo(tmp_path / "ada/pipe")
    os.mknod(tmp_path / "ada/socket", stat.S_IFSOCK | 0o600)
    os.symlink("/dev/zero", tmp_path / "ada/3.jpg")
    os.mkfifo(tmp_path / "bob")
    with (tmp_path / "ada/4.jpg").open("wb") as file:
        file.truncate(10**12)
    source = open_people(str(tmp_path))
    people = source.list_people()
    assert [person.identity for person in people] == ["ada"]
    assert source.found.skipped["special file"] == 5
    assert f"{tmp_path}/bob is a pipe" in source.found.notes
    photos = {photo.name: photo for photo in source.photos(people[0], 9)}
    assert photos["2.jpg"].error == f"{tmp_path}/ada/2.jpg is a pipe"
    assert photos["3.jpg"].error == f"{tmp_path}/ada/3.jpg is a device"
    assert photos["4.jpg"].reason == "too_large"
    for name in ("bob", "x.tar", "x.parquet"):
        if name != "bob":
            os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is a pipe"):
            open_people(str(tmp_path / name))


@pytest.mark.parametrize("where", ["nothing", "in a header", "in a photo", "in the last photo"])
def test_a_cut_tar_is_named_before_anything_runs(where: str, tmp_path: Path) -> None:
    whole = tar_of({"ada/1.jpg": picture(1) * 9, "bob/1.jpg": picture(2)})
    last = whole.index(b"bob/1.jpg") + 600
    keep = {"nothing": 0, "in a header": 100, "in a photo": 700, "in the last photo": last}[where]
    lay(tmp_path, {"p.tar": whole[:keep]})
    with pytest.raises(ValueError, match=r"p\.tar is no whole tar file"):
        open_people(str(tmp_path)).list_people()


def test_people_of_one_name_from_two_places_are_refused_by_name(tmp_path: Path) -> None:
    lay(tmp_path, {"train/ada/1.jpg": picture(1), "test/ada/1.jpg": picture(2), "test/bob/1.jpg": picture(3)})
    good, problems, found = look(tmp_path)
    assert list(good) == ["bob"]
    assert problems["ada"][0] == "duplicate_identity"
    assert "train/ada" in problems["ada"][1]
    assert "test/ada" in problems["ada"][1]
    assert found.people == 1
    both = {f"{i}.tar": tar_of({f"ada/{i}.jpg": picture(i)}) for i in (0, 1)}
    good, problems, found = look(lay(tmp_path / "tars", both))
    assert good == {"ada": ["ada/0.jpg", "ada/1.jpg"]}
    assert found.notes == ("people in more than one tar, whose photos are taken together: 1",)


def test_a_place_without_people_says_what_lies_there(tmp_path: Path) -> None:
    lay(tmp_path, {"1.jpg": picture(1), "2.jpg": picture(2), "all.zip": b"PK"})
    with pytest.raises(ValueError, match="there lie 2 stray photos, 1 archive; expected a folder for each"):
        open_people(str(tmp_path))
    with pytest.raises(ValueError, match=r"1\.jpg is one file: people must name a folder for each person"):
        open_people(str(tmp_path / "1.jpg"))


def test_what_was_found_is_one_line_and_the_first_notes() -> None:
    found = Found(
        1204,
        9816,
        {"video": 31, "empty folder": 4, "duplicate": 1, "archive": 0},
        tuple(f"place {i}" for i in range(12)),
    )
    first, *rest = str(found).splitlines()
    assert first == "1,204 people, 9,816 photos; skipped: 31 videos, 4 empty folders, 1 duplicate"
    assert rest == [*(f"place {i}" for i in range(10)), "and 2 more such places"]
    assert str(Found(1, 1)) == "1 person, 1 photo"


def test_the_plan_says_what_was_found_and_nobody_at_all_is_refused(tmp_path: Path) -> None:
    lay(tmp_path / "people", {"ada/1.jpg": picture(1), "ada/1.mov": b"x", "bob/x.mov": b"x"})
    config = CorpusConfig(people=str(tmp_path / "people"), output=str(tmp_path / "corpus"))
    listed = planning.list_people(config)
    text = planning.preview(config, MANIFEST, listed).describe(workers=1)
    assert text.splitlines()[0] == f"{tmp_path}/people: 1 person, 1 photo; skipped: 2 videos"
    assert "2 people of" in text, "bob is planned, as a row that says why"
    assert find(listed, "bob").problem == ("no_photos", f"{tmp_path}/people/bob holds no photo, only 1 video")
    (tmp_path / "people/ada/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"no people found at \S+: there lie 2 videos"):
        planning.list_people(config)
    pq.write_table(pa.table({"identity": [None], "image": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"nobody in \S+ has a photo that can be used: 0 people, 1 photo; skipped: 1 unnamed row"
    ):
        planning.list_people(dataclasses.replace(config, people=f"{tmp_path}/x.parquet"))


def test_photos_are_read_as_far_as_needed(tmp_path: Path) -> None:
    lay(tmp_path, {f"ada/{i}.jpg": picture(i) for i in range(4)})
    source = open_people(str(tmp_path))
    (ada,) = source.list_people()
    assert ada == PersonRef("ada")
    assert source.photos(ada, 2) == [RawPhoto("0.jpg", picture(0)), RawPhoto("1.jpg", picture(1))]
