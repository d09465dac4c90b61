"""What it costs to keep a LoRA in memory, in a Redis, in a folder and in a bucket: put, get, and photo -> LoRA file around it.

    python benchmarks/library.py            # a minute; Redis and S3 server are those of the tests, on this machine

One request at a time, the stores by turns, so that whatever else the machine does meets all of them; the fastest tenth (p10) is what
it costs on a quiet one. Writes benchmarks/results/library.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result
from redis_server import RedisServer
from s3_server import BUCKET, new_server, running

ROOT = Path(__file__).resolve().parents[1]
PHOTO = (ROOT / "tests/data/faces/80000-0.png").read_bytes()


async def measure(stores: dict[str, str], repeats: int) -> dict[str, dict[str, float]]:
    from lora_diffusion.config import load_config
    from lora_diffusion.endpoint.local import local_stages
    from lora_diffusion.serving.config import ServeConfig
    from lora_diffusion.serving.library import open_library
    from lora_diffusion.serving.messages import Code, DecodeTask, LatentTask, LoRARecord, Owner
    from lora_diffusion.serving.services import Decoder

    config = load_config(ServeConfig, ROOT / "configs/serve_tiny.yaml", [])
    stages: dict[str, Any] = local_stages(config)
    libraries: dict[str, Any] = {}
    for name, store in stores.items():
        ours = replace(config, library=replace(config.library, store=store, store_seconds=30.0))
        library = open_library(ours)
        libraries[name] = library, Decoder(ours, library)
        await library.ready()
    generator = np.random.default_rng(0)
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    async def timed(name: str, what: str, call: Any) -> Any:
        started = time.perf_counter()
        answer = await call
        times[name][what].append(1000 * (time.perf_counter() - started))
        return answer

    async def photo_to_lora(decoder: Decoder, seed: int) -> None:
        later = time.time() + 60
        found, _ = await stages["embedder"].detect(PHOTO, later)
        code, _ = await stages["denoiser"].sample(LatentTask(found.faces[0].embedding_C, seed), later)
        await decoder.decode(DecodeTask(code, None, "diffusers", Owner(token=str(seed))), later)

    for i in range(repeats):
        for name, (library, decoder) in libraries.items():
            code = Code(generator.standard_normal(512).astype(np.float32), "0" * 16)
            lora_id = generator.bytes(16).hex()
            await timed(name, "put", library.put(lora_id, LoRARecord(code, 0.5), "token"))
            await timed(name, "get", library.get(lora_id))
            await timed(name, "photo_to_lora", photo_to_lora(decoder, i))
    return {
        name: {f"{what}_{share}_ms": round(float(np.percentile(values[5:], at)), 2)
               for what, values in found.items() for share, at in (("p10", 10), ("p50", 50))}
        for name, found in times.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("redis", "s3"):
            (Path(folder) / name).mkdir()
        redis = RedisServer(Path(folder) / "redis")
        redis.start()
        try:
            with running(new_server(), Path(folder) / "s3"):
                stores = {"memory": "", "redis": redis.url, "folder": f"{folder}/loras", "s3": f"s3://{BUCKET}/loras"}
                result = asyncio.run(measure(stores, args.repeats))
        finally:
            redis.kill()
    print(*(f"{name}: {values}" for name, values in result.items()), sep="\n")
    write_result("library", {"repeats": args.repeats, "load_average": round(os.getloadavg()[0]), **result})


if __name__ == "__main__":
    main()
