"""The commands about files, `convert` and `verify`, and what all commands share."""

from __future__ import annotations

import argparse
from typing import Any

from lora_diffusion.places import SHIPPED, place, place_or_name
from lora_diffusion.storage import open_store

FORMATS = ("kohya", "diffusers", "peft", "vector")
FORMAT_HELP = "of the LoRA: kohya (default; ComfyUI, A1111, Forge, diffusers), diffusers, peft or vector (this package)"


class Refused(Exception):
    """Told to the user in one line."""


def add_convert(commands: Any) -> None:
    one = commands.add_parser("convert", help="a LoRA file of any program -> one for another program, or for a layout")
    one.set_defaults(run=convert)
    one.add_argument("source", type=place, metavar="LORA", help=".safetensors, a folder with one, also s3://...")
    one.add_argument("target", metavar="OUT", help="as source; peft's two files need a folder")
    one.add_argument("--format", choices=FORMATS, default="kohya", help=FORMAT_HELP)
    one.add_argument(
        "--base",
        metavar="MODEL",
        help="that the LoRA is for, a folder, a hub id, or sd1, sd2, sdxl: keeps all its layers and its rank (default: what the "
        "layers tell)",
    )
    one.add_argument(
        "--like", type=place_or_name, metavar="PLACE",
        help="instead of --base: bring it to the layout of this vector file, corpus or synthesiser",
    )  # fmt: skip
    one.add_argument("--partial", action="store_true", help="layers that the file does not describe are zero")
    one.add_argument("--ignore-extra", action="store_true", help="leave out what the layout has no place for")
    one.add_argument("--svd", action="store_true", help="cut a higher rank to the layout's")
    one.add_argument("--alpha", type=float, help="of a file that says none (default: its rank)")
    one.add_argument("--half", action="store_true", help="write float16: half the size, rounded")


def convert(args: argparse.Namespace) -> None:
    import torch

    from lora_diffusion.lora import formats

    if args.base and args.like:
        raise Refused("--base and --like each name a layout: give one of them")
    layout = layout_like(args.like) if args.like else formats.layout_of(args.source, empty_unet(args.base, args.source))
    loaded = formats.read(
        args.source, layout, partial=args.partial, ignore_extra=args.ignore_extra, svd=args.svd, alpha=args.alpha
    )
    metadata = formats.portable_metadata(args.source)
    metadata.setdefault("trigger", "")  # of somebody else's LoRA nothing is known
    dtype = torch.float16 if args.half else torch.float32
    written = formats.save(loaded.vector_N, layout, args.target, args.format, dtype=dtype, metadata=metadata)
    print(f"{written}  {args.format}, rank {layout.rank}, alpha {layout.alpha:g}, {len(layout.entries)} layers")
    for note in loaded.notes:
        print(note)


def add_verify(commands: Any) -> None:
    one = commands.add_parser(
        "verify",
        help="whether a corpus, a training run or a synthesiser is whole",
        description="Reads every byte of a corpus, a training run or a synthesiser, and names what is damaged, missing, foreign or "
        "of another recipe, and who is there although forgotten. Exit code 0: nothing is; 1: something is.",
    )
    one.set_defaults(run=verify)
    one.add_argument("uri", type=place_or_name, metavar="PLACE", help="a folder, s3://bucket/prefix, or tiny")
    one.add_argument(
        "--repair",
        action="store_true",
        help="remove what its job makes again (run that command after this one), and who was forgotten",
    )


def verify(args: argparse.Namespace) -> None:
    from lora_diffusion.verify import examine, repair

    findings = []
    for finding in examine(args.uri):
        findings.append(finding)
        print(f"{finding.kind}: {finding.name}: {finding.what}", flush=True)
    removed = repair(args.uri, findings) if args.repair else []
    for name in removed:
        print(f"removed: {name}")
    if args.repair and any(finding.kind == "forgotten" for finding in findings):
        print("who was forgotten is taken out of shards and failures")
    if removed:
        print("Run the command that made this place again: it makes what was removed")
    if findings:
        raise SystemExit(1)
    print(f"{args.uri} is whole")


def add_forget(commands: Any) -> None:
    one = commands.add_parser(
        "forget",
        help="a person leaves a corpus and the neighbours of synthesisers, and is not made again",
        description="Removes vector, embeddings, hashes, failures, name and statistics of one person; nobody else's vector changes. "
        "Killed anywhere, the same command ends it.",
    )
    one.set_defaults(run=forget)
    one.add_argument("identity", help="the name, as in column identity")
    one.add_argument("--corpus", type=place, required=True, metavar="FOLDER", help="or s3://...")
    one.add_argument(
        "--synthesizer",
        type=place,
        action="append",
        default=[],
        metavar="FOLDER",
        help="or s3://...; may be repeated",
    )


def forget(args: argparse.Namespace) -> None:
    from lora_diffusion.corpus.forget import forget as forget_person
    from lora_diffusion.jobs.claim import claimed
    from lora_diffusion.synthesis.forget import forget_neighbour

    with claimed(args.corpus, "forget"):
        whole = forget_person(open_store(args.corpus), args.identity)
    print(
        f"{args.corpus}: {args.identity} is gone" + ("" if whole else "; run its corpus job again, shards are missing")
    )
    for folder in args.synthesizer:
        rows = forget_neighbour(folder, args.corpus, args.identity)
        print(f"{folder}: {rows} neighbour{'s' * (rows != 1)} removed")
    print(
        "Yours to remove: the photos, data.cache of machines that trained, evaluations, backups, older versions in a bucket."
    )


def layout_like(uri: str) -> Any:
    """Of a vector file, a corpus, or a synthesiser. Raises ValueError if it is none of them."""
    from lora_diffusion.corpus import CorpusReader
    from lora_diffusion.lora.formats import read_layout
    from lora_diffusion.synthesis.synthesizer import Synthesizer

    if uri.lower().endswith(".safetensors"):
        return read_layout(uri)
    if uri in SHIPPED or not open_store(uri).exists("corpus.json"):
        return Synthesizer.from_pretrained(uri).layout
    return CorpusReader(uri).layout


def empty_unet(base: str | None, source: str) -> Any:
    """The UNet of a base model without its weights: names and shapes. None: of the family that the file's layers are of."""
    import torch
    from diffusers import UNet2DConditionModel

    from lora_diffusion.lora.formats import family_of
    from lora_diffusion.models.known_unets import FAMILIES, meta_unet
    from lora_diffusion.models.stable_diffusion import resolve_model

    family = base or family_of(source)
    if family in FAMILIES:
        return meta_unet(family)
    base = base or "tiny-sd"
    try:
        config = UNet2DConditionModel.load_config(resolve_model(base), subfolder="unet")
    except (OSError, ValueError) as error:
        raise Refused(
            f"no base model {base}: --base is a diffusers folder, a hub id, or {', '.join(FAMILIES)}"
        ) from error
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)
