"""What a training would find wrong with its settings, data and starting checkpoint, found without training: nothing is written.

Shared by `mvwan train --dry-run` and by whatever checks many trainings before the first one starts. Knows no loop.
"""

from dataclasses import dataclass
from typing import Any

from mvwan.compatibility import Compatibility
from mvwan.config import Config
from mvwan.data.dataset import Episodes, WindowDataset, episodes_of
from mvwan.model import surgery
from mvwan.model.quantized import check_quantize
from mvwan.model.trainable_table import TrainableTable
from mvwan.training_module import HeatmapWanTrainingModule


@dataclass(frozen=True, kw_only=True)
class WindowsOfRun:
    """The windows of both splits, as a training would have them."""

    episodes: Episodes
    training: WindowDataset
    validation: WindowDataset


def check_groups(config: Config) -> TrainableTable:
    """What would train, counted without weights. Raises `MvwanError` for groups that do not fit the base, and for a base held in a type
    whose library is missing here. (Which kernels run is left to the machine that trains.)"""
    check_quantize(config.base.quantize)
    return surgery.trainable_table(
        config.base.source,
        config.model.views,
        config.model.fusion,
        config.unfreeze_modulation_and_norms,
        trainable=config.trainable,
        train=config.train,
        action_head=config.model.action_head,
        view_code=config.model.view_code,
    )


def check_windows(config: Config) -> WindowsOfRun:
    """The windows of `config.data`. Raises `MvwanError` when there are none, or none with what the model learns from."""
    episodes = episodes_of(config.data)
    views, seed = config.model.views, config.seed
    training = WindowDataset(episodes, config.data, views, "train", seed)
    training.check_actions(config.model.action_head)
    training.check_calibrated(config.model.view_code)
    return WindowsOfRun(episodes=episodes, training=training, validation=WindowDataset(episodes, config.data, views, "validation", seed))


def check_start(config: Config, accept_trainable_change: bool = False) -> Compatibility | None:
    """How the checkpoint fits that training would start from; None without one. Raises `MvwanError` when it does not."""
    if config.train.from_checkpoint is None:
        return None
    start: dict[str, Any] = {"checkpoint": config.train.from_checkpoint, "accept_trainable_change": accept_trainable_change}
    return HeatmapWanTrainingModule(config=config, device="meta", print_banners=False, **start).fit
