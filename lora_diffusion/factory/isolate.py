"""One person's trouble must not cost another one's LoRA.

People are fine-tuned in groups, and what one of them does to the process (an exception, or its death) hits the group.
Here the one to blame is found: everyone is tried alone, those who fail alone become failures, and the others are done
again together, so their bits do not depend on how often the group was tried.

A worker that dies cannot say why. So it tells a ledger, which outlives it, what it begins and what it has ended; the
difference is deaths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lora_diffusion.corpus.schema import Failure, Person
from lora_diffusion.factory.embed import EmbeddedPerson, PersonEmbedder
from lora_diffusion.factory.make import BrokenDeviceError, DeviceError
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.storage import StoreError

Answer = Person | Failure
Make = Callable[[Sequence[EmbeddedPerson]], list[Answer]]
NOT_ONES_OWN = (DeviceError, StoreError)  # another person would meet the same


class Attempts(Protocol):
    """Counts how often something was begun and never ended."""

    def begin(self, key: str) -> int:
        """How often `key` was begun before without an end; counts one more."""
        ...

    def end(self, key: str) -> None:
        """`key` ended, well or badly, and the process lives."""
        ...


class AttemptsHere:
    """Attempts in this process: exact, but gone with it. Enough without Ray."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}

    def begin(self, key: str) -> int:
        before = self.open.get(key, 0)
        self.open[key] = before + 1
        return before

    def end(self, key: str) -> None:
        self.open.pop(key, None)


def embed_people(
    embed: PersonEmbedder, people: Sequence[tuple[int, PersonRef]], attempts: Attempts, max_deaths: int
) -> list[EmbeddedPerson]:
    """`embed` for each (position, person); whoever killed `max_deaths` workers (a photo can crash a decoder) is a failure."""
    embedded = []
    for position, person in people:
        key = f"embed {position}"
        if attempts.begin(key) < max_deaths:
            embedded.append(embed(position, person))
            attempts.end(key)
        else:
            message = f"the worker process died {max_deaths} times while it read this person's photos"
            failure = Failure(position, person.identity, None, "embed", "worker_died", message)
            embedded.append(EmbeddedPerson(position, person.identity, failures=(failure,)))
    return embedded


def make_group(make: Make, people: Sequence[EmbeddedPerson], attempts: Attempts, max_deaths: int) -> list[Answer]:
    """One answer for each of `people`. Raises only DeviceError, BrokenDeviceError and StoreError."""
    if not people:
        return []
    key = "group " + " ".join(str(person.position) for person in people)
    if attempts.begin(key) < max_deaths:
        try:
            answers = make(people)
        except BrokenDeviceError:
            raise  # this process is as good as dead, and is counted as such
        except NOT_ONES_OWN:
            attempts.end(key)
            raise
        except Exception as error:
            attempts.end(key)
            if len(people) == 1:
                return [_failure(people[0], error)]
            return _without_the_guilty(make, people, attempts, max_deaths)
        attempts.end(key)
        return answers
    if len(people) == 1:
        return [_death(people[0], max_deaths)]
    return _without_the_guilty(make, people, attempts, max_deaths)


def _without_the_guilty(
    make: Make, people: Sequence[EmbeddedPerson], attempts: Attempts, max_deaths: int
) -> list[Answer]:
    alone = {person.position: make_group(make, [person], attempts, max_deaths)[0] for person in people}
    good = [
        person for person in people if isinstance(alone[person.position], Person) or _judged(alone[person.position])
    ]
    if len(good) == len(people):  # alone everyone is fine: chance deaths, or only the group as such fails
        together = _once_more(make, people, attempts)
    else:
        together = make_group(make, good, attempts, max_deaths)
    for person, answer in zip(good, together or [], strict=False):
        alone[person.position] = answer
    return [alone[person.position] for person in people]


def _once_more(make: Make, people: Sequence[EmbeddedPerson], attempts: Attempts) -> list[Answer] | None:
    """The whole group a last time; None if that fails too, and the answers of everyone alone have to do."""
    key = "again " + " ".join(str(person.position) for person in people)
    if attempts.begin(key) > 0:
        return None
    try:
        answers = make(people)
    except (BrokenDeviceError, *NOT_ONES_OWN):
        raise
    except Exception:
        answers = None
    attempts.end(key)
    return answers


def _judged(answer: Answer) -> bool:
    """A failure that `make` itself returned (diverged, low similarity): it disturbs nobody."""
    return isinstance(answer, Failure) and answer.reason not in ("error", "worker_died")


def _failure(person: EmbeddedPerson, error: Exception) -> Failure:
    message = f"{type(error).__name__}: {error}"
    return Failure(person.position, person.identity, None, "finetune", "error", message)


def _death(person: EmbeddedPerson, deaths: int) -> Failure:
    message = f"the worker process died {deaths} times while it worked on this person alone"
    return Failure(person.position, person.identity, None, "finetune", "worker_died", message)
