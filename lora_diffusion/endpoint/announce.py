"""One line when the endpoint is ready: `serve run` itself only says that it was asked to start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI

from lora_diffusion.endpoint.studio import Studio

PAUSE_SECONDS = 0.5


def announced(app: FastAPI, studio: Studio) -> FastAPI:
    """`app`, which says where its page is as soon as all stages answer. Ray shows what a replica prints in `serve run`'s terminal."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_announce(studio))
        yield
        task.cancel()

    app.router.lifespan_context = lifespan
    return app


async def _announce(studio: Studio) -> None:
    told = False
    while True:
        try:
            await studio.ready()
            break
        except Exception as error:
            if getattr(error, "reason", "") == "store_unavailable" and not told:
                told = True
                where, why = studio.config.library.store, str(error.__cause__ or error).rstrip(".")
                print(
                    f"The store of LoRAs at {where} cannot be used: {why}. Until it can, 503 is answered.", flush=True
                )
        await asyncio.sleep(PAUSE_SECONDS)
    where = ""
    with suppress(Exception):  # Serve has no public way to ask where its proxy listens
        page = await asyncio.to_thread(_page)
        where = f": {page} (API: {page}/docs)"
    print(f"LoRA Diffusion is ready{where}. Ctrl-C ends it.", flush=True)


def _page() -> str:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    http = client.http_config
    host = "127.0.0.1" if http.host in ("0.0.0.0", "::") else http.host
    return f"http://{host}:{http.port}"
