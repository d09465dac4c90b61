"""Connects a job to the Ray that it is given, or starts one on this machine."""

from __future__ import annotations

import logging
import os

import ray


def connect(address: str, cpus_wanted: int = 0, log_to_driver: bool = False) -> None:
    """`address` is "local" (a Ray of the job's own, which ends with it), "auto" or HOST:PORT. Does nothing if connected.

    A Ray of our own has at least `cpus_wanted` logical CPUs, whatever the machine has: with fewer, Ray Train and Ray Data
    wait for ever. It has no dashboard, whose dozen processes would take the first seconds of every core; who wants it
    starts Ray (`ray start --head`) and gives `--ray-address auto`.
    """
    if ray.is_initialized():
        return
    own = {"num_cpus": max(os.cpu_count() or 1, cpus_wanted), "include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.ERROR, **own)
