#!/usr/bin/env python
"""Render synthetic people into a folder: photos, captions, attributes. Run it again to go on after an interruption.

jobs/world/make_faces.py --people 20000:20040 --views 8 --out demo/photos
ray job submit --working-dir . -- jobs/world/make_faces.py --people 20000:80000 --out s3://bucket/faces --ray-address auto
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `ray job submit` runs this file from elsewhere

import ray
import ray.data

from lora_diffusion.jobs.local_ray import connect
from lora_diffusion.storage import StoreError
from lora_diffusion.world.people.dataset import TABLE, FacesConfig, FacesFolder, FacesWriter


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        run(args)
    except (ValueError, StoreError) as error:
        sys.exit(f"make_faces: {error}")
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError | ray.exceptions.UserCodeException) and cause.__cause__:
            cause = cause.__cause__
        if not isinstance(cause, StoreError | ImportError):
            raise
        sys.exit(f"make_faces: {cause}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=people, required=True, metavar="FIRST:END", help="numbers, END excluded")
    parser.add_argument("--out", required=True, metavar="URI", help="local folder or s3://bucket/prefix")
    parser.add_argument("--views", type=int, default=8, help="photos of each person (default 8)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default 64)")
    parser.add_argument(
        "--ray-address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="a running Ray: auto or HOST:PORT (default: RAY_ADDRESS, or else start one on this machine)",
    )
    return parser.parse_args(arguments)


def people(text: str) -> range:
    first, separator, end = text.partition(":")
    if not (separator and first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END with FIRST < END, for example 20000:20040")
    return range(int(first), int(end))


def run(args: argparse.Namespace) -> None:
    config = FacesConfig(views=args.views, size=args.size)
    folder = FacesFolder(args.out, config)
    missing = folder.missing(args.people)
    done = len(args.people) - len(missing)
    print(f"{len(args.people)} people, {done} of them done: {len(missing) * args.views} photos to draw", flush=True)
    if missing:
        draw(missing, FacesWriter(args.out, config), args.ray_address)
    table = folder.finish()
    print(f"{len(table)} photos in {args.out}, described in {args.out.rstrip('/')}/{TABLE}")


def draw(missing: list[int], writer: FacesWriter, ray_address: str) -> None:
    """One row, one block, one Ray task; prints progress as the results come in, in whatever order."""
    connect(ray_address)
    # Several tasks for every CPU, each of less than a minute: that is the most that a kill loses.
    people_per_task = max(1, min(20, len(missing) // (4 * int(ray.cluster_resources().get("CPU", 1)))))
    tasks = [missing[i : i + people_per_task] for i in range(0, len(missing), people_per_task)]
    rows = ray.data.from_items([{"numbers": numbers} for numbers in tasks], override_num_blocks=len(tasks))
    start, drawn, photos, told = time.monotonic(), 0, 0, 0.0
    for result in rows.map(writer, num_cpus=1).iter_batches(batch_size=None, prefetch_batches=0):
        drawn += int(result["people"].sum())
        photos += int(result["photos"].sum())
        seconds = time.monotonic() - start
        if seconds - told >= 5 or drawn == len(missing):
            left = seconds / drawn * (len(missing) - drawn)
            print(f"{drawn}/{len(missing)} people, {photos / seconds:.1f} photos/s, {left:.0f} s left", flush=True)
            told = seconds


if __name__ == "__main__":
    main()
