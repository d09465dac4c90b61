"""Where the endpoint keeps LoRAs: bounded and forgetful."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion.config import load_config
from lora_diffusion.serving import kept
from lora_diffusion.serving import library as module
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.library import Library, LoRALibrary, content_id
from lora_diffusion.serving.messages import Code, DecodeTask, LoRARecord
from lora_diffusion.serving.services import Decoder

CONFIG = load_config(ServeConfig, Path(__file__).resolve().parents[2] / "configs/serve_tiny.yaml", [])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(value: float, size: int = 10) -> LoRARecord:
    return LoRARecord(vector_N=np.full(size, value, np.float32))


def test_id_is_of_the_content_and_the_layout() -> None:
    a, b = np.zeros(4, np.float32), np.array([0, 0, 0, 1e-30], np.float32)
    others = [
        (LoRARecord(vector_N=b), "x"),
        (LoRARecord(vector_N=a), "y"),
        (LoRARecord(vector_N=a[:3]), "x"),
        (LoRARecord(Code(a, "one")), "x"),
        (LoRARecord(Code(b, "one")), "x"),
        (LoRARecord(Code(a, "two")), "x"),
        (LoRARecord(Code(a, "one"), 0.0), "x"),  # the same vector for everybody
        (LoRARecord(Code(b, "one"), 0.0), "x"),
    ]
    ids = {content_id(LoRARecord(vector_N=a), "x"), *(content_id(record, layout) for record, layout in others)}
    assert len(ids) == 1 + len(others)
    assert content_id(LoRARecord(Code(a, "one", 0.5)), "x") == content_id(LoRARecord(Code(a.copy(), "one")), "x")


def test_library_forgets_what_expired_what_was_deleted_and_what_was_least_used() -> None:
    clock = Clock()
    library = LoRALibrary(max_bytes=80, ttl_seconds=10, clock=clock)  # room for two
    library.put("a", record(1))
    clock.now = 5
    library.put("b", record(2))
    library.get("a")
    third = record(3)
    library.put("c", third)  # b was used least recently
    with pytest.raises(ServingError, match="make room"):
        library.get("b")
    assert library.stats() == {"loras": 2, "bytes": 80, "max_bytes": 80}
    clock.now = 10
    with pytest.raises(ServingError) as caught:
        library.get("a")
    assert caught.value.reason == "unknown_lora"
    kept = library.get("c")
    assert kept.vector_N is third.vector_N
    assert kept.expires_in == 5
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


def test_putting_takes_no_longer_beside_many_others() -> None:
    """It walked all that were kept: 22 ms beside 100,000, in the process that answers everybody."""

    def seconds(others: int) -> float:
        library = LoRALibrary(max_bytes=10**9, ttl_seconds=3600)
        for i in range(others):
            library.put(f"{i}", record(1))
        times = []
        for _ in range(200):
            start = time.perf_counter()
            library.put("one", record(1))
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    assert seconds(30_000) < 10 * seconds(10)


def test_a_lora_stays_until_all_who_made_it_have_deleted_it() -> None:
    library = LoRALibrary(max_bytes=1000, ttl_seconds=10)
    for token in ("ada", "bob", "ada"):
        library.put("a", record(1), token)
    with pytest.raises(ServingError) as caught:
        library.delete("a", "eve")
    assert caught.value.reason == "not_yours"
    with pytest.raises(ServingError):
        library.delete("a")
    assert library.delete("a", "bob")
    with pytest.raises(ServingError):
        library.delete("a", "bob")
    assert library.get("a").nbytes == 40
    assert library.delete("a", "ada")
    assert library.stats()["bytes"] == 0
    with pytest.raises(ServingError, match="was deleted"):
        library.get("a")


def test_a_record_is_never_replaced_by_less() -> None:
    code = Code(np.ones(4, np.float32), "0" * 16)
    made, uploaded = LoRARecord(code, 0.5), record(1)
    for first, second in ((made, uploaded), (uploaded, made)):
        library = LoRALibrary(max_bytes=1000, ttl_seconds=10)
        library.put("a", first)
        library.put("a", second)
        kept = library.get("a")
        assert (kept.code, kept.deviation_scale) == (code, 0.5)
        assert np.array_equal(kept.vector_N, uploaded.vector_N)
        assert library.stats()["bytes"] == made.nbytes + uploaded.nbytes


def test_who_asks_for_one_that_is_gone_is_told_why() -> None:
    clock = Clock()
    library = LoRALibrary(max_bytes=40, ttl_seconds=10, clock=clock)
    library.put("evicted", record(1))
    library.put("deleted", record(2))
    library.delete("deleted")
    library.put("expired", record(3))
    clock.now = 11
    told = {}
    for lora_id in ("evicted", "deleted", "expired", "never"):
        with pytest.raises(ServingError) as caught:
            library.get(lora_id)
        told[lora_id] = str(caught.value)
    assert told == {
        "evicted": "This LoRA had to make room for newer ones. Make it again.",
        "deleted": "This LoRA was deleted. Make it again.",
        "expired": "This LoRA has expired. Make it again.",
        "never": "There is no LoRA with this id here. Make it again.",
    }
    library.put("expired", record(3))
    assert library.get("expired").nbytes == 40


def test_a_latent_of_another_length_ends_its_own_request_alone() -> None:
    """It was answered to all that were decoded with it."""
    decode = Decoder(CONFIG, Library(CONFIG))._stage
    good = Code(np.ones(decode.models.current.code_size, np.float32), decode.models.current_id)
    short, stale = Code(good.values_Z[:2], good.model_id), Code(good.values_Z, "0" * 16)
    answers = decode([DecodeTask(code, None) for code in (good, short, good, stale)])
    assert np.array_equal(answers[0], answers[2])
    assert "has 2 numbers" in str(answers[1])
    assert "belongs to synthesiser" in str(answers[3])


def test_of_those_that_are_gone_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    library = LoRALibrary(max_bytes=1000, ttl_seconds=10)
    for lora_id in "abc":
        library.put(lora_id, record(1))
        library.delete(lora_id)
    assert list(library._gone) == ["b", "c"]


def test_the_code_is_kept_and_makes_the_same_lora_again() -> None:
    async def scene() -> None:
        library = Library(CONFIG)
        decoder = Decoder(CONFIG, library)
        model = decoder._stage.models.current
        code = Code(np.ones(model.code_size, np.float32), decoder._stage.models.current_id)
        later = time.monotonic() + 60
        made, _ = await decoder.decode(DecodeTask(code, 0.5, "vector"), later)
        assert (await library.stats())["bytes"] == code.values_Z.nbytes
        vector_N = await decoder.vector(made.lora_id, None, later)
        assert content_id(LoRARecord(code, 0.5), model.layout.layout_id) == made.lora_id
        assert await decoder.file(made.lora_id, "vector", later) == made.file
        await library.delete(made.lora_id)
        kept = await decoder.vector(made.lora_id, LoRARecord(code, 0.5), later)  # whoever has the code needs no library
        assert np.array_equal(kept, vector_N)
        with pytest.raises(ServingError, match="was deleted"):
            await decoder.vector(made.lora_id, None, later)
        uploaded = await decoder.accept(made.file or b"")
        assert uploaded.lora_id == content_id(LoRARecord(vector_N=vector_N), model.layout.layout_id)
        with pytest.raises(ServingError, match="no latent"):
            await decoder.file(uploaded.lora_id, "latent", later)

    asyncio.run(scene())


def test_of_more_makers_than_are_remembered_the_last_may_delete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAKERS", 2)
    library = LoRALibrary(max_bytes=1000, ttl_seconds=10)
    for token in ("ada", "bob", "cyd"):
        library.put("a", record(1), token)
    with pytest.raises(ServingError):
        library.delete("a", "ada")
    assert library.delete("a", "cyd")
    assert library.delete("a", "bob")
    assert library.stats()["loras"] == 0


def test_what_has_expired_is_not_found_and_who_made_it_then_has_no_part_in_it() -> None:
    """Whatever the store: one that sweeps late still holds it."""
    there = kept.Kept(record(1), expires=10.0, tokens=(kept.hashed("ada"),))
    assert there.found(9.0).expires_in == 1
    with pytest.raises(ServingError, match="has expired"):
        there.found(10.0)
    for now, makers in ((9.0, ("ada", "bob")), (10.0, ("bob",))):
        assert kept.put_on(there, record(1), "bob", 20.0, now).tokens == tuple(map(kept.hashed, makers))
