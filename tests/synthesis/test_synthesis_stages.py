"""What judges a denoiser: whether the codes that it draws for faces are nearest to the codes of those very people."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig
from lora_diffusion.synthesis.training.dataset import CorpusRows, DataConfig
from lora_diffusion.synthesis.training.stages import DenoiserStage, percentile_rank

PEOPLE, SIZE = 60, 8


def test_the_rank_is_the_share_of_others_who_are_nearer() -> None:
    codes = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    drawn = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    own = torch.tensor([0, 1, 2, 3, 2])[:, None] == torch.arange(4)
    assert percentile_rank(drawn, codes, own).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.5])
    assert percentile_rank(drawn[:1], codes[:1], own[:1, :1]).tolist() == [0.5]


class Knows(nn.Module):
    """Answers with the code that stands in front of the face's embedding, whatever is asked."""

    code_size = SIZE

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor, drop: Tensor | None = None) -> Tensor:
        return condition[:, :SIZE]


def stage_of(faces: np.ndarray, codes: Tensor) -> DenoiserStage:
    counts, zeros = np.ones(PEOPLE, np.int64), np.zeros(PEOPLE, np.int64)
    names = [f"p{i}" for i in range(PEOPLE)]
    rows = CorpusRows(codes.numpy(), faces, faces, counts, zeros, zeros, names, DataConfig())
    diffusion = Diffusion(DiffusionConfig(prediction_type="sample"))
    return DenoiserStage(Knows(), diffusion, rows, lambda slots: codes[slots]).eval()  # type: ignore[arg-type]


def ranks(stage: DenoiserStage) -> Tensor:
    slots = stage.rows.validation
    draws = stage.draws(len(slots), torch.Generator().manual_seed(0))
    return stage(stage.inputs(slots), draws, 0)[1]["rank"]


def test_who_knows_everybody_ranks_first_and_who_takes_one_for_another_does_not() -> None:
    codes = torch.randn(PEOPLE, SIZE, generator=torch.Generator().manual_seed(1))
    faces = np.zeros((PEOPLE, 512), np.float32)
    faces[:, :SIZE] = codes
    stage = stage_of(faces, codes)
    assert len(stage.rows.validation) > 3
    assert ranks(stage).tolist() == [0.0] * len(stage.rows.validation)
    a, b = stage.rows.validation[:2]
    faces[[a, b]] = faces[[b, a]]
    found = ranks(stage_of(faces, codes))
    assert (found[:2] > 0).all()
    assert found[2:].tolist() == [0.0] * (len(found) - 2)
    assert "rank" not in stage.train()(stage.inputs(stage.rows.train), stage.draws(len(stage.rows.train), torch.Generator()), 0)[1]  # fmt: skip
