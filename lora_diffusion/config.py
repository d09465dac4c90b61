"""Configuration: frozen dataclasses, filled from a YAML file and from `key.sub=value` words.

A config dataclass lives beside the class that it builds; this module only knows how to fill one. Types are checked
here, once, so that a wrong key or value is an error at the start that says what was expected, not a crash in an hour.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from lora_diffusion.places import SYNTHETIC, local_place, place, place_or_name

Config = TypeVar("Config")

CONFIGS = Path(__file__).parent / "configs"
_SHORT = reprlib.Repr()  # YAML anchors make a value of billions of words from a few lines
_SHORT.maxstring = _SHORT.maxother = 200
_NONE_WORDS = frozenset({"", "null", "none", "~"})


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Fill the (nested, frozen) dataclass `cls` from its defaults, then a YAML file, then `key.sub=value` words.

    Raises ValueError for an unknown key (with the valid ones and the nearest of them), a value of the wrong type, a
    malformed override, or a file that is missing (see `find_config`) or no YAML mapping.
    """
    values = _read_yaml(find_config(path)) if path is not None else {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {word!r} is not of the form key=value (for example finetune.steps=80)")
        _set_dotted(values, key.strip().split("."), _Text(text))
    try:
        return from_dict(cls, values)
    except RecursionError as error:  # a YAML anchor that holds itself
        raise ValueError(f"config file {str(path)!r} is nested without end") from error


def find_config(path: str | Path) -> Path:
    """The file as typed, or else the one of this name that comes with the package: `sd15.yaml`, `configs/sd15.yaml`.

    Raises ValueError where there is neither, with the names of those that come with it.
    """
    typed, found = Path(path), local_place(path, "a config file")
    if found.is_file():
        return found
    if typed.parent in (Path(), Path("configs")) and (CONFIGS / typed.name).is_file():
        return CONFIGS / typed.name
    names = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
    raise ValueError(
        f"config file {str(found)!r} does not exist; give a path, or one that comes with this package: {names}"
    )


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build `cls` from plain nested values; the inverse of `to_dict`. Raises ValueError as `load_config`."""
    assert dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise ValueError(_unknown_key(str(key), list(fields), where))
    kwargs = {key: _convert(hints[key], value, f"{where}{key}", fields[key]) for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in kwargs and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"config is missing {', '.join(where + name for name in missing)}")
    try:
        return cls(**kwargs)
    except ValueError as error:  # a __post_init__ that checks ranges does not know where it lies
        raise ValueError(f"{where.rstrip('.')}: {error}" if where else str(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values (dict, list, str, int, float, bool, None) of a config: what JSON and YAML can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def to_yaml(config: Any) -> str:
    """The config as the YAML file that would give it."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def placed(config: Config) -> Config:
    """The dataclass with all its places (`Place`, `Output`, ... of `storage`) turned into addresses. Empty text stays empty.

    Raises ValueError with the key, also for a relative output where Ray's temporary copy of the user's folder is the
    working directory: it is thrown away with the job.
    """
    return typing.cast(Config, _map_places(config, "", _place))


def places(config: Any) -> list[tuple[str, str, bool]]:
    """(key, address, whether it is written to) of all places in what `placed` gave, names left out."""
    found: list[tuple[str, str, bool]] = []

    def note(text: str, marks: set[str], key: str) -> str:
        if text.startswith(("/", "s3://")):
            found.append((key, text, "output" in marks))
        return text

    _map_places(config, "", note)
    return found


def relative(values: Any) -> Any:
    """Plain values with the addresses below the working directory as if typed there: what is kept names no machine."""
    if isinstance(values, dict):
        return {key: relative(value) for key, value in values.items()}
    if isinstance(values, list):
        return [relative(value) for value in values]
    return values.removeprefix(f"{Path.cwd()}/") if isinstance(values, str) else values


def _map_places(config: Any, where: str, change: Callable[[str, set[str], str], str]) -> Any:
    hints = typing.get_type_hints(type(config), include_extras=True)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), where + field.name
        marks = _marks(hints[field.name])
        if dataclasses.is_dataclass(value):
            changed[field.name] = _map_places(value, key + ".", change)
        elif marks and isinstance(value, Mapping):
            changed[field.name] = {name: change(text, marks, f"{key}.{name}") for name, text in value.items()}
        elif marks and value:
            changed[field.name] = change(value, marks, key)
    return dataclasses.replace(config, **changed)


def _marks(hint: Any) -> set[str]:
    own = {mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, str)}
    return own.union(*(_marks(inner) for inner in typing.get_args(hint)))


def _place(text: str, marks: set[str], key: str) -> str:
    if "people" in marks and text.startswith(SYNTHETIC):
        return text
    if "redis" in marks and text.startswith(("redis://", "rediss://")):
        return text
    try:
        found = place_or_name(text) if "place or name" in marks else place(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    copy = next((folder for folder in Path.cwd().parents if folder.name == "working_dir_files"), None)
    if copy and "output" in marks and not os.path.isabs(text) and Path(found).is_relative_to(copy):
        raise ValueError(
            f"{key}={text} would lie in Ray's temporary copy of your folder, which is deleted after the job: give an "
            "absolute path on a disk that all machines share, or s3://bucket/prefix"
        )
    return found


class _Text(str):
    """The right side of an override, not yet parsed: only the field's type says whether `1e-4` or `on` is a word."""


class _NothingTwice(yaml.SafeLoader):
    """Of two keys of one name YAML takes the last, with its whole section: what the first set would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.tag, getattr(key, "value", None)), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" and name in seen:
                raise yaml.YAMLError(f"key {key.value!r} stands in line {seen[name]} and again in line {line}")
            if isinstance(key, yaml.ScalarNode):
                seen[name] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _NothingTwice)
    except OSError:
        raise
    except Exception as error:  # beside its own errors, it has others for tags such as !!bool x, and for deep nesting
        raise ValueError(f"config file {str(path)!r} is not valid YAML: {error or type(error).__name__}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config file {str(path)!r} must hold a mapping of keys, it holds a {type(values).__name__}")
    return values


def _set_dotted(values: dict[str, Any], keys: list[str], value: _Text) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override {'.'.join(keys)!r}: {'.'.join(keys[: depth + 1])!r} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _unknown_key(key: str, valid: list[str], where: str) -> str:
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {where + nearest[0]!r}?" if nearest else ""
    section = f" of {where.rstrip('.')!r}" if where else ""
    return f"unknown config key {where + key!r}.{hint} Valid keys{section}: {', '.join(sorted(valid))}"


def _convert(hint: Any, value: Any, where: str, field: dataclasses.Field[Any] | None = None) -> Any:
    if dataclasses.is_dataclass(hint):
        return _convert_section(hint, value, where, field)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, _Text):
            value = str(value) if str(value) in choices else _parse(value)
        if value not in choices:
            raise _wrong(where, f"one of {', '.join(map(str, choices))}", value)
        return value
    if hint is str:
        if not isinstance(value, str):
            raise _wrong(where, "a string", value)
        return str(value)
    if isinstance(value, _Text):
        value = _parse(value)
    if origin in (tuple, list):
        return _convert_sequence(origin, typing.get_args(hint), value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "a mapping", value)
        value_hint = (*typing.get_args(hint), Any, Any)[1]
        return {str(key): _convert(value_hint, item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:  # an override may lie within
        return {key: _convert(Any, item, where) for key, item in value.items()} if isinstance(value, dict) else value
    return _convert_scalar(hint, value, where)


def _convert_section(hint: Any, value: Any, where: str, field: dataclasses.Field[Any] | None) -> Any:
    if dataclasses.is_dataclass(value) and isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(where, f"a section with keys {', '.join(f.name for f in dataclasses.fields(hint))}", value)
    # A section's own default may differ from its class's defaults; keys that are not given keep the former.
    if field is not None and field.default_factory is not dataclasses.MISSING:
        value = _merge(to_dict(field.default_factory()), value)
    return from_dict(hint, value, f"{where}.")


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _convert_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in hints and (value is None or (isinstance(value, _Text) and value.lower() in _NONE_WORDS)):
        return None
    errors = []
    # str accepts every override text, so it is asked last.
    for hint in sorted((hint for hint in hints if hint is not type(None)), key=lambda hint: hint is str):
        try:
            return _convert(hint, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(origin: Any, hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(where, "a list, such as [a, b]", value)
    if origin is tuple and Ellipsis not in hints:
        if len(hints) != len(value):
            raise _wrong(where, f"a list of {len(hints)} values", value)
        return tuple(
            _convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
        )
    return origin(_convert(hints[0] if hints else Any, item, f"{where}[{i}]") for i, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as a string
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    raise _wrong(where, names.get(hint, str(hint)), value)


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception:  # as above
        return str(text)


def _wrong(where: str, expected: str, value: Any) -> ValueError:
    return ValueError(
        f"config key {where!r} must be {expected}, not {str(value) if isinstance(value, _Text) else _SHORT.repr(value)}"
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
