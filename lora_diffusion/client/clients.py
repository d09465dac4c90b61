"""Client and AsyncClient: the same calls, waited for or awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from lora_diffusion.client import calls
from lora_diffusion.client.answers import Event, Face, File, Latent, LoRA, Pictures
from lora_diffusion.client.calls import (
    Call,
    EventReader,
    Format,
    ImageOptions,
    Person,
    PersonalizeOptions,
    Photo,
    SamplingOptions,
)
from lora_diffusion.client.retry import ApiError, Retry

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:8000"
GRACE_SECONDS = 2.0
"""The server ends a request at its deadline, and says so; only then do we hang up."""


class _Shared:
    """url: of the server. api_key: if it asks for one. timeout: seconds for a call in all, retries included."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 60.0, retry: Retry | None = None
    ) -> None:
        self._settings: dict[str, Any] = {
            "base_url": url.rstrip("/") + "/",
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "follow_redirects": False,
        }
        self._timeout = timeout
        self._retry = retry or Retry()

    def _request(self, http: httpx.Client | httpx.AsyncClient, call: Call[Any], deadline: float) -> httpx.Request:
        left = max(0.001, deadline - time.monotonic())
        headers = {"Accept": call.accept, "X-Request-Timeout-Seconds": f"{left:.3f}"}
        return http.build_request(call.method, call.path, headers=headers, timeout=left + GRACE_SECONDS, **call.body())

    def _next_wait(self, attempt: int, outcome: httpx.Response | httpx.TransportError, deadline: float) -> float:
        """Seconds before the next attempt. Raises ApiError, or httpx.TransportError, if there is to be none."""
        seconds = self._retry.wait(attempt, outcome, deadline)
        if seconds is not None:
            return seconds
        if isinstance(outcome, httpx.Response):
            raise _problem(outcome)
        raise outcome


class Client(_Shared):
    """The endpoint, from a program.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     made = client.personalize("ada.jpg", "a photo of sks person, forest background", num_images=4)
    ...     made.images[0].save("ada.png")
    ...     client.download(made.lora, "kohya").save("ada.safetensors")

    A server that is busy (429, 503) or cannot be reached is asked again, no sooner than it says.

    Raises (every call):
        ApiError: the server refused; `reason` and the message say why.
        httpx.TransportError: it could not be reached in time.
        OSError: a photo cannot be read.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, transport: httpx.BaseTransport | None = None, **settings: Any
    ) -> None:
        super().__init__(url, **settings)
        self._http = httpx.Client(transport=transport, **self._settings)

    def personalize(
        self,
        photos: Photo | Sequence[Photo],
        prompt: str,
        *,
        format: Format | None = None,
        **options: Unpack[PersonalizeOptions],
    ) -> Pictures:
        """LoRA and scored pictures of the person in the photos; with `format`, the LoRA's file too."""
        return self._call(calls.personalize(photos, prompt, format, options))

    def personalize_events(
        self, photos: Photo | Sequence[Photo], prompt: str, **options: Unpack[PersonalizeOptions]
    ) -> Iterator[Event]:
        """The same as it happens: the LoRA, progress, each picture when it is ready, and last all of it without the data."""
        return self._events(calls.personalize(photos, prompt, None, options, events=True))

    def embeddings(self, photos: Sequence[Photo]) -> list[list[Face]]:
        """The faces of each photo, largest first."""
        return self._call(calls.embeddings(photos))

    def latents(
        self, photos: Photo | Sequence[Photo], num_samples: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[Latent]:
        """Codes of the person in the photos."""
        return self._call(calls.latents(photos, num_samples, options))

    def loras(
        self,
        source: Photo | Sequence[Photo] | Latent,
        num_samples: int = 1,
        *,
        score: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[LoRA]:
        """LoRAs of the person in the photos, or of a latent. score: draw each once and compare the face."""
        return self._call(calls.loras(source, num_samples, score, options))

    def upload(self, file: Photo) -> LoRA:
        """Give the server a LoRA file: diffusers', kohya's, our vector, or a zip of peft's two files."""
        return self._call(calls.upload(file))

    def download(self, lora: LoRA | str, format: Format = "kohya") -> File:
        return self._call(calls.download(lora, format))

    def delete(self, lora: LoRA | str) -> None:
        """Have it forgotten now; also if the server has forgotten it already."""
        try:
            self._call(calls.delete(lora))
        except ApiError as error:
            _forgive(error)

    def images(self, person: Person, prompt: str, **options: Unpack[ImageOptions]) -> Pictures:
        """Pictures with a LoRA that the server holds, or of a latent."""
        return self._call(calls.images(person, prompt, options))

    def edit(self, person: Person, edits: Mapping[str, float], *, deviation_scale: float | None = None) -> LoRA:
        """The LoRA of the changed person: attribute (`model()` lists them) -> strength in standard deviations."""
        return self._call(calls.edit(person, edits, deviation_scale))

    def interpolate(self, a: Person, b: Person, positions: Sequence[float]) -> list[LoRA]:
        """LoRAs on the way from a (0) to b (1)."""
        return self._call(calls.interpolate(a, b, positions))

    def model(self) -> dict[str, Any]:
        """What the server serves: base, layout, attributes, limits, defaults."""
        return self._call(calls.model())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: Call[T]) -> T:
        return call.parse(self._send(call, stream=False))

    def _events(self, call: Call[Any]) -> Iterator[Event]:
        response = self._send(call, stream=True)
        reader = EventReader()
        try:
            for line in response.iter_lines():
                if event := reader.line(line):
                    yield event
        finally:
            response.close()

    def _send(self, call: Call[Any], stream: bool) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            attempt += 1
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.send(self._request(self._http, call, deadline), stream=stream)
                if outcome.is_success:
                    return outcome
                outcome.read()
                outcome.close()
            except httpx.TransportError as error:
                outcome = error
            time.sleep(self._next_wait(attempt, outcome, deadline))


class AsyncClient(_Shared):
    """`Client` for asyncio: every call is awaited, `personalize_events` is iterated with `async for`."""

    def __init__(
        self, url: str = DEFAULT_URL, *, transport: httpx.AsyncBaseTransport | None = None, **settings: Any
    ) -> None:
        super().__init__(url, **settings)
        self._http = httpx.AsyncClient(transport=transport, **self._settings)

    async def personalize(
        self,
        photos: Photo | Sequence[Photo],
        prompt: str,
        *,
        format: Format | None = None,
        **options: Unpack[PersonalizeOptions],
    ) -> Pictures:
        return await self._call(calls.personalize(photos, prompt, format, options))

    def personalize_events(
        self, photos: Photo | Sequence[Photo], prompt: str, **options: Unpack[PersonalizeOptions]
    ) -> AsyncIterator[Event]:
        return self._events(calls.personalize(photos, prompt, None, options, events=True))

    async def embeddings(self, photos: Sequence[Photo]) -> list[list[Face]]:
        return await self._call(calls.embeddings(photos))

    async def latents(
        self, photos: Photo | Sequence[Photo], num_samples: int = 1, **options: Unpack[SamplingOptions]
    ) -> list[Latent]:
        return await self._call(calls.latents(photos, num_samples, options))

    async def loras(
        self,
        source: Photo | Sequence[Photo] | Latent,
        num_samples: int = 1,
        *,
        score: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[LoRA]:
        return await self._call(calls.loras(source, num_samples, score, options))

    async def upload(self, file: Photo) -> LoRA:
        return await self._call(calls.upload(file))

    async def download(self, lora: LoRA | str, format: Format = "kohya") -> File:
        return await self._call(calls.download(lora, format))

    async def delete(self, lora: LoRA | str) -> None:
        try:
            await self._call(calls.delete(lora))
        except ApiError as error:
            _forgive(error)

    async def images(self, person: Person, prompt: str, **options: Unpack[ImageOptions]) -> Pictures:
        return await self._call(calls.images(person, prompt, options))

    async def edit(self, person: Person, edits: Mapping[str, float], *, deviation_scale: float | None = None) -> LoRA:
        return await self._call(calls.edit(person, edits, deviation_scale))

    async def interpolate(self, a: Person, b: Person, positions: Sequence[float]) -> list[LoRA]:
        return await self._call(calls.interpolate(a, b, positions))

    async def model(self) -> dict[str, Any]:
        return await self._call(calls.model())

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, call: Call[T]) -> T:
        return call.parse(await self._send(call, stream=False))

    async def _events(self, call: Call[Any]) -> AsyncIterator[Event]:
        response = await self._send(call, stream=True)
        reader = EventReader()
        try:
            async for line in response.aiter_lines():
                if event := reader.line(line):
                    yield event
        finally:
            await response.aclose()

    async def _send(self, call: Call[Any], stream: bool) -> httpx.Response:
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            attempt += 1
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.send(self._request(self._http, call, deadline), stream=stream)
                if outcome.is_success:
                    return outcome
                await outcome.aread()
                await outcome.aclose()
            except httpx.TransportError as error:
                outcome = error
            await asyncio.sleep(self._next_wait(attempt, outcome, deadline))


def _problem(response: httpx.Response) -> ApiError:
    try:
        data = response.json()
    except ValueError:
        data = None
    return ApiError.of(data, response.status_code)


def _forgive(error: ApiError) -> None:
    """What is gone already need not be deleted, and a repeated deletion finds nothing."""
    if error.reason != "unknown_lora":
        raise error
