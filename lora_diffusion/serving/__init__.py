"""The work behind the endpoint, as plain classes: no Ray, no HTTP. `lora_diffusion.endpoint` puts them on a cluster and behind an API.

`stages.py` says what each stage answers; `faces.py` and `latents.py` hold the short ones (faces, codes, vectors), whose single
requests `batcher.py` gathers into batches; `engine.py` and `renderer.py` draw; `library.py` keeps LoRAs for a while.
"""
