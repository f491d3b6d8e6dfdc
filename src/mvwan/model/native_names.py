"""Tensor names of Wan-native files and of the older multi-view system <-> our names, both ways. Strings only.

The two namings of one tensor:

    Wan-native, older multi-view files             ours (diffusers)
    blocks.N.self_attn.q.weight                    blocks.N.attn1.to_q.weight
    blocks.N.cross_attn.o.bias                     blocks.N.attn2.to_out.0.bias
    blocks.N.mvs_attn.k.lora_A.default.weight      blocks.N.mvs_attn.to_k.lora_A.default.weight
    blocks.N.ffn.0.weight                          blocks.N.ffn.net.0.proj.weight
    blocks.N.norm3.weight                          blocks.N.norm2.weight
    blocks.N.modulation                            blocks.N.scale_shift_table
    head.head.weight, head.modulation              proj_out.weight, scale_shift_table
    head_rgb.head.weight, head_rgb.modulation      head_rgb.proj_out.weight, head_rgb.scale_shift_table
    head_action.head.weight                        head_action.proj_out.weight, and so on; its other layers keep their names
    text_embedding.0.weight                        condition_embedder.text_embedder.linear_1.weight

Source: the key names of the Wan2.2 release and of diffusers' `WanTransformer3DModel`.
"""

import re
from collections.abc import Iterable

from mvwan.errors import MvwanError

_BLOCK_PAIRS = (
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
    ("modulation_mvs", "modulation_mvs"),
    ("projector", "projector"),
    *(
        (f"{native}.{native_part}", f"{ours}.{our_part}")
        for native, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"), ("mvs_attn", "mvs_attn"))
        for native_part, our_part in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
)
_ROOT_PAIRS = (
    ("patch_embedding", "patch_embedding"),
    ("patch_embedding_heatmap", "patch_embedding_heatmap"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    *(
        pair
        for head in ("head_rgb", "head_heatmap", "head_action")
        for pair in ((f"{head}.head", f"{head}.proj_out"), (f"{head}.modulation", f"{head}.scale_shift_table"))
    ),
    *((f"head_action.{layer}", f"head_action.{layer}") for layer in ("proj_in", "pool", "hidden")),
)
_PREFIXES = ("pipe.dit.", "model.diffusion_model.", "dit.")
# What may follow a module's name: its own weight or bias, or that of a LoRA wrapper. Tables (`modulation`) end with their name.
_ENDING = re.compile(r"|\.(weight|bias)|\.base_layer\.(weight|bias)|\.lora_[AB](\.default)?\.weight")


def _translate(name: str, block_pairs: dict[str, str], root_pairs: dict[str, str]) -> str | None:
    block = re.match(r"blocks\.\d+\.", name)
    start = block.group() if block else ""
    pairs = block_pairs if block else root_pairs
    rest = name[len(start) :]
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):
        stem = ".".join(parts[:length])
        ending = rest[len(stem) :]
        if stem in pairs and _ENDING.fullmatch(ending):
            return f"{start}{pairs[stem]}{ending}"
    return None


_TO_OURS = (dict(_BLOCK_PAIRS), dict(_ROOT_PAIRS))
_TO_NATIVE = ({ours: native for native, ours in _BLOCK_PAIRS}, {ours: native for native, ours in _ROOT_PAIRS})


def to_ours(names: Iterable[str]) -> dict[str, str]:
    """Wan-native name -> our name for each of `names`; `.lora_A.weight` becomes `.lora_A.default.weight`.

    A prefix that older trainers left on (`pipe.dit.`) is taken off. Raises `MvwanError` that lists the names nobody knows,
    and when two names mean the same tensor.
    """
    translated: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        stripped = next((name[len(prefix) :] for prefix in _PREFIXES if name.startswith(prefix)), name)
        ours = _translate(stripped, *_TO_OURS)
        if ours is None:
            unknown.append(name)
        else:
            translated[name] = re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", ours)
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise MvwanError(f"{len(unknown)} tensor names are not Wan-native ones: {listed}")
    seen: dict[str, str] = {}
    for name, ours in translated.items():
        if ours in seen:
            raise MvwanError(f"two tensors are the same one: {seen[ours]} and {name} both mean {ours}")
        seen[ours] = name
    return translated


def to_native(names: Iterable[str]) -> dict[str, str]:
    """Our name -> Wan-native name for each of `names`, the inverse of `to_ours`. Raises `MvwanError` for a name without one."""
    translated = {name: _translate(name, *_TO_NATIVE) for name in names}
    unknown = [name for name, native in translated.items() if native is None]
    if unknown:
        raise MvwanError(f"{len(unknown)} tensors have no Wan-native name: {', '.join(unknown[:5])}")
    return {name: native for name, native in translated.items() if native is not None}


def is_native(names: Iterable[str]) -> bool:
    """Whether `names` are Wan-native: they hold a name that only that naming has."""
    only_native = re.compile(
        r"(^|\.)(self_attn|cross_attn|time_projection|text_embedding|head\.head|head_rgb\.head|head_heatmap\.head)\."
        r"|^(?:[\w.]*\.)?blocks\.\d+\.(modulation$|mvs_attn\.[qkvo]\.|ffn\.[02]\.)"
    )
    return any(only_native.search(name) for name in names)
