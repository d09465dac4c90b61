"""Where the endpoint keeps LoRAs: bounded, forgetful, and right while one is still on its way there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion.config import load_config
from lora_diffusion.serving import library as module
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.library import Library, LoRALibrary, LoRARecord, content_id
from lora_diffusion.serving.messages import Code, DecodeTask
from lora_diffusion.serving.services import Decoder

CONFIG = load_config(ServeConfig, Path(__file__).resolve().parents[2] / "configs/serve_tiny.yaml", [])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(value: float, size: int = 10) -> LoRARecord:
    return LoRARecord(np.full(size, value, np.float32))


def test_id_is_of_the_content_and_the_layout() -> None:
    a, b = np.zeros(4, np.float32), np.array([0, 0, 0, 1e-30], np.float32)
    assert content_id(a, "x") == content_id(a.copy(), "x")
    assert len({content_id(a, "x"), content_id(b, "x"), content_id(a, "y"), content_id(a[:3], "x")}) == 4


def test_library_forgets_what_expired_what_was_deleted_and_what_was_least_used() -> None:
    clock = Clock()
    library = LoRALibrary(max_bytes=80, ttl_seconds=10, clock=clock)  # room for two
    library.put("a", record(1))
    clock.now = 5
    library.put("b", record(2))
    library.get("a")
    library.put("c", record(3))  # b was used least recently
    with pytest.raises(ServingError, match="no LoRA"):
        library.get("b")
    assert library.stats() == {"loras": 2, "bytes": 80, "max_bytes": 80}
    clock.now = 10
    with pytest.raises(ServingError) as caught:
        library.get("a")
    assert caught.value.reason == "unknown_lora"
    assert library.get("c").vector_N[0] == 3
    assert library.delete("c")
    assert not library.delete("c")
    assert library.stats()["bytes"] == 0


def test_expired_loras_leave_memory_unasked() -> None:
    clock = Clock()
    library = LoRALibrary(max_bytes=1000, ttl_seconds=10, clock=clock)
    library.put("a", record(1))
    clock.now = 11
    library.sweep()
    assert library.stats()["loras"] == 0


def test_putting_again_renews_and_does_not_count_twice() -> None:
    clock = Clock()
    library = LoRALibrary(max_bytes=1000, ttl_seconds=10, clock=clock)
    library.put("a", record(1))
    clock.now = 9
    library.put("a", record(1))
    clock.now = 15
    assert library.get("a").nbytes == library.stats()["bytes"] == 40


# -- LoRAs on their way ------------------------------------------------------------------------------------------------


def test_who_asks_for_an_expected_one_waits_for_it() -> None:
    async def scene() -> LoRARecord:
        library = Library(CONFIG)
        await library.expect("a")
        asked = asyncio.create_task(library.get("a"))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await library.put("a", record(1))
        return await asyncio.wait_for(asked, 5)

    assert asyncio.run(scene()).vector_N[0] == 1


def test_deleted_on_its_way_it_never_arrives() -> None:
    async def scene() -> None:
        library = Library(CONFIG)
        await library.expect("a")
        asked = asyncio.create_task(library.get("a"))
        await asyncio.sleep(0.01)
        assert await library.delete("a")
        assert not await library.delete("a")
        with pytest.raises(ServingError, match="There is no LoRA"):
            await asyncio.wait_for(asked, 1)
        await library.put("a", record(1))
        with pytest.raises(ServingError):
            await library.get("a")
        assert (await library.stats())["loras"] == 0
        await library.expect("a")  # made anew, it is kept again
        await library.put("a", record(1))
        assert (await library.get("a")).vector_N[0] == 1

    asyncio.run(scene())


def test_one_that_never_comes_is_unknown_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(module, "EXPECTED_SECONDS", 0.2)

    async def scene() -> None:
        library = Library(CONFIG)
        await library.expect("a")
        with pytest.raises(ServingError, match="There is no LoRA"):
            await asyncio.wait_for(library.get("a"), 5)
        assert library._coming  # a deletion would still be remembered
        await asyncio.sleep(0.2)
        assert not library._coming
        await library.put("a", record(1))  # late, but it came
        assert (await library.get("a")).vector_N[0] == 1

    asyncio.run(scene())


class SlowLibrary(Library):
    """`put` takes a while, as across processes."""

    async def put(self, lora_id: str, record: LoRARecord) -> None:
        await asyncio.sleep(0.2)
        await super().put(lora_id, record)


def test_decoder_answers_before_the_library_has_the_vector() -> None:
    async def scene() -> None:
        library = SlowLibrary(CONFIG)
        decoder = Decoder(CONFIG, library)
        model = decoder._stage.models.current
        code = Code(np.zeros(model.code_size, np.float32), decoder._stage.models.current_id)
        done, _ = await decoder.decode(DecodeTask(code, 1.0, "vector"), deadline=float("inf"))
        assert done.file
        assert (await library.stats())["loras"] == 0
        kept = await library.get(done.lora_id)
        assert content_id(kept.vector_N, model.layout.layout_id) == done.lora_id

    asyncio.run(scene())
