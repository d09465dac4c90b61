"""Which files are photos, captions or something else, and which folders are people: one rule for folders, buckets, tars."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import unquote

from lora_diffusion.faces.photos import SIGNATURE_BYTES, SUFFIXES, looks_like_photo
from lora_diffusion.factory.people.source import CONSENT, Found, PersonRef, counted, refuse_namesakes, shown
from lora_diffusion.factory.people.walk import Entry, hidden

_PHOTOS = frozenset(SUFFIXES)
CAPTION_SUFFIXES = (".txt", ".caption")
_SAMPLE = 4096  # bytes of the middle of two files of one size: whether they are the same photo, for the count

Peek = Callable[[Entry, int, int], bytes]  # (file, start, count) -> bytes


def _suffixes(**kinds: str) -> dict[str, str]:
    return {f".{suffix}": kind.replace("_", " ") for kind, suffixes in kinds.items() for suffix in suffixes.split()}


_BELIEVED = _suffixes(  # they come beside each photo, or would be read as the small preview that they hold
    video="mp4 mov m4v avi mkv webm mpg mpeg wmv 3gp mts m2ts flv",
    raw_photo="dng cr2 cr3 crw nef nrw arw srf sr2 raf rw2 orf pef srw x3f 3fr iiq",
    sidecar_file="json jsonl xmp aae xml csv tsv yaml yml thm npy npz pt cls",
)
_NAMED = _suffixes(  # unless they turn out to be photos
    text_file="txt caption md html pdf doc docx",
    archive="zip 7z rar gz tgz bz2 xz zst tar",
    sound="mp3 m4a wav aac ogg",
    Parquet_file="parquet",
    Arrow_file="arrow",
)
_WRAPPER = re.compile(
    r"train|test|val(id(ation)?)?|dev|data|images|celeba_generated\d*|(?!identity=)\w+=.*", re.IGNORECASE
)


@dataclass
class Sorted:
    """The files of one folder. `good`: photos that may be used: not empty, no broken link, no duplicate by all signs."""

    photos: list[Entry] = field(default_factory=list)
    captions: dict[Entry, Entry] = field(default_factory=dict)  # by the photo
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    good: int = 0

    def skip(self, kind: str) -> None:
        self.skipped[kind] = self.skipped.get(kind, 0) + 1


def sort_out(entries: Iterable[Entry], peek: Peek, count: bool = True) -> Sorted:
    """Photos by suffix, or by content where the suffix says nothing. `count`: count what is wrong with photos, too."""
    found = Sorted()
    texts: dict[tuple[str, str], Entry] = {}  # by the tar and the path without its suffix
    unsure = []
    for entry in entries:
        suffix = _suffix(entry.path)
        if hidden(entry.path.rstrip("/").rpartition("/")[2]):
            found.skip("hidden file")
        elif entry.path.rpartition("/")[2] == CONSENT:
            continue
        elif suffix in _PHOTOS and not entry.path.endswith("/"):
            found.photos.append(entry)
        elif entry.problem:
            found.skip(entry.problem[0])
            found.notes.append(entry.problem[1])
        elif suffix in _BELIEVED:
            found.skip(_BELIEVED[suffix])
        elif not entry.size:
            found.skip("empty file")
        elif suffix in CAPTION_SUFFIXES:
            texts[entry.place[0], entry.path[: -len(suffix)]] = entry
        else:
            unsure.append(entry)
    _add_photos(found, unsure, peek)
    if texts:
        for photo in found.photos:
            stem = photo.place[0], photo.path[: len(photo.path) - len(_suffix(photo.path))]
            if stem in texts:
                found.captions[photo] = texts[stem]
        used = set(found.captions.values())
        _add_photos(found, [text for text in texts.values() if text not in used], peek)
    found.photos.sort()
    if count:
        _count(found, peek)
    return found


def _suffix(path: str) -> str:
    """`.jpg` of a path; empty for a name without one."""
    dot = path.rfind(".")
    return path[dot:].lower() if dot > path.rfind("/") + 1 else ""


def _add_photos(found: Sorted, entries: list[Entry], peek: Peek) -> None:
    """Those that are photos by their first bytes; the others are skipped."""
    if not entries:
        return
    with ThreadPoolExecutor(16) as pool:  # a bucket answers many at a time
        heads = pool.map(lambda entry: peek(entry, 0, SIGNATURE_BYTES), entries)
        for entry, head in zip(entries, heads, strict=True):
            if looks_like_photo(head):
                found.photos.append(entry)
            else:
                found.skip(_NAMED.get(_suffix(entry.path), "other file"))


def _count(found: Sorted, peek: Peek) -> None:
    sizes = {photo.size for photo in found.photos}
    if len(sizes) == len(found.photos) and 0 not in sizes:  # the usual case; what cannot be read has no size
        found.good = len(sizes)
        return
    by_size: dict[int, list[Entry]] = {}
    for photo in found.photos:
        if photo.problem:
            found.skip(photo.problem[0])
            found.notes.append(photo.problem[1])
        elif not photo.size:
            found.skip("empty file")
        else:
            by_size.setdefault(photo.size, []).append(photo)
    for size, alike in by_size.items():
        start = max(0, size - _SAMPLE) // 2
        different = len({photo.tag or peek(photo, start, _SAMPLE) for photo in alike}) if len(alike) > 1 else 1
        found.good += different
        for _ in range(len(alike) - different):
            found.skip("duplicate")


def link_people(root: Iterable[Entry]) -> list[PersonRef]:
    """People who are a link in the root that is not followed."""
    return [
        PersonRef(shown(entry.path.rstrip("/")), problem=(entry.problem[0].replace(" ", "_"), entry.problem[1]))
        for entry in root
        if entry.problem and entry.problem[0].endswith("link") and not entry.path.lower().endswith(SUFFIXES)
    ]


def people_in(
    uri: str, folders: Mapping[str, Sorted], root: Sorted, more: Iterable[PersonRef] = ()
) -> tuple[list[tuple[PersonRef, list[str]]], Found]:
    """Who the folders are, each with its folders, and what was found.

    `root`: what lies in no folder. `more`: people of whom only a problem is known.
    """
    groups, wrappers = _owners({folder: bool(inside.photos) for folder, inside in folders.items()})
    notes = (
        [f"the people are the folders in {', '.join(wrappers[:3])}{', ...' * (len(wrappers) > 3)}"] if wrappers else []
    )
    skipped = Counter(root.skipped)
    people, good = [], {}
    for owner, inner in groups.items():
        name = owner.rpartition("/")[2]
        identity = shown(unquote(name.removeprefix("identity=")) if name.startswith("identity=") else name)
        problem = None
        if shown(owner) != owner:
            problem = ("name_not_utf8", f"the folder's name is not UTF-8: {uri}/{shown(owner)}. Rename it")
        elif not any(folders[folder].photos for folder in inner):
            inside = sum((Counter(folders[folder].skipped) for folder in inner), Counter[str]())
            skipped["empty folder"] += not inside
            what = f"holds no photo, only {counted(inside)}" if inside else "is empty"
            problem = ("no_photos", f"{uri}/{owner} {what}")
        good[owner] = sum(folders[folder].good for folder in inner)
        people.append(
            (PersonRef(identity, "" if owner == identity or problem else owner, problem), f"{uri}/{shown(owner)}")
        )
    for folder in folders.values():
        if folder.skipped:
            skipped.update(folder.skipped)
            notes += folder.notes
    kept = refuse_namesakes([*people, *((person, f"{uri}/{person.identity}") for person in more)])
    usable = sum(not person.problem and good[person.where or person.identity] > 0 for person in kept)
    found = Found(usable, sum(good.values()), dict(skipped), (*notes, *root.notes))
    return [(person, groups.get(person.where or person.identity, [])) for person in kept], found


def _owners(filled: Mapping[str, bool]) -> tuple[dict[str, list[str]], list[str]]:
    """Person's folder -> it and the folders below it, and the folders that the people lie in, if they lie deeper.

    People are the top folders with all that is below. They lie a level deeper where the top folders hold folders of
    photos alone, and there is but one of them, or all have names that no person has: `train`, `data`, `split=x`.
    """
    parts = {folder: folder.split("/") for folder in filled if folder}
    depth, wrappers = 1, []
    while True:
        full = [path for folder, path in parts.items() if filled[folder]]
        tops = {"/".join(path[:depth]) for path in full}
        inner = {"/".join(path[: depth + 1]) for path in full}
        deeper = all(len(path) > depth for path in full)
        named = all(_WRAPPER.fullmatch(top.rpartition("/")[2]) for top in tops)
        if not (full and deeper and (named or (len(tops) == 1 and len(inner) > 1))):
            break
        depth, wrappers = depth + 1, sorted(map(shown, tops))
    groups: dict[str, list[str]] = {}
    for folder, path in parts.items():
        if len(path) >= depth:
            groups.setdefault("/".join(path[:depth]), []).append(folder)
    return groups, wrappers
