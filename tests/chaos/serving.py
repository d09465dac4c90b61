"""Rounds of chaos.py with the endpoint: each of its parts is killed while clients ask."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
from clients import Client
from http_endpoint import lora_diffusion_serve
from serve_world import save_synthesizer

if TYPE_CHECKING:
    from chaos import Chaos

# part -> word in its command line
STAGES = {
    name: f"lora-diffusion:{name}" for name in ("Gateway", "Embedder", "Denoiser", "Decoder", "Renderer", "Library")
}
FUSED = {name: STAGES[name] for name in ("Gateway", "Renderer")}
RAY = {
    "HAProxy": "bin/haproxy",
    "HAProxy's manager": "HAProxyManager",
    "proxy": "ray::ProxyActor",
    "controller": "ServeController",
}
# what a client may be told instead of an answer while a part is started again; a connection may break
PROBLEMS = {
    "overloaded",
    "not_ready",
    "deadline_exceeded",
    "unknown_lora",
    "transport",
    "503 of the proxy",
    "no routes yet",
}
BACK = 300.0  # seconds until all is answered again: a replica imports torch, on a busy machine


def serving(chaos: Chaos, count: int = 100) -> None:
    """`count` parts of one endpoint, in random order; the graphs in turn."""
    folder, tally = chaos.new("serving"), chaos.tallies["serving"]
    folder.mkdir()
    graph = ("stages", "fused")[(tally.rounds - 1) % 2]
    settings: dict[str, Any] = {
        "synthesizer": save_synthesizer(folder / "synthesizer"),
        "graph": graph,
        "sampling.num_inference_steps": 3,
        "limits.max_images": 4,
        "limits.default_seconds": 60,
        "deployments.Renderer.autoscaling_config.max_replicas": 1,
    }
    parts = {**(STAGES if graph == "stages" else FUSED), **RAY}
    with lora_diffusion_serve(folder, settings) as address:
        prober = Client(address, chaos.random.randrange(2**32), patience=BACK)
        for part in chaos.random.sample(sorted(parts), min(count, len(parts))):
            clients = [
                Client(address, chaos.random.randrange(2**32), patience=BACK, allowed=PROBLEMS, like=prober)
                for _ in range(2)
            ]
            over = threading.Event()
            threads = [threading.Thread(target=_ask, args=(client, over)) for client in clients]
            for thread in threads:
                thread.start()
            time.sleep(chaos.random.uniform(1, 4))
            begin = time.monotonic()
            if not _kill(parts[part]):
                continue
            time.sleep(1)
            while problem := prober.is_answered():
                assert time.monotonic() - begin < BACK, (
                    f"{part}: {problem}; {(folder / 'serve.log').read_text()[-3000:]}"
                )
                time.sleep(0.5)
            tally.kill(part, time.monotonic() - begin, 0)
            over.set()
            for thread in threads:
                thread.join()
            answers = sum((client.answers for client in clients), Counter[str]())
            wrong = [*clients[0].wrong, *clients[1].wrong, *prober.wrong]
            prober.wrong = []
            tally.log[-1] |= {"answers": dict(answers), "wrong": wrong}
            tally.different += len(wrong)


def _ask(client: Client, over: threading.Event) -> None:
    while not over.wait(0.1):
        client.ask()


def _kill(word: str) -> bool:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                process.kill()
                return True
    return False
