"""One frozen base model a family, behind one small interface: latents in and out, prompts to conditioning, fingerprint."""
