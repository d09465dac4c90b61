"""The stage `pictures` as a whole: photos, start, loop, folder. What it starts from is a synthesiser's folder, so it also
goes on from a published one, without any corpus."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_diffusion.config import to_dict
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.synthesis.codes import LearnedCodes, PCACodes
from lora_diffusion.synthesis.denoiser import count_parameters, widened
from lora_diffusion.synthesis.synthesizer import Neighbours, Synthesizer
from lora_diffusion.synthesis.training.begin import check_pictures
from lora_diffusion.synthesis.training.pictures.people import PhotoCache
from lora_diffusion.synthesis.training.pictures.stage import PictureStage
from lora_diffusion.synthesis.training.private import cache_root, private_files
from lora_diffusion.synthesis.training.run import TrainingRun
from lora_diffusion.synthesis.training.train_config import SYNTHESIZER, TrainConfig
from lora_diffusion.training.loop import Loop


class PictureTraining(TrainingRun):
    """The stage `pictures`, as `SynthesizerTraining` is the stages before."""

    def run(self) -> None:
        """Raises ValueError for people, a start or a base model that do not fit."""
        config, c = self.config, self.config.pictures
        check_pictures(config)
        start = Synthesizer.from_pretrained(config.before_pictures)
        base = BaseModel.from_pretrained(c.base or start.identity.base_name, self.group.device)
        start.check_base(base)
        recogniser = start.identity.recogniser_name
        start.check_recogniser(FaceEmbedder(EmbedderConfig(recogniser)))  # of this machine
        with cache_root(config.data.cache, self.group) as root:
            cache = PhotoCache(c, recogniser, base, root, self.store.uri)
            try:
                self._fill(cache)
                self._teach(start, base, cache, recogniser)
            finally:
                self.group.barrier()
                if self.group.local_rank == 0:
                    cache.remove()
                self.close()

    def _fill(self, cache: PhotoCache) -> None:
        error = None
        if self.group.local_rank == 0 and not cache.complete:
            try:
                with private_files():
                    cache.fill(self.say)
            except ValueError as caught:
                error = caught
        self.group.agree(error)

    def _teach(self, start: Synthesizer, base: BaseModel, cache: PhotoCache, recogniser: str) -> None:
        config, people = self.config, cache.open()
        grown = self._grown(start)
        stage = PictureStage(grown.to(self.group.device), base, people, config.pictures, recogniser)
        identity = {"people": people.digest, "pictures": _what_decides(config), "base": base.fingerprint}
        identity["start"] = {"weights": _digest(start), "layout_id": start.layout.layout_id}
        loop = Loop("pictures", stage, config.pictures_training, self.store, self.group, "ddp", False, identity)
        self.group.barrier()  # nobody writes a new state while another still reads the old one
        self.train(loop, lambda: None if stage.sheet is None else _sheet(stage.sheet))
        if self.leader:
            stage.load_state_dict(loop.best_weights(), strict=False)
            self._save(start, grown.to("cpu"), loop, len(people.train))
        self.group.barrier()

    def _grown(self, start: Synthesizer) -> Synthesizer:
        """The start with new components, and with a denoiser as configured; it answers as before."""
        space, c = start.codes, self.config.pictures
        if isinstance(space, PCACodes | LearnedCodes):
            space = LearnedCodes.of(space, c.new_components, c.new_scale, self.config.pictures_training.seed)
        torch.manual_seed(self.config.pictures_training.seed)
        if start.diffusion.factor_ZZ is not None and space.size != start.code_size:
            raise ValueError("diffusion.prior=corpus knows no new components: set pictures.new_components=0")
        wide = start.diffusion.denoiser(space.size, start.condition_size, self.config.denoiser)
        kind = start.diffusion.config.prediction_type
        if (
            space.size > start.code_size
            and kind != "sample"
            and wide.guess is None
            and start.latent_sampling.temperature
        ):
            raise ValueError(  # its answer for a new number is 0: of what it predicts, not of the number
                f"pictures.new_components={c.new_components} would be full of noise at first, where the denoiser predicts {kind}: set "
                "it to 0, or train the start with diffusion.prediction_type=sample, with denoiser.linear_guess=true, or for "
                "latent_sampling.temperature=0"
            )
        denoiser = widened(start.denoiser, wide)
        self.say(
            f"pictures: starts from {self.config.before_pictures}; {space.kind} codes of {space.size}, denoiser of "
            f"{count_parameters(self.config.denoiser, space.size, start.condition_size):,} parameters"
        )
        return Synthesizer(
            start.layout, space, denoiser, start.diffusion, start.provenance, None, None, start.latent_sampling
        )

    def _save(self, start: Synthesizer, made: Synthesizer, loop: Loop, people: int) -> None:
        config, state = self.config, loop.state
        lines = [] if self.log is None else self.log.lines
        best = [
            v for v in lines if v["stage"] == "pictures" and v["step"] == state.best_step and "validation_score" in v
        ]
        figures = {
            f"pictures_{name}": value for v in best for name, value in v.items() if name.startswith("validation_")
        }
        figures |= {"pictures_best_step": state.best_step, "pictures_people": people}
        made.provenance = replace(
            start.provenance,
            figures={**start.provenance.figures, **figures},
            config=to_dict(config),
            commit=self.commit,
            seed=config.pictures_training.seed,
        )
        if start.neighbours is not None and config.keep_neighbours:
            left = _left(start.neighbours, Synthesizer.from_pretrained(config.before_pictures).neighbours)
            made.neighbours = replace(left, codes_PZ=torch.from_numpy(made.encode(start.decode(left.codes_PZ))))
        made.save_pretrained(f"{self.store.uri}/{SYNTHESIZER}")
        self.store.write_json("results.json", made.provenance.figures)
        self.say(f"synthesiser: {self.store.uri}/{SYNTHESIZER}, of step {state.best_step}")


def _what_decides(config: TrainConfig) -> dict[str, Any]:
    """The settings that losses depend on. Where the photos lie does not matter: `people` has their contents."""
    settings = {key: value for key, value in to_dict(config.pictures).items() if key not in ("people", "start")}
    return {**settings, "denoiser": to_dict(config.denoiser)}


def _sheet(pictures_KPHWC: np.ndarray) -> bytes:
    """PNG: a row for each person, a column for each prompt."""
    K, P, H, W, _ = pictures_KPHWC.shape
    whole = pictures_KPHWC.transpose(0, 2, 1, 3, 4).reshape(K * H, P * W, 3)
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "PNG")
    return buffer.getvalue()


def _digest(synthesizer: Synthesizer) -> str:
    """16 hex digits over all that decides what it answers; when and from what it was made does not."""
    digest = hashlib.sha256(json.dumps(to_dict(synthesizer.latent_sampling), sort_keys=True).encode())
    for part in (synthesizer.codes, synthesizer.denoiser, synthesizer.diffusion):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _left(before: Neighbours, now: Neighbours | None) -> Neighbours:
    """Those of `before` whom nobody has taken out of the folder since."""
    if before.hashes_PH is None or now is None or now.hashes_PH is None:
        return before
    there = {bytes(row) for row in now.hashes_PH.numpy()}
    keep_P = torch.tensor([bytes(row) in there for row in before.hashes_PH.numpy()])
    return Neighbours(before.embeddings_PC[keep_P], before.codes_PZ[keep_P], before.hashes_PH[keep_P])
