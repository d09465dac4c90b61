"""LoRA Diffusion: one photo of a face in, a LoRA for Stable Diffusion out (arXiv:2412.02352)."""

__version__ = "0.1.0"
