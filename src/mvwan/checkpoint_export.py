"""A checkpoint in the forms that others read:

    mvwan           a checkpoint folder of ours without optimizer state: to start from, to predict with, to pass on
    wan-native      one file with the older system's names and nothing else: every tensor of the checkpoint, to the bit
    diffusers-lora  a folder: the LoRA of stock layers as stock diffusers loads it, everything else in a file beside it
    merged          a folder: a stock transformer with the LoRA merged, equal to the adapted model's RGB half
    multiview       a folder: `MultiViewWan` with the LoRA merged, equal to the adapted model

The heat reader of a run that has one, which never trains, lies beside the tensors in every folder that predicts heat; `wan-native`, which
has no place for it, says so. Nothing else is left out unless the user says so by name; what a form cannot hold is an error. An export is
whole or not there.
Knows no run, no optimizer state and no noise.
"""

import json
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from mvwan.checkpoint import OLDER_SYSTEM, READER, find_checkpoint, load_trained, read_heat_reader, share_checkpoint
from mvwan.config import TrainableConfig
from mvwan.errors import MvwanError, nearest
from mvwan.files import whole_directory, whole_file, write_file
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.native_names import to_native
from mvwan.model.surgery import has_place_in_stock, load_as_trained, load_model, obstacles_to_stock, to_stock
from mvwan.model.trainable import MergeReport, adapted_weight, merge_adapters, names_by_group, parameters_by_name, stock_name
from mvwan.model.wan import WanTransformer3DModel, in_float32_island
from mvwan.tensors import TensorFile, digest, write_tensors

Form = Literal["mvwan", "wan-native", "diffusers-lora", "merged", "multiview"]
Dtype = Literal["float32", "bfloat16"]
FORMS: tuple[Form, ...] = get_args(Form)
LORA_FILE, REST_FILE = "pytorch_lora_weights.safetensors", "multiview.safetensors"
_STOCK_LAYERS = ("attn1", "attn2", "ffn")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What `export_checkpoint` wrote."""

    path: Path
    notes: tuple[str, ...]
    """What is in it, and what the user must know of it; a sentence each."""


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    form: Form,
    *,
    base: str | Path | None = None,
    ema: bool = False,
    dtype: Dtype | None = None,
    rgb_only: bool = False,
) -> Export:
    """The export at `output`, of the trained tensors or (`ema`) their moving average. `path` is whatever `find_checkpoint` takes.

    `base` (None: the one of the manifest) and `dtype` of merged weights (None: float32, which rounds nothing) are for `merged` and
    `multiview`; `rgb_only` allows `merged` to leave out what has no influence on the RGB half. Raises `MvwanError`, with nothing
    written, when `output` exists, an option has no meaning for the form, or the form cannot hold the checkpoint.
    """
    output = Path(output)
    _check_options(form, output, base=base, dtype=dtype, rgb_only=rgb_only)
    found = find_checkpoint(path)
    tensors, manifest = load_trained(found, ema=ema)
    if form == "mvwan":
        return _write_shared(output, tensors, manifest, found, ema)
    if form == "wan-native":
        return _write_native(output, tensors, manifest, found)
    if form == "diffusers-lora":
        return _write_lora(output, tensors, manifest, found)
    if base is None and manifest["base"]["id"] is None:
        raise MvwanError(f"checkpoint {found}: a file of the older system does not know its base. Name it with --base.")
    if form == "merged":
        _check_obstacles(tensors, manifest, found)
        _check_rgb_only(tensors, found, rgb_only)
    return _write_model(output, tensors, manifest, found, form, base, ema, dtype or "float32")


def _check_options(form: str, output: Path, **options: Any) -> None:
    if form not in FORMS:
        raise MvwanError(f"--format {form}: no such form.{nearest(form, FORMS)} Forms are {', '.join(FORMS)}.")
    read = {"merged": ("base", "dtype", "rgb_only"), "multiview": ("base", "dtype")}.get(form, ())
    for name, value in options.items():
        if value and name not in read:
            flag = f"--{name.replace('_', '-')}"
            raise MvwanError(f"{flag}: nothing of a {form} export depends on it. Leave {flag} out.")
    if output.exists() or output.is_symlink():
        raise MvwanError(f"{output}: exists already. Remove it or choose another --output.")
    if form == "wan-native" and output.suffix != ".safetensors":
        raise MvwanError(f"{output}: a wan-native export is one file. Give --output a name that ends with .safetensors.")


def _count(names: Mapping[str, Any]) -> str:
    return ", ".join(f"{group} {len(held)}" for group, held in names_by_group(names).items())


# ── the trained tensors alone ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_shared(output: Path, tensors: TensorFile, manifest: Mapping[str, Any], found: Path, ema: bool) -> Export:
    if manifest["format_version"] == OLDER_SYSTEM:
        raise MvwanError(f"checkpoint {found}: a file of the older system does not know its base and settings. Pass on the file as it is.")
    share_checkpoint(found, output, ema)
    notes = (
        f"{len(tensors)} tensors, float32 ({_count(tensors)}); the base, {manifest['base']['id']}, is not in it",
        "for train.from_checkpoint, evaluate and sample; without optimizer state, so not for --resume",
    )
    return Export(path=output, notes=notes)


def _write_native(output: Path, tensors: TensorFile, manifest: Mapping[str, Any], found: Path) -> Export:
    rank, alpha = manifest["lora"]["rank"], manifest["lora"]["alpha"]
    if alpha not in (None, rank) and any(adapted_weight(name) for name in tensors):
        raise MvwanError(
            f"checkpoint {found}: has LoRA rank {rank} and alpha {alpha:g}; a wan-native file cannot say alpha, and its readers take it to "
            "be the rank. Export it as diffusers-lora or multiview, which keep alpha."
        )
    names = to_native(tensors)
    with whole_file(output) as partial:
        write_tensors(partial, {names[name]: tensors[name] for name in tensors})
        _check_written(TensorFile(partial).renamed({native: name for name, native in names.items()}), tensors, output)
    notes = [f"{len(tensors)} tensors under Wan-native names ({_count(tensors)}); the base is not in it"]
    if _reader(found, manifest) is not None:
        notes.append("the run's heat reader is not in it either: what loads this file reads heat through the VAE")
    trainable = manifest["config"].get("trainable", {})
    if trainable.get("groups") or any(trainable.get("lora", {}).get(name) is False for name in TrainableConfig().lora.__dict__):
        notes.append("the run chose its own layers or groups (settings `trainable`), which the file cannot say: give them when loading it")
    return Export(path=output, notes=tuple(notes))


def _write_lora(output: Path, tensors: TensorFile, manifest: Mapping[str, Any], found: Path) -> Export:
    lora = {name: stored for name in tensors if (stored := _diffusers_name(name)) is not None}
    if not lora:
        raise MvwanError(f"checkpoint {found}: holds no LoRA of a stock layer. Export it as wan-native or multiview.")
    rank = manifest["lora"]["rank"]
    alpha = float(rank if manifest["lora"]["alpha"] is None else manifest["lora"]["alpha"])
    rest = [name for name in tensors if name not in lora]
    layers = sorted({stored.removeprefix("transformer.").split(".lora_")[0] for stored in lora.values()})
    adapter = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": layers}
    metadata = json.dumps({f"transformer.{name}": value for name, value in adapter.items()}, indent=2, sort_keys=True)
    origin = {"views": manifest["views"], "fusion": manifest["fusion"], "lora_rank": rank, "lora_alpha": alpha}
    origin |= {"base": manifest["base"]["id"], "base_digest": manifest["base"]["digest"]}
    with whole_directory(output) as partial:
        write_tensors(partial / LORA_FILE, {lora[name]: tensors[name] for name in lora}, {"lora_adapter_metadata": metadata})
        said = {name: str(value) for name, value in origin.items() if value is not None}
        write_tensors(partial / REST_FILE, {name: tensors[name] for name in rest}, said)
        held = TensorFile(partial / LORA_FILE).renamed({stored: name for name, stored in lora.items()})
        beside = TensorFile(partial / REST_FILE)
        assert not held.keys() & beside.keys()
        _check_written(ChainMap(held, beside), tensors, output)  # pyright: ignore[reportArgumentType]
        write_file(partial / "README.md", _LORA_README.format(lora=len(lora), rest=len(rest), rank=rank, alpha=f"{alpha:g}"))
        reader = _write_reader(partial, found, manifest)
    notes = (
        f"{LORA_FILE}: {len(lora)} tensors, the LoRA of stock layers, rank {rank}, alpha {alpha:g}, for diffusers' own loader",
        f"{REST_FILE}: the other {len(rest)} tensors ({_count(dict.fromkeys(rest))})",
        f"{LORA_FILE} alone is not the adapted model",
        *reader,
    )
    return Export(path=output, notes=notes)


def _diffusers_name(name: str) -> str | None:
    """The name in a LoRA file of diffusers, or None for what is no adapter of a stock layer."""
    weight, parts = adapted_weight(name), name.split(".")
    if weight is None or parts[0] != "blocks" or parts[2] not in _STOCK_LAYERS:
        return None
    return f"transformer.{name.replace('.default.weight', '.weight')}"


_LORA_README = """# A multi-view checkpoint for diffusers

- `pytorch_lora_weights.safetensors`: {lora} tensors, the LoRA (rank {rank}, alpha {alpha}) of self-attention, cross-attention and
  feed-forward. `pipeline.load_lora_weights(folder)` and `WanTransformer3DModel.load_lora_adapter(folder)` of stock diffusers read it;
  rank and alpha are in its metadata.
- `multiview.safetensors`: the other {rest} tensors of the checkpoint under mvwan's names: view attention, patch embedding, heads and
  whatever else was trained. Stock diffusers has no place for them.

The LoRA alone is not the adapted model: it was trained together with what is in the second file. For the whole model as one folder use
`mvwan checkpoint export --format multiview`.
"""


def _check_written(written: Mapping[str, torch.Tensor], tensors: TensorFile, output: Path) -> None:
    if digest(written) != digest(tensors):
        raise MvwanError(f"{output}: what was read back is not what was written. Check the disk, then export again.")


def _reader(found: Path, manifest: Mapping[str, Any]) -> TensorFile | None:
    return None if manifest["format_version"] == OLDER_SYSTEM else read_heat_reader(found)


def _write_reader(partial: Path, found: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The run's heat reader, written into the folder `partial`, as a note; nothing for a run that has none."""
    reader = _reader(found, manifest)
    if reader is None:
        return ()
    write_tensors(partial / READER, reader)
    return (f"{READER}: reads heat from latents; mvwan.predict takes it as reader=HeatReader(**load_file(...)) (mvwan.heat_reader)",)


# ── whole models ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_obstacles(tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any], found: Path) -> None:
    if obstacles := obstacles_to_stock(tensors, manifest["fusion"]):
        raise MvwanError(
            f"checkpoint {found}: no stock transformer equals its RGB half; {'; '.join(obstacles)}. "
            "Export it as multiview, which holds everything."
        )


def _check_rgb_only(tensors: TensorFile, found: Path, rgb_only: bool) -> None:
    if not rgb_only:
        raise MvwanError(
            f"checkpoint {found}: a merged export is a stock transformer and would lose {_lost(tensors)}; none of it has any influence on "
            "the RGB half. Say --rgb-only to leave it out, or export it as multiview."
        )


def _lost(tensors: Mapping[str, torch.Tensor]) -> str:
    lost = dict.fromkeys(name for name in tensors if not has_place_in_stock(name))
    heads = "the heatmap head, the action head" if any(name.startswith("head_action.") for name in lost) else "the heatmap head"
    return f"{heads} and all of view attention ({len(lost)} trained tensors: {_count(lost)})"


def _write_model(
    output: Path,
    tensors: TensorFile,
    manifest: Mapping[str, Any],
    found: Path,
    form: Form,
    base: str | Path | None,
    ema: bool,
    dtype: Dtype,
) -> Export:
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    model = _adapted(manifest, found, base, ema)
    merged = merge_adapters(model, stored)
    _set_dtype(model, tensors, stored)
    if form == "merged":  # an adapter on a projector shows only now
        _check_obstacles(parameters_by_name(model), manifest, found)
    saved = to_stock(model, stored) if form == "merged" else model
    with whole_directory(output) as partial:
        _save_pretrained(saved, partial, output)
        reader = _write_reader(partial, found, manifest) if form == "multiview" else ()
    notes = (*_model_notes(saved, merged, manifest, dtype), *_base_notes(manifest), *_lost_notes(form, tensors), *reader)
    return Export(path=output, notes=notes)


def _base_notes(manifest: Mapping[str, Any]) -> list[str]:
    kind = manifest["config"].get("base", {}).get("quantize", "none")
    if kind == "none":
        return []
    return [f"the run trained and predicts on a base rounded to {kind}; here are its unrounded weights, so predictions differ a little"]


def _adapted(manifest: Mapping[str, Any], found: Path, base: str | Path | None, ema: bool) -> MultiViewWan:
    """The adapted model as the run computed with it; that of an older file with the base as stored."""
    if manifest["format_version"] == OLDER_SYSTEM:
        said = {name: manifest[name] for name in ("fusion", "unfreeze_modulation_and_norms", "action_head")}
        return load_model(base or "", found, **said)[0]
    return load_as_trained(found, base=base, ema=ema)[0]


def _set_dtype(model: MultiViewWan, tensors: TensorFile, dtype: torch.dtype) -> None:
    """Gives frozen tensors `dtype`; what the checkpoint holds stays float32, since rounded it would be another value, and islands do."""
    held = {stock_name(name) for name in tensors}
    for name, parameter in model.named_parameters():
        if dtype == torch.float32 or (name not in held and not in_float32_island(name, MultiViewWan)):
            parameter.data = parameter.data.to(dtype)


def _save_pretrained(model: MultiViewWan | WanTransformer3DModel, partial: Path, output: Path) -> None:
    try:
        model.save_pretrained(partial)
    except SafetensorError as error:
        raise MvwanError(f"{output}: cannot be written ({error}). Free some space or choose another folder.") from None
    for path in partial.iterdir():
        path.chmod(partial.stat().st_mode & 0o666)  # safetensors makes them private; like any new file instead


def _model_notes(
    saved: MultiViewWan | WanTransformer3DModel, merged: MergeReport, manifest: Mapping[str, Any], dtype: Dtype
) -> tuple[str, ...]:
    parameters = sum(parameter.numel() for parameter in saved.parameters())
    notes = [f"{type(saved).__name__}, {parameters:,} parameters, LoRA merged into {merged.layers} weights; load it with from_pretrained"]
    if dtype == "bfloat16":
        notes.append(
            f"merged weights are rounded to bfloat16, which takes away {merged.lost:.1%} of what the LoRA adds (norm over norm); "
            "without --dtype they are float32 and nothing is lost"
        )
    if isinstance(saved, MultiViewWan) and manifest["views"] is None:
        notes.append("an older file does not say how many views it was trained with; config.json says 3, which nothing computes with")
    return tuple(notes)


def _lost_notes(form: Form, tensors: TensorFile) -> tuple[str, ...]:
    return (f"LEFT OUT, as --rgb-only asked: {_lost(tensors)}. This model predicts no heatmap.",) if form == "merged" else ()
