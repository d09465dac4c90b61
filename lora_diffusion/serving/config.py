"""Settings of the endpoint. `configs/serve_tiny.yaml` and `configs/serve_sd15.yaml` fill them; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from lora_diffusion.places import PlaceOrName, PlaceOrRedis


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may ask for. Bytes, pixels, seconds.

    body_seconds: a body that takes longer to arrive is given up (slow uploads must not hold connections).
    max_in_flight: requests that one gateway works on at a time; more are answered 503 with Retry-After.
    """

    max_body_bytes: int = 20_000_000  # of a request
    max_pixels: int = 50_000_000  # of a photo
    max_photos: int = 8  # of a request
    max_faces: int = 16  # reported of a photo
    max_prompt_chars: int = 1000  # of each prompt
    max_images: int = 8  # of a request
    max_samples: int = 8  # LoRAs of a request
    max_inference_steps: int = 100  # of a picture
    max_guidance_scale: float = 20.0  # of a picture
    max_interpolations: int = 16  # LoRAs between two people
    default_seconds: float = 60.0  # deadline of a request that names none
    max_seconds: float = 300.0  # longest deadline that a request may name
    body_seconds: float = 20.0
    max_in_flight: int = 64
    retry_after_seconds: float = 1.0  # what a refused client is told to wait


@dataclass(frozen=True)
class LibraryConfig:
    """Where LoRAs that were made lie, and how long they stay. One LoRA takes 2 KB, an uploaded one 4 N bytes.

    store: "", in memory, gone with its process; redis://[user@]host[:port][/database] (rediss:// with TLS), s3://bucket/prefix or a
        folder: all replicas share it, also graph=fused with several gateways.
    password_env: environment variable with the password of a Redis, which must not stand in `store`.
    shards: of the one in memory, with graph=stages: a process each.
    max_upload_bytes: of an uploaded LoRA's vector in float32; larger ones are refused.
    """

    store: PlaceOrRedis = ""
    password_env: str = "LORA_DIFFUSION_REDIS_PASSWORD"
    store_seconds: float = 2.0  # how long a store may take to answer, before the request is answered 503
    shards: int = 1
    max_bytes: int = 1_000_000_000  # memory for LoRAs, of each shard; a store has limits of its own
    max_upload_bytes: int = 20_000_000
    ttl_seconds: float = 3600.0  # how long a LoRA stays

    def __post_init__(self) -> None:
        if self.ttl_seconds <= 0 or self.store_seconds <= 0:
            raise ValueError("ttl_seconds and store_seconds are above 0")
        if self.shards < 1 or (self.shards > 1 and self.store):
            raise ValueError("shards is at least 1, and more only without a store, which all replicas share anyway")
        if self.store.startswith(("redis:", "rediss:")):
            address = urlsplit(self.store)
            if address.password or "password" in parse_qs(address.query):
                raise ValueError(f"store holds a password: put it into the environment variable {self.password_env}")
            if not address.hostname:
                raise ValueError("store names no host: redis://host:6379/0")


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of a request that leaves them out. None: what the synthesiser's folder recommends."""

    latent_guidance_scale: float | None = None  # of the denoiser
    latent_inference_steps: int | None = None  # of the denoiser
    temperature: float | None = None  # of the denoiser
    deviation_scale: float | None = None  # factor of the difference from the mean LoRA
    guidance_scale: float = 1.25  # of pictures
    num_inference_steps: int = 20  # of pictures
    negative_prompt: str = ""  # of pictures
    score_prompt: str = "a photo of sks person, neutral, facing the camera, studio light, grey studio background"  # of the picture that is scored with a LoRA


@dataclass(frozen=True)
class AccessConfig:
    """Who may ask, and how often.

    api_keys_env: environment variable with comma-separated keys; set without a key: an error.
    api_keys_file: a file with keys, one a line, as a mounted secret; those of the variable count, too. Neither: everybody may ask.
    open: listen beyond this machine although there are no keys; otherwise that is refused at the start.
    requests_per_minute: for each key (or each address, without keys), at one gateway; 0: as many as they like.
    proxies: how many in front write X-Forwarded-For: whose address a request has; HAProxy of `lora-diffusion serve` is counted by
        itself. 0: the header is not believed.
    cors_origins: pages of other sites that a browser may let in; empty: none.
    allowed_hosts: names under which it may be asked, besides addresses and localhost; "*": any. Empty: any with keys, none without.
    """

    api_keys_env: str = "LORA_DIFFUSION_API_KEYS"
    api_keys_file: str | None = None
    open: bool = False
    requests_per_minute: int = 0
    burst: int = 20  # requests that may come at once
    proxies: int = 0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchConfig:
    """Largest batch of each stage, requests (of the renderer: pictures), and how many may wait."""

    embedder: int = 8  # photos at a time
    denoiser: int = 64  # faces at a time
    decoder: int = 64  # LoRAs at a time
    renderer: int = 16  # pictures at a time
    max_waiting: int = 64  # requests that may wait at each stage


@dataclass(frozen=True)
class ServeConfig:
    """synthesizer: a shipped name, a folder or s3://bucket/prefix. rank, alpha and modules of the LoRAs are its.

    base: where the base model lies, as `synthesizer` or a hub id; None: where the synthesiser's training found it.
    graph: "stages", a deployment for each; "fused": embedder, denoiser, decoder and library in the gateway's process, where
        models are small. Then `deployments` of these four are not used.
    embedder: keys of `EmbedderConfig`; without `model`, the recogniser that the synthesiser was trained with. Another base
        model or recogniser than the synthesiser's is refused.
    deployments: Ray Serve options by deployment (Gateway, Embedder, Denoiser, Decoder, Renderer, Library).
    """

    base: PlaceOrName | None = None  # base model: a shipped name, folder, single file, s3:// or hub id
    synthesizer: PlaceOrName = "tiny"  # a shipped name, folder or s3://
    graph: Literal["stages", "fused"] = (
        "stages"  # of Ray Serve's deployments: one for each stage, or all but the drawing in the gateway
    )
    licence: str = ""  # shown by /v1/model
    log_requests: bool = False  # a line of JSON for each request, without its content; errors have theirs anyhow
    device: str = "cpu"  # of all stages
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the base model
    threads: int = 1  # of each stage on a CPU
    embedder: dict[str, Any] = field(default_factory=dict)
    batch: BatchConfig = field(default_factory=BatchConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    library: LibraryConfig = field(default_factory=LibraryConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    deployments: dict[str, Any] = field(default_factory=dict)
