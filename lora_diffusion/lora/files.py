"""Where a LoRA lies: the one safetensors file that a path, a folder or a place in a bucket means, and what is in it."""

import os
from typing import Any, TypeAlias

from torch import Tensor

from lora_diffusion.lora import container
from lora_diffusion.lora.foreign import PEFT_CONFIG
from lora_diffusion.places import place
from lora_diffusion.storage import Store, open_store

PathLike: TypeAlias = str | os.PathLike[str]
FILE_NAMES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "kohya": "lora.safetensors",
    "vector": "vector.safetensors",
}
MAX_BYTES = 8 * 2**30  # no LoRA is that large; a whole model is, and need not be read to be refused


def open_file(path: PathLike) -> tuple[str, dict[str, Tensor], dict[str, str], dict[str, Any] | None]:
    """Of the file that `path` means: its address, tensors and metadata, and peft's config if one lies beside it."""
    store, name = find(path)
    source = f"{store.uri}/{name}"
    try:
        size = store.files().get(name, 0)
        if size > MAX_BYTES:
            raise ValueError(f"{source} has {size / 2**30:.0f} GB: a whole model, not a LoRA")
        data = store.read(name)
        tensors, metadata = container.parse(data, source)
        if "layout_id" in metadata:  # ours; others count their checksums otherwise
            container.check_data(data, metadata, source)
        config = None
        if any(key.startswith("base_model.model.") for key in tensors) and store.exists(PEFT_CONFIG):
            config = container.json_object(store.read(PEFT_CONFIG), f"{store.uri}/{PEFT_CONFIG}")
    except FileNotFoundError as error:
        raise ValueError(f"{source} does not exist; give a .safetensors file or a folder that holds one") from error
    return source, tensors, metadata, config


def find(path: PathLike) -> tuple[Store, str]:
    """The folder and the name of the safetensors file that `path` means."""
    where = place(path)
    folder, _, name = where.rpartition("/")
    if (where.startswith("s3://") and name.lower().endswith(".safetensors")) or os.path.isfile(where):
        return open_store(folder or "/"), name
    store = open_store(where)
    files = store.files()
    if not files and not (store.local and os.path.isdir(where)):
        raise ValueError(f"{path} does not exist; give a .safetensors file or a folder that holds one")
    known = [name for name in FILE_NAMES.values() if name in files]
    found = known or sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("."))
    if len(found) != 1:
        names = sorted(found or files)[:8]
        raise ValueError(f"{path} should hold one LoRA as .safetensors, it holds {names}; name the file itself")
    return store, found[0]
