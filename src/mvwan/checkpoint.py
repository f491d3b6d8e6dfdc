"""Checkpoints: save, load, list, the resume guard and the compatibility rules. The only file that knows this tree:

    <output>/checkpoints/
        latest                      name of the newest checkpoint folder, for people and scripts; never trusted by the code
        step-000500/                appears whole, by one rename
            trained.safetensors     the trained tensors by parameter name (`….lora_A.default.weight`), float32
            ema.safetensors         their moving average, when there is one
            optimizer.safetensors   `exp_avg/<name>` and `exp_avg_sq/<name>`
            state.json              step and schedule; data order, sigma and noise are functions of (seed, step, sample)
            manifest.json           base and its digest, views, fusion, groups with names, counts and digests, settings, versions,
                                    and the SHA-256 of every file above
            COMMITTED               written last: the SHA-256 of manifest.json

So every byte is vouched for, and nothing is pickled. Frozen tensors that a run took over from another checkpoint (rule 2 below)
are kept in `trained.safetensors` too, under a group with mode `frozen`: they would be lost otherwise.

A file of the older system (bare safetensors, Wan-native names, no metadata) loads by its path alone, as format version 0.

Compatibility of a checkpoint with a model, by what the model's table trains:
    exact     the same tensors
    older     lacks whole groups of the switch: they keep the base's values. Inference only; going on training is refused
    newer     has tensors that are frozen here: their values are loaded and stay frozen, never dropped
    conflict  anything else missing, unknown or of another shape: an error that lists the keys by group
Knows no optimizer, no loop and no file outside a checkpoint.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mvwan.errors import MvwanError
from mvwan.files import (
    COMMIT_MARK,
    flatten,
    is_committed,
    mark_committed,
    read_json,
    read_text,
    remove_directory,
    remove_leftovers,
    sha256_file,
    whole_directory,
    write_file,
    write_json,
)
from mvwan.model.native_names import to_ours
from mvwan.model.trainable import SWITCH_GROUPS, parameters_by_name
from mvwan.model.trainable_table import TrainableTable

FORMAT_VERSION = 1
OLDER_SYSTEM = 0
TRAINED, EMA, OPTIMIZER, STATE, MANIFEST = "trained.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_VERSIONED = ("mvwan", "torch", "diffusers", "peft", "accelerate", "safetensors")
_NEEDED = {"format_version": int, "base": dict, "views": int, "fusion": str, "groups": dict, "lora": dict, "step": int, "config": dict}

MAY_CHANGE_ON_RESUME = frozenset(
    {
        *(f"train.{name}" for name in ("steps", "save_every", "keep_last", "evaluate_every", "evaluate_windows", "log_every")),
        *(f"train.{name}" for name in ("movement_step", "tracker", "num_workers", "batch_size", "gradient_accumulation")),
        *("data.root", "data.cache", "base.source", "base.codec", "model.gradient_checkpointing"),
    }
)
"""Settings that a resumed run may change: none alters what a step computes. Data and base are compared by content, and the windows of
a step (batch_size * gradient_accumulation * processes) as `items_per_step`."""


class Trained(NamedTuple):
    """What `load_trained` returns."""

    tensors: dict[str, torch.Tensor]
    """By our parameter names."""
    manifest: dict[str, Any]
    """`format_version` is 0 for a file of the older system, which knows neither base nor views (None)."""


# ── save ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_checkpoint(
    output: str | Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    manifest: Mapping[str, Any],
    optimizer_state: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    ema: Mapping[str, torch.Tensor] | None = None,
    keep_last: int = 0,
) -> Path:
    """The new folder, whole on the disk; older ones beyond `keep_last` (0: none) are removed afterwards.

    `manifest["groups"]` is {group: {"mode", "names"}} and covers `tensors`; counts, dtypes, digests and versions are filled in here.
    Raises `MvwanError` when the disk does not take it; what was there stays.
    """
    named = [name for group in manifest["groups"].values() for name in group["names"]]
    assert sorted(named) == sorted(tensors), "the groups of the manifest do not name the tensors"
    folder = Path(output) / "checkpoints"
    target = folder / f"step-{step:06d}"
    remove_leftovers(folder)
    if target.exists():  # without a commit mark, or from a run that was taken back to an earlier step
        remove_directory(target)
    with whole_directory(target) as partial:
        _save_tensors(partial / TRAINED, tensors)
        _save_tensors(partial / OPTIMIZER, optimizer_state)
        if ema is not None:
            _save_tensors(partial / EMA, ema)
        write_json(partial / STATE, {"step": step, **state})
        content = {
            "format_version": FORMAT_VERSION,
            **manifest,
            "step": step,
            "groups": {name: _group_entry(group, tensors) for name, group in manifest["groups"].items()},
            "versions": {name: metadata.version(name) for name in _VERSIONED if _is_installed(name)},
            "files": {path.name: sha256_file(path) for path in sorted(partial.iterdir())},
        }
        write_json(partial / MANIFEST, content)
        mark_committed(partial, sha256_file(partial / MANIFEST) + "\n")
    write_file(folder / "latest", target.name + "\n")
    if keep_last:
        for old in list_checkpoints(output)[:-keep_last]:
            remove_directory(old)
    return target


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    try:
        save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise MvwanError(
            f"{path.parent.parent}: the checkpoint cannot be written ({error}). Free some space or choose another folder."
        ) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private; like any new file instead


def _group_entry(group: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    held = {name: tensors[name] for name in group["names"]}
    return {
        "mode": group["mode"],
        "parameters": sum(tensor.numel() for tensor in held.values()),
        "tensors": len(held),
        "dtype": "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held.values()})),
        "digest": digest(held),
        "names": list(held),
    }


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """`sha256:…` of names, dtypes, shapes and bits, whatever the order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"


# ── find and load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_checkpoints(output: str | Path) -> list[Path]:
    """The committed checkpoint folders of a run, oldest first."""
    folders = (Path(output) / "checkpoints").glob("step-*")
    found = [path for path in folders if re.fullmatch(r"step-\d{6,}", path.name) and is_committed(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(output: str | Path) -> Path | None:
    """The newest committed checkpoint folder of a run, or None."""
    return max(list_checkpoints(output), key=lambda path: int(path.name.removeprefix("step-")), default=None)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder, or the file of the older system, that `path` means: either of them, or a run's folder (its newest).

    Raises `MvwanError` when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path.parent if path.name == TRAINED and is_committed(path.parent) else path
    if not path.is_dir():
        raise MvwanError(
            f"checkpoint {path}: no such file or folder. Give a run's output folder, a checkpoint folder or a .safetensors file."
        )
    if is_committed(path):
        return path
    newest = latest_checkpoint(path.parent if path.name == "checkpoints" else path)
    if newest is None:
        half = " Its commit mark is missing, so it was never finished." if (path / MANIFEST).is_file() or (path / TRAINED).is_file() else ""
        raise MvwanError(
            f"checkpoint {path}: holds no complete checkpoint.{half} Give a run's output folder or a folder step-NNNNNN in it."
        )
    return newest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked against its commit mark. Raises `MvwanError` when it was changed or is not one."""
    folder = Path(folder)
    if not is_committed(folder):
        raise MvwanError(f"checkpoint {folder}: its commit mark is missing, so it was never finished. Use another checkpoint.")
    if read_text(folder / COMMIT_MARK).strip() != sha256_file(folder / MANIFEST):
        raise _damaged(folder / MANIFEST)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        raise MvwanError(f"checkpoint {folder}: format version {version!r}; this mvwan reads {FORMAT_VERSION}. Install a matching mvwan.")
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise MvwanError(f"checkpoint {folder}: its manifest has no usable {', '.join(wrong)}. Use another checkpoint.")
    return manifest


def load_trained(path: str | Path, ema: bool = False) -> Trained:
    """The trained tensors (or their moving average) on the CPU, and the manifest; every digest checked.

    `path` is whatever `find_checkpoint` takes. Raises `MvwanError` for anything damaged, incomplete or not a checkpoint.
    """
    found = find_checkpoint(path)
    if found.is_file():
        if ema:
            raise MvwanError(f"checkpoint {found}: a file of the older system holds no moving average. Load the trained tensors instead.")
        return _load_older(found)
    manifest = read_manifest(found)
    if ema:
        if EMA not in manifest["files"]:
            raise MvwanError(
                f"checkpoint {found}: holds no moving average; the run had train.ema_decay=0. Load the trained tensors instead."
            )
        return Trained(_load_checked(found, EMA, manifest), manifest)
    tensors = _load_tensors(found / TRAINED)
    groups = manifest["groups"]
    named = {name for group in groups.values() for name in group["names"]}
    if named != tensors.keys():
        raise _damaged(found / TRAINED, f"its tensors are not those of the manifest: {', '.join(sorted(named ^ tensors.keys())[:3])}")
    changed = [name for name, group in groups.items() if digest({key: tensors[key] for key in group["names"]}) != group["digest"]]
    if changed:
        raise _damaged(found / TRAINED, f"the group {changed[0]} has other bits than when it was saved")
    return Trained(tensors, manifest)


def read_optimizer(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(`exp_avg/<name>` and `exp_avg_sq/<name>`, state) of a checkpoint folder, digests checked. Raises `MvwanError` when damaged."""
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = _load_checked(folder, OPTIMIZER, manifest)
    if manifest["files"].get(STATE) != sha256_file(folder / STATE):
        raise _damaged(folder / STATE)
    return tensors, read_json(folder / STATE)


def _load_checked(folder: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if manifest["files"].get(name) != sha256_file(folder / name):
        raise _damaged(folder / name)
    return _load_tensors(folder / name)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise MvwanError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise MvwanError(f"{path}: not a readable safetensors file ({error}). Give a run's folder or a .safetensors checkpoint.") from None


def _damaged(path: Path, why: str = "its digest is not the one recorded when it was saved") -> MvwanError:
    return MvwanError(f"{path}: damaged, {why}. Use another checkpoint of the run.")


def _load_older(path: Path) -> Trained:
    """A file of the older system; rank from its shapes, switch and fusion from its names; alpha is unknown (None)."""
    stored = _load_tensors(path)
    if not stored:
        raise MvwanError(f"{path}: holds no tensors")
    try:
        names = to_ours(stored)
    except MvwanError as error:
        raise MvwanError(f"{path}: not a checkpoint of mvwan or of the older system; {error}") from None
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    if len(ranks) > 1:
        raise MvwanError(f"{path}: its LoRA adapters have ranks {sorted(ranks)}; one rank for all is needed")
    rank = ranks.pop() if ranks else None
    manifest = {
        "format_version": OLDER_SYSTEM,
        "base": {"id": None, "digest": None},
        "views": None,
        "fusion": "view" if any(name.startswith("patch_embedding_heatmap.") for name in tensors) else "channel",
        "unfreeze_modulation_and_norms": any(re.fullmatch(r"blocks\.\d+\.scale_shift_table", name) for name in tensors),
        "lora": {"rank": rank, "alpha": None},
        "groups": {},
        "step": None,
        "config": {},
    }
    return Trained(tensors, manifest)


# ── does it fit? ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Outcome = Literal["exact", "older", "newer", "conflict"]
Purpose = Literal["infer", "train"]


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """How a checkpoint fits a model; names are parameter names, by group."""

    outcome: Outcome
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Trained here, not in the checkpoint."""
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """In the checkpoint, frozen here."""
    unknown: tuple[str, ...] = ()
    """In the checkpoint, not in the model, each with the nearest name."""
    reshaped: tuple[str, ...] = ()
    """`name is [...], needs [...]`."""

    def describe(self) -> list[str]:
        """A line per group that is not plainly the same on both sides; nothing when the outcome is exact."""
        lines = [
            f"{group}: {len(names)} tensors not in the checkpoint, they keep the base's values" for group, names in self.missing.items()
        ]
        return lines + [f"{group}: {len(names)} tensors loaded and kept frozen" for group, names in self.extra.items()]

    def require(self, purpose: Purpose, path: str | Path) -> None:
        """Nothing, or `MvwanError` when this outcome does not allow `purpose`."""
        if self.outcome == "conflict":
            problems = [f"missing of the group {group}: {_some(names)}" for group, names in self.missing.items()]
            problems += [f"unknown: {_some(self.unknown)}"] if self.unknown else []
            problems += [f"of another shape: {_some(self.reshaped)}"] if self.reshaped else []
            raise MvwanError(
                f"checkpoint {path} does not fit this model; {'; '.join(problems)}. "
                "Load it with the base, views, fusion, LoRA layers and rank that it was trained with."
            )
        if self.outcome == "older" and purpose == "train":
            groups = " and ".join(self.missing)
            raise MvwanError(
                f"checkpoint {path} was trained without the groups {groups}; to go on training it with them is inconsistent, since its "
                "other weights were fitted to their frozen values. Turn unfreeze_modulation_and_norms off to go on, or start a new "
                "training from the base with it on. (Inference with it on is fine.)"
            )


def compatibility(shapes: Mapping[str, Sequence[int]], model: nn.Module, table: TrainableTable) -> Compatibility:
    """How a checkpoint with tensors of these shapes fits `model`, of which `table` says what trains."""
    own = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(model).items()}
    trainable = set(table.trainable_names)
    missing = {row.name: names for row in table.trainable_rows if (names := tuple(name for name in row.names if name not in shapes))}
    extra = {row.name: names for row in table.rows if not row.trainable and (names := tuple(name for name in row.names if name in shapes))}
    unknown = tuple(f"{name}{_nearest(name, own)}" for name in shapes if name not in own)
    reshaped = tuple(
        f"{name} is {list(shape)}, needs {list(own[name])}" for name, shape in shapes.items() if name in own and tuple(shape) != own[name]
    )
    assert trainable | {name for names in extra.values() for name in names} >= shapes.keys() & own.keys()
    sizes = {row.name: row.tensors for row in table.rows}
    lacks_whole_switch_groups = all(group in SWITCH_GROUPS and len(names) == sizes[group] for group, names in missing.items())
    if unknown or reshaped or not lacks_whole_switch_groups:
        outcome: Outcome = "conflict"
    else:
        outcome = "older" if missing else "newer" if extra else "exact"
    return Compatibility(outcome=outcome, missing=missing, extra=extra, unknown=unknown, reshaped=reshaped)


def load_into(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], table: TrainableTable, purpose: Purpose, path: str | Path
) -> Compatibility:
    """How `tensors` fit, after writing every one of them into `model`. Raises `MvwanError`, with the model untouched, when they do not.

    Trained parameters stay float32. Frozen ones take the checkpoint's dtype: a rounded value would be another value.
    """
    fit = compatibility({name: tuple(tensor.shape) for name, tensor in tensors.items()}, model, table)
    fit.require(purpose, path)
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise MvwanError(f"checkpoint {path}: NaN or infinity in {_some(broken)}. Use another checkpoint.")
    parameters = parameters_by_name(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if parameters[name].requires_grad:
                parameters[name].copy_(tensor)
            else:
                parameters[name].data = tensor.to(parameters[name].device, copy=True)
    return fit


def _nearest(name: str, own: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, [key for key in own if key.split(".")[:2] == name.split(".")[:2]] or list(own), n=1)
    return f" (nearest is {near[0]})" if near else ""


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# ── is it the same run? ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_identity(saved: Mapping[str, Any], path: str | Path, **now: Any) -> None:
    """Nothing, or `MvwanError` that names both values when the checkpoint was trained on something else.

    `now` holds what the model is: `base` (digest), `views`, `fusion`, `rank`, `alpha`. What an older file does not know is not compared.
    """
    lora = saved["lora"]
    known = {"base": saved["base"].get("digest"), "views": saved["views"], "fusion": saved["fusion"], "rank": lora.get("rank")}
    known["alpha"] = lora.get("alpha")
    for name, value in now.items():
        if known[name] is not None and known[name] != value:
            raise MvwanError(f"checkpoint {path} was trained with {_IDENTITY_WORDS[name]} {known[name]}, here it is {value}. Set it back.")


_IDENTITY_WORDS = {"base": "a base of digest", "views": "model.views", "fusion": "model.fusion"}
_IDENTITY_WORDS |= {"rank": "trainable.lora.rank", "alpha": "trainable.lora.alpha"}


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> None:
    """Nothing, or `MvwanError` that names every setting with both values when `now` would not continue the run of manifest `saved`.

    Both are manifests; `now` needs `base`, `data`, `items_per_step` and `config`. See `MAY_CHANGE_ON_RESUME`.
    """
    before = {"base.digest": saved["base"].get("digest"), "data.fingerprint": saved.get("data", {}).get("fingerprint")}
    after = {"base.digest": now["base"]["digest"], "data.fingerprint": now["data"]["fingerprint"]}
    before["windows per step"], after["windows per step"] = saved.get("items_per_step"), now["items_per_step"]
    before |= flatten(saved["config"], ".")
    after |= flatten(now["config"], ".")
    changed = [name for name in after if name in before and before[name] != after[name] and name not in MAY_CHANGE_ON_RESUME]
    changed += [name for name in before if name not in after and name not in MAY_CHANGE_ON_RESUME]
    if changed:
        listed = "; ".join(f"{name}: {before.get(name)} in the checkpoint, {after.get(name, 'absent')} now" for name in changed)
        raise MvwanError(
            f"{path} cannot be resumed with other settings; {listed}. "
            "Set them back, or start a new run in another folder with train.from_checkpoint."
        )
    if saved["step"] > after["train.steps"]:
        raise MvwanError(f"{path} is at step {saved['step']}, train.steps={after['train.steps']} ends before. Raise train.steps.")
