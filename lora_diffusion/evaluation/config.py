"""What an evaluation is made with. Everything here can be set in YAML or as `key.sub=value`; see configs/evaluate.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_diffusion.evaluation.similarity import RenderConfig
from lora_diffusion.places import Output, Place, PlaceOrName
from lora_diffusion.synthesis.training.dataset import DataConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """The whole of `jobs/evaluate.py`.

    corpus: what was learned from. held_out: a corpus of other people, fine-tuned by the same recipe: the ceiling.
    synthesizers: name -> folder of each trained synthesiser, such as latent: runs/tiny/training/synthesizer.
    people: photos of the held-out people; empty: where `held_out` was made from.
    base: the base model; empty: that of the corpus.
    second_recogniser: one that conditioned nothing; null: none.
    prompt_scorer: package.module:Class that says whether pictures show what their prompts asked for; null: not scored.
    limit: the first so many held-out people; null: all.
    condition_photos: so many photos of a person are the input; the others are what renders are compared with.
    scales: factors of the deviation from the corpus' mean; 1 is the method as it is, a synthesiser as its folder recommends.
    guidance_scale, num_inference_steps, temperature: of the denoiser; null: what its folder recommends.
    diversity_people, diversity_samples: so many LoRAs are drawn for each of so many people.
    reference: the synthesiser that the others are compared with; empty: the first.
    data: which rows of the corpus the baselines learn from, and how they are split.
    ablations: output of jobs/ablate.py, for the report; empty: none.
    pictures_people: of so many people the pictures are kept, for the contact sheets.
    batch_people: LoRAs drawn together. workers: 0 is one for each CPU (or GPU).
    """

    corpus: Place = "runs/tiny/corpus"
    held_out: Place = "runs/tiny/held_out"
    output: Output = "runs/tiny/evaluation"  # folder or s3:// of the report
    synthesizers: dict[str, PlaceOrName] = field(default_factory=dict)
    people: Place = ""
    base: PlaceOrName = ""
    device: str = "auto"  # auto takes a GPU where there is one
    second_recogniser: PlaceOrName | None = "tiny-b"
    prompt_scorer: str | None = None
    limit: int | None = 48
    condition_photos: int = 1
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    temperature: float | None = None
    seed: int = 0  # of drawn latents
    diversity_people: int = 12
    diversity_samples: int = 4
    reference: str = ""
    ablations: Place = ""
    pictures_people: int = 12
    batch_people: int = 16
    workers: int = 0  # processes; 0 is one for each CPU (or GPU)
    worker_cpus: float = 0.9  # CPUs of each
    worker_gpus: float = 0.0  # GPUs of each
    data: DataConfig = field(default_factory=DataConfig)
    render: RenderConfig = field(default_factory=RenderConfig)

    def __post_init__(self) -> None:
        if 1.0 not in self.scales or any(scale <= 0 for scale in self.scales):
            raise ValueError(f"scales are {self.scales}; they must be positive and hold 1.0, the method as it is")
        if self.condition_photos < 1 or self.batch_people < 1:
            raise ValueError("condition_photos and batch_people must be at least 1")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit is {self.limit}; at least 2 people are needed to tell one from another")
        if self.diversity_samples < 2:
            raise ValueError(f"diversity_samples is {self.diversity_samples}; one LoRA cannot differ from itself")
        if self.reference and self.reference not in self.synthesizers:
            raise ValueError(f"reference {self.reference!r} is none of the synthesizers {', '.join(self.synthesizers)}")
