"""What is not installed is named together with the extra of this package that brings it.

`pip install lora-diffusion` brings the command and the client of an endpoint. `[torch]`: LoRAs are made, drawn and
converted in this process. `[ray]`: the jobs. `[serve]`: the endpoint. `[redis]`: its LoRAs in a Redis. `[lance]`: a corpus as a Lance table.
`[world]`: rendered people.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A package that an extra brings is not installed. Told to the user in one line."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed: pip install 'lora-diffusion[{extra}]'", name=package
        )


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns the error of an import inside the block into a MissingExtra, unless it is one of our own modules."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "lora_diffusion":
            raise
        raise MissingExtra(package, extra) from None


def check(extra: str, *modules: str) -> None:
    """For what another process is going to import. Imports nothing. Raises MissingExtra."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module, extra)
