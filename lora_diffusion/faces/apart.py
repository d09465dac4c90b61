"""A photo that may take long to decode is decoded in a process of its own, which is ended when its time is up.

A thread could not be stopped. What is decoded at once is told from the header, by no decoder: the photos that people send.

python -m lora_diffusion.faces.apart MAX_PIXELS SECONDS < photo > a line of JSON, and the pixels
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from lora_diffusion.faces.photos import (
    JPEG_SCAN,
    MAX_PIXELS,
    SIGNATURE_BYTES,
    PhotoError,
    PhotoReason,
    Pixels,
    load_photo,
    looks_like_photo,
)

SECONDS = 30.0  # for one photo
LIGHT_PIXELS, LIGHT_SCANNED = (
    16_000_000,
    200_000_000,
)  # of the picture, and of all scans of a JPEG together: half a second
LIGHT_SEGMENTS = 1000  # of a file; usual are 20
MEMORY = 4_000_000_000  # bytes of address space of the process
_ROOT = Path(__file__).resolve().parents[2]
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that say how large the picture is


def load_photo_within(
    data: bytes, seconds: float | None = None, *, max_pixels: int = MAX_PIXELS, faults: list[PhotoReason] | None = None
) -> Pixels:
    """`load_photo`, which ends: PhotoError "unreadable" where decoding takes longer than `seconds`, or ends its process."""
    if is_light(data):
        return load_photo(data, max_pixels=max_pixels, faults=faults)
    seconds = SECONDS if seconds is None else seconds
    command = [sys.executable, "-m", __name__, str(max_pixels), str(math.ceil(seconds))]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, timeout=seconds, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        raise PhotoError(
            "unreadable",
            f"Decoding it takes more than {seconds:.3g} s. Save it anew, as a JPEG of at most 16 megapixels.",
        ) from None
    if done.returncode:
        raise PhotoError("unreadable", "Its decoder crashed, or wanted too much memory. Save it anew, as a JPEG.")
    end = done.stdout.index(b"\n")
    told = json.loads(done.stdout[:end])
    if "reason" in told:
        raise PhotoError(told["reason"], told["message"])
    if faults is not None:
        faults += told["faults"]
    return np.frombuffer(done.stdout, np.uint8, offset=end + 1).reshape(told["shape"]).copy()


def is_light(data: bytes) -> bool:
    """Whether decoding ends within a second or so: a JPEG, PNG or WebP of usual size and build, or no photo at all."""
    if data.startswith(b"\xff\xd8\xff"):
        pixels = _jpeg_pixels(data)
        return pixels is not None and pixels <= LIGHT_PIXELS and pixels * data.count(JPEG_SCAN) <= LIGHT_SCANNED
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        pixels = int.from_bytes(data[16:20]) * int.from_bytes(data[20:24])
        return pixels <= LIGHT_PIXELS and _png_is_short(data)
    if data.startswith(b"RIFF") and data[8:15] == b"WEBPVP8":
        return _webp_pixels(data) <= LIGHT_PIXELS
    return not looks_like_photo(data[:SIGNATURE_BYTES]) and not data.startswith(
        (b"BM", b"MM", b"II")
    )  # Pillow asks for less


def _jpeg_pixels(data: bytes) -> int | None:
    """None: the first scan does not begin within `LIGHT_SEGMENTS`."""
    place, pixels = 2, 0
    for _ in range(LIGHT_SEGMENTS):
        head = data[place : place + 9]
        if len(head) < 2 or head[0] != 0xFF:
            return None
        if head[1] in _JPEG_SIZES:
            pixels = int.from_bytes(head[5:7]) * int.from_bytes(head[7:9])
        if head[1] == JPEG_SCAN[1]:
            return pixels
        place += 1 if head[1] == 0xFF else 2 + int.from_bytes(head[2:4])
    return None


def _png_is_short(data: bytes) -> bool:
    place = 8
    for _ in range(LIGHT_SEGMENTS):
        if place >= len(data) or data[place + 4 : place + 8] == b"IEND":
            return True
        place += 12 + int.from_bytes(data[place : place + 4])
    return False


def _webp_pixels(data: bytes) -> int:
    if data[15:16] == b"X":
        return (1 + int.from_bytes(data[24:27], "little")) * (1 + int.from_bytes(data[27:30], "little"))
    if data[15:16] == b"L":
        bits = int.from_bytes(data[21:25], "little")
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    sides = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
    return (sides[0] & 0x3FFF) * (sides[1] & 0x3FFF)


def main() -> None:
    import resource

    max_pixels, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # also where nobody is left who would end it
    faults: list[PhotoReason] = []
    try:
        pixels = load_photo(sys.stdin.buffer.read(), max_pixels=max_pixels, faults=faults)
        told: dict[str, object] = {"shape": pixels.shape, "faults": faults}
    except PhotoError as error:
        pixels, told = np.empty(0, np.uint8), {"reason": error.reason, "message": str(error)}
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
    sys.stdout.buffer.write(pixels.data)


if __name__ == "__main__":
    main()
