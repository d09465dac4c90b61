"""A picture of a corpus: what its LoRAs draw, beside the photos that they were made of."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_diffusion.corpus import CorpusReader, matrix
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import PersonEmbedder
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.factory.people import PersonRef


def contact_sheet(config: CorpusConfig, people: Sequence[PersonRef], count: int = 12) -> bytes:
    """PNG: for at most `count` people, evenly spread over the corpus, one photo, the base model's picture and the LoRA's.

    The vectors are read back from the corpus, so the sheet shows what is stored there. `people`: the source's list.
    Raises ValueError if the corpus has nobody.
    """
    table = CorpusReader(config.output).sample(count, ["identity", "similarity", "vector"])
    if not len(table):
        raise ValueError(f"the corpus at {config.output} has no people to show")
    vectors_KN = matrix(table["vector"]).astype(np.float32)
    maker = LoRAMaker(config)
    prompt = (config.score.prompts or ("a photo of sks person",))[0]
    tuned = maker.scorer.draw(vectors_KN, [prompt] * len(table), [0] * len(table), maker.finetuner.bank)
    base = maker.scorer.draw(None, [prompt], [0])[0]
    embedder = PersonEmbedder(config, maker.base.image_size)
    refs = {person.identity: person for person in people}
    cells = []
    for k, (identity, similarity) in enumerate(
        zip(table["identity"].to_pylist(), table["similarity"].to_pylist(), strict=True)
    ):
        embedded = embedder(0, refs[identity]) if identity in refs else None
        photo = embedded.photos().pixels[0] if embedded and embedded.pictures else np.full_like(base, 200)
        cells.append((identity, similarity, [photo, base, tuned[k]]))
    return _sheet(cells, prompt)


def _sheet(cells: Sequence[tuple[str, float, list[np.ndarray]]], prompt: str, side: int = 128, gap: int = 12) -> bytes:
    """Three people in a row, each with three pictures and a label."""
    columns = min(3, len(cells))
    width, height = 3 * side + gap, side + 34
    sheet = Image.new("RGB", (gap + columns * width, 44 + math.ceil(len(cells) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(12), ImageFont.load_default(14)
    draw.text((gap, 8), "photo · base model · fine-tuned", "black", large)
    draw.text((gap, 25), prompt, "grey", small)
    for i, (identity, similarity, pictures) in enumerate(cells):
        left, top = gap + i % columns * width, 48 + i // columns * height
        for j, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (left + j * side, top))
        name = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in identity)
        label = name if len(name) <= 40 else name[:39] + "…"
        score = "" if math.isnan(similarity) else f"   similarity {similarity:.2f}"
        draw.text((left, top + side + 4), label + score, "black", small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
