"""The error that a person can act on, inside the wrapping that a framework puts around it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from lora_diffusion.extras import MissingExtra
from lora_diffusion.factory.errors import out_of_memory

USER_ERRORS = (ValueError, OSError, MissingExtra)
# where exceptions, and those of Ray, keep what they were made from
_ATTRIBUTES = ("cause", "_base_exc", "controller_failure", "__cause__", "__context__")


# types of Ray's for processes, machines and data that are gone
_GONE = (
    "ActorDiedError",
    "ActorUnavailableError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "OwnerDiedError",
    "RaySystemError",
    "RpcError",
    "WorkerCrashedError",
)


class RunAgain(RuntimeError):
    """What is nobody's fault and needs no change: the same command goes on."""


def find_cause(error: BaseException, wanted: tuple[type[BaseException], ...] = USER_ERRORS) -> BaseException | None:
    """The first error of a type in ``wanted`` in or behind ``error``, breadth first; None if there is none.

    Ray's own errors never count: they also inherit from the class that they wrap.
    """
    return next(
        (item for item in _chain(error) if isinstance(item, wanted) and not isinstance(item, _wrappers())), None
    )


def explain(error: BaseException, wanted: tuple[type[BaseException], ...] = (), less_memory: str = "") -> str | None:
    """The sentence for the user; None for a fault of ours, whose traceback is wanted.

    ``wanted``: types besides USER_ERRORS that speak to the user. ``less_memory``: what the job could be asked to hold less of.
    """
    found = find_cause(error, (*USER_ERRORS, *wanted))
    if found is not None:
        return str(found)
    if any(_out_of_memory(item) for item in _chain(error)):
        return f"memory ended, and what was finished is kept. Use machines with more of it, or {less_memory or 'smaller batches'}"
    return None


def gone(error: BaseException) -> str | None:
    """The sentence about machines or processes that ended under the job; None if `error` is something else."""
    for item in _chain(error):
        if isinstance(item, RunAgain):
            return str(item)
        text, told = str(item), []
        if any(kind.__name__ in _GONE for kind in type(item).__mro__):
            told = text.strip().splitlines()[:1]
        elif type(item).__name__ == "UnserializableException":  # what a worker met, of which only the text came over
            told = re.findall(rf"^ray\.exceptions\.(?:{'|'.join(_GONE)}): (.*)", text, re.MULTILINE)[-1:]
        if told and "creation task" not in text:
            what = "".join(re.findall(r"class_name: (\w+)", text)[:1]) or "a part of Ray"
            return f"{what} ended ({told[0].rstrip('.')}): run the same command again"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        item = queue.pop(0)
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        queue += [getattr(item, name, None) for name in _ATTRIBUTES]
        queue += getattr(item, "worker_failures", {}).values()


def _wrappers() -> tuple[type[BaseException], ...]:
    ray = sys.modules.get("ray")
    return (ray.exceptions.RayError,) if ray else ()


def _out_of_memory(error: BaseException) -> bool:
    """Also as Ray passes it on, and Ray's own, whose monitor ends a worker in time."""
    # not OOM, which Ray names as a possible cause of any death
    words = ("can't allocate memory", "memory usage threshold")
    return out_of_memory(error) or (
        isinstance(error, (RuntimeError, *_wrappers())) and any(word in str(error) for word in words)
    )
