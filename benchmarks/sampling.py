"""How to draw with a synthesiser: similarity of its LoRAs for other settings of `LatentSampling`.

    python benchmarks/sampling.py --synthesizer runs/tiny/training/synthesizer --draw 2,1,2.5,8 --draw 1,0,3.5,25

`--draw guidance,temperature,deviation,steps`; without any, what the folder recommends. On people of the corpus' split who are in no
corpus, not on held-out ones: those must not choose anything. One photo each, or so many as `--inputs` says, judged by the same other
photos: `--inputs 1 2 4`. What is settled may be measured on held-out people: `--first 80000 --people 64 --inputs 1 2 4 --name photos`.
Writes benchmarks/results/sampling.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result
from judge import Judge, embedders
from quality import ROOT, photos_of

from lora_diffusion.config import load_config
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.synthesis import Synthesizer


def setting(text: str) -> dict[str, Any]:
    names = ("guidance_scale", "temperature", "deviation_scale")
    *numbers, steps = text.split(",")
    return {**dict(zip(names, map(float, numbers), strict=True)), "num_inference_steps": int(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthesizer", nargs="+", default=["tiny"])
    parser.add_argument("--draw", type=setting, action="append", metavar="G,T,D,S")
    parser.add_argument("--inputs", type=int, nargs="+", default=[1], metavar="PHOTOS")
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--first", type=int, default=23_000)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--name", default="sampling", help="of the JSON below benchmarks/results")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(CorpusConfig, ROOT / "configs/tiny.yaml")
    maker, by = LoRAMaker(config), embedders(args.threads)
    people = [photos_of(args.first + i, args.photos, by["recogniser"]) for i in range(args.people)]
    judge = Judge(maker, config, people, by, max(args.inputs))
    rows = []
    for folder in args.synthesizer:
        synthesizer = Synthesizer.from_pretrained(folder)
        synthesizer.check_base(maker.base)
        for count, how in itertools.product(args.inputs, args.draw or [{}]):
            vectors_KN = synthesizer.from_embedding(judge.faces(count), **how)
            rows.append({"synthesizer": folder, "inputs": count, **how, **judge(vectors_KN)})
            print(rows[-1], flush=True)
    print(write_result(args.name, {"people": args.people, "first": args.first, "photos": args.photos, "rows": rows}))


if __name__ == "__main__":
    main()
