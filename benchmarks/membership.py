"""What the shipped synthesiser's weights remember: can one tell from what it answers who it was trained on?

    python benchmarks/membership.py --people 150

Members: people of the corpus (stages `pca` and `denoiser`) and people of the stage `pictures`, with the very photos that were
trained on; outsiders: as many people of the same distribution whom no training saw. An attacker who has a person's photos
asks for a LoRA of each and looks at three things: `likeness` (cosine of pictures drawn with the first photo's LoRA to the mean of
the other photos), `gain` (likeness less what is explained by `photo`, the cosine of that photo to the same mean, a control that
knows nothing of the synthesiser), and `consistency` (mean cosine of the codes of all photos with each other). AUC of 0.5: nothing
can be told. Intervals: 95 %, people resampled 2,000 times. One core, about five minutes. Writes benchmarks/results/membership.json.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result
from judge import embedders

from lora_diffusion.evaluation.similarity import RenderConfig, draw_people
from lora_diffusion.faces.choice import FaceError
from lora_diffusion.faces.embedder import FaceEmbedder, embed_pictures
from lora_diffusion.faces.unit import unit
from lora_diffusion.lora.bank import LoRABank
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis import Synthesizer
from lora_diffusion.synthesis.training.pictures.people import split
from lora_diffusion.world.people import render, sample_person, sample_view

Floats = NDArray[np.float64]
VIEWS, VALIDATION = 6, 32
PICTURES = range(30_000, 30_899)
VALIDATED = split([f"person-{number:06d}" for number in PICTURES], VALIDATION)[1]
GROUPS = {  # evenly spread over those who were trained on
    "outsiders": [*range(24_000, 25_000)],
    "corpus": [*range(20_000, 20_736)],
    "pictures": [number for place, number in enumerate(PICTURES) if place not in VALIDATED],
}


def embeddings_of(number: int, embedder: FaceEmbedder) -> NDArray[np.float32]:
    """(VIEWS, 512): of the photos that `jobs/world/make_faces.py --views 6` writes. Photos without a usable face are left out."""
    person, found = sample_person(number), []
    for view in range(VIEWS):
        jpeg = io.BytesIO()
        Image.fromarray(render(person, sample_view(number, view), 64).image).save(
            jpeg, "JPEG", quality=95, subsampling=0
        )
        try:
            found.append(embedder.embed(np.asarray(Image.open(jpeg))).vector)
        except FaceError:
            continue
    return np.stack(found) if len(found) > 2 else np.empty((0, 512), np.float32)


def pairwise(rows_VZ: Floats) -> float:
    return float((rows_VZ @ rows_VZ.T)[np.triu_indices(len(rows_VZ), 1)].mean())


def auc(members: Floats, outsiders: Floats) -> float:
    ranks = np.concatenate([members, outsiders]).argsort().argsort() + 1.0
    m, n = len(members), len(outsiders)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def attack(members: Floats, outsiders: Floats) -> dict[str, object]:
    rng = np.random.default_rng(0)
    again = [auc(rng.choice(members, len(members)), rng.choice(outsiders, len(outsiders))) for _ in range(2000)]
    caught = float((members > np.quantile(outsiders, 0.95)).mean())
    interval = [round(float(edge), 3) for edge in np.percentile(again, [2.5, 97.5])]
    return {
        "auc": round(auc(members, outsiders), 3),
        "interval": interval,
        "caught_at_5_percent_false": round(caught, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=150, help="of each group")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    by, model, base = embedders(args.threads), Synthesizer.from_pretrained("tiny"), BaseModel.from_pretrained("tiny-sd")
    bank, scene = LoRABank(base.unet, model.layout), RenderConfig(num_inference_steps=10)
    scores: dict[str, dict[str, list[float]]] = {}
    for group, numbers in GROUPS.items():
        mine = scores[group] = {"photo": [], "likeness": []}
        codes: list[Floats] = []
        for place in np.linspace(0, len(numbers) - 1, args.people).astype(int):
            photos_VE = embeddings_of(numbers[place], by["recogniser"])
            if not len(photos_VE):
                continue
            rest_E = unit(photos_VE[1:].mean(0))
            codes.append(model.denoise(photos_VE, [0] * len(photos_VE)))
            drawn = draw_people(base, bank, model.from_embedding(photos_VE[0]), scene)
            mine["photo"].append(float(photos_VE[0] @ rest_E))
            mine["likeness"].append(float((embed_pictures(by["recogniser"], drawn)[0][0] @ rest_E).mean()))
        mean_Z = np.mean([codes_VZ[0] for codes_VZ in codes], axis=0)
        mine["consistency"] = [pairwise(unit(codes_VZ - mean_Z)) for codes_VZ in codes]
        print(group, {name: round(float(np.mean(values)), 4) for name, values in mine.items()}, flush=True)
    photo, likeness = (np.concatenate([scores[group][name] for group in GROUPS]) for name in ("photo", "likeness"))
    slope, offset = np.polyfit(photo, likeness, 1)
    for mine in scores.values():
        mine["gain"] = list(np.array(mine["likeness"]) - slope * np.array(mine["photo"]) - offset)
    people = {group: len(mine["photo"]) for group, mine in scores.items()}
    means = {
        group: {name: round(float(np.mean(values)), 4) for name, values in mine.items()}
        for group, mine in scores.items()
    }
    attacks = {
        group: {name: attack(np.array(mine[name]), np.array(scores["outsiders"][name])) for name in mine}
        for group, mine in scores.items()
        if group != "outsiders"
    }
    for group, found in attacks.items():
        print(group, found)
    print(write_result("membership", {"people": people, "means": means, "attacks": attacks}))


if __name__ == "__main__":
    main()
