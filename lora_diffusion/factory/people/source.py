"""What every source of people gives: who is there, their photos, and a count of all that was found and left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lora_diffusion.faces.photos import PhotoReason

CONSENT, CONSENT_BYTES = "consent.txt", 4096  # in a person's folder; more of it is not carried on


@dataclass(frozen=True)
class PersonRef:
    """A person in a source. `where` is the source's own pointer; `problem` (reason, message) rules the person out."""

    identity: str
    where: str = ""
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class RawPhoto:
    """A photo's bytes as they were found; `data` is None if it cannot be used, and `reason` and `error` say why."""

    name: str
    data: bytes | None
    caption: str | None = None
    error: str = ""
    reason: PhotoReason = "unreadable"


@dataclass(frozen=True)
class Found:
    """What listing counted. `skipped`: kind, in the singular -> how many; `notes`: a sentence each on single places."""

    people: int = 0  # with a photo that may be used
    photos: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`1,204 people, 9,816 photos; skipped: 31 videos, 4 empty folders`, and the notes, a line each."""
        people = "1 person" if self.people == 1 else f"{self.people:,} people"
        skipped = f"; skipped: {counted(self.skipped)}" if any(self.skipped.values()) else ""
        more = [f"and {len(self.notes) - 10:,} more such places"] if len(self.notes) > 10 else []
        return "\n".join([f"{people}, {counted({'photo': self.photos})}{skipped}", *self.notes[:10], *more])


class PeopleSource(Protocol):
    uri: str
    found: Found  # what the last `list_people` counted

    def list_people(self) -> list[PersonRef]:
        """Everyone, in any order; each identity once."""
        ...

    def photos(self, person: PersonRef, limit: int) -> list[RawPhoto]:
        """At most `limit` different photos of one person, in the order of their names, and duplicates among them."""
        ...

    def consent(self, person: PersonRef) -> str | None:
        """What the source says of the person's consent (a reference, a date, `yes`); None if it says nothing."""
        ...


def counted(kinds: Mapping[str, int]) -> str:
    """`31 videos, 1 duplicate`, the most frequent first."""
    order = sorted((kind for kind in kinds if kinds[kind]), key=lambda kind: (-kinds[kind], kind))
    return ", ".join(f"{kinds[kind]:,} {kind}{'s' * (kinds[kind] != 1)}" for kind in order) or "0 photos"


def consent_of(values: Iterable[Any]) -> str | None:
    """Of what stands at each of a person's photos, texts or booleans: None unless each has one."""
    texts = ["yes" if value is True else str(value or "").strip() for value in values]
    texts = ["" if text.lower() in ("no", "false", "0") else text for text in texts]
    return ", ".join(dict.fromkeys(texts)) if texts and all(texts) else None


def shown(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def distinct(photos: Iterable[RawPhoto], limit: int) -> list[RawPhoto]:
    """The first `limit` different photos; one with the bytes of an earlier one comes without data, as a duplicate.

    `photos` is consumed no further than needed.
    """
    found: list[RawPhoto] = []
    names: dict[bytes, str] = {}
    for photo in photos:
        if len(found) - sum(p.reason == "duplicate" for p in found) >= limit:
            break
        first = names.setdefault(hashlib.sha256(photo.data).digest(), photo.name) if photo.data else photo.name
        if first != photo.name:
            photo = replace(photo, data=None, reason="duplicate", error=f"the same bytes as {first}")
        found.append(photo)
    return found


def refuse_namesakes(people: Iterable[tuple[PersonRef, str]]) -> list[PersonRef]:
    """Each identity once: people of one name from different places cannot be told apart, and none of them is taken."""
    by_name: dict[str, list[tuple[PersonRef, str]]] = {}
    for person, place in people:
        by_name.setdefault(person.identity, []).append((person, place))
    return [namesakes[0][0] if len(namesakes) == 1 else _refused(namesakes) for namesakes in by_name.values()]


def _refused(namesakes: list[tuple[PersonRef, str]]) -> PersonRef:
    name, places = namesakes[0][0].identity, ", ".join(place for _, place in namesakes[:4])
    message = f"{len(namesakes)} people carry the identity {name!r} ({places}): give each person its own name"
    return replace(namesakes[0][0], problem=("duplicate_identity", message))
