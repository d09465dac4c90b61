"""The text encoders in a single-file checkpoint, under the names of CLIP's code or of OpenCLIP's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_diffusion.models.kinds import Shapes


def text_encoder(prefix: str, tensors: Mapping[str, Tensor], whole: bool) -> Any:
    """The encoder whose tensors begin with `prefix`: "....model." is OpenCLIP.

    whole: as in XL, which takes all layers of OpenCLIP, and its projection of the whole prompt. 2.x ends at the last layer but
    one. Raises KeyError for a tensor that is missing, ValueError for one of another shape.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    open_clip = prefix.endswith(".model.")
    config = _config(prefix, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, open_clip)
    if open_clip and whole:
        config["projection_dim"] = tensors[prefix + "text_projection"].shape[1]
    elif open_clip:
        config["num_hidden_layers"] -= 1
    weights = _open_clip(prefix, tensors, config, whole) if open_clip else _clip(prefix, tensors)
    cls = CLIPTextModelWithProjection if open_clip and whole else CLIPTextModel
    return build(cls, CLIPTextConfig(**config), weights)


def _config(prefix: str, shapes: Shapes, open_clip: bool) -> dict[str, Any]:
    if open_clip:
        layers, wide = "transformer.resblocks.{}.ln_1.weight", "transformer.resblocks.0.mlp.c_fc.weight"
        token, position = "token_embedding.weight", "positional_embedding"
    else:
        prefix += "text_model." if any(name.startswith(prefix + "text_model.") for name in shapes) else ""
        layers, wide = "encoder.layers.{}.layer_norm1.weight", "encoder.layers.0.mlp.fc1.weight"
        token, position = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    vocabulary, width = shapes[prefix + token]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[prefix + wide][0],
        "num_hidden_layers": count(shapes, prefix + layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": shapes[prefix + position][0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
    }


def _clip(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in found.items() if "position_ids" not in name}


def _open_clip(prefix: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], whole: bool) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    unused = [prefix + "logit_scale"]
    if not whole:
        unused += [f"{prefix}transformer.resblocks.{config['num_hidden_layers']}.", prefix + "text_projection"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(unused))}

    class Sized:  # the width, where the converter looks for it
        class config:
            hidden_size = config["hidden_size"]

    found: dict[str, Tensor] = convert_open_clip_checkpoint(Sized, kept, prefix=prefix)
    return found


def build(cls: Callable[..., Any], config: Any, weights: Mapping[str, Tensor]) -> Any:
    """A model that takes over the tensors as they are. Raises ValueError if one is missing, superfluous or misshapen."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls(**config) if isinstance(config, dict) else cls(config)
    # transformers calls the weights of CLIP text_model.* or not, depending on its version
    names = {name.removeprefix("text_model."): name for name in model.state_dict()}
    plain = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(
            {names.get(name, name): tensor for name, tensor in plain.items()}, strict=True, assign=True
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise ValueError(f"its {cls.__name__} is not as in Stable Diffusion 1.x, 2.x or XL ({reason})") from error
    return model.eval()


def count(shapes: Shapes, name: str) -> int:
    """How many of `name`, with 0, 1, ... for {}, there are."""
    number = 0
    while name.format(number) in shapes:
        number += 1
    return number
