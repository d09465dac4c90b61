"""Photos that a base model practises on (`base_adaptation.py`): latents, where in them the loss counts, captions as tokens.

Axes: M photos, P people of V photos each, W captions of a photo, S token positions, C / H / W latents.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_diffusion.lora.photo_data import face_weights
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.storage import open_store
from lora_diffusion.world.base.recipe import load_faces


@dataclass(frozen=True, eq=False)
class AdaptationFaces:
    """Photos of the base split on the model's device, in the order of the people.

    latents (M, C, H, W); face (M, H, W): where the loss counts; scene_tokens (M, S): captions that say all but who it
    is; described_tokens (M, W, S): captions that may describe the person, too.
    """

    latents: Tensor
    face: Tensor
    scene_tokens: Tensor
    described_tokens: Tensor
    photos_each: int

    @property
    def people(self) -> int:
        return len(self.latents) // self.photos_each

    @classmethod
    def load(cls, uri: str, base: BaseModel, face_weight: float) -> AdaptationFaces:
        """From a folder of `jobs/world/make_faces.py`. Raises ValueError if the people have different numbers of photos."""
        import pyarrow.parquet as pq

        faces = load_faces(uri, base.image_size)
        columns = ["number", "view", "subject_caption", "face_box"]
        table = pq.read_table(io.BytesIO(open_store(uri).read("faces.parquet")), columns=columns)
        rows = sorted(table.to_pylist(), key=lambda row: (row["number"], row["view"]))
        counts = np.unique([row["number"] for row in rows], return_counts=True)[1]
        if counts.min() != counts.max():
            raise ValueError(f"{uri}: people have {counts.min()} to {counts.max()} photos; all need the same number")

        def tokens(captions: list[str]) -> Tensor:
            length = base.tokenizer.model_max_length
            ids = base.tokenizer(captions, padding="max_length", max_length=length, truncation=True).input_ids
            return torch.tensor(ids, device=base.device)

        latents = base.encode_images(faces.images, batch_size=256)
        boxes_M4 = np.array([row["face_box"] for row in rows], np.float32)
        weights = face_weights(boxes_M4, faces.images.shape[1:3], latents.shape[-2:], face_weight)  # type: ignore[arg-type]
        described = tokens([caption for captions in faces.captions for caption in captions])
        return cls(
            latents,
            weights.to(base.device),
            tokens([row["subject_caption"] for row in rows]),
            described.view(len(rows), -1, described.shape[-1]),
            photos_each=int(counts[0]),
        )
