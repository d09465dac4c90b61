"""Every way a photo can be bad has one reason; every way it can be good gives upright 8-bit RGB."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.faces.photos import FORMATS, SUFFIXES, PhotoError, load_photo, looks_like_photo, prepare_photo


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    ys, xs = np.mgrid[0:height, 0:width]
    return np.stack([xs * 255 / (width - 1), ys * 255 / (height - 1), np.full_like(xs, 40)], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes | str | Path, **options: int) -> str:
    with pytest.raises(PhotoError) as caught:
        load_photo(data, **options)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000", "QOI", "SGI", "HEIF"]
)
def test_every_format_gives_the_same_rgb_whatever_the_name(kind: str, tmp_path: Path) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    options = {"quality": 95} if kind in ("JPEG", "MPO", "WEBP", "AVIF", "HEIF") else {}
    data = encoded(Image.fromarray(gradient()), kind, **options)
    assert looks_like_photo(data[:16])
    (tmp_path / "photo.txt").write_bytes(data)
    pixels = load_photo(tmp_path / "photo.txt")
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - gradient()).mean() < (4 if options else 0.01)


def test_a_path_reads_as_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "photo ü.png"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    assert np.array_equal(load_photo(path), gradient())
    assert np.array_equal(load_photo(str(path)), gradient())
    with pytest.raises(FileNotFoundError):
        load_photo(tmp_path / "absent.png")


def test_every_suffix_that_pillow_knows_for_these_formats_is_a_photos() -> None:
    Image.init()
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")} <= set(
        SUFFIXES
    )


def test_text_looks_like_no_photo() -> None:
    for text in (
        b"",
        b"BMW and other cars",
        b"P1n code of the",
        b"Photo by Ada Love",
        b"{}",
        b"PK\x03\x04" + b"0" * 12,
    ):
        assert not looks_like_photo(text[:16]), text


def test_heic_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_diffusion.faces.photos._heif_reader", lambda: False)
    data = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + b"\0" * 100
    assert reason_of(data) == "heif"
    with pytest.raises(PhotoError, match=r"pip install 'lora-diffusion\[heic\]'"):
        load_photo(data)


@pytest.mark.parametrize("make", ["fifo", "device", "huge"])
def test_what_is_no_plain_file_is_refused_before_it_is_read(make: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10**12)
    assert reason_of(path) == ("too_large" if make == "huge" else "unreadable")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that turns an upright photo into the stored one
    upright = Image.fromarray(gradient())
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(load_photo(encoded(stored, "PNG", exif=exif)), gradient())


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    pixels = load_photo(encoded(red, "JPEG", quality=95))
    assert pixels.shape == (32, 32, 3)
    assert pixels[16, 16, 0] > 200
    assert pixels[16, 16, 1:].max() < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    pixels = load_photo(encoded(Image.fromarray(values), "PNG"))
    assert np.abs(pixels[..., 0] - values / 257).max() <= 1
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_a_dark_sixteen_bit_photo_stays_dark() -> None:
    pixels = load_photo(encoded(Image.fromarray(np.full((32, 32), 200, np.uint16)), "PNG"))
    assert pixels.max() <= 1


def test_float_grey_is_scaled() -> None:
    values = np.linspace(0, 1, 64 * 32, dtype=np.float32).reshape(32, 64)
    pixels = load_photo(encoded(Image.fromarray(values), "TIFF"))
    assert np.abs(pixels[..., 1] - values * 255).max() <= 1
    values[3, 3] = np.nan
    assert reason_of(encoded(Image.fromarray(values), "TIFF")) == "unreadable"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_becomes_white(mode: str) -> None:
    clear = Image.new("RGBA", (32, 32), (10, 20, 30, 0)).convert(mode if mode != "PA" else "RGBA")
    kind = "PNG" if mode != "PA" else "WEBP"
    assert load_photo(encoded(clear, kind, **({"lossless": True} if kind == "WEBP" else {}))).min() == 255


def test_half_transparent_black_is_grey() -> None:
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert np.abs(load_photo(encoded(half, "PNG")).astype(int) - 127).max() <= 1


def test_palette_with_a_transparent_colour_becomes_white() -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    assert load_photo(encoded(image, "PNG", transparency=0)).min() == 255
    assert np.array_equal(load_photo(encoded(image, "PNG"))[0, 0], [200, 0, 0])


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_has_three_equal_channels(mode: str) -> None:
    pixels = load_photo(encoded(Image.fromarray(gradient()).convert(mode), "PNG"))
    assert pixels.shape == (48, 64, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 1])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert reason_of(tmp_path / "empty.jpg") == "empty_file"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_file_cut_short_is_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert reason_of(data[: int(len(data) * share)]) in ("truncated", "unreadable", "not_an_image")


def test_a_jpeg_cut_in_half_is_called_truncated() -> None:
    data = encoded(Image.fromarray(gradient(256, 256)), "JPEG", quality=95)
    assert reason_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}], ids=str
)
@pytest.mark.parametrize("missing", [1, 2, 3, 6])
def test_a_jpeg_without_its_last_bytes_is_read(missing: int, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(gradient(256, 256)), "JPEG", quality=90, **options)
    faults: list[str] = []
    pixels = load_photo(data[:-missing], faults=faults)
    assert faults == ["truncated"]
    whole = load_photo(data, faults=faults)
    assert faults == ["truncated"], "the whole file has no fault"
    assert (pixels == whole).all(axis=2).mean() > 0.98


# Not the end of the last scan of a progressive file: it holds the finest bits only.
@pytest.mark.parametrize(
    ("options", "share"),
    [(options, share) for options in ({}, {"restart_marker_rows": 1}) for share in (0.02, 0.3, 0.6, 0.95)]
    + [({"progressive": True}, share) for share in (0.02, 0.3, 0.6)],
    ids=str,
)
@pytest.mark.parametrize("picture", ["smooth", "noise", "white below"])
def test_a_jpeg_that_lacks_part_of_its_picture_is_truncated(
    picture: str, share: float, options: dict[str, object]
) -> None:
    pixels = gradient(256, 256)
    if picture == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    if picture == "white below":
        pixels[200:] = 255
    data = encoded(Image.fromarray(pixels), "JPEG", quality=90, **options)
    start = data.find(b"\xff\xda") + 20
    assert reason_of(data[: start + int((len(data) - start) * share)]) == "truncated"


def test_a_text_file_named_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_text("This is no picture.\n" * 100)
    assert reason_of(path) == "not_an_image"


def test_svg_is_named_as_such() -> None:
    assert reason_of(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>') == "svg"
    assert reason_of(b'<svg width="10" height="10"/>') == "svg"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [Image.fromarray(np.roll(gradient(), i * 9, 1)) for i in range(3)]
    assert reason_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:])) == "animated"


def test_a_single_frame_gif_is_a_photo() -> None:
    assert load_photo(encoded(Image.fromarray(gradient()), "GIF")).shape == (48, 64, 3)


def bomb(side: int) -> bytes:
    """A small PNG whose header promises side × side pixels; the picture data are absent: decoding it would fail."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 40_000, 400_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    # 100, 1,600 and 160,000 megapixels: the last ones pass Pillow's own limits of warning and of error.
    assert reason_of(bomb(side)) == "too_large"


def test_a_real_100_megapixel_photo_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(data) < 100_000
    assert reason_of(data) == "too_large"


def test_the_pixel_limit_can_be_set() -> None:
    data = encoded(Image.fromarray(gradient()), "PNG")
    assert reason_of(data, max_pixels=48 * 64 - 1) == "too_large"
    assert load_photo(data, max_pixels=48 * 64).shape == (48, 64, 3)


def test_a_photo_of_a_few_pixels_is_refused() -> None:
    assert reason_of(encoded(Image.fromarray(gradient(8, 64)), "PNG")) == "too_small"


def test_no_damage_escapes_as_another_error() -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        data = np.frombuffer(encoded(Image.fromarray(gradient()), kind), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=6)] = rng.integers(0, 256, 6)
            try:
                pixels = load_photo(damaged.tobytes())
            except PhotoError:
                refused += 1
                continue
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
    assert 0 < refused < 360


def test_a_photo_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PhotoError("svg", "no")))
    assert (error.reason, str(error)) == ("svg", "no")


def test_prepare_takes_the_centre_and_the_size() -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    assert np.array_equal(prepare_photo(wide, 64), np.full((64, 64, 3), 200))
    assert prepare_photo(wide, 33).shape == (33, 33, 3)
    assert prepare_photo(np.ascontiguousarray(wide.transpose(1, 0, 2)), 64).min() == 200


def test_prepare_leaves_a_fitting_photo_alone() -> None:
    square = gradient(64, 64)
    assert np.array_equal(prepare_photo(square, 64), square)


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_prepare_says_what_it_expects(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="RGB uint8"):
        prepare_photo(bad, 64)


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once_and_a_progressive_one_read() -> None:
    """Each scan is a pass over the whole picture: half a megabyte could hold a decoder for minutes."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).resize((2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert load_photo(data).shape == (2000, 2000, 3)
    last = data[data.rfind(b"\xff\xda") : -2]
    start = time.process_time()
    with pytest.raises(PhotoError, match="scans; photos have about 10") as refused:
        load_photo(data[:-2] + last * 3000 + data[-2:])
    assert refused.value.reason == "unreadable"
    assert time.process_time() - start < 2
