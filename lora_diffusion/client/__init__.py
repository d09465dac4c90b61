"""A client of the endpoint, sync and async. `pip install lora-diffusion` is enough: httpx, and nothing of torch."""

from lora_diffusion.client.answers import Event, Face, File, Image, Latent, Likeness, LoRA, Pictures, Progress
from lora_diffusion.client.clients import AsyncClient, Client
from lora_diffusion.client.retry import ApiError, Retry

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Event",
    "Face",
    "File",
    "Image",
    "Latent",
    "Likeness",
    "LoRA",
    "Pictures",
    "Progress",
    "Retry",
]
