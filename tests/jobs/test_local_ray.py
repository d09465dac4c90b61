"""Nothing waits without a word for machines that are not there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_diffusion.jobs import local_ray
from lora_diffusion.jobs.local_ray import Need, find_missing, make_room

CPU, GPU = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}
EMBED = Need("embedding", "workers.embed_cpus", 1.0, count=2)
TUNE = Need("fine-tuning", "workers.finetune_gpus", 1.0, 1.0)
TRAIN = Need("training", "workers.num_workers", 4.0, 1.0, 3)


def test_needs_find_room_machine_by_machine() -> None:
    for needs, machines, missing in (
        ([EMBED], [CPU], None),
        ([EMBED, TUNE], [CPU], TUNE),
        ([EMBED, TUNE], [CPU, GPU], None),
        ([EMBED, TUNE], [GPU], None),
        ([TRAIN], [GPU] * 3, None),
        ([TRAIN], [GPU] * 2, TRAIN),
        ([TRAIN], [{"CPU": 64.0}, {"CPU": 3.0, "GPU": 8.0}], TRAIN),  # the CPUs are not where the GPUs are
        ([Need("training", "workers.cpus", 3.0)], [{"CPU": 2.0}] * 2, Need("training", "workers.cpus", 3.0)),
        ([Need("scoring", "worker_cpus", 0.9), Need("embedding", "embed_cpus", 0.1)], [{"CPU": 1.0}], None),
        ([Need("idle", "keys", 0.0)], [], None),
        ([EMBED], [], EMBED),
    ):
        assert find_missing(needs, machines) == missing, (needs, machines)


@pytest.mark.ray
def test_what_can_never_be_had_is_refused_with_the_key_to_change(ray_local: None) -> None:
    sentence = (
        "fine-tuning wants 1 CPU and 1 GPU (workers.finetune_gpus); this Ray has 8 CPUs and 0 GPUs on 1 machine, and no "
        "autoscaler that could bring more. Ask for less with workers.finetune_gpus, or add machines to this Ray"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make_room([EMBED, TUNE], 0.0)
    make_room([EMBED], 0.0)


@pytest.mark.ray
def test_where_an_autoscaler_may_help_a_line_says_what_is_waited_for(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_ray, "_may_grow", lambda: True)
    make_room([TRAIN], 0.0)
    said = capsys.readouterr().out
    assert "training wants 4 CPUs and 1 GPU for each of 3 workers (workers.num_workers); this Ray has 8 CPUs" in said
    assert "waiting for its autoscaler" in said


def test_a_ray_that_a_busy_machine_starts_too_slowly_is_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[str] = []

    def init(**options: Any) -> None:
        tries.append(options["address"])
        if len(tries) < 3:
            raise Exception(
                "The current node timed out during startup. This could happen because some of the raylet failed"
            )

    monkeypatch.setattr(local_ray.ray, "init", init)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    local_ray._init("local", {})
    assert tries == ["local"] * 3
    assert capsys.readouterr().out.count("Once more") == 2
    tries.clear()
    monkeypatch.setattr(
        local_ray.ray, "init", lambda **options: (_ for _ in ()).throw(Exception("timed out during startup"))
    )
    with pytest.raises(Exception, match="timed out"):
        local_ray._init("local", {})
