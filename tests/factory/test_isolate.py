"""Laws of isolation: one person's trouble costs nobody else, and the others' bits do not depend on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.corpus import Failure, Person
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.errors import BrokenDeviceError, CommonFault, DeviceError
from lora_diffusion.factory.isolate import embed_people, make_group, stand_in
from lora_diffusion.factory.people import PersonRef

PEOPLE = [EmbeddedPerson(i, f"p{i}", embedding=np.ones(512, np.float32)) for i in range(4)]


class Died(BaseException):
    """As a process that ends: nothing in it catches this."""


class Maker:
    """Makes rows whose vector says with whom they were made; `trouble` is asked before each group."""

    def __init__(self, trouble: Callable[[set[int]], None], diverging: int | None = None) -> None:
        self.trouble, self.diverging = trouble, diverging
        self.calls: list[list[int]] = []

    def __call__(self, people: Sequence[EmbeddedPerson]) -> list[Person | Failure]:
        positions = [person.position for person in people]
        self.calls.append(positions)
        self.trouble(set(positions))
        company = np.array([100 * len(people) + sum(positions)], np.float32)
        return [self.answer(person, company) for person in people]

    def answer(self, person: EmbeddedPerson, company: np.ndarray) -> Person | Failure:
        if self.diverging == person.position:
            return Failure(person.position, person.identity, None, "finetune", "diverged", "")
        assert person.embedding is not None
        rest = (0.0, 0.0, 0.0, 0.0, 1, 0, 1, 0, ("x",), 0.0, 0.0, 0.0)
        photos = person.embedding[None]
        return Person(person.position, person.identity, company, person.embedding, photos, *rest)


def run(maker: Maker, attempts: InMemoryAttempts, lives: int = 100) -> list[Person | Failure]:
    """As Ray does it: a worker that dies is started again with the same group."""
    for _ in range(lives):
        try:
            return make_group(maker, PEOPLE, attempts, max_deaths=3)
        except Died:
            continue
    raise AssertionError("the group never ended")


def vectors(answers: list[Person | Failure]) -> list[object]:
    return [a.vector[0] if isinstance(a, Person) else a.reason for a in answers]


def test_without_trouble_the_group_is_made_once() -> None:
    maker = Maker(lambda group: None)
    assert vectors(run(maker, InMemoryAttempts())) == [406] * 4
    assert maker.calls == [[0, 1, 2, 3]]


def test_who_raises_is_a_failure_and_the_others_are_made_together() -> None:
    def trouble(group: set[int]) -> None:
        if 1 in group:
            raise RuntimeError("bad photos")

    answers = run(Maker(trouble, diverging=3), InMemoryAttempts())
    assert vectors(answers) == [305, "error", 305, "diverged"]
    assert isinstance(answers[1], Failure)
    assert answers[1].message == "RuntimeError: bad photos"


def test_who_kills_the_worker_is_a_failure_and_the_others_are_made_together() -> None:
    def trouble(group: set[int]) -> None:
        if 2 in group:
            raise Died

    maker = Maker(trouble, diverging=3)
    answers = run(maker, InMemoryAttempts())
    assert vectors(answers) == [304, 304, "worker_died", "diverged"]
    assert maker.calls.count([0, 1, 2, 3]) == 3
    assert maker.calls.count([2]) == 3


@pytest.mark.parametrize("deaths", [1, 2, 3, 4, 5])
def test_deaths_by_chance_do_not_change_a_bit(deaths: int) -> None:
    """Whenever the worker is killed from outside, the group ends up made together."""
    left = deaths

    def trouble(group: set[int]) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise Died

    assert vectors(run(Maker(trouble), InMemoryAttempts())) == [406] * 4


def test_if_only_the_group_as_such_fails_everyone_is_made_alone() -> None:
    def trouble(group: set[int]) -> None:
        if len(group) > 1:
            raise RuntimeError("only together")

    assert vectors(run(Maker(trouble), InMemoryAttempts())) == [100, 101, 102, 103]


@pytest.mark.parametrize("error", [DeviceError("out of memory"), BrokenDeviceError("CUDA error")])
def test_what_is_nobodys_fault_is_not_blamed_on_anybody(error: Exception) -> None:
    def trouble(group: set[int]) -> None:
        raise error

    attempts = InMemoryAttempts()
    with pytest.raises(type(error)):
        make_group(Maker(trouble), PEOPLE, attempts, max_deaths=3)
    assert bool(attempts.open) == isinstance(error, BrokenDeviceError), "a broken device counts as a death"


@pytest.mark.parametrize("people", [PEOPLE, PEOPLE[:1]])
def test_an_exception_that_a_stand_in_meets_too_is_blamed_on_nobody(people: list[EmbeddedPerson]) -> None:
    def trouble(group: set[int]) -> None:
        raise TypeError(f"argument of group {sorted(group)}")

    maker = Maker(trouble)
    with pytest.raises(
        CommonFault, match=r"fails for everybody.*TypeError: argument of group \[0.*run the same command"
    ):
        make_group(maker, people, InMemoryAttempts(), max_deaths=3)
    assert len(maker.calls) == 2, "the group and the stand-in: nobody needs to be tried alone"


def test_a_process_that_dies_over_a_stand_in_too_is_blamed_on_nobody() -> None:
    def trouble(group: set[int]) -> None:
        raise Died

    maker = Maker(trouble)
    with pytest.raises(CommonFault, match="the worker process died 3 times"):
        run(maker, InMemoryAttempts())
    assert maker.calls == [[0, 1, 2, 3]] * 3 + [[-1]] * 3


def test_people_who_all_have_a_fault_of_their_own_are_failures_all() -> None:
    def trouble(group: set[int]) -> None:
        if group != {-1}:
            raise RuntimeError("bad captions")

    assert vectors(run(Maker(trouble), InMemoryAttempts())) == ["error"] * 4


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_stand_in_is_like_the_person_and_has_nothing_of_the_person() -> None:
    boxes = np.zeros((2, 4), np.float32)
    someone = EmbeddedPerson(7, "ada", (png(16, 24), b"no picture"), ("ada in Rome", "ada"), boxes, np.ones(512, "f4"))
    nobody = stand_in(someone)
    assert [Image.open(io.BytesIO(picture)).size for picture in nobody.pictures] == [(16, 24), (64, 64)]
    assert (nobody.position, nobody.captions) == (-1, ("a photo", "a photo"))
    assert nobody.embedding is not None
    assert np.linalg.norm(nobody.embedding) == pytest.approx(1)
    assert not {"ada", someone.pictures[0]} & {nobody.identity, *nobody.pictures}
    assert stand_in(EmbeddedPerson(0, "x", (png(8, 8),))).captions is None


class Embed:
    """An embedder that answers what it is told; `broken`: it cannot even look at noise."""

    def __init__(self, reason: str, broken: bool) -> None:
        self.reason, self.broken = reason, broken

    def __call__(self, position: int, person: PersonRef) -> EmbeddedPerson:
        failure = Failure(position, person.identity, None, "embed", self.reason, "it said so")
        return EmbeddedPerson(position, person.identity, failures=(failure,))

    def try_out(self) -> None:
        if self.broken:
            raise RuntimeError("the recogniser's file is cut off")


def test_a_recogniser_that_fails_on_noise_as_well_is_blamed_on_nobody() -> None:
    people = [(0, PersonRef("a")), (1, PersonRef("b"))]

    def reasons(reason: str, broken: bool) -> list[str]:
        embedded = embed_people(Embed(reason, broken), people, InMemoryAttempts(), 3)  # type: ignore[arg-type]
        return [failure.reason for person in embedded for failure in person.failures]

    assert reasons("error", broken=False) == ["error"] * 2
    assert reasons("too_few_photos", broken=True) == ["too_few_photos"] * 2, "it saw no face: an answer, not a fault"
    with pytest.raises(
        CommonFault, match=r"error, it said so \(stand-in: RuntimeError: the recogniser's file is cut off"
    ):
        reasons("error", broken=True)
