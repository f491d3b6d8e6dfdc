"""What a training would find wrong with its settings, data, output folder and checkpoint, found without training: nothing is written.

Shared by `mvwan train --dry-run` and by whatever checks many trainings before the first one starts. Knows no loop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvwan import checkpoint
from mvwan.compatibility import Compatibility, check_resume
from mvwan.config import Config
from mvwan.data.dataset import Episodes, WindowDataset, episodes_of
from mvwan.errors import MvwanError
from mvwan.model import surgery
from mvwan.model.quantized import check_quantize
from mvwan.model.trainable_table import TrainableTable
from mvwan.precision import settle
from mvwan.run_manifest import run_manifest
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


def checkpoint_to_resume(output: str | Path, resume: bool) -> Path | None:
    """The newest checkpoint in `output`, None where there is none. Raises `MvwanError` when there is one and nobody asked to `resume`."""
    found = checkpoint.latest_checkpoint(output)
    if found is not None and not resume:
        raise MvwanError(f"{output}: holds a run at {found.name}. Use --resume to go on with it, or another output folder.")
    return found


def check_resumed(config: Config, found: Path, training: WindowDataset, accept_trainable_change: bool = False) -> int:
    """The step at which a training with `config` on `training` goes on from the checkpoint `found`. Raises `MvwanError` when it does not.

    On as many processes as make the windows of a step as many as they were; damaged windows, found when they are encoded, are not asked.
    """
    saved = checkpoint.read_manifest(found)
    config = settle(config, saved=saved["config"])
    alone = config.train.batch_size * config.train.gradient_accumulation
    processes = max(1, saved.get("items_per_step", alone) // alone)
    check_resume(saved, run_manifest(config, processes, "", training), found, accept_trainable_change)
    return int(saved["step"])


def check_start(config: Config, found: Path | None = None, accept_trainable_change: bool = False) -> Compatibility | None:
    """How the checkpoint fits that training would start from: `found`, the run's own, or `train.from_checkpoint`; None without one.

    Raises `MvwanError` when it does not.
    """
    checkpoint_path = found or config.train.from_checkpoint
    if checkpoint_path is None:
        return None
    start: dict[str, Any] = {"checkpoint": checkpoint_path, "accept_trainable_change": accept_trainable_change}
    return HeatmapWanTrainingModule(config=config, device="meta", print_banners=False, **start).fit
