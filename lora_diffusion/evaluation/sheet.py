"""Contact sheets: a row for each person, a column for each method, the same prompts and noise across a row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lora_diffusion.evaluation.held_out import Floats, HeldOut, Pixels
from lora_diffusion.evaluation.scoring import Scores

INK, MUTED = (31, 41, 51), (123, 135, 148)


@dataclass(frozen=True, eq=False)
class Column:
    """`pictures_KPHWC` of the first people; `values_K`, written below, if any."""

    title: str
    pictures_KPHWC: Pixels
    values_K: Floats | None = None

    @classmethod
    def of(cls, title: str, scores: Scores, pictures: int = 2) -> Column:
        """The first `pictures` prompts of a method."""
        return cls(title, scores.pictures_KPHWC[:, :pictures], scores.similarity_K())


def photo_column(held: HeldOut) -> Column:
    return Column("photo", held.photos_KHWC[:, None])


def contact_sheet(columns: Sequence[Column], people: int, side: int = 88, gap: int = 14, top: int = 46) -> bytes:
    """PNG. Every column shows at least `people` people; pictures are scaled to `side` pixels."""
    widths = [column.pictures_KPHWC.shape[1] * side for column in columns]
    row = side + 20
    sheet = Image.new("RGB", (sum(widths) + gap * (len(columns) + 1), top + row * people + 6), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    title_font, value_font = ImageFont.load_default(13), ImageFont.load_default(11)
    for column, width in zip(columns, widths, strict=True):
        for line, words in enumerate(_wrap(column.title, width, title_font)[:2]):
            draw.text((left, 8 + 16 * line), words, INK, title_font)
        for k in range(people):
            for p, picture in enumerate(column.pictures_KPHWC[k]):
                shown = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
                sheet.paste(shown, (left + p * side, top + k * row))
            if column.values_K is not None:
                draw.text((left, top + k * row + side + 3), f"{column.values_K[k]:+.2f}", MUTED, value_font)
        left += width + gap
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return data.getvalue()


def _wrap(words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
