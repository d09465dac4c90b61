"""The synthesiser: an identity embedding in, a LoRA vector out. Start reading at `synthesizer.py`."""

from lora_diffusion.synthesis.codes import CodeSpace, LatentCodes, PCACodes, VectorCodes
from lora_diffusion.synthesis.denoiser import Denoiser, DenoiserConfig
from lora_diffusion.synthesis.diffusion import Diffusion, DiffusionConfig, diffusion_loss, sample_codes
from lora_diffusion.synthesis.normaliser import Normaliser
from lora_diffusion.synthesis.pca import PCA, fit_pca, fit_pca_distributed
from lora_diffusion.synthesis.synthesizer import LatentSampling, Synthesizer
from lora_diffusion.synthesis.vae import LoRAVAE, VAEConfig

__all__ = [
    "PCA",
    "CodeSpace",
    "Denoiser",
    "DenoiserConfig",
    "Diffusion",
    "DiffusionConfig",
    "LatentCodes",
    "LatentSampling",
    "LoRAVAE",
    "Normaliser",
    "PCACodes",
    "Synthesizer",
    "VAEConfig",
    "VectorCodes",
    "diffusion_loss",
    "fit_pca",
    "fit_pca_distributed",
    "sample_codes",
]
