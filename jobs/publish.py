#!/usr/bin/env python
"""Make a trained synthesiser ready for others: how to draw with it, attribute directions for `edit`, half the size.

jobs/publish.py runs/tiny/training/synthesizer --out runs/tiny/published --draw guidance_scale=2 deviation_scale=2.5
jobs/publish.py s3://bucket/training/synthesizer --out face-loras --corpus s3://bucket/corpus --labels labels.parquet --no-neighbours

--labels: a Parquet file with `identity` and one column of numbers for each attribute (null: unknown), or `synthetic` for the
people of jobs/world/make_faces.py. Directions are fitted on what the synthesiser itself answers to the corpus' embeddings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_diffusion.corpus import CorpusReader
from lora_diffusion.storage import StoreError
from lora_diffusion.synthesis.publish import Labels, publish


def synthetic_labels(corpus: str) -> Labels:
    """What rendered people look like, from the numbers in their names."""
    from lora_diffusion.world.people import sample_person

    identities = CorpusReader(corpus).table(["identity"])["identity"].to_pylist()
    people = [sample_person(int(identity.removeprefix("person-"))) for identity in identities]
    return {person.name: person.traits.attributes() for person in people}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthesizer", help="folder or s3://...")
    parser.add_argument("--out", required=True, help="folder or s3://...")
    parser.add_argument("--draw", nargs="*", default=[], metavar="key=value", help="settings of LatentSampling")
    parser.add_argument("--corpus", help="folder or s3://... of the people with labels")
    parser.add_argument("--labels", help="Parquet file, or `synthetic`")
    parser.add_argument("--no-neighbours", action="store_true", help="leave out the corpus' embeddings: biometric data")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    args = parser.parse_args()
    try:
        published = publish(
            args.synthesizer,
            args.out,
            draw=dict(word.split("=", 1) for word in args.draw),
            corpus=args.corpus,
            labels=synthetic_labels(args.corpus) if args.labels == "synthetic" and args.corpus else args.labels,
            neighbours=not args.no_neighbours,
            dtype=getattr(torch, args.dtype),
        )
    except (ValueError, OSError, StoreError) as error:
        sys.exit(f"publish: {error}")
    if args.labels and published.directions is not None:
        told = zip(published.directions.names, published.directions.separation_A.tolist(), strict=True)
        print("correlation with the labels: " + ", ".join(f"{name} {value:.2f}" for name, value in told))
    print(f"published: {args.out}")


if __name__ == "__main__":
    main()
