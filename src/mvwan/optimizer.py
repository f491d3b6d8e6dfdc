"""AdamW over the trainable groups, its schedule and moving average; and all of it to and from named tensors.

Knows no loop, no batch and no other process: where tensors are spread over several, all of this is about this one's parts, but for
what is loaded, which is whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from mvwan.config import TrainConfig
from mvwan.errors import MvwanError
from mvwan.model.trainable import optimizer_groups, parameters_by_name
from mvwan.sharding import local_part, shard_like
from mvwan.training_module import HeatmapWanTrainingModule

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(module: HeatmapWanTrainingModule, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a parameter group per trainable group and weight decay."""
    groups = optimizer_groups(module.model, module.groups)
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=train.adam_betas)


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


def optimizer_tensors(optimizer: Any, module: HeatmapWanTrainingModule) -> tuple[dict[str, torch.Tensor], int]:
    """({`exp_avg/<name>`, `exp_avg_sq/<name>`}, updates that the optimizer counted)."""
    parameters = parameters_by_name(module.model)
    entries = {name: optimizer.state[parameters[name]] for name in module.table.trainable_names}
    updates = {int(entry["step"]) for entry in entries.values()}
    assert len(updates) == 1, f"some tensors were updated more often than others: {updates}"
    return {f"{moment}/{name}": entry[moment] for name, entry in entries.items() for moment in _MOMENTS}, updates.pop()


def load_optimizer(optimizer: Any, module: HeatmapWanTrainingModule, tensors: Mapping[str, torch.Tensor], updates: int, path: Any) -> None:
    """Nothing; `optimizer` then stands as when `optimizer_tensors` was called. `MvwanError` names `path` when its tensors are others."""
    parameters = parameters_by_name(module.model)
    shapes = {f"{moment}/{name}": parameters[name].shape for name in module.table.trainable_names for moment in _MOMENTS}
    wrong = sorted(name for name in shapes.keys() | tensors.keys() if name not in tensors or tensors[name].shape != shapes.get(name))
    if wrong:
        raise MvwanError(
            f"{path}: its optimizer state does not fit what trains: {', '.join(wrong[:3])}. Use another checkpoint of the run."
        )
    for name in module.table.trainable_names:
        parameter = parameters[name]
        moments = {moment: shard_like(parameter, tensors[f"{moment}/{name}"]) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **moments}


class MovingAverage:
    """Exponential moving average of what a checkpoint holds; nothing at all when `decay` is 0."""

    def __init__(self, module: HeatmapWanTrainingModule, decay: float, start: Mapping[str, torch.Tensor] | None = None) -> None:
        """Starts at `start` (None: the values now)."""
        self.module = module
        self.decay = decay
        now = module.saved_tensors() if decay else {}
        self.tensors = {name: (tensor if start is None else shard_like(tensor, start[name])).clone() for name, tensor in now.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the values now; once per optimizer update."""
        parameters = parameters_by_name(self.module.model) if self.tensors else {}
        for name, average in self.tensors.items():
            local_part(average).lerp_(local_part(parameters[name]).to(average.dtype), 1 - self.decay)
