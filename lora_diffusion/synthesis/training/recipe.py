"""The whole way from a corpus to a synthesiser: statistics, PCA, VAE, denoiser, folder. `jobs/train.py` runs it on Ray.

Each stage leaves its result in the run's folder (or bucket) and is skipped when it is there, so the same call goes on
where a killed one stopped. docs/guides/train.md says what lies where.

Axes: P rows, N vector length, M varying parameters, Z code size, C condition.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.artifacts import checksum
from lora_diffusion.config import to_dict, to_yaml
from lora_diffusion.corpus import CorpusReader, Statistics
from lora_diffusion.corpus.tombstone import keyed_hash, not_forgotten, read_key
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.storage import Store
from lora_diffusion.synthesis.baselines import Pairs
from lora_diffusion.synthesis.codes import CodeSpace, LatentCodes, PCACodes, VectorCodes, reconstruction
from lora_diffusion.synthesis.denoiser import Denoiser
from lora_diffusion.synthesis.diffusion import Diffusion, prior_factor
from lora_diffusion.synthesis.linear_guess import LinearGuess
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA, fit_pca, fit_pca_distributed, ridge_smoother
from lora_diffusion.synthesis.synthesizer import Neighbours, Provenance, Synthesizer
from lora_diffusion.synthesis.training.dataset import CorpusRows
from lora_diffusion.synthesis.training.metrics import explained_variance, explained_variance_png
from lora_diffusion.synthesis.training.passes import passes
from lora_diffusion.synthesis.training.run import TrainingRun
from lora_diffusion.synthesis.training.snapshot import CorpusSnapshot
from lora_diffusion.synthesis.training.stages import DenoiserStage, VAEStage
from lora_diffusion.synthesis.training.train_config import BEFORE_PICTURES, CONDITION_SIZE, SYNTHESIZER, TrainConfig
from lora_diffusion.synthesis.vae import LoRAVAE, latent_usage
from lora_diffusion.training.checkpoint import differences, pack, strip_prefix, unpack, with_prefix
from lora_diffusion.training.distributed import Group
from lora_diffusion.training.loop import Loop, LoopConfig

__all__ = ["SynthesizerTraining", "TrainConfig"]

Slots = NDArray[np.int64]
CONFIG = "config.yaml"


class SynthesizerTraining(TrainingRun):
    """Makes what is missing in `store` of all stages that learn from a corpus. `more`: as of `TrainingRun`."""

    def __init__(
        self,
        config: TrainConfig,
        snapshot: CorpusSnapshot,
        rows: CorpusRows,
        store: Store,
        group: Group | None = None,
        **more: Any,
    ) -> None:
        super().__init__(config, store, group, **more)
        self.snapshot, self.rows = snapshot, rows
        dtype = config.workers.compute_dtype
        self.bfloat16 = dtype == "bfloat16" or (dtype == "auto" and self.group.device.type == "cuda")
        self.figures: dict[str, Any] = {}

    def run(self) -> None:
        """All stages that the configuration names; after the denoiser, the synthesiser's folder. Raises ValueError."""
        try:
            self.normaliser = Normaliser.from_statistics(self._statistics())
            if "pca" in self.config.stages:
                self._pca(make=True)
            if "vae" in self.config.stages:
                self._train(self._vae_loop())
                gc.collect()  # a loop refers to itself: weights, moments and averages of the VAE stay until then
            if "denoiser" in self.config.stages:
                self._denoiser()
        finally:
            self.close()

    # -- statistics and PCA ----------------------------------------------------------------------------------------

    def _statistics(self) -> Statistics:
        """Of the training rows alone: validation must not look at the others."""
        name = "statistics.safetensors"
        if not self._there(name):
            self._keep_config()
            run = passes(self.group, self.rows.train, lambda slots: self.rows.vectors(slots).numpy())
            statistics = run(Statistics.of)
            self._write(name, statistics.to_bytes({"data": json.dumps(self._identity())}))
        data = self.store.read(name)
        statistics = Statistics.from_bytes(data)
        if len(statistics.mean) != self.snapshot.vector_size:
            raise ValueError(f"{self.store.uri}/{name} is of another layout: choose another output")
        rows = json.loads(checksum.notes(data).get("data", "null"))  # of an earlier release: only how many are known
        lines = differences(rows, self._identity()) if rows else []
        if lines or statistics.count != len(self.rows.train):
            what = "; ".join(lines) or f"{statistics.count:,} instead of {len(self.rows.train):,}"
            raise ValueError(
                f"{self.store.uri}/{name} was made of other rows: {what}. Delete it, or choose another output"
            )
        return statistics

    def _pca(self, make: bool) -> PCA | None:
        """The one that is there, or a new one; None if there is none and it need not be made."""
        name, wanted = "pca.safetensors", {"data": self._identity(), "pca": to_dict(self.config.pca)}
        if not self._there(name):
            if not make:
                return None
            pca = self._fit_pca()
            self._keep_config()
            if pca is not None:
                self._write_pca(name, pca, wanted)
            self.group.barrier()
        tensors, _ = self._kept(name, wanted)
        return PCA.from_tensors(tensors)

    def _fit_pca(self) -> PCA | None:
        """Few rows: exact, by worker 0 alone (None on the others). Many: passes that all workers share."""
        c, train = self.config.pca, self.rows.train
        self.say(f"pca: {len(train):,} rows of {self.normaliser.size:,} varying parameters")
        settings: dict[str, Any] = {"exact_rows": c.exact_rows, "iterations": c.iterations}
        if c.of == "predicted" and len(train) > c.exact_rows:
            raise ValueError(f"pca.of=predicted needs exact components: set pca.exact_rows to at least {len(train)}")
        if c.of == "predicted":
            settings["smoother_PP"] = ridge_smoother(self.rows.embeddings(train).numpy(), c.penalty)
        if len(train) <= c.exact_rows:
            if not self.leader:
                return None
            chunks = [train[i : i + 128] for i in range(0, len(train), 128)]
            return fit_pca(lambda: map(self._normalised, chunks), c.num_components, **settings)
        pca = fit_pca_distributed(passes(self.group, train, self._normalised), c.num_components, **settings)
        return pca if self.leader else None

    def _write_pca(self, name: str, pca: PCA, meta: dict[str, Any]) -> None:
        curve = explained_variance(pca, len(self.rows.train))
        self.store.write_json("explained_variance.json", curve)
        self.store.write("explained_variance.png", explained_variance_png({"corpus": curve["cumulative"]}))
        self.store.write(name, pack(dict(pca.state_dict()), meta))
        reached = ", ".join(f"{share} by {count}" for share, count in curve["components_for_share"].items() if count)
        self.say(
            f"pca: {len(pca)} components explain {curve['cumulative'][-1]:.1%} of the variance{f' ({reached})' if reached else ''}"
        )

    def _normalised(self, slots: Slots) -> NDArray[Any]:
        return self.normaliser.normalise(self.rows.vectors(slots)).numpy()

    # -- VAE -------------------------------------------------------------------------------------------------------

    def _vae_loop(self) -> Loop:
        config = self.config
        torch.manual_seed(config.vae_training.seed)
        vae = LoRAVAE(config.vae, copy.deepcopy(self.normaliser))
        pca = self._pca(make=False) if config.start_from_pca and config.vae.linear_skip else None
        if config.start_from_pca and config.vae.linear_skip and pca is None:
            raise ValueError(
                f"no pca.safetensors in {self.store.uri}: run stage=pca first, or set start_from_pca=false"
            )
        if pca is not None:
            vae.start_from_pca(pca)
        identity = {"data": self._identity(), "vae": to_dict(config.vae), "start_from_pca": pca is not None}
        return self._loop("vae", VAEStage(vae, self.rows, config.vae_training.steps), config.vae_training, identity)

    def _vae(self) -> LoRAVAE:
        loop = self._vae_loop()
        if not loop.state.done:
            raise ValueError(f"the VAE in {self.store.uri} is not trained: run stage=vae or stage=all first")
        weights = strip_prefix("vae", loop.best_weights())
        del loop
        gc.collect()
        vae = LoRAVAE(self.config.vae, copy.deepcopy(self.normaliser))  # whole again, where FSDP split it
        vae.load_state_dict(weights, strict=False)
        return vae.to(self.group.device).eval()

    # -- denoiser --------------------------------------------------------------------------------------------------

    def _denoiser(self) -> None:
        config, rows = self.config, self.rows
        space = self._code_space().to(self.group.device)
        space.standardise(self._chunks(rows.train), config.standardise)
        if self.leader:
            self._describe(space)
        codes = self._codes(space)
        factor = None
        if config.diffusion.prior == "corpus":
            factor = prior_factor(codes(rows.train))
        torch.manual_seed(config.denoiser_training.seed)
        diffusion = Diffusion(config.diffusion, factor)
        denoiser = diffusion.denoiser(space.size, CONDITION_SIZE, config.denoiser)
        if denoiser.guess is not None:
            self._guess(denoiser.guess, codes)
        stage = DenoiserStage(denoiser, diffusion, rows, codes, config.condition)
        names = ("denoiser", "diffusion", "code_space", "standardise", "condition")
        identity = {name: to_dict(config)[name] for name in names} | {"data": self._identity()}
        loop = self._loop("denoiser", stage, config.denoiser_training, identity)
        self._train(loop)
        if self.leader:
            fixed = {} if denoiser.guess is None else with_prefix("guess", dict(denoiser.guess.state_dict()))
            diffusion = diffusion.cpu()
            whole = diffusion.denoiser(space.size, CONDITION_SIZE, config.denoiser)  # where FSDP split it
            whole.load_state_dict(strip_prefix("denoiser", loop.best_weights()) | fixed)
            self._save(space.cpu(), whole, diffusion, codes, loop)
        self.group.barrier()

    def _guess(self, guess: LinearGuess, codes: Callable[[Slots], Tensor]) -> None:
        """Fitted once, by worker 0, and kept: the weights of a resumed training belong to this one."""
        name, rows = "linear_guess.safetensors", self.rows
        settings = ("code_space", "standardise", "condition")
        wanted = {"data": self._identity(), **{key: getattr(self.config, key) for key in settings}}
        if not self._there(name):
            self._keep_config()
            if self.leader:
                cosine = guess.fit(self._pairs(rows.train, codes), self._pairs(rows.validation, codes))
                self.store.write(name, pack(dict(guess.state_dict()), {**wanted, "cosine": cosine}))
            self.group.barrier()
        tensors, found = self._kept(name, wanted)
        guess.load_state_dict(tensors)
        self.figures["linear_guess_cosine"] = cosine = found["cosine"]
        self.say(f"linear guess: cosine {cosine:.4f} with the codes of {len(rows.validation)} validation people")

    def _pairs(self, slots: Slots, codes: Callable[[Slots], Tensor]) -> Pairs:
        """What the denoiser sees of a person, with the person's codes: the mean embedding, or each photo's in turn."""
        parts = [slots[start : start + 256] for start in range(0, len(slots), 256)]

        def pairs(part: Slots) -> tuple[Tensor, Tensor]:
            if self.config.condition == "mean":
                return self.rows.embeddings(part), codes(part)
            photos_BFC, counts_B = self.rows.photo_embeddings(part)
            own_BF = torch.arange(photos_BFC.shape[1]) < counts_B[:, None]
            return photos_BFC[own_BF], codes(part).repeat_interleave(counts_B, 0)

        return lambda: map(pairs, parts)

    def _code_space(self) -> CodeSpace:
        if self.config.code_space == "vector":
            return VectorCodes(copy.deepcopy(self.normaliser))
        if self.config.code_space == "latent":
            return LatentCodes(self._vae())
        pca = self._pca(make=False)
        if pca is None:
            raise ValueError(f"no pca.safetensors in {self.store.uri}: run stage=pca or stage=all first")
        return PCACodes(copy.deepcopy(self.normaliser), pca)

    def _codes(self, space: CodeSpace) -> Callable[[Slots], Tensor]:
        """Codes of rows: made once for all, but those as long as the vectors only when they are asked for."""
        if self.config.code_space == "vector":
            whole = VectorCodes(self.normaliser)
            whole.load_state_dict({name: tensor.cpu() for name, tensor in space.state_dict().items()})
            return lambda slots: whole.encode(self.rows.vectors(slots))
        table_PZ = torch.zeros(self.snapshot.num_rows, space.size)
        used = np.concatenate([self.rows.train, self.rows.validation])
        size = 128
        for start in range(self.group.rank * size, len(used), self.group.world_size * size):
            slots = used[start : start + size]
            with torch.no_grad():
                table_PZ[slots] = space.encode(self.rows.vectors(slots).to(self.group.device)).float().cpu()
        table_PZ = self.group.sum(table_PZ)
        return lambda slots: table_PZ[slots]

    def _describe(self, space: CodeSpace) -> None:
        """How much of held-out vectors the code space keeps."""
        found = reconstruction(space, self._chunks(self.rows.validation)).to_dict()
        if isinstance(space, LatentCodes):
            found["active_latents"] = latent_usage(space.vae, self._chunks(self.rows.validation))[0]
        self.figures["reconstruction"] = found
        self.say(f"{space.kind} codes of {space.size}: {', '.join(f'{k} {v:.4g}' for k, v in found.items())}")

    def _save(
        self,
        space: CodeSpace,
        denoiser: Denoiser,
        diffusion: Diffusion,
        codes: Callable[[Slots], Tensor],
        loop: Loop,
    ) -> None:
        config, rows, snapshot = self.config, self.rows, self.snapshot
        self.figures |= {f"denoiser_{name}": value for name, value in self._validated(loop).items()}
        self.figures["denoiser_best_step"] = loop.state.best_step
        corpus = {"recipe_id": snapshot.recipe_id, "start": snapshot.start}
        counts = {"rows": len(rows.train), "validation_rows": len(rows.validation)}
        provenance = Provenance(
            base=dict(snapshot.base),
            recogniser=dict(snapshot.recogniser),
            corpus={**corpus, **counts, "left_out": rows.left_out, "failed": snapshot.num_failed},
            finetune=dict(snapshot.finetune),
            figures=self.figures,
            config=to_dict(config),
            commit=self.commit,
            seed=config.denoiser_training.seed,
        )
        neighbours = self._neighbours(codes) if config.keep_neighbours else None
        layout = LoRALayout.from_dict(snapshot.layout)
        synthesizer = Synthesizer(
            layout, space, denoiser, diffusion, provenance, None, neighbours, config.latent_sampling
        )
        folder = BEFORE_PICTURES if config.pictures.people else SYNTHESIZER
        synthesizer.save_pretrained(f"{self.store.uri}/{folder}")
        self.store.write_json("results.json", self.figures)
        self.say(f"synthesiser: {self.store.uri}/{folder}")

    def _validated(self, loop: Loop) -> dict[str, float]:
        """What the weights that are kept were chosen by, or with keep=newest would have been."""
        names = [f"validation_{name}" for name in loop.stage.selection_metrics]
        if loop.config.keep == "best":
            return dict(zip(names, loop.state.best, strict=True))
        lines = self.log.lines if self.log else []
        then = [line for line in lines if (line["stage"], line["step"]) == ("denoiser", loop.state.best_step)]
        return {name: line[name] for line in then for name in names if name in line}

    def _neighbours(self, codes: Callable[[Slots], Tensor]) -> Neighbours:
        """Of the people who were learned from, but for those who were forgotten meanwhile."""
        rows, corpus = self.rows, CorpusReader(self.snapshot.uri)
        key, hashes_PH = read_key(corpus.store), None
        names = [rows.identities[slot] for slot in rows.train]
        there = set(not_forgotten(corpus.store, corpus.plan.identities, names))
        slots = np.array([slot for slot, name in zip(rows.train, names, strict=True) if name in there], np.int64)
        if key is not None:
            hashes = b"".join(keyed_hash(key, name) for name in names if name in there)
            hashes_PH = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).reshape(len(slots), -1)
        return Neighbours(rows.embeddings(slots), codes(slots), hashes_PH)

    # -- all stages ------------------------------------------------------------------------------------------------

    def _loop(self, name: str, stage: Any, config: LoopConfig, identity: dict[str, Any]) -> Loop:
        loop = Loop(name, stage, config, self.store, self.group, self.config.workers.parallel, self.bfloat16, identity)
        self.group.barrier()  # nobody writes a new state while another still reads the old one
        return loop

    def _train(self, loop: Loop) -> None:
        if not loop.state.done:
            self._keep_config()
        self.train(loop)

    def _identity(self) -> dict[str, Any]:
        data = self.config.data
        chosen = {key: getattr(data, key) for key in ("validation_fraction", "min_similarity", "max_people")}
        return {"layout_id": self.snapshot.layout_id, "rows": self.snapshot.key, **chosen}

    def _chunks(self, slots: Slots) -> Any:
        return (chunk.to(self.group.device) for chunk in self.rows.chunks(slots, 128))

    def _kept(self, name: str, wanted: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A stage's result that is there, and what was noted beside it. Raises ValueError if it was made with other settings."""
        saved = unpack(self.store, name)
        assert saved is not None
        tensors, notes = saved
        if lines := differences({key: notes.get(key) for key in wanted}, wanted):
            raise ValueError(
                f"{self.store.uri}/{name} was made with other settings: {'; '.join(lines)}. "
                "Delete it, or choose another output"
            )
        return tensors, notes

    def _keep_config(self) -> None:
        """What is made from here on is made with this configuration; one that was refused leaves no trace."""
        if self.leader:
            self.store.write(CONFIG, to_yaml(self.config).encode())

    def _there(self, name: str) -> bool:
        """The same answer on all workers, whoever is first to write."""
        there = self.store.exists(name)
        self.group.barrier()
        return there

    def _write(self, name: str, data: bytes) -> None:
        if self.leader:
            self.store.write(name, data)
        self.group.barrier()
