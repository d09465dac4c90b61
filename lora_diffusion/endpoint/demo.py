"""The end of `make demo`: starts the service, makes one person's LoRA and picture through HTTP, says how to go on.

python -m lora_diffusion.endpoint.demo --photo demo/held_out/80000/00.jpg --out demo/personalised
python -m lora_diffusion.endpoint.demo --photo ada.jpg --out ada configs/serve_sd15.yaml synthesizer=runs/sd15/published port=8001
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from lora_diffusion.client import Client
from lora_diffusion.endpoint import APP

PROMPT = "a photo of sks person, smiling, facing the camera, beach background, wearing a red v-neck top"
START_SECONDS = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, required=True, help="a photo with one face")
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRA and the picture")
    parser.add_argument("words", nargs="*", help="what `lora-diffusion serve` takes (default: the shipped application)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{next((word[5:] for word in args.words if word.startswith('port=')), '8000')}"
    start = time.monotonic()
    service = start_service(args.words, args.out / "serve.log")
    try:
        wait_until_ready(address, service, args.out / "serve.log")
        with Client(address) as client:
            print(f"service ready after {time.monotonic() - start:.0f} s: {address}")
            start = time.monotonic()
            made = client.personalize(args.photo, PROMPT, num_images=1, seed=0, image_seed=1000)
            print(f"photo -> LoRA and picture in {time.monotonic() - start:.2f} s, the first time")
            made.images[0].save(args.out / f"picture{made.images[0].suffix}")
            client.download(made.lora, "kohya").save(args.out / "lora.safetensors")
    finally:
        service.send_signal(signal.SIGINT)  # as Ctrl-C does: Serve is shut down, then its Ray
        service.wait(60)
    shutil.copy(args.photo, args.out / "photo.jpg")
    print(f"""
photo, picture and LoRA: {args.out}
keep the service running: {f"lora-diffusion serve {' '.join(args.words)}" if args.words else "make serve"}, then open {address} or

curl -F photo=@{args.photo} -F 'prompt={PROMPT}' {address}/v1/personalize""")


def start_service(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`lora-diffusion serve` with `words`, or `serve run` of the shipped application, with a Ray of its own."""
    command = [str(Path(sys.executable).parent / "serve"), "run", str(APP)]
    if words:
        command = [sys.executable, "-m", "lora_diffusion.cli", "serve", *words]
    with log.open("wb") as output:
        env = {"RAY_ADDRESS": "local", **os.environ}
        # where the shell that started us runs in the background, Ctrl-C is ignored, and would be by the service
        return subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until_ready(address: str, service: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _ready(address):
        if service.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the service did not start; its last words:\n{log.read_text()[-2000:]}")
        time.sleep(0.5)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=10).is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
