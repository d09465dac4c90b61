"""The tokenizer of CLIP, and what is asked of it. A single-file checkpoint carries none: it is made from its merges alone."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MERGES = Path(__file__).resolve().parents[1] / "assets" / "clip-tokenizer" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(**options: Any) -> Any:
    """transformers' `CLIPTokenizer` of Stable Diffusion, 77 tokens; `options` change its settings, such as `pad_token`."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress(MERGES.read_bytes()).decode()
    settings = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": 77,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "merges.txt").write_text(merges)
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary(merges)))
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **settings})
        )
        return CLIPTokenizer.from_pretrained(folder)


def tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token numbers (B, S), filled up or cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def vocabulary(merges: str) -> dict[str, int]:
    """Token -> number: the 256 bytes as printable characters, the same at a word's end, what merges make, start and end."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(code) for code in printable] + [chr(256 + i) for i in range(len(others))]
    made = ["".join(line.split()) for line in merges.splitlines()[1:]]
    words = [*characters, *(character + "</w>" for character in characters), *made, START, END]
    return {word: number for number, word in enumerate(words)}
