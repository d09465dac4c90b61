"""What the stage `pictures` learns from, what it draws in a step, and what its losses weigh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lora_diffusion.factory.config import PhotoConfig, ScoreConfig
from lora_diffusion.places import Place, PlaceOrName

# Scenes for validation: other ones than those that evaluation draws.
SCENES = (
    "a photo of sks person, smiling, turned slightly right, side light, red wall background, wearing a green crew neck top",
    "a photo of sks person, neutral, in profile facing left, soft daylight, office background, wearing a white shirt",
    "a photo of sks person, slight smile, facing the camera, warm evening light, garden background, wearing a black v-neck top",
    "a photo of sks person, sad, turned slightly left, cool light, dark studio background, wearing a yellow shirt",
)


@dataclass(frozen=True)
class LossWeights:
    """identity: 1 - cosine of a drawn picture's embedding to the mean of the person's other photos.

    The others are anchors:
    denoising: the base model's loss on the person's other photos (hair, glasses, beard; too much of it makes weak LoRAs).
    high_noise: squared difference to the base model's prediction in an early step, where composition, pose and light are decided.
    start: the same to the prediction with the LoRA of the synthesiser that training began with.
    outside: the difference to the base model's in the last steps, outside of the head.
    code_length: mean square of the code, so that LoRAs stay near the corpus'.
    sharpness: share of fine detail that a picture lacks against the photos after the VAE.
    """

    identity: float = 1.0
    denoising: float = 0.1
    high_noise: float = 0.0
    start: float = 0.0
    outside: float = 0.0
    code_length: float = 0.0
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or max(vars(self).values()) == 0:
            raise ValueError(f"loss weights must not be negative, and one must be positive: {self}")


@dataclass(frozen=True)
class PicturesConfig:
    """people: where the photos are (`factory.people.open_people`); empty: the stage is left out.
    start: a synthesiser's folder or `tiny`; empty: what this run's stages before made. With one, no corpus is needed.
    base: the base model; empty: the one that the synthesiser was made for.
    max_people: only the first so many; null: all.
    validation_people: so many of them are held out: their pictures choose the weights that are kept.
    second_recogniser: judges beside the one that teaches, and never teaches; null: none.
    prompt_scorer: package.module:Class, as in the evaluation's configuration; null: prompts are not judged.
    new_components: how many the linear decoder gets beside those of the PCA; a VAE's decoder gets none.
    new_scale: their size against the others': a code number of them moves a LoRA so many times as far.
    components_rate: learning rate of the decoder, as a share of the size of its weights; the denoiser has the loop's own.
    matched: 0: prompts are those of anybody's photos, and a picture should resemble the mean of the person's other photos. Above: the
        prompt is that of one of these, which makes up so much of what the picture should resemble. Then turned heads and
        glasses pay where the prompt asks for them.
    pictures_each: pictures of each person in a step.
    num_inference_steps: how they are drawn, by DDIM, without guidance.
    gradient_steps: through how many of the last steps the gradient goes. All of them take twice the time of two, and keep the prompts.
    denoising_photos: photos of each person in the denoising loss.
    timestep_range: of the denoising loss.
    head: diameter of what the loss `outside` spares, in sides of the face's box.
    jitter: how far crops are shaken before the recogniser looks (1: 2 degrees, 3 %, 2 px).
    autocast: for the base model, in training; auto: bfloat16 where the device multiplies in it.
    score: how validation draws; its prompts should ask for poses and lights. `min_similarity` has no meaning here.
    prompt_price: what validation's score (lower is better) adds to 1 - similarity, for each unit that the parts of the prompts
        fall short of the base model's, on average.
    detail_price: the same for the share of fine detail that is lost.
    """

    people: Place = ""
    start: PlaceOrName = ""
    base: PlaceOrName = ""
    max_people: int | None = None
    validation_people: int = 32
    photos: PhotoConfig = field(default_factory=lambda: PhotoConfig(max_photos=8))
    second_recogniser: PlaceOrName | None = None
    prompt_scorer: str | None = None
    new_components: int = 32
    new_scale: float = 10.0
    components_rate: float = 1e-3
    matched: float = 0.0
    pictures_each: int = 2
    num_inference_steps: int = 6
    gradient_steps: int = 2
    denoising_photos: int = 2
    timestep_range: tuple[int, int] = (100, 900)
    head: float = 2.2
    jitter: float = 1.0
    autocast: Literal["auto", "bfloat16"] | None = "auto"
    weights: LossWeights = field(default_factory=LossWeights)
    score: ScoreConfig = field(default_factory=lambda: ScoreConfig(SCENES, 1, 15, 1.25))
    prompt_price: float = 2.0
    detail_price: float = 1.0

    def __post_init__(self) -> None:
        for name in ("validation_people", "pictures_each", "num_inference_steps", "gradient_steps", "denoising_photos"):
            if getattr(self, name) < 1:
                raise ValueError(f"pictures.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.matched <= 1:
            raise ValueError(f"pictures.matched must be from 0 to 1, not {self.matched}")
        if self.gradient_steps > self.num_inference_steps:
            raise ValueError(
                f"pictures.gradient_steps is {self.gradient_steps}, more than num_inference_steps, {self.num_inference_steps}"
            )
        if self.new_components < 0 or self.new_scale <= 0 or not self.score.prompts:
            raise ValueError(
                "pictures: new_components must not be negative, new_scale positive, score.prompts not empty"
            )
