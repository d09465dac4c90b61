"""How well embeddings tell people apart: AUC, TAR at a FAR, rank-1. Plain numpy; embeddings of unit length.

Axes: N photos, E embedding, G gallery photos of one person, P people, Q probe photos.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.faces.unit import unit

Floats = NDArray[np.float32]


def pair_scores(
    gallery_NE: Floats, gallery_person_N: NDArray[np.int64], probe_QE: Floats, probe_person_Q: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Cosine of every (gallery photo, probe photo) pair: (scores of the same person, scores of different people)."""
    scores = unit(probe_QE) @ unit(gallery_NE).T
    same = probe_person_Q[:, None] == gallery_person_N[None]
    return scores[same], scores[~same]


def auc(positive: Floats, negative: Floats) -> float:
    """Area under the ROC curve: the chance that a same-person pair scores above a different-people pair; ties half."""
    if not len(positive) or not len(negative):
        raise ValueError(f"auc needs pairs of both kinds, got {len(positive)} positive and {len(negative)} negative.")
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left").astype(np.float64)
    ties = np.searchsorted(ordered, positive, side="right") - below
    return float((below + 0.5 * ties).mean() / len(negative))


def tar_at_far(positive: Floats, negative: Floats, far: float = 1e-3) -> float:
    """True accept rate at the threshold that lets a share `far` of the different-people pairs pass."""
    if not 0 < far < 1:
        raise ValueError(f"far is a share between 0 and 1, got {far}.")
    if far * len(negative) < 1:
        raise ValueError(
            f"FAR {far} needs at least {int(np.ceil(1 / far))} different-people pairs, got {len(negative)}."
        )
    accepted = int(far * len(negative))
    threshold = np.partition(negative, len(negative) - accepted - 1)[len(negative) - accepted - 1]
    return float((positive > threshold).mean())


def rank1(gallery_PGE: Floats, probe_QE: Floats, probe_person_Q: NDArray[np.int64]) -> float:
    """Share of probes whose nearest person, by the mean of the unit embeddings of G gallery photos, is their own."""
    centres_PE = unit(unit(gallery_PGE).mean(axis=1))
    nearest_Q = (unit(probe_QE) @ centres_PE.T).argmax(axis=1)
    return float((nearest_Q == probe_person_Q).mean())


def verification_report(
    gallery_PGE: Floats, probe_QE: Floats, probe_person_Q: NDArray[np.int64], far: float = 1e-3
) -> dict[str, float | int]:
    """All figures for P people with G gallery photos each, and Q probes of them.

    AUC and TAR are over all pairs of one gallery photo and one probe; rank-1 is told for the first photo and for all G.
    """
    people, photos, size = gallery_PGE.shape
    if probe_QE.shape != (len(probe_person_Q), size) or not len(probe_QE):
        raise ValueError(f"Expected probes ({len(probe_person_Q)}, {size}), one row a label, got {probe_QE.shape}.")
    person_of_gallery = np.repeat(np.arange(people), photos)
    positive, negative = pair_scores(gallery_PGE.reshape(-1, size), person_of_gallery, probe_QE, probe_person_Q)
    return {
        "people": people,
        "probes": len(probe_QE),
        "gallery_photos": photos,
        "auc": auc(positive, negative),
        "far": far,
        "tar_at_far": tar_at_far(positive, negative, far),
        "rank1_one_photo": rank1(gallery_PGE[:, :1], probe_QE, probe_person_Q),
        "rank1_gallery": rank1(gallery_PGE, probe_QE, probe_person_Q),
        "mean_same": float(positive.mean()),
        "mean_other": float(negative.mean()),
    }
