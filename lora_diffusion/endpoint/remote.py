"""A deployment as an object with async methods, that does not give up when a replica dies.

Calls travel by gRPC from replica to replica (`_by_reference=False`), which saves a hop by way of Ray's object store for
every argument and answer.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

import grpc
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from lora_diffusion.serving.errors import ServingError

Stage = TypeVar("Stage")
LOST = (ActorDiedError, ActorUnavailableError, RayActorError, WorkerCrashedError)
ATTEMPTS = 4
PAUSE_SECONDS = 0.25


class ReplicaLost(Exception):
    """The replica that streamed an answer is gone; what has come so far is good."""


def remote(stage: type[Stage], handle: DeploymentHandle[Any]) -> Stage:
    """The stage that runs behind `handle`, with the methods that its class has here."""
    return cast(Stage, Remote(stage, handle))


class Remote:
    """`await remote.method(*args)` is `handle.method.remote(*args)`, tried again elsewhere if the replica is lost.

    All methods of the stages may be repeated. Errors of the stages come out as they were raised; a full queue as
    ServingError "overloaded". A call that is cancelled is cancelled over there. In a method that is an async generator a
    lost replica raises ReplicaLost.
    """

    def __init__(self, stage: type, handle: DeploymentHandle[Any]) -> None:
        self._stage = stage
        self._handle = handle.options(_by_reference=False)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        streams = inspect.isasyncgenfunction(getattr(self._stage, method))
        answer = self._stream if streams else self._call
        return lambda *args: answer(method, args)

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                if not is_lost(error) or attempt == ATTEMPTS:
                    raise told(error) from None
                await asyncio.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError("unreachable")

    async def _stream(self, method: str, args: tuple[Any, ...]) -> AsyncIterator[Any]:
        responses = getattr(self._handle.options(stream=True), method).remote(*args)
        try:
            async for item in responses:
                yield item
        except Exception as error:
            if is_lost(error):
                raise ReplicaLost from None
            raise told(error) from None
        finally:
            responses.cancel()


def is_lost(error: BaseException) -> bool:
    if isinstance(error, grpc.aio.AioRpcError):  # a replica that shuts down cancels what it has not begun
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return isinstance(error, LOST) or isinstance(getattr(error, "cause", None), LOST)


def told(error: Exception) -> Exception:
    """The error as the stage raised it."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BackPressureError):
        return ServingError("overloaded", "Too many requests wait already. Try again a little later.")
    if isinstance(cause, DeploymentUnavailableError) or is_lost(error):
        return ServingError("overloaded", "A part of the service is being restarted. Try again a little later.")
    return cause if isinstance(cause, Exception) else error
