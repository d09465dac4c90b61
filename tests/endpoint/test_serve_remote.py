"""What counts as a lost replica, and how the errors of a stage reach whoever called it."""

from __future__ import annotations

import grpc
import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from lora_diffusion.endpoint.remote import is_lost, told
from lora_diffusion.serving.errors import ServingError


def broken(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (broken(grpc.StatusCode.UNAVAILABLE), True),
        (broken(grpc.StatusCode.CANCELLED), True),
        (broken(grpc.StatusCode.RESOURCE_EXHAUSTED), False),
        (ActorUnavailableError("gone", None), True),
        (ServingError("overloaded", "Later."), False),
        (ValueError("of a stage"), False),
    ],
)
def test_only_a_call_whose_replica_is_gone_is_repeated(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost


@pytest.mark.parametrize(
    "error",
    [
        broken(grpc.StatusCode.UNAVAILABLE),
        BackPressureError(num_queued_requests=9, max_queued_requests=8),
        DeploymentUnavailableError("gone"),
    ],
)
def test_what_is_lost_or_full_is_told_as_overload(error: Exception) -> None:
    answer = told(error)
    assert isinstance(answer, ServingError)
    assert answer.reason == "overloaded"


def test_errors_of_a_stage_come_out_as_they_are() -> None:
    error = ServingError("unknown_lora", "There is none.")
    assert told(error) is error
