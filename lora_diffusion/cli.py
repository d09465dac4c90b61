"""The command `lora-diffusion`; nothing imports it. The commands of jobs are those of lora_diffusion/jobs/run.py.

lora-diffusion personalize ada.jpg --prompt 'a photo of sks person, forest background' --out ada
lora-diffusion personalize ada.jpg ada2.jpg --out ada --num-images 0      # the LoRA only
lora-diffusion personalize ada.jpg --prompt '...' --out ada --server http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion import __version__
from lora_diffusion.cli_files import FORMAT_HELP, FORMATS, Refused, add_convert, add_forget, add_verify
from lora_diffusion.extras import MissingExtra, needs
from lora_diffusion.jobs.run import JOBS, command, help_of, stopped
from lora_diffusion.jobs.run import main as run_here
from lora_diffusion.places import local_place, place
from lora_diffusion.storage import open_store

PROMPT = "a photo of sks person"


@dataclass(frozen=True)
class Picture:
    """The bytes of a PNG file, its seed, and the cosine of the drawn face with the photo's."""

    data: bytes
    seed: int
    similarity: float | None


@dataclass(frozen=True)
class Outcome:
    """lora: bytes of the file (a zip for peft)."""

    lora: bytes
    seed: int | None
    pictures: list[Picture]


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in JOBS:
        job = command if arguments is None else run_here
        sys.exit(job(words[0], words[1:]))
    args = parse(words)
    try:
        with needs("torch"):
            args.run(args)
    except (Refused, MissingExtra, ValueError, OSError) as error:
        # the library and the API call it faces=largest
        sys.exit(f"lora-diffusion: {str(error).replace('faces=largest', '--largest-face')}")
    except KeyboardInterrupt:
        sys.exit(stopped("lora-diffusion"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora-diffusion", description="One photo of a face in, a LoRA for Stable Diffusion out."
    )
    parser.add_argument("--version", action="version", version=f"lora-diffusion {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for job in JOBS:
        commands.add_parser(job, help=help_of(JOBS[job]).partition("\n")[0])
    add_convert(commands)
    add_verify(commands)
    add_forget(commands)
    one = commands.add_parser(
        "personalize",
        help="photos of one person -> LoRA and pictures",
        description=__doc__.partition("\n\n")[2] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(run=personalize)
    one.add_argument("photos", nargs="+", type=file, metavar="PHOTO", help="of one person; several are averaged")
    one.add_argument("--prompt", type=words, default=PROMPT, help=f"call the person `sks person` (default: {PROMPT})")
    one.add_argument(
        "--out", type=address, required=True, metavar="FOLDER", help="or s3://...: gets the LoRA and the pictures"
    )
    one.add_argument("--format", choices=FORMATS, default="kohya", help=FORMAT_HELP)
    one.add_argument("--num-images", type=at_least(0), default=1, metavar="N", help="0: the LoRA only (default: 1)")
    one.add_argument("--seed", type=at_least(0), help="of the LoRA (default: a random one, told at the end)")
    one.add_argument("--image-seed", type=at_least(0), help="of the first picture, +1 for each further one")
    one.add_argument(
        "--steps", type=at_least(1), dest="num_inference_steps", metavar="N", help="of denoising a picture"
    )
    one.add_argument("--guidance-scale", type=float, metavar="X")
    one.add_argument("--negative-prompt", metavar="TEXT")
    one.add_argument("--largest-face", action="store_true", help="if a photo shows several, instead of refusing it")
    where = one.add_argument_group("where it is made: in this process, unless a server is named")
    where.add_argument(
        "--server",
        default=os.environ.get("LORA_DIFFUSION_SERVER"),
        metavar="URL",
        help="such as http://127.0.0.1:8000 (default: LORA_DIFFUSION_SERVER); its key, if it asks for one, is read from "
        "LORA_DIFFUSION_API_KEY",
    )
    where.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for the server (default: 120)")
    where.add_argument(
        "--synthesizer", default="tiny", metavar="FOLDER", help="in this process (default: the shipped one)"
    )
    where.add_argument("--base", metavar="MODEL", help="in this process (default: the synthesiser's)")
    where.add_argument("--recogniser", metavar="MODEL", help="in this process (default: the synthesiser's)")
    where.add_argument("--device", default="cpu", help="in this process (default: cpu)")
    return parser.parse_args(arguments)


def file(text: str) -> Path:
    try:
        return local_place(text, "a photo")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def address(text: str) -> str:
    try:
        return place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"is blank: say what to draw, for example {PROMPT!r}")
    return text


def at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def personalize(args: argparse.Namespace) -> None:
    open_store(args.out).check()
    for photo in args.photos:
        if not photo.exists():
            raise Refused(f"there is no file {photo}")
        if photo.is_dir():
            raise Refused(f"{photo} is a folder: give the photos in it, as in {photo}/*.jpg")
    write(ask_server(args) if args.server else make_here(args), args)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, in the words that the API and the library share."""
    names = ("seed", "image_seed", "num_inference_steps", "guidance_scale", "negative_prompt")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {**given, "faces": "largest" if args.largest_face else "one"}


def ask_server(args: argparse.Namespace) -> Outcome:
    import httpx

    from lora_diffusion.client import ApiError, Client

    settings = settings_of(args)
    key = os.environ.get("LORA_DIFFUSION_API_KEY")
    try:
        with Client(args.server, api_key=key, timeout=args.timeout) as client:
            if not args.num_images:
                names = ("seed", "faces")
                lora = client.loras(args.photos, **{n: settings[n] for n in names if n in settings})[0]
                tell_left_out(lora.left_out)
                return Outcome(client.download(lora, args.format).data, lora.seed, [])
            made = client.personalize(
                args.photos, args.prompt, format=args.format, num_images=args.num_images, **settings
            )
            assert made.file is not None
            tell_left_out(made.lora.left_out)
            pictures = [Picture(image.data, image.seed, image.similarity) for image in made.images]
            return Outcome(made.file.data, made.lora.seed, pictures)
    except ApiError as error:
        raise Refused(f"{args.server} refused: {error} ({error.reason})") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise Refused(
            f"{args.server} cannot be reached ({error or type(error).__name__}). Is `lora-diffusion serve` running? "
            "Without --server it is made in this process."
        ) from error


def make_here(args: argparse.Namespace) -> Outcome:
    import io

    from PIL import Image

    from lora_diffusion.faces.photos import load_photos

    load_photos(args.photos)  # what cannot be read is told before the models are loaded
    say(f"loading the synthesiser {args.synthesizer} and its models")
    started = time.monotonic()
    from lora_diffusion.lora import formats
    from lora_diffusion.personalize import Personalizer
    from lora_diffusion.training.progress import Lines

    quieten()
    personalizer = Personalizer(args.synthesizer, args.base, recogniser=args.recogniser, device=args.device)
    identity = personalizer.synthesizer.identity
    say(f"for {identity.base_name}, faces by {identity.recogniser_name} ({time.monotonic() - started:.1f} s)")
    for name, text in (("prompt", args.prompt), ("negative prompt", args.negative_prompt or "")):
        if args.num_images and (unread := personalizer.base.unread(text)):
            say(f"the {name} is too long, and its end is not read: {unread}")
    bar = Lines(sys.stderr)
    drawn = f" and {args.num_images} picture{'s' * (args.num_images != 1)} of: {args.prompt}"
    what = f"a LoRA{drawn if args.num_images else ''}"
    say(f"{len(args.photos)} photo{'s' * (len(args.photos) != 1)} -> {what}")
    made = personalizer(
        args.photos,
        args.prompt,
        num_images=args.num_images,
        on_step=lambda done, steps: bar(f"drawing {done}/{steps}  ") if sys.stderr.isatty() else None,
        **settings_of(args),
    )
    pictures = []
    for i, pixels in enumerate(made.images_BHWC):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append(Picture(buffer.getvalue(), made.image_seed + i, float(made.similarity_B[i])))
    model = personalizer.synthesizer
    file = formats.to_bytes(made.vector_N, model.layout, args.format, metadata=model.identity.metadata())
    return Outcome(file, made.seed, pictures)


def say(line: str) -> None:
    """What is being done. Results go to standard output."""
    print(line, file=sys.stderr, flush=True)


def tell_left_out(photos: dict[str, float]) -> None:
    from lora_diffusion.faces.choice import LeftOut

    for name, cosine in photos.items():
        say(str(LeftOut(name, cosine)))


def quieten() -> None:
    """No progress bars of loading, and no warnings that only a programmer can heed; others as plain sentences."""
    import warnings

    import diffusers.utils.logging
    import transformers.utils.logging

    warnings.simplefilter("ignore", FutureWarning)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def write(outcome: Outcome, args: argparse.Namespace) -> None:
    store = open_store(args.out)
    name = "lora.zip" if args.format == "peft" else "lora.safetensors"
    store.write(name, outcome.lora)
    print(f"{store.uri}/{name}  {args.format}, seed {outcome.seed}")
    for picture in outcome.pictures:
        store.write(f"{picture.seed}.png", picture.data)
        likeness = "" if picture.similarity is None else f"  similarity {picture.similarity:.3f}"
        print(f"{store.uri}/{picture.seed}.png{likeness}")


if __name__ == "__main__":
    main()
