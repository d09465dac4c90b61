"""From what a person calls a base model to the parts that we use of it, or one sentence that says why not.

A diffusers folder (here, in a bucket, on the hub) is read part by part: what we never use (safety checker, feature
extractor, image encoder) is never looked at. No pickle is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.models import single_file
from lora_diffusion.models.files import NotHereError, fetch_folder, here_only_now
from lora_diffusion.models.kinds import check_pointer, kind_of_class, kind_of_folder, read_json
from lora_diffusion.models.parts import Parts, check_parts

EXPECTED = (
    "expected is Stable Diffusion 1.x, 2.x or XL: a diffusers folder (also s3://bucket/prefix), a single .safetensors "
    "checkpoint, a hub id that this machine can reach, or a shipped model"
)
HUB = "https://huggingface.co"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
_XL_CLASSES = {**_CLASSES, "text_encoder_2": "CLIPTextModelWithProjection"}
_USED = re.compile(
    r"model_index\.json|(unet|vae|text_encoder|text_encoder_2|tokenizer|tokenizer_2|scheduler)/[^/]*\.(json|txt|safetensors)"
)
_CONFIGS = re.compile(r".*\.(json|txt)")


def load_parts(place: str, dtype: torch.dtype = torch.float32) -> Parts:
    """`place`: a folder, a file, s3://bucket/prefix or a hub id, as `places.place_or_name` gives it. On the CPU, in `dtype`.

    Raises ValueError: what lies there, or what is wrong with it.
    """
    path = _local(place)
    parts = single_file.load(path, dtype) if path.is_file() else _load_folder(path, dtype)
    check_parts(parts)
    return parts


def _local(place: str) -> Path:
    """The file or folder of this machine that holds `place`; of a remote one only the files that we use."""
    if "://" in place:
        name = place.rpartition("/")[2]
        if single_file.is_weights(name):
            single_file.check_name(name)
            return fetch_folder(place)
        _check_folder(fetch_folder(place, lambda found: bool(_CONFIGS.fullmatch(found))))  # before gigabytes
        return fetch_folder(place, lambda found: bool(_USED.fullmatch(found)))
    path = Path(place)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(place) or single_file.is_weights(place):
        raise ValueError("there is no such file or folder")
    from diffusers import DiffusionPipeline

    here = here_only_now()
    try:
        index = dict(DiffusionPipeline.load_config(place, local_files_only=here))
        if not _trouble(index):  # else its gigabytes need not be fetched
            unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
            return Path(DiffusionPipeline.download(place, use_safetensors=True, local_files_only=here, **unused))
    except Exception as error:  # of a dozen types, among them those of HTTP libraries
        if here:
            raise NotHereError(
                f"base model {place} is not on this machine yet: the hub would be asked for it"
            ) from error
        raise ValueError(f"there is no such folder here, and {_hub_says(error, place)}") from error
    raise ValueError(_trouble(index))


def _hub_says(error: BaseException, place: str) -> str:
    """Why the hub does not give it: diffusers says of everything that a file is missing, so what lies behind is looked at."""
    kinds: set[str] = set()
    behind: BaseException | None = error
    while behind is not None:
        kinds |= {kind.__name__ for kind in type(behind).__mro__}
        behind = behind.__cause__ or behind.__context__
    if "GatedRepoError" in kinds:
        return f"the hub gives it to those who accepted its terms: do so at {HUB}/{place}, then log in with `hf auth login` or HF_TOKEN"
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return (
            f"the hub cannot be reached: where it can, `hf download {place} --local-dir FOLDER`, and give that folder"
        )
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no model of this name, or a private one: then log in with `hf auth login` or HF_TOKEN"
    return f"the hub does not give it ({_first(error)})"


def _check_folder(folder: Path) -> dict[str, Any]:
    """What model_index.json says, if the folder is of a family that we load. Looks at configurations only."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"it is {kind_of_folder(folder)}")
    index = read_json(folder / "model_index.json")
    trouble = _trouble(index)
    if trouble:
        raise ValueError(trouble)
    pipeline, classes = kind_of_class(str(index.get("_class_name", ""))), _classes(index)
    for part, wanted in classes.items():
        config = read_json(folder / part / "config.json")
        found = str(config.get("_class_name") or (config.get("architectures") or [wanted])[0])
        if not found.startswith(wanted):
            raise ValueError(f"it is {pipeline}, whose {part} is {kind_of_class(found)} instead of a {wanted}")
    for part in (part.replace("text_encoder", "tokenizer") for part in classes if "text_encoder" in part):
        names = {path.name for path in (folder / part).glob("*")}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise ValueError(
                f"its {part}/ is missing (tokenizer.json, or vocab.json and merges.txt): copy it from the model that this "
                "one was made of"
            )
    return index


def _trouble(index: dict[str, Any]) -> str:
    """What the pipeline is instead, or which part it lacks; "" if model_index.json tells of nothing wrong."""
    pipeline = kind_of_class(str(index.get("_class_name", "")))
    missing = [part for part in _classes(index) if not (index.get(part) or [None])[0]]
    if "transformer" in index:
        return f"it is {pipeline}"
    return f"it is {pipeline} without {', '.join(missing)}" if missing else ""


def _classes(index: dict[str, Any]) -> dict[str, str]:
    return _XL_CLASSES if "text_encoder_2" in index else _CLASSES


def _load_folder(folder: Path, dtype: torch.dtype) -> Parts:
    import diffusers
    import transformers

    index = _check_folder(folder)
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "torch_dtype": dtype}
    loaded: dict[str, Any] = {}
    for part, name in _classes(index).items():
        cls: Any = getattr(diffusers, name, None) or getattr(transformers, name)
        variant = _variant(folder, part)
        with _told(part), _no_progress_bars():
            loaded[part], report = cls.from_pretrained(folder / part, variant=variant, **options)
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"its {part} lacks {len(missing)} weights, such as {missing[0]}: get the file again")
        if part.startswith("text_encoder"):
            label = part.replace("text_encoder", "tokenizer")
            with _told(label):
                loaded[label] = transformers.CLIPTokenizer.from_pretrained(folder / label, local_files_only=True)
            # transformers gives 1e30 where tokenizer_config.json does not say it
            longest = min(loaded[label].model_max_length, loaded[part].config.max_position_embeddings)
            loaded[label].model_max_length = longest
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    name = str(config.get("_class_name") or index.get("scheduler", ["", ""])[1])
    with _told(f"scheduler ({name})"):
        scheduler = getattr(diffusers, name).from_config(config)
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))
    return Parts(**loaded, scheduler=scheduler, force_zeros_for_empty_prompt=zeros)


@contextmanager
def _told(part: str) -> Iterator[None]:
    """What a library raises about a part, as a ValueError; but memory that ends is no fault of the model."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise ValueError(f"its {part} cannot be loaded ({_first(error)})") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _variant(folder: Path, part: str) -> str | None:
    """The word in the weights' file names, as in `model.fp16.safetensors`; None for the plain names, which come first."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    shard = r"(-\d+-of-\d+)?"
    names = [path.name for path in (folder / part).iterdir()]
    for name in names:
        check_pointer(folder / part / name)
    found = [re.fullmatch(rf"{stem}{shard}(?:\.([\w]+))?{shard}\.safetensors", name) for name in names]
    variants = {match[2] for match in found if match}
    if variants:
        return None if None in variants else sorted(variants, key=lambda word: word != "fp16")[0]
    if any(name.endswith(".bin") for name in names):
        raise ValueError(
            f"its {part} is a pickle (.bin), which can run any code and is not opened; if you trust it, rewrite the folder "
            f"by python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('{folder}', "
            f"safety_checker=None).save_pretrained('{folder}-safe')\""
        )
    raise ValueError(f"its {part}/ holds no {stem}.safetensors")


def _first(error: BaseException) -> str:
    """The first line of what a library says, without its full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
