"""For the notebooks: pictures, enlarged and labelled, and commands. Importing it also turns off progress bars and notices."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence

import numpy as np
from IPython.display import Image as Shown
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore", message="IProgress")

SIDE, MARGIN = 150, 26  # px of an enlarged picture, and of a line of text


def grid(
    rows: Sequence[Sequence[NDArray[np.uint8] | Image.Image]],
    left: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    side: int = SIDE,
) -> Image.Image:
    """One picture of all: a row for each of `rows`, its name to the `left`, a label under each picture."""
    wide = max(map(len, rows))
    font = ImageFont.load_default(14)
    indent = 12 + max(int(font.getlength(text)) for text in left) if left else 0
    step = side + (MARGIN if labels else 4)
    sheet = Image.new("RGB", (indent + wide * (side + 4), len(rows) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        if left:
            pen.text((4, i * step + side // 2), left[i], "black", font, anchor="lm")
        for j, picture in enumerate(row):
            one = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
            place = (indent + j * (side + 4), i * step)
            sheet.paste(one.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), place)
            if labels and j < len(labels[i]):
                pen.text((place[0] + side // 2, place[1] + side + 4), labels[i][j], "black", font, anchor="ma")
    return sheet


def show(
    rows: Sequence[Sequence[NDArray[np.uint8] | Image.Image]],
    left: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    side: int = SIDE,
) -> Shown:
    """The grid as a small JPEG, for the end of a notebook's cell."""
    file = io.BytesIO()
    grid(rows, left, labels, side).save(file, "JPEG", quality=78)
    return Shown(file.getvalue(), format="jpeg")


def sheet(path: str, width: int = 720) -> Shown:
    """A picture of a file, as a small JPEG."""
    picture = Image.open(path).convert("RGB")
    file = io.BytesIO()
    picture.resize((width, picture.height * width // picture.width)).save(file, "JPEG", quality=78)
    return Shown(file.getvalue(), format="jpeg")


def shell(command: str) -> None:
    """Run a command, print it and what it says, with paths as seen from here. Raises CalledProcessError."""
    print(f"$ {command}")
    words = [sys.executable, "-W", "ignore", "-m", "lora_diffusion.cli", *shlex.split(command)[1:]]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = done.stdout.replace(f"{os.getcwd()}/", "")
    print("\n".join(line for line in said.splitlines() if "core_worker.cc" not in line))
    done.check_returncode()
