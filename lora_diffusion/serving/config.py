"""Settings of the endpoint. `configs/serve_tiny.yaml` and `configs/serve_sd15.yaml` fill them; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_diffusion.storage import PlaceOrName


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may ask for. Bytes, pixels, seconds.

    body_seconds: a body that takes longer to arrive is given up (slow uploads must not hold connections).
    max_in_flight: requests that one gateway works on at a time; more are answered 503 with Retry-After.
    """

    max_body_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_photos: int = 8
    max_faces: int = 16
    max_prompt_chars: int = 1000
    max_images: int = 8
    max_samples: int = 8
    max_inference_steps: int = 100
    max_guidance_scale: float = 20.0
    max_interpolations: int = 16
    default_seconds: float = 60.0
    max_seconds: float = 300.0
    body_seconds: float = 20.0
    max_in_flight: int = 64
    retry_after_seconds: float = 1.0


@dataclass(frozen=True)
class LibraryConfig:
    """Memory for LoRAs that were made, and how long they stay. One LoRA takes 4 N bytes."""

    max_bytes: int = 1_000_000_000
    ttl_seconds: float = 3600.0


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of a request that leaves them out. None: what the synthesiser's folder recommends."""

    latent_guidance_scale: float | None = None
    latent_inference_steps: int | None = None
    temperature: float | None = None
    deviation_scale: float | None = None
    guidance_scale: float = 1.25
    num_inference_steps: int = 20
    negative_prompt: str = ""
    score_prompt: str = "a photo of sks person, neutral, facing the camera, studio light, grey studio background"


@dataclass(frozen=True)
class AccessConfig:
    """Who may ask, and how often.

    api_keys_env: environment variable with comma-separated keys; unset or empty: everybody may ask.
    requests_per_minute: for each key (or each address, without keys), at one gateway; 0: as many as they like.
    cors_origins: pages of other sites that a browser may let in; empty: none.
    """

    api_keys_env: str = "LORA_DIFFUSION_API_KEYS"
    requests_per_minute: int = 0
    burst: int = 20
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchConfig:
    """Largest batch of each stage, requests (of the renderer: pictures), and how many may wait."""

    embedder: int = 8
    denoiser: int = 64
    decoder: int = 64
    renderer: int = 16
    max_waiting: int = 64
    max_wait_seconds: float = 0.0


@dataclass(frozen=True)
class ServeConfig:
    """synthesizer: a shipped name, a folder or s3://bucket/prefix. rank, alpha and modules of the LoRAs are its.

    base: where the base model lies, as `synthesizer` or a hub id; None: where the synthesiser's training found it.
    embedder: keys of `EmbedderConfig`; without `model`, the recogniser that the synthesiser was trained with. Another base
        model or recogniser than the synthesiser's is refused.
    deployments: Ray Serve options by deployment (Gateway, Embedder, Denoiser, Decoder, Renderer, Library).
    """

    base: PlaceOrName | None = None
    synthesizer: PlaceOrName = "tiny"
    licence: str = ""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1
    embedder: dict[str, Any] = field(default_factory=dict)
    batch: BatchConfig = field(default_factory=BatchConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    library: LibraryConfig = field(default_factory=LibraryConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    deployments: dict[str, Any] = field(default_factory=dict)
