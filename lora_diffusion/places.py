"""Addresses and names: what a person typed becomes an absolute path or `s3://bucket/prefix`, and what a stranger named stays inside.

Every path of a configuration, a command line or a call goes through `place`; every name from a bucket, a tar or a file through `check_name`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

# What a configuration's text names, for `config.placed`: something to read, something to write, or a path or else a name.
Place = Annotated[str, "place"]
Output = Annotated[str, "output"]
PlaceOrName = Annotated[str, "place or name"]
PlaceOrRedis = Annotated[str, "output", "redis"]  # something to write, or redis://host:port/database
People = Annotated[str, "people"]  # something to read, or synthetic:40
SYNTHETIC = "synthetic:"
SHIPPED = ("tiny", "tiny-b", "tiny-sd", "tiny-start")  # names that win over a folder of the same name here


def check_name(name: str) -> None:
    """Raises ValueError for a name from outside that is no path inside of the folder that it is put in."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\\0"):
        raise leads_out(name)


def leads_out(name: str) -> ValueError:
    return ValueError(f"the name {name!r} leads out of its folder: rename or remove it")


def place(text: str | os.PathLike[str]) -> str:
    """What a person typed as an address: an absolute local path, or `s3://bucket/prefix`.

    `~` and a variable at the beginning (`$SCRATCH/x`) are filled in, `file:///x` is a path, and `s3:/bucket/x`, which is
    what `Path("s3://bucket/x")` holds, is `s3://bucket/x`. Touches nothing. Raises ValueError for anything else.
    """
    typed = os.fspath(text)
    if not typed.strip() or "\0" in typed:
        raise ValueError(f"{typed!r} is no path: give a local folder or s3://bucket/prefix")
    scheme, slashes, rest = _address(typed) or ("", "", typed)
    if not scheme:
        return _local(typed)
    if scheme == "file":
        host, _, path = rest.partition("/") if len(slashes) == 2 else ("", "", rest)
        if host not in ("", "localhost"):
            raise ValueError(f"{typed!r} names the machine {host}: give file:///path, or the path alone")
        return _local("/" * bool(slashes) + unquote(path))
    if scheme not in ("s3", "s3a"):
        raise ValueError(f"cannot open {typed!r}: give a local folder or s3://bucket/prefix")
    if not rest.strip("/"):
        raise ValueError(f"cannot open {typed!r}: an S3 address needs a bucket, as in s3://bucket/prefix")
    return f"s3://{rest.strip('/')}"


def _address(typed: str) -> tuple[str, str, str] | None:
    """Scheme, slashes and rest of `scheme:/rest`; None for a path."""
    found = re.fullmatch(r"([a-z][\w+.-]+):(/*)(.*)", typed.strip(), re.IGNORECASE | re.DOTALL)
    if not found or not (found[2] or found[1].lower() in ("s3", "s3a", "file")):
        return None
    return found[1].lower(), found[2], found[3]


def _local(typed: str) -> str:
    path = os.path.expanduser(typed)
    if path.startswith("~"):
        raise ValueError(
            f"{typed}: this machine has no user {path[1:].partition('/')[0]!r}; for a folder of this name, ./{typed}"
        )
    if path.startswith("$"):
        path = os.path.expandvars(path)
        if path.startswith("$"):
            raise ValueError(
                f"{typed}: there is no environment variable {path.partition('/')[0]}; for a folder, ./{typed}"
            )
    return os.path.abspath(path)


def place_or_name(text: str | os.PathLike[str]) -> str:
    """As `place` for an address, or a path that is one at sight or exists; a name (shipped, of a hub) stays as it is."""
    typed = os.fspath(text)
    if typed in SHIPPED:
        return typed
    is_path = _address(typed) or typed.startswith(("/", ".", "~", "$")) or os.path.exists(typed)
    return place(typed) if is_path else typed


def local_place(text: str | os.PathLike[str], what: str) -> Path:
    """`place`, for what can lie only on this machine. `what`: its name in the ValueError about a bucket."""
    found = place(text)
    if found.startswith("s3://"):
        raise ValueError(f"{what} must lie on this machine, not at {found}")
    return Path(found)
