"""How much of held-out people their fine-tuned LoRAs carry over, by both recognisers, with every control.

    python benchmarks/quality.py                     # 64 held-out people, the recipe of configs/tiny.yaml
    python benchmarks/quality.py --people 16 finetune.steps=40

Writes benchmarks/results/quality.json and the contact sheet docs/images/fine_tuned.jpg
(rows: people; columns: four photos, four pictures of the base model, four of the fine-tuned LoRA).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_diffusion.config import load_config, to_dict
from lora_diffusion.evaluation.similarity import RenderConfig, draw_people, similarity_report
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, embed_pictures, face_boxes
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.lora.photo_data import PersonPhotos
from lora_diffusion.world.people import render as photograph
from lora_diffusion.world.people import sample_person, sample_view
from lora_diffusion.world.people.captions import subject_caption
from lora_diffusion.world.scenes import SceneClassifier, prompt_accuracy

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write_result

ROOT = Path(__file__).resolve().parents[1]


def photos_of(number: int, views: int, embedder: FaceEmbedder) -> PersonPhotos:
    """The photos of one synthetic person with the captions of ``jobs/world/make_faces.py``, and where the embedder finds the face."""
    person = sample_person(number)
    shots = [sample_view(number, index) for index in range(views)]
    pixels = np.stack([photograph(person, view, 64).image for view in shots])
    captions = tuple(subject_caption(view, person.traits) for view in shots)
    return PersonPhotos(person.name, pixels, captions, face_boxes(embedder, pixels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--first", type=int, default=80_000, help="number of the first person; held-out from 80000")
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--name", default="quality", help="name of the JSON; only `quality` replaces the sheet in docs/"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of configs/tiny.yaml")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(CorpusConfig, ROOT / "configs/tiny.yaml", args.overrides)

    detector = FaceEmbedder(config.embedder)
    people = [photos_of(args.first + i, args.photos, detector) for i in range(args.people)]
    maker = LoRAMaker(config)
    base, layout, finetuner = maker.base, maker.layout, maker.finetuner
    started = time.perf_counter()
    size = config.people_per_group
    groups = [finetuner(people[i : i + size], maker.start_1N) for i in range(0, len(people), size)]
    vectors_KN = np.concatenate([group.vectors_KN for group in groups])
    seconds = (time.perf_counter() - started) / len(people)

    scene = RenderConfig(
        guidance_scale=config.score.guidance_scale, num_inference_steps=config.score.num_inference_steps
    )
    prompts, _ = scene.pictures()
    renders = draw_people(base, finetuner.bank, vectors_KN, scene)
    # as many pictures of the base model as of the LoRAs, so that both accuracies rest on the same number
    base_scene = RenderConfig(
        prompts=scene.prompts,
        seeds_per_prompt=args.people,
        guidance_scale=scene.guidance_scale,
        num_inference_steps=scene.num_inference_steps,
    )
    base_renders = draw_people(base, finetuner.bank, None, base_scene)[0]
    classifier = SceneClassifier.from_pretrained()
    result: dict[str, object] = {
        "config": {key: to_dict(config)[key] for key in ("base", "lora", "finetune", "people_per_group")},
        "base_fingerprint": base.fingerprint,
        "people": args.people,
        "first": args.first,
        "photos_each": args.photos,
        "seconds_per_lora": round(seconds, 3),
        "threads": args.threads,
        "vector_length": layout.size,
        "prompts": prompts,
        "prompt_accuracy": prompt_accuracy(classifier, renders.reshape(-1, *renders.shape[-3:]), prompts * args.people),
        "prompt_accuracy_base": prompt_accuracy(classifier, base_renders, base_scene.pictures()[0]),
    }
    for name, model in (("recogniser", "tiny"), ("second_recogniser", "tiny-b")):
        embedder = FaceEmbedder(EmbedderConfig(model, several_faces="largest", threads=args.threads))
        photos = [embed_pictures(embedder, person.pixels) for person in people]
        renders_KPE, found_KP = embed_pictures(embedder, renders)
        base_PE, _ = embed_pictures(embedder, base_renders[: 4 * args.people])
        reconstructions = np.concatenate([base.decode(base.encode_images(person.pixels)) for person in people])
        originals_E = np.concatenate([vectors for vectors, _ in photos])
        kept = (embed_pictures(embedder, reconstructions)[0] * originals_E).sum(-1)
        report = similarity_report(renders_KPE, found_KP, base_PE, [vectors[found] for vectors, found in photos])
        result[name] = {**report.to_dict(), "vae_reconstruction": round(float(kept.mean()), 4)}
        print(name, report, f"VAE {kept.mean():.3f}", flush=True)
    print(
        f"{seconds:.2f} s per LoRA; prompt accuracy {result['prompt_accuracy']}, base {result['prompt_accuracy_base']}"
    )
    print(write_result(args.name, result))
    if args.name == "quality":
        shown = base_renders[:: args.people][:4]
        sheet = np.concatenate(
            [np.concatenate([*people[k].pixels[:4], *shown, *renders[k][:4]], 1) for k in range(min(6, args.people))]
        )
        picture = Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.LANCZOS)
        picture.save(ROOT / "docs/images/fine_tuned.jpg", quality=75)


if __name__ == "__main__":
    main()
