"""The configuration of a training: which corpus, which stages, how large, on which workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lora_diffusion.places import Output, Place, PlaceOrName
from lora_diffusion.synthesis.denoiser import DenoiserConfig
from lora_diffusion.synthesis.diffusion import DiffusionConfig
from lora_diffusion.synthesis.folder import LatentSampling
from lora_diffusion.synthesis.training.dataset import DataConfig
from lora_diffusion.synthesis.training.pictures_config import PicturesConfig
from lora_diffusion.synthesis.training.stages import Condition
from lora_diffusion.synthesis.vae import VAEConfig
from lora_diffusion.training.distributed import Parallel
from lora_diffusion.training.loop import LoopConfig

STAGES = ("pca", "vae", "denoiser", "pictures")
CONDITION_SIZE = 512
SYNTHESIZER, BEFORE_PICTURES = "synthesizer", "before_pictures"  # folders in the output


@dataclass(frozen=True)
class PCAConfig:
    """`exact_rows`: up to so many rows all components are exact; beyond, `iterations` passes approach the first ones.

    of: the components of the vectors, or of what a ridge regression from the embedding predicts of them: what the face
        decides, without the optimiser's noise (exact rows only).
    """

    num_components: int = 512  # Z of code_space pca
    of: Literal["vectors", "predicted"] = "vectors"
    penalty: float = 1e-2  # ridge penalty of that regression
    exact_rows: int = 4096
    iterations: int = 6  # passes of the randomised PCA


@dataclass(frozen=True)
class WorkersConfig:
    """`num_workers` training processes; with `max_workers` set, Ray adds and removes some between the two as machines
    come and go. `cpus`: for each, threads as well. `compute_dtype` auto: bfloat16 (autocast) on GPUs, float32 on CPUs.
    `max_failures`: how often a worker may die before the run gives up; preempted spot machines do not count."""

    num_workers: int = 1  # training processes
    max_workers: int | None = None  # Ray adds and removes workers up to here; null: fixed
    use_gpu: bool = False  # one GPU a worker
    cpus: int = 1  # CPUs and threads of each
    parallel: Parallel = "ddp"  # fsdp splits weights over the workers
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs, float32 on CPUs
    max_failures: int = 3

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.cpus < 1:
            raise ValueError(f"num_workers and cpus must be at least 1, not {self.num_workers} and {self.cpus}")
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(f"max_workers is {self.max_workers}, fewer than num_workers, {self.num_workers}")


@dataclass(frozen=True)
class TrainConfig:
    """All of `jobs/train.py`.

    stage: one of pca, vae, denoiser, pictures, or all of them in order; pictures only where `pictures.people` says whose.
    code_space: what the denoiser works in; `vector` and `pca` need no VAE.
    layout_id: refuse a corpus of another one; None: whatever the corpus has.
    recogniser: where those who use the synthesiser find the corpus' recogniser (as `EmbedderConfig.model`); another one is
        refused. None: where the corpus found it.
    standardise: `each` code number to unit variance, or all `together`, by one factor.
    condition: what the denoiser sees of a person, the mean embedding of the photos or one photo's (see `DenoiserStage`).
    latent_sampling: what the folder recommends to draw with.
    keep_neighbours: put the people's embeddings and codes into the folder, too.
    """

    corpus: Place = "runs/tiny/corpus"  # folder or s3:// of the corpus
    output: Output = "runs/tiny/training"  # folder or s3:// of the run
    stage: Literal["all", "pca", "vae", "denoiser", "pictures"] = "all"
    code_space: Literal["latent", "pca", "vector"] = "latent"
    layout_id: str | None = None
    recogniser: PlaceOrName | None = None
    data: DataConfig = field(default_factory=DataConfig)
    pca: PCAConfig = field(default_factory=PCAConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    vae_training: LoopConfig = field(default_factory=LoopConfig)
    start_from_pca: bool = True  # the VAE's linear path begins as the PCA
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    denoiser_training: LoopConfig = field(default_factory=lambda: LoopConfig(steps=5000))
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    pictures_training: LoopConfig = field(
        default_factory=lambda: LoopConfig(300, 8, 5e-4, 20, 0.0, validate_every=50, log_every=10, checkpoint_every=50)
    )
    standardise: Literal["each", "together"] = "each"
    condition: Condition = "mean"
    latent_sampling: LatentSampling = field(default_factory=LatentSampling)
    keep_neighbours: bool = True
    tensorboard: bool = True  # write event files
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    @property
    def stages(self) -> tuple[str, ...]:
        if self.stage != "all":
            return (self.stage,)
        made = tuple(stage for stage in STAGES[:3] if stage != "vae" or self.code_space == "latent")
        if not self.pictures.people:
            return made
        return ("pictures",) if self.pictures.start else (*made, "pictures")

    @property
    def needs_corpus(self) -> bool:
        """Whether a stage learns from LoRAs: not where pictures alone teach what another run made."""
        return self.stages != ("pictures",)

    @property
    def before_pictures(self) -> str:
        """Where the synthesiser lies that the stage `pictures` starts from."""
        return self.pictures.start or f"{self.output}/{BEFORE_PICTURES}"
