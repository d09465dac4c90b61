"""A user's mistake is found in whatever it is wrapped."""

from __future__ import annotations

import ray.exceptions

from lora_diffusion.jobs.causes import find_cause


class Wrapper(ray.exceptions.RayError, ValueError):
    """As Ray's errors do, it inherits from the class of what it wraps."""

    def __init__(self, cause: BaseException | None = None, workers: dict[int, BaseException] | None = None) -> None:
        super().__init__("a long story")
        self.cause = cause
        self.worker_failures = workers or {}


def test_the_mistake_is_found_through_chained_and_wrapping_errors() -> None:
    mistake = ValueError("expected 512 numbers")
    chained = RuntimeError("worker died")
    chained.__cause__ = mistake
    for error in (mistake, chained, Wrapper(mistake), Wrapper(Wrapper(chained)), Wrapper(workers={1: chained})):
        assert find_cause(error) is mistake


def test_a_wrapper_alone_is_no_mistake_and_a_circle_ends() -> None:
    first, second = Wrapper(), RuntimeError()
    first.cause, second.__context__ = second, first
    assert find_cause(first) is None


def test_rays_own_error_gives_back_what_the_task_raised() -> None:
    mistake = ValueError("expected 512 numbers")
    wrapped = ray.exceptions.RayTaskError("task", "traceback", mistake).as_instanceof_cause()
    assert isinstance(wrapped, ValueError)
    assert find_cause(wrapped) is mistake
