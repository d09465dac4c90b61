"""One line when the endpoint is ready: `serve run` itself only says that it was asked to start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI

from lora_diffusion.endpoint.studio import Studio

PAUSE_SECONDS = 0.5
LISTEN = "0A"  # in /proc/net/tcp


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
        host, port = await asyncio.to_thread(_listens)
        if listeners(port) > 1:
            print(
                f"Another program listens at port {port}, too, and gets a part of the requests: end it, or take another port.",
                flush=True,
            )
        where = f": http://{host}:{port} (API: http://{host}:{port}/docs)"
    print(f"LoRA Diffusion is ready{where}. Ctrl-C ends it.", flush=True)


def _listens() -> tuple[str, int]:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    http = client.http_config
    return "127.0.0.1" if http.host in ("0.0.0.0", "::") else http.host, http.port


def listeners(port: int) -> int:
    """How many sockets of this machine listen there: Ray's proxies may share a port. 0 where that can't be seen."""
    found = 0
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path("/proc/net", name).read_text().splitlines()[1:]]
            found += sum(row[3] == LISTEN and row[1].endswith(f":{port:04X}") for row in rows)
    return found
