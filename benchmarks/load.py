"""Open-loop load on the endpoint, run as a process of its own: requests start on time whether or not earlier ones are answered.

    python benchmarks/load.py URL --route loras --rate 5 --seconds 60
    python benchmarks/load.py URL --route loras --closed 8 --seconds 10     # closed loop: what the server can do

Latency is counted from when a request was due, so that a server that stalls cannot hide it (coordinated omission).
Prints one JSON object: counts by status, latencies of successes in ms, successes of each second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

FACES = sorted((Path(__file__).resolve().parents[1] / "tests/data/faces").glob("*.png"))
ROUTES = {
    "loras": {"format": "diffusers"},
    "images": {"prompt": "a photo of sks person, studio light"},
    "personalize": {"prompt": "a photo of sks person, studio light"},
}


class Load:
    def __init__(self, url: str, route: str, timeout: float) -> None:
        self.url = f"{url}/v1/{route}"
        self.fields = ROUTES[route]
        self.timeout = timeout
        self.photos = [path.read_bytes() for path in FACES]
        self.answers: list[tuple[float, float, str]] = []  # when it ended, latency, status; seconds

    async def ask(self, session: aiohttp.ClientSession, number: int, due: float) -> None:
        form = aiohttp.FormData({**self.fields, "seed": str(number)})
        form.add_field("photo", self.photos[number % len(self.photos)], filename="photo.png")
        try:
            async with session.post(self.url, data=form) as response:
                await response.read()
                status = str(response.status)
                if response.status in (429, 503) and "Retry-After" not in response.headers:
                    status += " without Retry-After"
        except (aiohttp.ClientError, TimeoutError) as error:
            status = type(error).__name__
        now = time.perf_counter()
        self.answers.append((now, now - due, status))

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=self.timeout)
        )

    async def open_loop(self, rate: float, seconds: float) -> None:
        async with self.session() as session:
            start = time.perf_counter()
            tasks = []
            for number in range(int(rate * seconds)):
                due = start + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(self.ask(session, number, due)))
            await asyncio.gather(*tasks)

    async def closed_loop(self, clients: int, seconds: float) -> None:
        end = time.perf_counter() + seconds

        async def one(session: aiohttp.ClientSession, client: int) -> None:
            number = client
            while time.perf_counter() < end:
                await self.ask(session, number, time.perf_counter())
                number += clients

        async with self.session() as session:
            await asyncio.gather(*(one(session, client) for client in range(clients)))

    def report(self, started: float) -> dict[str, Any]:
        good = [(ended, latency) for ended, latency, status in self.answers if status in ("200", "201")]
        latencies = np.array([latency for _, latency in good]) * 1000
        seconds = max(ended for ended, _, _ in self.answers) - started
        each = Counter(int(ended - started) for ended, _ in good)
        return {
            "statuses": dict(Counter(status for _, _, status in self.answers)),
            "success_per_second": round(len(good) / seconds, 2),
            "latency_ms": {f"p{q}": round(float(np.percentile(latencies, q)), 1) for q in (50, 90, 99, 100)}
            if good
            else {},
            "successes_of_each_second": [each[i] for i in range(int(seconds) + 1)],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--route", choices=ROUTES, default="loras")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--closed", type=int, default=0, help="clients that ask one after the other, instead of a rate")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--timeout", type=float, default=120.0)
    args = parser.parse_args()
    load = Load(args.url, args.route, args.timeout)
    started = time.perf_counter()
    asyncio.run(load.closed_loop(args.closed, args.seconds) if args.closed else load.open_loop(args.rate, args.seconds))
    print(json.dumps(load.report(started)))


if __name__ == "__main__":
    main()
