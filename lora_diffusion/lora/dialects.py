"""What programs call the layers of a UNet in LoRA files, and what else such files may be.

Every dialect is a prefix, the layer's name, and a suffix that says A, B or alpha:

    prefixes   base_model.model. (peft)   unet. (diffusers)   diffusion_model. (ComfyUI)   lora_unet_ (kohya)   lycoris_
    names      diffusers'   down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q, old: ….attn1.processor.to_q
               Stability's  input_blocks.2.1.transformer_blocks.0.attn1.to_q
               either with "_" for "."
    suffixes   .lora_A.weight   .lora_A.<adapter>.weight   .lora_A   .lora_down.weight   .lora.down.weight
               _lora.down.weight   .lora_linear_layer.down.weight   .alpha

So a key is read without knowing its program: prefix off, suffix off, "." to "_", and the rest looked up.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

_PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.|module\.|_orig_mod\.|lora_unet_|lycoris_)*"
)
_LORA = re.compile(
    r"(.+?)(?:"
    r"\.lora_([AB])(?!\.bias$|\.[^.]+\.bias$)(?:\.[^.]+)??(?:\.weight)?"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight"
    r"|\.lora_(down|up)(?:\.[^.]+)?\.weight"
    r"|\.(alpha))"
)
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}
# Suffixes of what a vector of A and B cannot hold.
_KINDS = {
    "LoHa": re.compile(r"(.+?)\.hada_[wt]\d"),
    "LoKr": re.compile(r"(.+?)\.lokr_[wt]\d"),
    "DoRA": re.compile(r"(.+?)\.(?:dora_scale|lora_magnitude_vector)"),
    "(IA)³": re.compile(r"(.+?)\.(?:on_input|ia3_l)"),
    "OFT": re.compile(r"(.+?)\.(?:oft_|boft_)"),
    "GLoRA": re.compile(r"(.+?)\.[ab][12]\.weight$"),
    "LoCon with a core (lora_mid)": re.compile(r"(.+?)\.lora_mid\."),
    "AdaLoRA": re.compile(r"(.+?)\.lora_E(?:\.|$)"),
    "VeRA": re.compile(r"(.+?)\.vera_"),
    "LoRA with biases": re.compile(r"(.+?)\.lora_[AB](?:\.[^.]+)?\.bias$"),
    "full difference (.diff)": re.compile(r"(.+?)\.(?:diff|diff_b|w_norm|b_norm|set_weight)$"),
}
_NO_LORA = {
    "a textual inversion": re.compile(r"emb_params$|string_to_param|clip_[lg]$|<[^>]+>$"),
    "an IP-Adapter": re.compile(r"ip_adapter|image_proj|.*_ip\.weight$"),
    "a ControlNet": re.compile(r"control_model|lora_controlnet|controlnet_|input_hint_block"),
    "a whole model, not a LoRA": re.compile(
        r"model\.diffusion_model|first_stage_model|cond_stage_model|conv_in\.|down_blocks\.|double_blocks\.|encoder\."
    ),
}
_TEXT = re.compile(r"(?:lora_te\d?_|text_encoders?\.|text_encoder_\d\.|te\d?_|lora_prior_te_|text_model)")
_UNET = re.compile(
    r"(?:down_blocks?|up_blocks?|mid_block|input_blocks|middle_block|output_blocks|conv_(?:in|out)|time_emb)"
)
FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "refiner": "the refiner of Stable Diffusion XL",
}
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}  # of the text that attn2 looks at
_OTHER_FAMILIES = {
    "Stable Cascade": re.compile(r"lora_prior_unet_"),
    "FLUX": re.compile(r".*(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    "Stable Diffusion 3": re.compile(r".*(?:joint_blocks[._]\d|transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj)"),
    "a language model": re.compile(r".*model[._]layers[._]\d+[._](?:self_attn|mlp)[._]"),
    "a transformer (such as PixArt, Wan, Qwen-Image), not a UNet": re.compile(
        r"(?:.*[._])?(?:transformer_blocks|blocks|layers)[._]\d+[._](?:attn|self_attn|cross_attn|attention|ffn?)"
    ),
}


class Key(NamedTuple):
    """`layer`: its name, spelled with "_"; `side`: A, B or alpha; `kind`: what it is instead, where a vector cannot hold it."""

    layer: str
    side: str = ""
    kind: str = ""


def read_key(key: str) -> Key | None:
    """What a tensor's key means; None for one that is no part of a LoRA."""
    if found := _LORA.fullmatch(key):
        return Key(_flat(found[1]), _SIDES[found[2] or found[3] or found[4] or found[5]])
    for kind, pattern in _KINDS.items():
        if found := pattern.match(key):
            return Key(_flat(found[1]), kind=kind)
    return None


def _flat(layer: str) -> str:
    name = layer[_PREFIX.match(layer).end() :].replace(".", "_").replace("_processor_to_", "_to_")  # type: ignore[union-attr]
    return f"{name}_0" if name.endswith("_to_out") else name


@lru_cache(maxsize=16)
def spellings(names: tuple[str, ...]) -> dict[str, str]:
    """Layer as `read_key` has it -> name in diffusers' UNet, for each way to spell one of `names`."""
    per_block = layers_per_block(names)
    found = {}
    for name in names:
        for spelled in (*stability_names(name, per_block), name):
            found[spelled.replace(".", "_")] = name
    return found


_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_RESNET |= {"conv_shortcut": "skip_connection"}
_OUTSIDE = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
_OUTSIDE |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in (0, 1)}
_OUTSIDE |= {f"{name}_embedding.linear_{i + 1}": f"label_emb.0.{2 * i}" for i in (0, 1) for name in ("add", "class")}
_BLOCK = re.compile(r"(down|up)_blocks\.([0-9]{1,3})\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]{1,3})\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.([01])\.(.+)")


def stability_names(name: str, per_block: int) -> tuple[str, ...]:
    """What the UNet of Stability's own code (LDM, SGM) calls a layer of diffusers', with `per_block` resnets a block.

    An upsampler comes after the attention, if its block has one, which its name does not tell: both names are given.
    """
    if name in _OUTSIDE:
        return (_OUTSIDE[name],)
    if found := _MIDDLE.fullmatch(name):
        kind, i, rest = found.groups()
        return (
            (f"middle_block.1.{rest}",)
            if kind == "attentions"
            else (f"middle_block.{2 * int(i)}.{_RESNET.get(rest, rest)}",)
        )
    found = _BLOCK.fullmatch(name)
    if not found:
        return ()
    way, block, kind, i, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if way == "down":
        n = 1 + (per_block + 1) * block + i
        if kind == "downsamplers":
            return (f"input_blocks.{n + per_block}.0.op",)
        return (f"input_blocks.{n}.0.{_RESNET.get(rest, rest)}" if kind == "resnets" else f"input_blocks.{n}.1.{rest}",)
    n = (per_block + 1) * block + i
    if kind == "upsamplers":
        return tuple(f"output_blocks.{n + per_block}.{place}.{rest}" for place in (1, 2))
    return (f"output_blocks.{n}.0.{_RESNET.get(rest, rest)}" if kind == "resnets" else f"output_blocks.{n}.1.{rest}",)


def layers_per_block(names: Iterable[str]) -> int:
    """Up blocks have one resnet more than down blocks; 2 (all of Stability's models) where the names do not tell."""
    found = [_BLOCK.fullmatch(name) for name in names]
    inner = [(match[1], int(match[4])) for match in found if match and match[3] in ("resnets", "attentions")]
    return max([*(i for way, i in inner if way == "up"), *(i + 1 for way, i in inner if way == "down")], default=2)


def family(widths: Mapping[str, int], keys: Iterable[str] = ()) -> str:
    """A key of FAMILIES, the name of another model, or "" where nothing tells.

    widths: layer as `read_key` has it -> features in; keys: as they stand in the file.
    """
    for name, pattern in _OTHER_FAMILIES.items():
        if any(pattern.match(key) and not _UNET.search(key) and not _TEXT.match(key) for key in keys):
            return name
    for layer, width in widths.items():
        if re.search(r"attn2_to_[kv]$", layer) and not _TEXT.match(layer) and width in _WIDTHS:
            return _WIDTHS[width]
    deep = any(_UNET.search(layer) and re.search(r"transformer_blocks_[2-9]", layer) for layer in widths)
    return "sdxl" if deep or any(key.startswith(("lora_te2_", "text_encoder_2.")) for key in keys) else ""


def what_else(keys: Iterable[str]) -> str:
    """What a file without a LoRA is, as far as its keys tell; "" if they do not."""
    names = list(keys)
    return next((name for name, pattern in _NO_LORA.items() if any(pattern.match(key) for key in names)), "")


def group_of(key: str) -> str:
    """In words, what part of a model a key that the layout does not know belongs to."""
    known = read_key(key)
    if _TEXT.match(key) or _TEXT.match(_PREFIX.sub("", key, count=1)):
        return "text encoder"
    if known and _UNET.search(known.layer):
        return "UNet outside of the layout"
    return "unknown"
