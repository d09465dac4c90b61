"""Fine-tunes eight people in a process whose memory the kernel limits to what three of them need.

python little_memory.py WORLD, with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed leaves the process
Prints JSON: how many were made together, the largest difference of a LoRA from those made without the limit, what is told.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import numpy as np
from factory_world import make_config

from lora_diffusion.corpus import Person
from lora_diffusion.factory import planning
from lora_diffusion.factory.embed import PersonEmbedder
from lora_diffusion.factory.errors import DeviceError
from lora_diffusion.factory.make import LoRAMaker


def bytes_of(name: str) -> int:
    """Bytes of VmSize, VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(world: str) -> None:
    config = make_config(
        Path(world),
        people=f"{world}/people",
        output="nowhere",
        people_per_group=8,
        finetune={"steps": 2, "batch_size": 48},
        score={"prompts": []},
    )
    embed = PersonEmbedder(config, 16)
    people = [embed(i, person) for i, person in enumerate(planning.list_people(config).values())]
    maker = LoRAMaker(config)
    maker(people[:1])  # all that is loaded once
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    whole = maker(people)
    each = (bytes_of("VmHWM") - before) / len(people)
    assert maker.together == 8, "all of them fit where nothing limits them"
    assert not maker.note
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (int(bytes_of("VmSize") + 3 * each), hard))
    halves = maker(people)
    told = maker.note
    resource.setrlimit(resource.RLIMIT_AS, (bytes_of("VmSize") + 1_000_000, hard))
    try:
        maker(people[:1])
        refused = ""
    except DeviceError as error:
        refused = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert all(isinstance(answer, Person) for answer in [*whole, *halves])
    far = max(float(np.abs(a.vector - b.vector).max()) for a, b in zip(whole, halves, strict=True))  # type: ignore[union-attr]
    print(json.dumps({"together": maker.together, "far": far, "told": told, "refused": refused, "each_mb": each / 1e6}))


if __name__ == "__main__":
    main(sys.argv[1])
