#!/usr/bin/env python
"""Train the tiny world's detector and recognisers from nothing, export them for insightface, measure them.

    jobs/world/train_recogniser.py --work runs/recogniser                        # small: 400 people, minutes
    jobs/world/train_recogniser.py --work runs/full --people 3200 --minutes 15   # what is shipped
    jobs/world/train_recogniser.py --work runs/full --only measure               # figures of the shipped folders

Every stage (render, detector, a, b, known, measure) is skipped where its result lies in --work already; a training goes on
from its last epoch. Only people of their own split are trained on: base for A and the detector, recogniser-b for B;
figures are over held-out people.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from lora_diffusion.faces.known import FILE
from lora_diffusion.world.people import SPLITS
from lora_diffusion.world.recognisers.crops import aligned_crops
from lora_diffusion.world.recognisers.data import load_people, render_people
from lora_diffusion.world.recognisers.detector import FaceDetector
from lora_diffusion.world.recognisers.detector_training import DetectorTrainingConfig, train_detector
from lora_diffusion.world.recognisers.files import build_recogniser, load_recogniser, save_recogniser
from lora_diffusion.world.recognisers.known_faces import drawn_photos, measure_known
from lora_diffusion.world.recognisers.measurement import measure_detector, measure_recogniser, open_folder
from lora_diffusion.world.recognisers.network import RecogniserConfig
from lora_diffusion.world.recognisers.onnx_export import export_detector, export_recogniser
from lora_diffusion.world.recognisers.training import RecogniserTrainer, TrainingConfig

STAGES = ("render", "detector", "a", "b", "known", "measure")
FOLDERS = {"a": "recogniser", "b": "recogniser-b"}
ARCHITECTURES = {"a": "resnet", "b": "patches"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, checkpoints and results")
    parser.add_argument("--people", type=int, default=400, help="training people of each recogniser (default 400)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out people measured on (default 100)")
    parser.add_argument("--views", type=int, default=10, help="photos of a person (default 10)")
    parser.add_argument("--hair-views", type=int, default=2, help="further photos with other hair (default 2)")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time of each recogniser (default 4)")
    parser.add_argument("--detector-steps", type=int, default=2500, help="batches of 48 canvases (default 2500)")
    parser.add_argument(
        "--canvases", type=int, default=1000, help="canvases of 0, 1, 2 faces measured on (default 1000)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that render (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads that train (default 2)")
    parser.add_argument("--no-bf16", action="store_true", help="train in float32: CPUs without AVX512-BF16 or AMX")
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage only (may be repeated)")
    args = parser.parse_args(arguments)
    for name in ("people", "held_out"):
        if not 12 <= getattr(args, name) <= 10_000:
            parser.error(f"--{name.replace('_', '-')} is a number of people, 12 to 10000, got {getattr(args, name)}")
    if args.views < 3:
        parser.error(f"--views is at least 3, got {args.views}")
    return args


def people_of(split: str, count: int) -> range:
    return range(SPLITS[split].start, SPLITS[split].start + count)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "render": render,
        "detector": detector,
        "a": recogniser,
        "b": recogniser,
        "known": known,
        "measure": measure,
    }
    for stage in args.only or STAGES:
        started = time.monotonic()
        stages[stage](args, stage)
        print(f"{stage}: done in {time.monotonic() - started:.0f} s", flush=True)


def render(args: argparse.Namespace, _: str) -> None:
    shards = str(args.work / "shards")
    for split, count in (("held-out", args.held_out), ("base", args.people), ("recogniser-b", args.people)):
        # Held-out people need five gallery photos and some probes with other hair.
        views = args.views + 4 if split == "held-out" else args.views
        hair = max(2, args.hair_views) if split == "held-out" else args.hair_views
        render_people(shards, people_of(split, count), views, hair, args.workers)
        print(f"rendered {count} people of {split}", flush=True)


def detector(args: argparse.Namespace, _: str) -> None:
    target = args.work / "det.onnx"
    if target.exists():
        return
    data = load_people(str(args.work / "shards"), people_of("base", args.people)).labelled()
    torch.manual_seed(0)
    model = train_detector(FaceDetector(), data, DetectorTrainingConfig(steps=args.detector_steps), print_line)
    export_detector(model, target)


def recogniser(args: argparse.Namespace, which: str) -> None:
    folder = args.work / FOLDERS[which]
    if (folder / "rec.onnx").exists():
        return
    split, seed = ("base", 1) if which == "a" else ("recogniser-b", 2)
    kinds = ("as-usual", "other-hair")
    data = load_people(str(args.work / "shards"), people_of(split, args.people), kinds)
    rng = np.random.default_rng(5)
    variants = [aligned_crops(data.photos, data.points, rng, 0.8, share) for share in (0.0, 0.7)]
    torch.manual_seed(seed)
    config = RecogniserConfig(architecture=ARCHITECTURES[which])
    model = build_recogniser(config)
    training = TrainingConfig(max_seconds=60 * args.minutes, bf16=not args.no_bf16)
    trainer = RecogniserTrainer(model, np.stack(variants), data.person, training)
    checkpoint = args.work / f"recogniser-{which}.checkpoint.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"goes on after epoch {trainer.epoch}", flush=True)
    trainer.train(checkpoint, print_line)
    folder.mkdir(exist_ok=True)
    save_recogniser(model, config, args.work / f"recogniser-{which}.safetensors")
    export_recogniser(load_recogniser(args.work / f"recogniser-{which}.safetensors"), folder / "rec.onnx")


def known(args: argparse.Namespace, _: str) -> None:
    folder = args.work / FOLDERS["a"]
    if not (folder / "rec.onnx").exists() or (folder / FILE).exists():
        return
    photos = drawn_photos(min(1.0, args.people / 3200))
    try:
        measure_known(with_detector(args, folder), ARCHITECTURES["a"], photos)
    except ValueError as error:
        print(f"what recogniser A knows stays unknown: {error}", flush=True)


def with_detector(args: argparse.Namespace, folder: Path) -> Path:
    if (args.work / "det.onnx").exists():
        shutil.copyfile(args.work / "det.onnx", folder / "det.onnx")
    return folder


def measure(args: argparse.Namespace, _: str) -> None:
    shards, held_out = str(args.work / "shards"), people_of("held-out", args.held_out)
    for folder in (args.work / name for name in FOLDERS.values()):
        if not (folder / "rec.onnx").exists():
            continue
        embedder = open_folder(with_detector(args, folder))
        figures = {"detector": measure_detector(embedder, shards, held_out, args.canvases)}
        figures |= measure_recogniser(embedder, shards, held_out)
        (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(folder.name, json.dumps(figures, indent=1), flush=True)


def print_line(figures: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
