"""Photos as they come from users -> clean RGB, or one clear reason why not.

A bad file is data, not an exception that ends a job: every way a photo can be unusable has a `reason` code that goes
into the failures table. Nothing is decoded before the header says how many pixels that would make.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
PhotoReason = Literal[
    "empty_file", "not_an_image", "svg", "animated", "too_large", "too_small", "truncated", "unreadable"
]

MAX_PIXELS = 50_000_000
MIN_SIDE = 16
# The JPEG reader also opens MPO, the JPEG with a second picture that phones and stereo cameras write.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")


class PhotoError(ValueError):
    """A photo that cannot be used. `reason` is one of `PhotoReason`; the message says what to do about it."""

    def __init__(self, reason: PhotoReason, message: str) -> None:
        super().__init__(message)
        self.reason: PhotoReason = reason

    def __reduce__(self) -> tuple[type[PhotoError], tuple[PhotoReason, str]]:
        # Both arguments, so that the error survives the way between processes.
        return type(self), (self.reason, str(self))


def load_photo(source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """RGB uint8 (H, W, 3) of a photo, upright.

    EXIF orientation is applied; CMYK, palette, grey, 16-bit and float images become 8-bit RGB; what is transparent
    becomes white. Raises PhotoError for a file that is empty, no image, an animation, of more than `max_pixels` (told
    from the header, nothing is decoded), smaller than 16 px, or cut short. OSError of a path that cannot be read passes.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise PhotoError("empty_file", "The file has 0 bytes. Upload it again.")
    with warnings.catch_warnings():
        # Pillow warns of large images on its own scale; ours is checked below, before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image, max_pixels)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
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


def _unidentified(data: bytes) -> PhotoError:
    start = data[:512].lstrip().lower()
    if b"<svg" in start or (start.startswith(b"<?xml") and b"svg" in data[:4096].lower()):
        return PhotoError("svg", "SVG is a drawing, not a photo. Send JPEG, PNG or WebP.")
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
    # Of an MPO the first picture is the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        frames = getattr(image, "n_frames", 0)
        raise PhotoError("animated", f"The {image.format} file holds {frames} frames. Send one still photo.")


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode == "F" or image.mode.startswith("I"):
        return _wide_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.array(image.convert("RGB"))


def _wide_to_rgb(values_HW: NDArray[np.generic]) -> Pixels:
    """16- or 32-bit grey, or float grey, scaled to 8 bits by the range of the type: Pillow's convert would clip at 255."""
    values = values_HW.astype(np.float64)
    if not np.isfinite(values).all():
        raise PhotoError("unreadable", "The image holds values that are not finite numbers.")
    top = float(values.max(initial=0.0))
    if values_HW.dtype.kind == "f":
        white = 1.0 if top <= 1.0 else 255.0 if top <= 255.0 else top
    else:
        white = 65535.0 if top <= 65535.0 else float(2**31 - 1)
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
