"""Does a checkpoint fit a model, and is it the same run? The compatibility rules, with a name for each outcome.

Of a checkpoint with a model, by what the model's table trains:
    exact     the same tensors
    older     lacks whole groups of the switch, or the camera code: they keep the base's values. Fine for inference; going on training
              is refused unless the user accepts the change by name
    newer     has tensors that are frozen here: their values are loaded and stay frozen, never dropped
    conflict  anything else missing, unknown or of another shape: an error that lists the keys by group
Knows no file: it gets tensors, shapes and manifests.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mvwan.config import Config
from mvwan.errors import MvwanError, some
from mvwan.files import flatten
from mvwan.model.trainable import CAMERA_GROUP, SWITCH_GROUPS, parameters_by_name
from mvwan.model.trainable_table import TrainableTable
from mvwan.tensors import TensorFile, dtype_name

MAY_CHANGE_ON_RESUME = frozenset(
    {
        *(f"train.{name}" for name in ("steps", "save_every", "keep_last", "keep_best", "async_save", "log_every", "movement_step")),
        *(f"train.{name}" for name in ("evaluate_every", "evaluate_windows", "tracker", "num_workers")),
        *("train.batch_size", "train.gradient_accumulation", "train.compile"),
        *("data.root", "data.cache", "data.on_corrupt", "base.source", "base.codec"),
        *("model.gradient_checkpointing", "model.attention"),
    }
)
"""Settings that a resumed run may change: none alters what a step computes, but for rounding. Data and base are compared by content, and
the windows of a step (batch_size * gradient_accumulation * processes) as `items_per_step`. `train.steps` may not change under a cosine
schedule."""


_FIT_IN_FLOAT32 = ("float32", "bfloat16", "float16")
"""Types whose every value float32 holds: nothing is rounded on loading."""

Outcome = Literal["exact", "older", "newer", "conflict"]
Purpose = Literal["infer", "train", "train changed"]
"""What a checkpoint is loaded for; "train changed": to go on training with other groups, which the user accepted by name."""


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
            problems = [f"missing of the group {group}: {some(_by_block(names))}" for group, names in self.missing.items()]
            problems += [f"unknown: {some(self.unknown)}"] if self.unknown else []
            problems += [f"of another shape: {some(self.reshaped)}"] if self.reshaped else []
            raise MvwanError(
                f"checkpoint {path} does not fit this model; {'; '.join(problems)}. "
                "Load it with the base, views, fusion, action head, LoRA layers and rank that it was trained with."
            )
        if self.outcome == "older" and purpose == "train":
            groups = " and ".join(self.missing)
            raise MvwanError(
                f"checkpoint {path} was trained without the groups {groups}; to go on training it with them is inconsistent, since its "
                "other weights were fitted to their frozen values. Turn unfreeze_modulation_and_norms off to go on, start a new training "
                "from the base with it on, or insist with --accept-trainable-change: these groups then start from the base with fresh "
                "optimizer state, and the manifest says so. (Inference with it on is fine.)"
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
    may_lack = (*SWITCH_GROUPS, CAMERA_GROUP)  # what the base has, or what starts at zero
    lacks_whole_groups = all(group in may_lack and len(names) == sizes[group] for group, names in missing.items())
    if unknown or reshaped or not lacks_whole_groups:
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
    shapes = tensors.shapes if isinstance(tensors, TensorFile) else {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fit = compatibility(shapes, model, table)
    fit.require(purpose, path)
    types = tensors.dtypes if isinstance(tensors, TensorFile) else {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    rounded = [f"{name} is {dtype}" for name, dtype in types.items() if dtype not in _FIT_IN_FLOAT32]
    if rounded:
        raise MvwanError(f"checkpoint {path}: {some(rounded)}; needs {', '.join(_FIT_IN_FLOAT32)}. Save it again as float32.")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise MvwanError(f"checkpoint {path}: NaN or infinity in {some(broken)}. Use another checkpoint.")
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


def _by_block(names: Sequence[str]) -> list[str]:
    """The names with the blocks that share one put together: `blocks.{0-3,7}.projector.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        blocks.setdefault(f"blocks.*.{found[2]}" if found else name, []).append(int(found[1]) if found else 0)
    return [
        stem.replace("*", str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(sorted(numbers))}}}")
        if stem.startswith("blocks.*.")
        else stem
        for stem, numbers in blocks.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


# ── is it the same run? ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_identity(saved: Mapping[str, Any], path: str | Path, **now: Any) -> None:
    """Nothing, or `MvwanError` that names both values when the checkpoint was trained on something else.

    `now` holds what the model is: `base` (digest), `views`, `fusion`, `action_head`, `view_code`, `rank`, `alpha`. What an older file
    does not know is not compared. A manifest that says nothing of an action head or a view code is from before there was one.
    """
    lora = saved["lora"]
    known = {"base": saved["base"].get("digest"), "views": saved["views"], "fusion": saved["fusion"], "rank": lora.get("rank")}
    known |= {"alpha": lora.get("alpha"), "action_head": saved.get("action_head", "none"), "view_code": saved.get("view_code", "slot")}
    for name, value in now.items():
        if known[name] is not None and known[name] != value:
            insist = " or, to go on training from it, insist with --accept-trainable-change"
            raise MvwanError(
                f"checkpoint {path} was trained with {_IDENTITY_WORDS[name]} {known[name]}, here it is {value}. Set it back"
                f"{insist if name == 'view_code' and known[name] == 'slot' else ''}."
            )


_IDENTITY_WORDS = {"base": "a base of digest", "views": "model.views", "fusion": "model.fusion", "action_head": "model.action_head"}
_IDENTITY_WORDS |= {"view_code": "model.view_code", "rank": "trainable.lora.rank", "alpha": "trainable.lora.alpha"}


_SWITCH = "unfreeze_modulation_and_norms"


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any], path: str | Path, accept_trainable_change: bool = False) -> None:
    """Nothing, or `MvwanError` that names every setting with both values when `now` would not continue the run of manifest `saved`.

    Both are manifests; `now` needs `base`, `data`, `items_per_step` and `config`. See `MAY_CHANGE_ON_RESUME`; the switch may change
    when the user accepts it by name.
    """
    before = {"base.digest": saved["base"].get("digest"), "data.fingerprint": saved.get("data", {}).get("fingerprint")}
    after = {"base.digest": now["base"]["digest"], "data.fingerprint": now["data"]["fingerprint"]}
    if "codec" in saved:  # which older manifests do not say
        before["digest of VAE and text encoder"], after["digest of VAE and text encoder"] = saved["codec"], now.get("codec")
    before["windows per step"], after["windows per step"] = saved.get("items_per_step"), now["items_per_step"]
    before |= flatten(saved["config"], ".")
    after |= flatten(now["config"], ".")
    may_change = MAY_CHANGE_ON_RESUME | ({_SWITCH} if accept_trainable_change else set())
    if after["train.schedule"] == "cosine":  # its learning rates depend on where the run ends
        may_change -= {"train.steps"}
    changed = [name for name in after if name in before and before[name] != after[name] and name not in may_change]
    changed += [name for name in before if name not in after and name not in may_change]
    usual = flatten(Config().to_dict(), ".")  # what a checkpoint does not say was as it is by default
    changed += [name for name in after if name not in before and after[name] != usual.get(name) and name not in may_change]
    if changed == [_SWITCH]:
        raise MvwanError(
            f"{path} was trained with {_SWITCH}={str(before[_SWITCH]).lower()}, now it is {str(after[_SWITCH]).lower()}; to go on training "
            "with other groups is inconsistent, since all were fitted to each other. Set it back, or insist with "
            "--accept-trainable-change: groups that are new start from the base with fresh optimizer state, and the manifest says so."
        )
    if changed:
        listed = "; ".join(
            f"{name}: {before.get(name, usual.get(name, 'absent'))} in the checkpoint, {after.get(name, 'absent')} now" for name in changed
        )
        raise MvwanError(
            f"{path} cannot be resumed with other settings; {listed}. "
            "Set them back, or start a new run in another folder with train.from_checkpoint."
        )
    if saved["step"] > after["train.steps"]:
        raise MvwanError(f"{path} is at step {saved['step']}, train.steps={after['train.steps']} ends before. Raise train.steps.")


def check_skipped(saved: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> None:
    """Nothing, or `MvwanError` when other windows are left out as damaged than in the run of manifest `saved`: others would come next."""
    before, after = (set(manifest["data"].get("skipped", ())) for manifest in (saved, now))
    if before != after:
        raise MvwanError(
            f"{path} was trained without {len(before)} damaged windows, now it is {len(after)}; {some(sorted(before ^ after))} differ. "
            "Set data.on_corrupt and data.cache as they were, or start a new run in another folder with train.from_checkpoint."
        )
