"""Checkpoints: save, load, list, find. The only file that knows this tree:

    <output>/checkpoints/
        latest, best                names of the newest checkpoint folder and of the one with the lowest held-out loss, for people and
                                    scripts: a path that ends in one of them is followed; resuming looks at the folders themselves
        step-000500/                appears whole, by one rename
            trained.safetensors     the trained tensors by parameter name (`….lora_A.default.weight`), float32
            ema.safetensors         their moving average, when there is one
            heat_reader.safetensors `heat_reader.HeatReader.tensors`, when the run has one: frozen, and the same in all its checkpoints
            optimizer.safetensors   `<moment>/<name>`, by `trainable_table.moment_shapes`
            state.json              step, updates per group; schedule, data order, sigma and noise are functions of (seed, step, sample)
            manifest.json           base and its digest, views, fusion, action head, groups with names, counts and digests, held-out
                                    loss, settings, versions, accepted changes of what trains, and the SHA-256 of every file above
            COMMITTED               written last: the SHA-256 of manifest.json

So every byte is vouched for, and nothing is pickled. A checkpoint that was exported for others (`share_checkpoint`) has neither moving
average nor optimizer and state. Frozen tensors that a run took over from another checkpoint (`newer`)
are kept in `trained.safetensors` too, under a group with mode `frozen`: they would be lost otherwise.

A file of the older system (bare safetensors, Wan-native names, no metadata) loads by its path alone, as format version 0.
Whether its tensors fit a model is asked in `compatibility`. Knows no optimizer, no loop and no file outside a checkpoint.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvwan.actions import ACTION_HEADS, action_head_of
from mvwan.errors import MvwanError, nearest
from mvwan.files import (
    COMMIT_MARK,
    is_committed,
    mark_committed,
    only_worker,
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
from mvwan.tensors import TensorFile, digest, write_tensors

SHIPPED = {"tiny-tracking": Path(__file__).parent / "assets" / "tiny-tracking"}
"""Checkpoints that come with the package, by the name that stands for their path: the tiny Wan after multi-view tracking."""
FORMAT_VERSION = 1
OLDER_SYSTEM = 0
LATEST, BEST = "latest", "best"
READER = "heat_reader.safetensors"
TRAINED, EMA, OPTIMIZER, STATE, MANIFEST = "trained.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_VERSIONED = ("mvwan", "torch", "diffusers", "peft", "accelerate", "safetensors")
_NEEDED = {"format_version": int, "base": dict, "views": int, "fusion": str, "groups": dict, "lora": dict, "step": int, "config": dict}
_NEEDED |= {"files": dict, "unfreeze_modulation_and_norms": bool}
_STEPS_END = 2**53
"""No count is larger: float64 holds them all."""


class Trained(NamedTuple):
    """What `load_trained` returns."""

    tensors: TensorFile
    """By our parameter names; each is read when it is asked for."""
    manifest: dict[str, Any]
    """`format_version` is 0 for a file of the older system, which knows neither base nor views (None)."""


# ── save ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def only_writer(output: str | Path) -> AbstractContextManager[None]:
    """Keeps other trainings out of `output` while its block lasts: they would clear each other's half-written checkpoints."""
    return only_worker(Path(output) / "checkpoints", wait=False)


def save_checkpoint(
    output: str | Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    manifest: Mapping[str, Any],
    optimizer_state: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    ema: Mapping[str, torch.Tensor] | None = None,
    keep_last: int = 0,
    keep_best: bool = False,
    reader: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """The new folder, whole on the disk; older ones beyond `keep_last` (0: none) are removed afterwards, but for the best if it is kept.

    The best is the one with the lowest `manifest["held_out_loss"]`, of several the first.
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
        write_tensors(partial / TRAINED, tensors)
        write_tensors(partial / OPTIMIZER, optimizer_state)
        if ema is not None:
            write_tensors(partial / EMA, ema)
        if reader is not None:
            write_tensors(partial / READER, reader)
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
    tidy(output, keep_last, keep_best)
    return target


def share_checkpoint(found: Path, output: Path, ema: bool = False) -> Path:
    """The new folder `output`: the checkpoint folder `found` without optimizer state and with one set of tensors, the trained ones or
    (`ema`) their moving average. All that a run needs to start from it or to predict with it, in a third of the bytes or less."""
    tensors, manifest = load_trained(found, ema=ema)
    reader = read_heat_reader(found)
    with whole_directory(output) as partial:
        write_tensors(partial / TRAINED, tensors)
        if reader is not None:
            write_tensors(partial / READER, reader)
        content = {
            **manifest,
            "groups": {name: _group_entry(group, tensors) for name, group in manifest["groups"].items()},
            "files": {path.name: sha256_file(path) for path in sorted(partial.iterdir())},
        }
        write_json(partial / MANIFEST, content)
        mark_committed(partial, sha256_file(partial / MANIFEST) + "\n")
    return output


def tidy(output: str | Path, keep_last: int = 0, keep_best: bool = False) -> None:
    """Nothing; the pointers name what they should and old checkpoints are gone, as after a save that nobody killed on the way."""
    found = list_checkpoints(output)
    if not found:
        return
    folder = found[-1].parent
    remove_leftovers(folder)
    write_file(folder / LATEST, found[-1].name + "\n")
    best = _best(found if keep_best else found[-keep_last:])  # [-0:] is all of them
    if best is not None:
        write_file(folder / BEST, best.name + "\n")
    else:
        (folder / BEST).unlink(missing_ok=True)
    for old in found[:-keep_last] if keep_last else ():
        if not (keep_best and old == best):
            remove_directory(old)


def _best(folders: Iterable[Path]) -> Path | None:
    """The folder with the lowest held-out loss on as many windows as the last one's, the first of several; None when none was measured.

    A damaged one cannot be the best. A resumed run may measure on other windows than before, whose losses say nothing about these.
    """
    losses: dict[Path, float] = {}
    num_windows: dict[Path, int | None] = {}
    for path in folders:
        try:
            manifest = read_manifest(path)
        except MvwanError:
            continue
        loss = manifest.get("held_out_loss")
        if isinstance(loss, int | float):
            losses[path] = loss
            num_windows[path] = manifest["config"].get("train", {}).get("evaluate_windows")
    alike = [path for path in losses if num_windows[path] == list(num_windows.values())[-1]]
    return min(alike, key=lambda path: losses[path], default=None)


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


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

    `…/checkpoints/best` and `…/checkpoints/latest` mean the folder they name, `tiny-tracking` the one that ships with the tiny Wan.
    Raises `MvwanError` when there is none.
    """
    if str(path) in SHIPPED and os.path.exists(path):
        raise MvwanError(f"checkpoint {path}: there is a {os.path.abspath(path)}, and one that ships. Give the whole path, or rename it.")
    path = SHIPPED.get(str(path), Path(path))
    if os.path.isfile(path) and path.name in (LATEST, BEST) and path.parent.name == "checkpoints":
        path = path.parent / _pointed_to(path)
    if os.path.isfile(path):
        return path.parent if path.name == TRAINED and is_committed(path.parent) else path
    if not os.path.isdir(path):
        raise MvwanError(
            f"checkpoint {path}: no such file or folder.{nearest(str(path), SHIPPED)} Give a run's output folder, a checkpoint folder, "
            f"a .safetensors file, or {', '.join(SHIPPED)}."
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


def _pointed_to(pointer: Path) -> str:
    name = read_text(pointer).strip()
    if not re.fullmatch(r"step-\d{6,}", name):
        raise MvwanError(f"checkpoint {pointer}: names no checkpoint folder. Give a folder step-NNNNNN beside it.")
    return name


def checkpoint_digest(path: str | Path | None) -> str | None:
    """64 hex digits that change with whatever is in the checkpoint that `path` means; None for None."""
    if path is None:
        return None
    found = find_checkpoint(path)
    return sha256_file(found if found.is_file() else found / MANIFEST)


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
    wrong = _unusable(manifest)
    if wrong:
        raise MvwanError(f"checkpoint {folder}: its manifest has no usable {', '.join(wrong)}. Use another checkpoint.")
    return manifest


def _unusable(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the fields that are missing or cannot be what they are read as."""
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        return wrong
    rank, alpha = manifest["lora"].get("rank"), manifest["lora"].get("alpha")
    names, fps = manifest.get("view_names", []), manifest.get("fps", 1)
    usable = {
        "views": manifest["views"] >= 1,
        "view_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "fps": isinstance(fps, int | float) and 0 < fps < math.inf,
        "fusion": manifest["fusion"] in ("channel", "view"),
        "action_head": manifest.get("action_head", "none") in tuple(ACTION_HEADS),
        "view_code": manifest.get("view_code", "slot") in ("slot", "camera", "both"),
        "step": 0 <= manifest["step"] < _STEPS_END,
        "base": {"id", "digest"} <= manifest["base"].keys() and all(isinstance(manifest["base"][key], str) for key in ("id", "digest")),
        "lora.rank": isinstance(rank, int) and 1 <= rank < _STEPS_END,
        "lora.alpha": isinstance(alpha, int | float) and 0 < alpha < math.inf,
        "data": isinstance(manifest.get("data", {}), dict),
        "trainable_changes": isinstance(manifest.get("trainable_changes", []), list),
        "files": all(isinstance(value, str) for value in manifest["files"].values()),
    }
    kinds = {"mode": str, "parameters": int, "tensors": int, "dtype": str, "digest": str, "names": list}
    for group, entry in manifest["groups"].items():
        usable[f"groups.{group}"] = (
            isinstance(entry, dict)
            and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            and entry["mode"] in ("frozen", "full", "lora")
            and all(isinstance(name, str) for name in entry["names"])
        )
    return [name for name, fine in usable.items() if not fine]


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
        tensors = _load_checked(found, EMA, manifest)
        _check_tensors(tensors, manifest)
        return Trained(tensors, manifest)
    tensors = TensorFile(found / TRAINED)
    groups = manifest["groups"]
    _check_tensors(tensors, manifest)
    changed = [name for name, group in groups.items() if digest({key: tensors[key] for key in group["names"]}) != group["digest"]]
    if changed:
        raise _damaged(found / TRAINED, f"the group {changed[0]} has other bits than when it was saved")
    return Trained(tensors, manifest)


def _check_tensors(tensors: TensorFile, manifest: Mapping[str, Any]) -> None:
    """Nothing, or `MvwanError` when they are not those of the manifest, or what was trained is not float32."""
    named = {name: group["mode"] for group in manifest["groups"].values() for name in group["names"]}
    if named.keys() != tensors.keys():
        other = ", ".join(sorted(named.keys() ^ tensors.keys())[:3])
        raise _damaged(tensors.path, f"its tensors are not those of the manifest: {other}")
    for name, mode in named.items():
        if mode != "frozen" and tensors.dtypes[name] != "float32":
            raise _damaged(tensors.path, f"{name} is {tensors.dtypes[name]}, what was trained is float32")


def read_optimizer(path: str | Path) -> tuple[TensorFile, dict[str, Any]]:
    """(tensors by the names of `moment_shapes`, state) of a checkpoint folder, digests checked. Raises `MvwanError` when damaged."""
    folder = Path(path)
    manifest = read_manifest(folder)
    if OPTIMIZER not in manifest["files"]:
        raise MvwanError(
            f"checkpoint {folder}: holds no optimizer state, so no run can be resumed from it. Start a new one with train.from_checkpoint."
        )
    tensors = _load_checked(folder, OPTIMIZER, manifest)
    if manifest["files"].get(STATE) != sha256_file(folder / STATE):
        raise _damaged(folder / STATE)
    wrong = [f"{name} is {dtype}" for name, dtype in tensors.dtypes.items() if dtype != "float32"]
    if wrong:
        raise _damaged(folder / OPTIMIZER, f"{wrong[0]}, moments are float32")
    state = read_json(folder / STATE)
    if not isinstance(state, dict) or state.get("step") != manifest["step"]:
        raise _damaged(folder / STATE, "its step is not that of the manifest")
    updates = state.get("updates")
    if not isinstance(updates, dict) or not all(_is_count(count) for count in updates.values()):
        raise _damaged(folder / STATE, "it has no usable count of updates per group")
    return tensors, state


def read_heat_reader(path: str | Path) -> TensorFile | None:
    """The tensors of the run's heat reader in a checkpoint folder, None where it has none. Raises `MvwanError` when they are damaged."""
    folder = Path(path)
    manifest = read_manifest(folder)
    if READER not in manifest["files"]:
        return None
    tensors = _load_checked(folder, READER, manifest)
    alone = {"weight", "bias"}
    if tensors.keys() not in (alone, {*alone, "weight_last", "bias_last"}) or set(tensors.dtypes.values()) != {"float32"}:
        raise _damaged(folder / READER, "it does not hold the weights and biases of a heat reader in float32")
    return tensors


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _STEPS_END


def _load_checked(folder: Path, name: str, manifest: Mapping[str, Any]) -> TensorFile:
    if manifest["files"].get(name) != sha256_file(folder / name):
        raise _damaged(folder / name)
    return TensorFile(folder / name)


def _damaged(path: Path, why: str = "its digest is not the one recorded when it was saved") -> MvwanError:
    way_out = "Use another checkpoint of the run; without this folder, --resume goes on from the one before"
    return MvwanError(f"{path}: damaged, {why}. {way_out}.")


def _load_older(path: Path) -> Trained:
    """A file of the older system; rank and action head from its shapes, switch and fusion from its names; alpha is unknown (None)."""
    stored = TensorFile(path)
    if not stored:
        raise MvwanError(f"{path}: holds no tensors")
    try:
        tensors = stored.renamed(to_ours(stored))
        action_head = action_head_of(tensors.shapes)
    except MvwanError as error:
        raise MvwanError(f"{path}: not a checkpoint of mvwan or of the older system; {error}") from None
    ranks: dict[int, list[str]] = {}
    for name, shape in tensors.shapes.items():
        if ".lora_A." in name:
            ranks.setdefault(shape[0] if shape else 0, []).append(name)
    if len(ranks) > 1:
        rarest = min(ranks.values(), key=len)[0]
        raise MvwanError(f"{path}: its LoRA adapters have ranks {sorted(ranks)}, the rarest in {rarest}; one rank for all is needed")
    rank = next(iter(ranks), None)
    manifest = {
        "format_version": OLDER_SYSTEM,
        "base": {"id": None, "digest": None},
        "views": None,
        "fusion": "view" if any(name.startswith("patch_embedding_heatmap.") for name in tensors) else "channel",
        "action_head": action_head,
        "unfreeze_modulation_and_norms": any(re.fullmatch(r"blocks\.\d+\.scale_shift_table", name) for name in tensors),
        "lora": {"rank": rank, "alpha": None},
        "groups": {},
        "step": None,
        "config": {},
    }
    return Trained(tensors, manifest)
