"""Photos as they come from users -> clean RGB, or one clear reason why not.

A bad file is data, not an exception that ends a job: every way a photo can be unusable has a `reason` code that goes
into the failures table. Nothing is decoded before the header says how many pixels that would make.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
PhotoReason = Literal[
    "empty_file",
    "not_an_image",
    "svg",
    "heif",
    "animated",
    "too_large",
    "too_small",
    "truncated",
    "unreadable",
    "duplicate",  # in a corpus: another photo of this person has the same bytes
]

MAX_PIXELS = 50_000_000
MAX_BYTES = 500_000_000  # of a file: 50 megapixels without compression, 16 bits a channel and transparency, are 400 MB
MIN_SIDE = 16
MAX_SCANS, MAX_SCANNED_PIXELS = (
    100,
    600_000_000,
)  # of a progressive JPEG, which is decoded anew for each scan; usual are 10
# The JPEG reader also opens MPO, the JPEG with a second picture that phones and stereo cameras write. HEIF needs the
# package pillow-heif. Formats without a signature (TGA) or that run other programs (EPS, WMF) are left out.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "QOI", "PSD", "SGI")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".heic", ".heics", ".heif", ".heifs", ".hif", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".qoi", ".psd", ".sgi", ".rgb", ".rgba", ".bw"),
)
SIGNATURE_BYTES = 16
STRIP = 256  # rows that are converted at a time
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|II[*+]\0|MM\0[*+]|BM.{4}\0\0\0\0|GIF8[79]a|P[1-6Ff]\s"
    rb"|.{4}ftyp(avif|avis|hei[cmsx]|hev[cmsx]|mif1|msf1)|\0\0\0\x0cjP  |\xffO\xffQ|qoif|8BPS\0\x01|\x01\xda[\0\x01][\x01\x02]",
    re.DOTALL,
)
_HEIF = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)
_SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"


class PhotoError(ValueError):
    """A photo that cannot be used. `reason` is one of `PhotoReason`; the message says what to do about it."""

    def __init__(self, reason: PhotoReason, message: str) -> None:
        super().__init__(message)
        self.reason: PhotoReason = reason

    def __reduce__(self) -> tuple[type[PhotoError], tuple[PhotoReason, str]]:
        # Both arguments, so that the error survives the way between processes.
        return type(self), (self.reason, str(self))


def looks_like_photo(head: bytes) -> bool:
    """Whether a file that begins with these `SIGNATURE_BYTES` is an image that `load_photo` may read."""
    return _SIGNATURE.match(head) is not None


def special_file(mode: int) -> str | None:
    """What `st_mode` is that can be neither read as a file nor listed as a folder: "a pipe", ...; None for the usual."""
    return _SPECIAL.get(stat.S_IFMT(mode))


def check_size(size: int) -> None:
    """Raises PhotoError for a file of more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise PhotoError("too_large", f"The file has {size / 1e6:,.0f} MB; a photo has at most {MAX_BYTES / 1e6:g} MB.")


def load_photos(photos: Any) -> list[tuple[str, Pixels]]:
    """What a sentence calls each photo, and its RGB uint8 (H, W, 3). A photo, or a list of them: paths, bytes, PIL images, arrays.

    Raises as `load_photo`, with the photo's name.
    """
    several = list(photos) if isinstance(photos, list | tuple) else [photos]
    if not several:
        raise ValueError("no photo was given: give at least one of the person")
    loaded = []
    for i, photo in enumerate(several):
        path = isinstance(photo, str | Path)
        name = Path(photo).name if path else f"Photo {i + 1}" if len(several) > 1 else ""
        try:
            if isinstance(photo, Image.Image):
                pixels = _to_rgb(ImageOps.exif_transpose(photo))
            else:
                pixels = load_photo(photo) if path or isinstance(photo, bytes) else np.asarray(photo)
        except PhotoError as error:
            raise PhotoError(error.reason, f"{name}: {error}" if name else str(error)) from None
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            what = f"{type(photo).__name__} ({pixels.dtype} {pixels.shape})"
            raise ValueError(f"{name or 'the photo'} is {what}: give a path, bytes, a PIL image or uint8 RGB (H, W, 3)")
        loaded.append((name or "The photo", pixels))
    return loaded


def load_photo(
    source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS, faults: list[PhotoReason] | None = None
) -> Pixels:
    """RGB uint8 (H, W, 3) of a photo, upright. What it is, is decided by its content, not by its name.

    EXIF orientation is applied; CMYK, palette, grey, 16-bit and float images become 8-bit RGB; what is transparent
    becomes white. A JPEG without its last bytes is read, and "truncated" appended to `faults`. Raises PhotoError for a
    file that is empty, no image, an animation, of more than `max_pixels` (told from the header, nothing is decoded),
    smaller than 16 px, cut short, or no plain file. OSError of a path that cannot be read passes.
    """
    data = source if isinstance(source, bytes) else _read(Path(source))
    if not data:
        raise PhotoError("empty_file", "The file has 0 bytes. Upload it again.")
    try:
        return _decode(data, max_pixels)
    except PhotoError as error:
        pixels = _jpeg_without_end(data, max_pixels) if error.reason == "truncated" else None
        if pixels is None:
            raise
        if faults is not None:
            faults.append("truncated")
        return pixels


def _read(path: Path) -> bytes:
    status = path.stat()
    special = special_file(status.st_mode)  # reading one may never end
    if special:
        raise PhotoError("unreadable", f"This is {special}, not a file.")
    if path.is_dir():
        raise PhotoError("unreadable", "This is a folder: give the photos in it.")
    check_size(status.st_size)
    return path.read_bytes()


def _decode(data: bytes, max_pixels: int) -> Pixels:
    formats = (*FORMATS, "HEIF") if _HEIF.match(data) and _heif_reader() else FORMATS
    with warnings.catch_warnings():
        # Pillow warns of large images on its own scale; ours is checked below, before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check_header(image, max_pixels)
                _check_scans(image, data)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
        except PhotoError:
            raise
        except UnidentifiedImageError as error:
            raise _unidentified(data) from error
        except Image.DecompressionBombError as error:
            detail = f"The photo has far more than the {max_pixels / 1e6:g} megapixels that are decoded. Scale it down."
            raise PhotoError("too_large", detail) from error
        except Exception as error:
            # Pillow's parsers meet damaged bytes with many kinds of error: OSError, SyntaxError, TypeError, struct.error.
            cut = isinstance(error, EOFError) or any(word in str(error).lower() for word in ("truncated", "broken"))
            reason: PhotoReason = "truncated" if cut else "unreadable"
            raise PhotoError(reason, f"The image is cut short or damaged: {error}.") from error


@cache
def _heif_reader() -> bool:
    """Whether pillow-heif is installed; then Pillow can use it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _check_scans(image: Image.Image, data: bytes) -> None:
    """Half a megabyte can hold thousands of scans, minutes of work. In compressed data the marker does not occur."""
    scans = data.count(JPEG_SCAN) if image.format in ("JPEG", "MPO") else 0
    if scans > MAX_SCANS or scans * image.size[0] * image.size[1] > MAX_SCANNED_PIXELS:
        raise PhotoError(
            "unreadable",
            f"The JPEG is built up in {scans} scans; photos have about 10, and at most {MAX_SCANS} are decoded. Save it anew.",
        )


def _jpeg_without_end(data: bytes, max_pixels: int) -> Pixels | None:
    """The picture of a JPEG that lacks its end marker and perhaps a few bytes before it; None if more is missing.

    It is decoded twice, with nothing and with other bytes in the place of what is missing: what both show is in the file.
    """
    scan = data.rfind(JPEG_SCAN)  # the last scan; in the compressed data this pair of bytes does not occur
    if not data.startswith(b"\xff\xd8\xff") or scan < 0:
        return None
    data = data.removesuffix(b"\xff")
    compressed = data[scan + 14 :] or b"U"
    try:
        picture = _decode(data + _JPEG_END, max_pixels)
        filling = compressed * (1 + max(len(data), picture.size // 32) // len(compressed))
        other = _decode(data + filling + _JPEG_END, max_pixels)
    except PhotoError:
        return None
    return picture if (picture == other).all(axis=2).mean() >= 0.98 else None


def _unidentified(data: bytes) -> PhotoError:
    start = data[:512].lstrip().lower()
    if b"<svg" in start or (start.startswith(b"<?xml") and b"svg" in data[:4096].lower()):
        return PhotoError("svg", "SVG is a drawing, not a photo. Send JPEG, PNG or WebP.")
    if _HEIF.match(data):
        detail = (
            "HEIC photos need the package pillow-heif (pip install 'lora-diffusion[heic]'). Install it, or send JPEG."
        )
        return PhotoError("heif", detail)
    if data.startswith(b"version https://git-lfs"):
        return PhotoError("not_an_image", "The file is a Git LFS pointer, not the photo itself. Run git lfs pull.")
    return PhotoError("not_an_image", "The file is no image that we read. Send JPEG, PNG, WebP, AVIF, TIFF or BMP.")


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PhotoError(
            "too_large",
            f"The photo has {width} × {height} = {width * height / 1e6:.1f} megapixels; at most {max_pixels / 1e6:g} are "
            "decoded. Scale it down, or raise max_pixels.",
        )
    if min(width, height) < MIN_SIDE:
        raise PhotoError("too_small", f"The photo is {width} × {height} px; a face needs at least {MIN_SIDE} px.")
    # Of an MPO the first picture is the photo, of HEIF the main one, of PSD what all layers give.
    if image.format not in ("MPO", "HEIF", "PSD") and _has_second_picture(image):
        raise PhotoError("animated", f"The {image.format} file holds more than one picture. Send one still photo.")


def _has_second_picture(image: Image.Image) -> bool:
    """Not by `n_frames`: Pillow counts by reading them all, which takes minutes where a small file holds very many."""
    if image.format not in ("GIF", "TIFF"):
        return bool(getattr(image, "n_frames", 1) > 1)
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _to_rgb(image: Image.Image) -> Pixels:
    """In strips, so that nothing but the picture and the answer is there as a whole."""
    width, height = image.size
    boxes = [(0, top, width, min(top + STRIP, height)) for top in range(0, height, STRIP)]
    wide = image.mode == "F" or image.mode.startswith("I")
    white = _white(np.asarray(image.crop(box)) for box in boxes) if wide else 0.0
    rgb_HWC = np.empty((height, width, 3), np.uint8)
    for box in boxes:
        strip = image.crop(box)
        rgb_HWC[box[1] : box[3]] = _wide_to_rgb(np.asarray(strip), white) if wide else _strip_to_rgb(strip)
    return rgb_HWC


def _strip_to_rgb(image: Image.Image) -> Pixels:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.array(image.convert("RGB"))


def _white(strips: Iterable[NDArray[np.generic]]) -> float:
    """Of 16- or 32-bit grey, or float grey, the value that is white, by the range of the type: Pillow's convert would clip at 255."""
    tops, kind = [0.0], "f"
    for values_HW in strips:
        if not np.isfinite(values_HW.astype(np.float64)).all():
            raise PhotoError("unreadable", "The image holds values that are not finite numbers.")
        tops.append(float(values_HW.max()))
        kind = values_HW.dtype.kind
    top = max(tops)
    if kind == "f":
        return 1.0 if top <= 1.0 else 255.0 if top <= 255.0 else top
    return 65535.0 if top <= 65535.0 else float(2**31 - 1)


def _wide_to_rgb(values_HW: NDArray[np.generic], white: float) -> Pixels:
    values = values_HW.astype(np.float64)
    grey = np.clip(values / white * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def prepare_photo(pixels_HWC: Pixels, size: int) -> Pixels:
    """(size, size, 3): the largest centred square, resized by Lanczos to the base model's resolution."""
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or pixels_HWC.dtype != np.uint8:
        raise ValueError(f"Expected RGB uint8 (H, W, 3), got {pixels_HWC.dtype} {pixels_HWC.shape}. Use load_photo.")
    if size < 1:
        raise ValueError(f"size is in pixels and at least 1, got {size}.")
    height, width, _ = pixels_HWC.shape
    if (height, width) == (size, size):
        return pixels_HWC
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(pixels_HWC).resize((size, size), Image.Resampling.LANCZOS, box=box))
