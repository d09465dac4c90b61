"""Training of `tiny-sd`, the small Stable Diffusion of the embedded world."""
