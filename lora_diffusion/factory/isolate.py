"""One person's trouble must not cost another one's LoRA, and a fault that is everybody's is nobody's.

People are fine-tuned in groups, and what one of them does to the process (an exception, or its death) hits the group.
First the set-up must show that it works: a stand-in, with pictures of noise, is made in the same way. If that fails too,
CommonFault stops the job, and nobody is marked as failed. Otherwise the one to blame is found: everyone is tried alone,
those who fail alone become failures, and the others are done again together, so their bits do not depend on how often the
group was tried.

A worker that dies cannot say why. So it tells a ledger, which outlives it, what it begins and what it has ended; the
difference is deaths.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from lora_diffusion.corpus.schema import Failure, Person
from lora_diffusion.factory.attempts import Attempts
from lora_diffusion.factory.embed import EmbeddedPerson, PersonEmbedder
from lora_diffusion.factory.errors import BrokenDeviceError, CommonFault, DeviceError
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.storage import StoreError

T = TypeVar("T")
Answer = Person | Failure
Make = Callable[[Sequence[EmbeddedPerson]], list[Answer]]


class WorkerDied(RuntimeError):
    """The process ended so often over the same work that the work counts as the cause."""


def embed_people(
    embed: PersonEmbedder, people: Sequence[tuple[int, PersonRef]], attempts: Attempts, max_deaths: int
) -> list[EmbeddedPerson]:
    """`embed` for each (position, person); whoever killed `max_deaths` workers (a photo can crash a decoder) is a failure.

    Raises CommonFault if the recogniser fails on noise as well, and StoreError.
    """
    embedded = []
    for position, person in people:
        answer = _attempt(partial(embed, position, person), f"embed {position}", attempts, max_deaths)
        if isinstance(answer, Exception):
            failure = _failure(EmbeddedPerson(position, person.identity), "embed", answer)
            answer = EmbeddedPerson(position, person.identity, failures=(failure,))
        for failure in answer.failures:
            if failure.photo is None and _broke(failure):
                _prove(embed.try_out, f"{failure.reason}, {failure.message}", f"embed {position}", attempts, max_deaths)
        embedded.append(answer)
    return embedded


def make_group(make: Make, people: Sequence[EmbeddedPerson], attempts: Attempts, max_deaths: int) -> list[Answer]:
    """One answer for each of `people`. Raises only CommonFault, DeviceError, BrokenDeviceError and StoreError."""

    def attempt(
        some: Sequence[EmbeddedPerson], word: str = "group", deaths: int = max_deaths
    ) -> list[Answer] | Exception:
        key = f"{word} {' '.join(str(person.position) for person in some)}"
        return _attempt(lambda: make(some), key, attempts, deaths)

    def alone(person: EmbeddedPerson) -> Answer:
        answers = attempt([person])
        return _failure(person, "finetune", answers) if isinstance(answers, Exception) else answers[0]

    if not people:
        return []
    answers = attempt(people)
    if not isinstance(answers, Exception):
        return answers
    nobody = stand_in(people[0])
    _prove(lambda: make([nobody]), _said(answers), f"group {people[0].position}", attempts, max_deaths)
    if len(people) == 1:
        return [_failure(people[0], "finetune", answers)]
    each = {person.position: alone(person) for person in people}
    good = [person for person in people if not _broke(each[person.position])]
    if len(good) < len(people):
        together: list[Answer] | Exception = make_group(make, good, attempts, max_deaths)
    else:  # alone everyone is fine: chance deaths, or only the group as such fails
        together = attempt(people, "again", 1)
    if not isinstance(together, Exception):  # else the answers of everyone alone have to do
        each |= {person.position: answer for person, answer in zip(good, together, strict=True)}
    return [each[person.position] for person in people]


def stand_in(person: EmbeddedPerson) -> EmbeddedPerson:
    """Somebody of whom nothing is a person's own: as many pictures, of the same size, but noise, and plain captions."""
    generator = np.random.default_rng(0)

    def noise(picture: bytes) -> bytes:
        try:
            width, height = Image.open(io.BytesIO(picture)).size
        except OSError:  # this may be what is wrong with the person
            width = height = 64
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    embedding = np.full(512, 512**-0.5, np.float32)
    return replace(
        person,
        position=-1,
        identity="stand-in",
        pictures=tuple(map(noise, person.pictures)),
        captions=person.captions and ("a photo",) * len(person.pictures),
        embedding=embedding,
        photo_embeddings=np.stack([embedding] * max(1, len(person.pictures))),
        failures=(),
    )


def _prove(work: Callable[[], object], trouble: str, key: str, attempts: Attempts, max_deaths: int) -> None:
    """Raises CommonFault if `work`, which is the same but about nobody, fails as well."""
    error = _attempt(work, f"stand-in for {key}", attempts, max_deaths)
    if isinstance(error, Exception):
        raise CommonFault(
            f"this fails for everybody, also for a stand-in with pictures of noise, so nobody is marked as failed: {trouble} "
            f"(stand-in: {_said(error)}); mend the base model, the recogniser, the configuration or the memory, and run the "
            "same command again"
        ) from error


def _attempt(work: Callable[[], T], key: str, attempts: Attempts, max_deaths: int) -> T | Exception:
    """What `work` returns, or why it does not. Raises what another person would meet as well: a device or store that fails."""
    if attempts.begin(key) >= max_deaths:
        return WorkerDied(f"the worker process died {max_deaths} times over it")
    try:
        answer: T | Exception = work()
    except BrokenDeviceError:
        raise  # this process is as good as dead, and is counted as such
    except (DeviceError, StoreError):
        attempts.end(key)
        raise
    except Exception as error:
        answer = error
    attempts.end(key)
    return answer


def _broke(answer: Answer) -> bool:
    """No failure that was returned as one (diverged, low similarity), which disturbs nobody."""
    return isinstance(answer, Failure) and answer.reason in ("error", "worker_died")


def _failure(person: EmbeddedPerson, stage: str, error: Exception) -> Failure:
    reason = "worker_died" if isinstance(error, WorkerDied) else "error"
    return Failure(person.position, person.identity, None, stage, reason, _said(error))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, WorkerDied) else f"{type(error).__name__}: {error}"
