"""The work behind the endpoint, as plain classes: no Ray, no HTTP. `serve/` puts them on a cluster and behind an API.

`batcher.py` gathers single requests into batches; `stages.py` holds the three short stages (faces, latents, vectors);
`engine.py` and `renderer.py` draw; `library.py` keeps LoRAs for a while.
"""
