"""A made-up evaluation, whose every answer is known; and corpora of two steps, to run the real one end to end."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from factory_world import build_corpus, make_config

from lora_diffusion.evaluation import HeldOut, Method, Scores
from lora_diffusion.evaluation.methods import with_scales

RECOGNISERS = ["tiny", "tiny-b"]
PICTURES, SIDE, HEADS = 4, 16, 5
# cosine with the own gallery, before noise; scaled methods gain 0.1 at 1.5
DEGREES = {
    "base": 0.0,
    "other": 0.0,
    "mean": 0.02,
    "nearest": 0.2,
    "ridge_vector": 0.25,
    "ridge_pca": 0.28,
    "synthesised:latent": 0.35,
    "finetuned": 0.5,
    "reconstructed:latent": 0.4,
}


def held_out(people: int) -> HeldOut:
    rng = np.random.default_rng(0)
    galleries_RKC = np.stack([np.eye(people, 512, dtype=np.float32)] * 2)
    return HeldOut(
        tuple(f"person-{k}" for k in range(people)),
        rng.normal(size=(people, 3)).astype(np.float32),
        galleries_RKC[0],
        galleries_RKC,
        np.full((2, people), 0.6, np.float32),
        rng.integers(0, 255, (people, SIDE, SIDE, 3)).astype(np.uint8),
        {},
    )


def scores_of(method: Method, held: HeldOut, degree: float, seed: int = 0, shown: int = 3) -> Scores:
    """Cosine `degree` with the own gallery, about 0 with others'; a fifth of the prompts is disobeyed."""
    rng = np.random.default_rng(seed)
    people, samples = method.vectors_KSN.shape[:2]
    T = samples * PICTURES
    cosines = rng.normal(0, 0.02, (people, 2, T, len(held))).astype(np.float32)
    cosines[np.arange(people), :, :, method.people_K] += degree
    return Scores(
        method.people_K,
        cosines,
        np.ones((people, 2, T), bool),
        (rng.random((people, T, HEADS)) < 0.8).astype(np.int8),
        np.full((people, 2), 0.2 if samples > 1 else np.nan, np.float32),
        rng.integers(0, 255, (shown, PICTURES, SIDE, SIDE, 3)).astype(np.uint8),
    )


def methods_of(people: int) -> tuple[HeldOut, list[Method], dict[str, Scores]]:
    """Everything that jobs/evaluate.py hands to the report, for one synthesiser."""
    held = held_out(people)
    plain = [Method.of(name, np.full((people, 3), i, np.float32)) for i, name in enumerate(DEGREES)]
    several = replace(plain[6], vectors_KSN=np.zeros((2, 4, 3), np.float32), people_K=np.arange(2))
    methods = with_scales([*plain, several], (1.0, 1.5), np.zeros(3, np.float32))
    scores = {
        method.id: scores_of(method, held, DEGREES[method.name] + (0.1 if method.scale > 1 else 0), seed)
        for seed, method in enumerate(methods)
    }
    return held, methods, scores


def build_corpora(world: Path) -> None:
    """`corpus/` (six people) and `held_out/` (the other two) in `world`, as jobs/build_corpus.py makes them, without Ray."""
    names = sorted(path.name for path in (world / "people").iterdir() if path.is_dir())
    for name, people in (("corpus", names[:6]), ("held_out", names[6:])):
        folder = world / f"people_{name}"
        for person in people:
            shutil.copytree(world / "people" / person, folder / person)
        config = make_config(world, people=str(folder), output=str(world / name), score={"prompts": []})
        build_corpus(config)


def evaluation_settings(world: Path) -> list[str]:
    """Words of the command line for the smallest evaluation: two people, one prompt, two steps."""
    return [
        f"corpus={world / 'corpus'}",
        f"held_out={world / 'held_out'}",
        f"data.cache={world / 'cache'}",
        "second_recogniser=null",
        "scales=[1.0, 2.0]",
        "diversity_people=1",
        "diversity_samples=2",
        "pictures_people=2",
        "workers=1",
        "worker_cpus=0.5",
        "render.prompts=[a photo of sks person]",
        "render.num_inference_steps=2",
    ]


def ablation_settings(world: Path) -> list[str]:
    """The smallest ablation: two networks, a few steps."""
    return [
        *(f"evaluation.{word}" for word in evaluation_settings(world) if "diversity" not in word),
        f"training.data.cache={world / 'cache'}",
        "evaluation.diversity_people=0",
        "training.pca.num_components=3",
        "training.vae.latent_size=3",
        "training.vae.hidden=[8]",
        "training.vae_training.steps=4",
        "training.denoiser.width=32",
        "training.denoiser.depth=2",
        "training.denoiser.condition_width=32",
        "training.denoiser_training.steps=4",
        "training.denoiser_training.validate_every=2",
        "factors=[conditioning]",
        "seeds=1",
    ]
