"""The jobs on Ray, and the one way to run them: `lora-diffusion corpus`, or `ray job submit jobs/build_corpus.py`."""
