"""A dataclass of plain settings as command line options, for jobs that train in one process."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def add_settings(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """`--people-per-step 32` for each field that is one number or word."""
    for setting in _plain(settings):
        option = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(option, type=type(setting.default), default=setting.default)


def read_settings(args: argparse.Namespace, settings: type[T]) -> T:
    return settings(**{setting.name: getattr(args, setting.name) for setting in _plain(settings)})


def _plain(settings: type[Any]) -> list[Field[Any]]:
    return [setting for setting in fields(settings) if isinstance(setting.default, int | float | str)]
