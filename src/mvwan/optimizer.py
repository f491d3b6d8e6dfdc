"""The optimizer over the trainable groups, its schedule and moving average; and all of it to and from named tensors.

Knows no loop, no batch and no other process: where tensors are spread over several, all of this is about this one's parts, but for
what is loaded, which is whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from mvwan.config import TrainConfig
from mvwan.errors import MvwanError
from mvwan.model.trainable import optimizer_groups, parameters_by_name
from mvwan.model.trainable_table import moment_shapes
from mvwan.sharding import local_part, shard_like
from mvwan.tensors import TensorFile
from mvwan.training_module import HeatmapWanTrainingModule


def make_optimizer(module: HeatmapWanTrainingModule, train: TrainConfig) -> torch.optim.Optimizer:
    """`train.optimizer` with a parameter group per trainable group and weight decay; AdamW in one pass over each tensor.

    Adafactor takes learning rates as they are given: it neither scales them by a tensor's size, which would hold back what starts at
    zero, nor lowers them with time, which is the schedule's part.
    """
    groups = optimizer_groups(module.model, module.groups)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if train.optimizer == "adafactor":
        return Adafactor(groups, lr=train.learning_rate, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(groups, betas=train.adam_betas, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, step: int) -> LambdaLR:
    """The schedule as it stands after `step` updates, one factor per parameter group; call its `step()` once per update."""

    def factor_of(warmup_steps: int) -> Any:
        return lambda update: learning_rate_factor(update, warmup_steps, train.steps, train.schedule)

    return LambdaLR(optimizer, [factor_of(group["warmup_steps"]) for group in optimizer.param_groups], last_epoch=step - 1)


def learning_rate_factor(update: int, warmup_steps: int, steps: int, schedule: str) -> float:
    """What the learning rate of `update`, counted from 0, is multiplied with: linear over the warm-up, then constant or cosine to 0."""
    if update < warmup_steps:
        return (update + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - warmup_steps) / max(1, steps - warmup_steps))))


def optimizer_tensors(optimizer: Any, module: HeatmapWanTrainingModule) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """({`<moment>/<name>`: tensor} by `moment_shapes`, {group: updates that the optimizer counted})."""
    parameters = parameters_by_name(module.model)
    moments: dict[str, torch.Tensor] = {}
    updates: dict[str, int] = {}
    for row in module.table.trainable_rows:
        entries = {name: optimizer.state[parameters[name]] for name in row.names}
        counted = {int(entry["step"]) for entry in entries.values()}
        assert len(counted) == 1, f"{row.name}: some tensors were updated more often than others: {counted}"
        updates[row.name] = counted.pop()
        for name, entry in entries.items():
            moments |= {moment: entry[moment.partition("/")[0]] for moment in _moments_of(module, name, parameters[name])}
    return moments, updates


def load_optimizer(
    optimizer: Any,
    module: HeatmapWanTrainingModule,
    tensors: TensorFile,
    updates: Mapping[str, int],
    path: Any,
    accept_trainable_change: bool = False,
) -> None:
    """Nothing; `optimizer` then stands as when `optimizer_tensors` was called. `MvwanError` names `path` when its tensors are others.

    `accept_trainable_change`: groups that were not trained before start fresh, and the state of groups that are frozen now is left.
    """
    parameters = parameters_by_name(module.model)
    rows = [row for row in module.table.trainable_rows if row.name in updates or not accept_trainable_change]
    shapes = {name: shape for row in rows for held in row.names for name, shape in _moments_of(module, held, parameters[held]).items()}
    frozen = {name for row in module.table.rows if not row.trainable for name in row.names}
    there = {name for name in tensors if not (accept_trainable_change and name.partition("/")[2] in frozen)}
    wrong = sorted((shapes.keys() ^ there) | {row.name for row in rows if row.name not in updates})
    wrong += [name for name in sorted(shapes.keys() & there) if tuple(tensors.shapes[name]) != shapes[name]]
    if wrong:
        raise MvwanError(
            f"{path}: its optimizer state does not fit what trains: {', '.join(wrong[:3])}. Use another checkpoint of the run."
        )
    for row in rows:
        for name in row.names:
            parameter = parameters[name]
            moments = {held.partition("/")[0]: shard_like(parameter, tensors[held]) for held in _moments_of(module, name, parameter)}
            optimizer.state[parameter] = {"step": _counter(module.config.train, updates[row.name], parameter), **moments}


def _moments_of(module: HeatmapWanTrainingModule, name: str, parameter: torch.Tensor) -> dict[str, tuple[int, ...]]:
    return moment_shapes(module.config.train.optimizer, name, parameter.shape)


def _counter(train: TrainConfig, updates: int, parameter: torch.Tensor) -> Any:
    """As each optimizer counts; AdamW in a tensor beside the parameter."""
    return updates if train.optimizer == "adafactor" else torch.tensor(float(updates), device=parameter.device)


class MovingAverage:
    """Exponential moving average of what a checkpoint holds; nothing at all when `decay` is 0."""

    def __init__(self, module: HeatmapWanTrainingModule, decay: float, start: Mapping[str, torch.Tensor] | None = None) -> None:
        """Starts at `start`, or at the values now where that has none."""
        self.module = module
        self.decay = decay
        now = module.saved_tensors() if decay else {}
        start = start or {}
        self.tensors = {name: shard_like(tensor, start[name]) if name in start else tensor.clone() for name, tensor in now.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the values now; once per optimizer update."""
        parameters = parameters_by_name(self.module.model) if self.tensors else {}
        for name, average in self.tensors.items():
            local_part(average).lerp_(local_part(parameters[name]).to(average.dtype), 1 - self.decay)
