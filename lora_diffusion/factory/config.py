"""What a corpus is made with. Everything here can be set in YAML or as `key.sub=value`; see configs/tiny.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lora_diffusion.config import to_dict
from lora_diffusion.corpus.schema import VECTOR_DTYPES
from lora_diffusion.faces.embedder import EmbedderConfig
from lora_diffusion.lora.recipe import FinetuneConfig
from lora_diffusion.places import Output, People, PlaceOrName


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers carry a LoRA, the arguments of `LoRALayout.from_unet`, and where every fine-tuning starts.

    start: a vector file, or the name of a shipped one (`tiny-start`), as `jobs/world/learn_start.py` makes it; None starts
    as peft does, with a random A.
    """

    rank: int = 1  # R, the rank of each layer's LoRA
    alpha: float = 1.0  # the LoRA is multiplied by alpha / rank
    target_modules: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # ends of the names of the layers that carry a LoRA
    start: PlaceOrName | None = None


@dataclass(frozen=True)
class PhotoConfig:
    """Which photos of a person are used, and how they become square.

    crop: "centre" takes the largest central square; "face" a square around the detected face, its side `face_margin`
    times the longer side of the face's box (2.5 shows head and shoulders).
    """

    min_photos: int = 1  # people with fewer usable photos fail
    max_photos: int = 20  # the first so many usable photos are used
    max_pixels: int = 50_000_000  # larger photos are left out
    crop: Literal["centre", "face"] = "centre"
    face_margin: float = 2.5  # side of the square around a face, in longer sides of its box
    same_person: float | None = 0.2  # photos of a lower cosine with the mean of most are left out; null keeps all

    def __post_init__(self) -> None:
        if not 1 <= self.min_photos <= self.max_photos:
            raise ValueError(f"min_photos must lie in 1 .. max_photos ({self.max_photos}), not {self.min_photos}")
        if self.face_margin < 1:
            raise ValueError(f"face_margin must be at least 1, not {self.face_margin}: the face would be cut")
        if self.same_person is not None and not -1 <= self.same_person < 1:
            raise ValueError(f"same_person is a cosine, at least -1 and below 1, or null; it is {self.same_person}")


@dataclass(frozen=True)
class ScoreConfig:
    """Renders that are compared with the photos. An empty list of prompts: no scoring.

    min_similarity: people below it go to the failures table (the quality gate); None keeps everybody.
    """

    prompts: tuple[str, ...] = (
        "a photo of sks person, facing the camera, white studio background",
    )  # one render a prompt and seed
    seeds_per_prompt: int = 2  # renders of each prompt
    num_inference_steps: int = 20  # of the base model's sampler
    guidance_scale: float = 3.0  # of the base model's sampler
    max_batch: int = 64  # pictures drawn at a time
    min_similarity: float | None = None

    def __post_init__(self) -> None:
        if self.min_similarity is not None and not self.prompts:
            raise ValueError("min_similarity is a gate on renders, but there are no prompts to render")


@dataclass(frozen=True)
class WorkerConfig:
    """How Ray spreads the work. Fractions of a CPU leave room for Ray's own tasks on a small machine.

    finetune_max: 0 is one worker for each GPU (or CPU) that the cluster has, also of machines that join. A number of workers with
        GPUs is asked for at once: an autoscaler can bring the machines, and those that are there begin.
    max_deaths: so often may a worker process die over the same people before they count as the cause.
    """

    embed_min: int = 1  # embedding workers at least
    embed_max: int = 1  # embedding workers at most
    embed_cpus: float = 0.2  # CPUs of each
    finetune_min: int = 1  # fine-tuning workers at least, where finetune_max does not fix their number
    finetune_max: int = 0
    finetune_cpus: float = 0.9  # CPUs of each
    finetune_gpus: float = 0.0  # GPUs of each; 0 fine-tunes on the CPU
    max_deaths: int = 3


@dataclass(frozen=True)
class CorpusConfig:
    """The whole of `jobs/build_corpus.py`.

    people: a folder of folders, Parquet or tars (`factory.people.open_people`), or synthetic:40, that is, so many people who
        are rendered into a folder beside the corpus. output: folder or s3:// of the corpus.
    people_per_group: K, fine-tuned together; groups_per_shard: groups in one file, the unit that a crash can cost.
    class_images: pictures of `finetune.class_prompt` that the base model draws for prior preservation; 0: none.
    require_consent: whom the source has no consent of fails as `no_consent`.
    limit: take only the first so many people; None takes all.
    seconds_per_lora: what the cost estimate assumes until some shards have been measured.
    """

    people: People
    output: Output
    base: PlaceOrName = "tiny-sd"  # base model: a shipped name, folder, single file, s3:// or hub id
    device: str = "auto"  # auto takes a GPU where there is one
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base model
    vector_dtype: Literal["float32", "float16"] = "float32"  # of the stored vectors
    people_per_group: int = 16
    groups_per_shard: int = 1
    class_images: int = 0
    require_consent: bool = False
    limit: int | None = None
    seconds_per_lora: float = 3.0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    photos: PhotoConfig = field(default_factory=PhotoConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    workers: WorkerConfig = field(default_factory=WorkerConfig)

    def __post_init__(self) -> None:
        if self.people_per_group < 1 or self.groups_per_shard < 1:
            raise ValueError(
                "people_per_group and groups_per_shard must be at least 1, "
                f"not {self.people_per_group} and {self.groups_per_shard}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 or null (everybody), not {self.limit}")
        if self.vector_dtype not in VECTOR_DTYPES:
            raise ValueError(f"vector_dtype must be one of {', '.join(VECTOR_DTYPES)}, not {self.vector_dtype!r}")

    def recipe(self, recogniser: str, start: str | None = None) -> dict[str, Any]:
        """Everything that decides the bits of a row. `recogniser`, `start`: fingerprints of what the names mean."""
        whole = to_dict(self)
        embedder = {key: whole["embedder"][key] for key in ("det_size", "det_thresh", "min_face", "several_faces")}
        return {
            "dtype": self.dtype,
            "vector_dtype": self.vector_dtype,
            "groups": {key: whole[key] for key in ("people_per_group", "groups_per_shard")},
            # without same_person, as earlier releases made corpora, the recipe is theirs
            "photos": {key: value for key, value in whole["photos"].items() if (key, value) != ("same_person", None)},
            "embedder": {"fingerprint": recogniser, **embedder},
            "class_images": self.class_images,
            "finetune": whole["finetune"],
            **({} if start is None else {"start": start}),
            "score": {key: value for key, value in whole["score"].items() if key != "max_batch"},
        }

    def as_begun(self, recipe: Mapping[str, Any]) -> CorpusConfig:
        """To go on with a corpus of `recipe`: a setting that it lacks came later, and is off there unless somebody set it."""
        later = "same_person" not in recipe.get("photos", {}) and self.photos.same_person == PhotoConfig.same_person
        return replace(self, photos=replace(self.photos, same_person=None)) if later else self
