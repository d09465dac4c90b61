"""Laws of the endpoint's stages, without Ray and HTTP: the running batch, the batcher."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_pipeline import tiny_pipeline

from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.rendering import render
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.serving.batcher import Batcher, Timing
from lora_diffusion.serving.engine import Picture, RenderEngine
from lora_diffusion.serving.errors import ServingError
from lora_diffusion.serving.messages import Progress, deadline_in
from lora_diffusion.serving.renderer import AsyncRenderer, Drawn

SOON = 60.0


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(tiny_pipeline())


@pytest.fixture(scope="module")
def layout(base: BaseModel) -> LoRALayout:
    return LoRALayout.from_unet(base.unet)


def people(layout: LoRALayout, count: int) -> list[np.ndarray]:
    return list((0.3 * np.random.default_rng(0).standard_normal((count, layout.size))).astype(np.float32))


def mixed(layout: LoRALayout) -> list[Picture]:
    """Everybody different: person, prompt, negative prompt, seed, guidance, steps."""
    a, b, c, d = people(layout, 4)
    return [
        Picture(a, "a b", "", 1, 3.0, 3),
        Picture(b, "c", "d", 2, 1.0, 5),
        Picture(c, "e f g", "", 3, 7.5, 4),
        Picture(d, "h", "i", 4, 2.0, 3),
        Picture(a, "h", "i", 4, 2.0, 5),
    ]


def drawn(engine: RenderEngine, pictures: Sequence[Picture]) -> list[np.ndarray]:
    rows = engine.admit(list(pictures))
    while engine.rows:
        engine.advance()
    return [row.pixels_HWC for row in rows if row.pixels_HWC is not None]


def assert_same_picture(a: np.ndarray, b: np.ndarray) -> None:
    """To float error: a grey level of 256 may round to its neighbour."""
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


# -- the running batch ---------------------------------------------------------------------------------------------------


def test_picture_is_the_same_alone_as_in_company(base: BaseModel, layout: LoRALayout) -> None:
    engine = RenderEngine(base, layout)
    together = drawn(engine, mixed(layout))
    assert len(together) == 5
    for picture, expected in zip(mixed(layout), together, strict=True):
        assert_same_picture(drawn(engine, [picture])[0], expected)


def test_everything_that_a_picture_is_asked_for_matters(base: BaseModel, layout: LoRALayout) -> None:
    a, b = people(layout, 2)
    engine = RenderEngine(base, layout)
    reference = Picture(a, "a", "", 1, 3.0, 3)
    others = [
        Picture(b, "a", "", 1, 3.0, 3),
        Picture(a, "z y", "", 1, 3.0, 3),
        Picture(a, "a", "z y", 1, 3.0, 3),
        Picture(a, "a", "", 2, 3.0, 3),
        Picture(a, "a", "", 1, 9.0, 3),
        Picture(a, "a", "", 1, 3.0, 6),
    ]
    first, *rest = drawn(engine, [reference, *others])
    for other in rest:
        assert np.abs(other.astype(int) - first.astype(int)).max() > 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_engine_draws_what_render_draws(prediction_type: str, clip: bool) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(prediction_type=prediction_type, clip_sample=clip)
    base = BaseModel.from_pipeline(pipe)
    layout = LoRALayout.from_unet(base.unet)
    (vector,) = people(layout, 1)
    ours = drawn(RenderEngine(base, layout), [Picture(vector, "a b", "c", 5, 3.0, 4)])[0]
    theirs = render(
        base,
        vector[None],
        ["a b"],
        [5],
        bank=LoRABank(base.unet, layout),
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt="c",
    )[0]
    assert_same_picture(ours, theirs)


def test_pictures_join_and_leave_a_batch_under_way(base: BaseModel, layout: LoRALayout) -> None:
    engine = RenderEngine(base, layout)
    pictures = mixed(layout)
    alone = [drawn(engine, [picture])[0] for picture in pictures]
    rows = engine.admit(pictures[:2])
    engine.advance()
    rows += engine.admit(pictures[2:])
    engine.advance()
    engine.drop([rows[3]])
    while engine.rows:
        engine.advance()
    assert rows[3].pixels_HWC is None
    for i in (0, 1, 2, 4):
        pixels = rows[i].pixels_HWC
        assert pixels is not None
        assert_same_picture(pixels, alone[i])


def test_vector_of_another_layout_is_refused_and_the_batch_goes_on(base: BaseModel, layout: LoRALayout) -> None:
    engine = RenderEngine(base, layout)
    engine.admit(mixed(layout)[:1])
    with pytest.raises(ValueError, match="layout"):
        engine.admit([Picture(np.zeros(3, np.float32), "a")])
    assert len(engine.rows) == 1


async def all_events(renderer: AsyncRenderer, pictures: Sequence[Picture], seconds: float = SOON) -> list[Any]:
    return [event async for event in renderer.draw(pictures, time.monotonic() + seconds)]


def test_request_gets_progress_pictures_and_timing(base: BaseModel, layout: LoRALayout) -> None:
    async def scenario() -> list[Any]:
        renderer = AsyncRenderer(RenderEngine(base, layout))
        first, _ = await asyncio.gather(
            all_events(renderer, mixed(layout)[:2]), all_events(renderer, mixed(layout)[2:])
        )
        await renderer.close()
        return first

    events = asyncio.run(scenario())
    assert sorted(event.index for event in events if isinstance(event, Drawn)) == [0, 1]
    steps = [event.done for event in events if isinstance(event, Progress)]
    assert steps == sorted(steps)
    assert steps[-1] < 8  # 3 + 5: the last step gives pictures
    assert isinstance(events[-1], Timing)
    assert events[-1].batch_size == 5


def test_cancelled_request_leaves_the_batch(base: BaseModel, layout: LoRALayout) -> None:
    async def scenario() -> int:
        engine = RenderEngine(base, layout)
        renderer = AsyncRenderer(engine)
        endless = [Picture(people(layout, 1)[0], "a", num_inference_steps=1000)] * 4
        started = asyncio.Event()

        async def watch() -> None:
            async for _ in renderer.draw(endless, time.monotonic() + SOON):
                started.set()

        task = asyncio.create_task(watch())
        await started.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await all_events(renderer, mixed(layout)[:1])
        await renderer.close()
        return len(engine.rows)

    assert asyncio.run(scenario()) == 0


def test_late_request_leaves_the_batch_and_is_told(base: BaseModel, layout: LoRALayout) -> None:
    async def scenario() -> int:
        engine = RenderEngine(base, layout)
        renderer = AsyncRenderer(engine)
        with pytest.raises(ServingError) as caught:
            await all_events(renderer, [Picture(people(layout, 1)[0], "a", num_inference_steps=1000)], seconds=0.3)
        assert caught.value.reason == "deadline_exceeded"
        await all_events(renderer, mixed(layout)[:1])
        await renderer.close()
        return len(engine.rows)

    assert asyncio.run(scenario()) == 0


def test_pictures_beyond_the_queue_are_refused_at_once(base: BaseModel, layout: LoRALayout) -> None:
    async def scenario() -> list[Any]:
        renderer = AsyncRenderer(RenderEngine(base, layout), max_rows=2, max_waiting=4)
        pictures = mixed(layout)[:2]
        outcomes = await asyncio.gather(*(all_events(renderer, pictures) for _ in range(4)), return_exceptions=True)
        await renderer.close()
        return outcomes

    outcomes = asyncio.run(scenario())
    refused = [outcome for outcome in outcomes if isinstance(outcome, ServingError)]
    assert [error.reason for error in refused] == ["overloaded", "overloaded"]
    assert sum(isinstance(outcome, list) for outcome in outcomes) == 2


LONE_SURROGATE = "a \ud83d b"
POISONS: dict[str, dict[str, Any]] = {
    "surrogate in the prompt": {"prompt": LONE_SURROGATE},
    "surrogate in the negative prompt": {"negative_prompt": LONE_SURROGATE},
    "no prompt": {"prompt": None},
    "number for a prompt": {"prompt": 7},
    "bytes for a prompt": {"prompt": b"a"},
    "no negative prompt": {"negative_prompt": None},
    "vector of another layout": {"vector_N": np.zeros(3, np.float32)},
    "empty vector": {"vector_N": np.zeros(0, np.float32)},
    "matrix": {"vector_N": np.zeros((2, 2), np.float32)},
    "no vector": {"vector_N": None},
    "words for a vector": {"vector_N": np.array(["a"])},
    "no steps": {"num_inference_steps": 0},
    "negative steps": {"num_inference_steps": -1},
    "more steps than there are": {"num_inference_steps": 5000},
    "half a step": {"num_inference_steps": 2.5},
    "huge seed": {"seed": 2**70},
    "negative seed": {"seed": -(2**70)},
    "word for a seed": {"seed": "x"},
    "word for guidance": {"guidance_scale": "x"},
    "no guidance": {"guidance_scale": None},
}


@pytest.mark.parametrize("poison", POISONS)
def test_what_one_request_makes_raise_ends_that_request_alone(base: BaseModel, layout: LoRALayout, poison: str) -> None:
    async def scenario() -> list[Any]:
        renderer = AsyncRenderer(RenderEngine(base, layout))
        good = mixed(layout)[:3]
        bad = replace(mixed(layout)[3], **POISONS[poison])
        requests = [all_events(renderer, pictures) for pictures in ([good[0]], [good[1]], [good[2], bad], [good[2]])]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        await renderer.close()
        return outcomes

    first, second, broken, third = asyncio.run(scenario())
    assert isinstance(broken, Exception)
    for events, alone in zip((first, second, third), mixed(layout)[:3], strict=True):
        (picture,) = [event for event in events if isinstance(event, Drawn)]
        assert_same_picture(picture.pixels_HWC, drawn(RenderEngine(base, layout), [alone])[0])


def test_values_that_are_not_finite_spoil_nobody_elses_picture(base: BaseModel, layout: LoRALayout) -> None:
    a, b = people(layout, 2)
    engine = RenderEngine(base, layout)
    spoiled = [
        Picture(np.full_like(a, np.nan), "a", "", 1, 3.0, 3),
        Picture(np.full_like(a, 3e38), "a", "", 1, 3.0, 3),
        Picture(b, "a", "", 1, float("nan"), 3),
        Picture(b, "a", "", 1, float("inf"), 3),
    ]
    good = Picture(a, "a b", "c", 5, 2.0, 4)
    assert_same_picture(drawn(engine, [*spoiled, good])[-1], drawn(engine, [good])[0])


# -- the batcher ---------------------------------------------------------------------------------------------------------


class Slow:
    """Doubles numbers, as many at a time as it is given; waits for `go` first."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.go.wait(10)
        return [ValueError("odd one out") if item < 0 else 2 * item for item in items]


def with_batcher(scenario: Callable[[Batcher[int, int], Slow], Any], **options: Any) -> Any:
    async def run() -> Any:
        work = Slow()
        return await scenario(Batcher("slow", work, **options), work)

    return asyncio.run(run())


def later() -> float:
    return time.monotonic() + SOON


def test_what_waits_while_a_batch_runs_is_the_next_batch() -> None:
    async def scenario(batcher: Batcher[int, int], work: Slow) -> list[tuple[int, Timing]]:
        first = asyncio.create_task(batcher(1, later()))
        while not work.batches:
            await asyncio.sleep(0.01)
        rest = [asyncio.create_task(batcher(i, later())) for i in (2, 3, 4, 5)]
        await asyncio.sleep(0.05)
        work.go.set()
        answers = await asyncio.gather(first, *rest)
        assert work.batches == [[1], [2, 3, 4], [5]]
        return answers

    answers = with_batcher(scenario, max_batch_size=3)
    assert [value for value, _ in answers] == [2, 4, 6, 8, 10]
    assert [timing.batch_size for _, timing in answers] == [1, 3, 3, 3, 1]
    assert answers[1][1].wait_seconds >= 0.04


def test_error_of_one_item_reaches_its_caller_alone() -> None:
    async def scenario(batcher: Batcher[int, int], work: Slow) -> list[Any]:
        work.go.set()
        return await asyncio.gather(*(batcher(i, later()) for i in (1, -1, 2)), return_exceptions=True)

    good, bad, also_good = with_batcher(scenario)
    assert (good[0], also_good[0]) == (2, 4)
    assert isinstance(bad, ValueError)


def test_what_one_item_makes_raise_reaches_its_caller_alone() -> None:
    def work(items: Sequence[int]) -> list[int]:
        if -2 in items:
            return []  # as wrong as raising
        return [10 // item for item in items]

    async def scenario() -> list[Any]:
        batcher: Batcher[int, int] = Batcher("divides", work)
        return await asyncio.gather(*(batcher(i, later()) for i in (1, 0, 2, -2, 5)), return_exceptions=True)

    one, zero, two, none, five = asyncio.run(scenario())
    assert (one[0], two[0], five[0]) == (10, 5, 2)
    assert isinstance(zero, ZeroDivisionError)
    assert isinstance(none, RuntimeError)


def test_a_deadline_is_as_far_away_on_another_machine_whatever_its_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pickle.dumps({"until": deadline_in(60)})
    monkeypatch.setattr(time, "monotonic", lambda: 12_345.0)
    monkeypatch.setattr(time, "time", lambda: -1e9)
    assert pickle.loads(sent)["until"] == pytest.approx(12_405, abs=1)


def test_cancelled_and_late_requests_are_never_worked_on() -> None:
    async def scenario(batcher: Batcher[int, int], work: Slow) -> None:
        first = asyncio.create_task(batcher(1, later()))
        while not work.batches:
            await asyncio.sleep(0.01)
        cancelled = asyncio.create_task(batcher(2, later()))
        late = asyncio.create_task(batcher(3, time.monotonic() + 0.02))
        kept = asyncio.create_task(batcher(4, later()))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        work.go.set()
        assert (await first)[0] == 2
        assert (await kept)[0] == 8
        with pytest.raises(ServingError, match="time was up"):
            await late
        assert work.batches == [[1], [4]]

    with_batcher(scenario)


def test_full_queue_refuses_at_once() -> None:
    async def scenario(batcher: Batcher[int, int], work: Slow) -> list[Any]:
        tasks = [asyncio.create_task(batcher(i, later())) for i in range(5)]
        await asyncio.sleep(0.05)
        refused = [task for task in tasks if task.done()]
        work.go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.exception().reason for task in refused] == [  # type: ignore[union-attr]
            outcome.reason for outcome in outcomes if isinstance(outcome, ServingError)
        ]
        return outcomes

    outcomes = with_batcher(scenario, max_waiting=3, max_batch_size=1)
    assert sum(isinstance(outcome, ServingError) for outcome in outcomes) == 2


def test_stages_work_in_a_second_event_loop(base: BaseModel, layout: LoRALayout) -> None:
    work = Slow()
    work.go.set()
    batcher: Batcher[int, int] = Batcher("slow", work)
    renderer = AsyncRenderer(RenderEngine(base, layout))
    for _ in range(2):  # as in a script that calls `asyncio.run` twice
        assert asyncio.run(asyncio.wait_for(batcher(1, later()), 10))[0] == 2
        events = asyncio.run(asyncio.wait_for(all_events(renderer, mixed(layout)[:1]), SOON))
        assert any(isinstance(event, Drawn) for event in events)


def test_who_leaves_while_it_is_worked_on_takes_no_answer_from_the_others() -> None:
    async def scenario(batcher: Batcher[int, int], work: Slow) -> None:
        leaves, stays = (asyncio.create_task(batcher(i, later())) for i in (1, 2))
        while not work.batches:
            await asyncio.sleep(0.01)
        leaves.cancel()
        work.go.set()
        assert (await asyncio.wait_for(stays, 10))[0] == 4
        assert work.batches == [[1, 2]]
        assert (await asyncio.wait_for(batcher(3, later()), 10))[0] == 6

    with_batcher(scenario)
