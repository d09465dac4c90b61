"""Decoding ends: what may take long happens in a process of its own, which is stopped, and needs a bounded memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.faces.apart import LIGHT_SEGMENTS, is_light, load_photo_within
from lora_diffusion.faces.photos import PhotoError, load_photo

FACE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def large(kind: str, channels: int = 3) -> bytes:
    """More megapixels than are decoded at once, in some 50 kB."""
    return saved(np.zeros((4100, 4000, channels), np.uint8), kind, **({"method": 0} if kind == "WEBP" else {}))


def jpeg_of_segments(count: int) -> bytes:
    data = saved(FACE, "JPEG")
    return data[:2] + b"\xff\xe5\0\x02" * count + data[2:]


def png_of_chunks(count: int) -> bytes:
    data = saved(FACE, "PNG")
    end = data.rindex(b"IDAT") - 4
    return data[:end] + (struct.pack(">I", 0) + b"qqQq" + b"\0" * 4) * count + data[end:]


def tiff_of_pages(count: int) -> bytes:
    """As a scanner's, but of no content: 100 bytes a page, each a list of eight entries and the place of the next."""
    entries = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 1), (273, 8), (278, 64), (279, 4096)]
    listed = struct.pack("<H", 8) + b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries)
    pages = [listed + struct.pack("<I", 8 + (i + 1) * 102 if i < count - 1 else 0) for i in range(count)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages) + b"\0" * 5000


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0MM\0*"}),
    ],
)
def test_the_photos_that_people_send_are_decoded_at_once(kind: str, options: dict[str, Any]) -> None:
    assert is_light(saved(FACE, kind, **options))
    assert is_light(saved(np.zeros((3000, 4000, 3), np.uint8), kind, **options))


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"\x80\x04\x95", b"PK\3\4"])
def test_what_is_no_photo_needs_no_process(data: bytes) -> None:
    assert is_light(data)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda kind=kind: large(kind) for kind in ("JPEG", "PNG", "WEBP")),
        lambda: large("WEBP", 4),
        *(
            lambda kind=kind: saved(FACE, kind)
            for kind in ("TIFF", "AVIF", "JPEG2000", "GIF", "BMP", "PPM", "QOI", "SGI")
        ),
        lambda: jpeg_of_segments(LIGHT_SEGMENTS),
        lambda: png_of_chunks(LIGHT_SEGMENTS),
        lambda: saved(FACE, "JPEG")[:15],
    ],
)
def test_what_may_take_long_is_told_from_its_header(make: Callable[[], bytes]) -> None:
    assert not is_light(make())


def test_apart_a_photo_is_the_same() -> None:
    for data in (saved(FACE, "TIFF"), saved(FACE, "AVIF"), jpeg_of_segments(LIGHT_SEGMENTS)):
        pixels = load_photo_within(data)
        assert np.array_equal(pixels, load_photo(data))
        assert pixels.flags.writeable
    faults: list[Any] = []
    load_photo_within(jpeg_of_segments(LIGHT_SEGMENTS)[:-2], faults=faults)
    assert faults == ["truncated"]
    for data, limit in ((saved(FACE, "TIFF")[:500], 10**6), (large("PNG"), 10**6), (tiff_of_pages(3), 10**6)):
        told = []
        for load in (load_photo, load_photo_within):
            with pytest.raises(PhotoError) as caught:
                load(data, max_pixels=limit)
            told.append((caught.value.reason, str(caught.value)))
        assert told[0] == told[1]


def test_decoding_ends_with_its_time() -> None:
    with pytest.raises(PhotoError, match=r"takes more than 0\.1 s") as caught:
        load_photo_within(large("JPEG"), 0.1)
    assert caught.value.reason == "unreadable"


def test_a_small_file_of_very_many_pages_is_refused_without_counting_them() -> None:
    """Pillow counted for minutes."""
    data = tiff_of_pages(150_000)
    start = time.process_time()
    with pytest.raises(PhotoError, match="more than one picture"):
        load_photo(data)
    assert time.process_time() - start < 2


MEASURE = r"""
import io, re, sys
import numpy as np
from PIL import Image
from lora_diffusion.faces.photos import load_photo
dtype, mode, kind = sys.argv[1:]
shape = (7000, 7000, 4) if mode == "RGBA" else (7000, 7000)
buffer = io.BytesIO()
Image.fromarray(np.zeros(shape, dtype)).save(buffer, kind)
print(load_photo(buffer.getvalue()).shape, re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])  # kB
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize("photo", [("uint8", "RGBA", "PNG"), ("uint16", "I;16", "PNG")])
def test_of_49_megapixels_there_is_the_picture_and_the_answer_in_memory(photo: tuple[str, str, str]) -> None:
    """1.3 to 1.5 GB, once; the picture takes 0.2 GB (four bytes a pixel), its RGB 0.15."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *photo], capture_output=True, text=True, check=True)
    assert "(7000, 7000, 3)" in done.stdout
    assert int(done.stdout.split()[-1]) < 700_000
