"""Named settings: what a run starts from before a YAML file and `--set` are laid over it.

Knows values only; `config` knows what they mean and checks them. Source of the 5B numbers: the hyper-parameters in use for the
older system (256 px, rank 32, learning rate 1e-4, clip 1, warm-up 100 steps, accumulation 4).
"""

from copy import deepcopy
from typing import Any

from mvwan.config import Config, config_from_dict, merge
from mvwan.errors import MvwanError, nearest

_TINY: dict[str, Any] = {
    "base": {"source": "tiny"},
    # Fusion `channel` would press 2 x 192 numbers per patch through 256-wide tokens; with streams of their own both fit.
    "model": {"fusion": "view", "action_head": "gripper"},
    "trainable": {"lora": {"rank": 8}},
    "data": {
        # At 40 frames per second these are 0.2 s, after which an arm looks again. Spots then cross fewer cells within a latent frame than
        # in longer, faster clips; the two were not compared at equal training.
        "num_frames": 9,
        "frame_interval": 1,
        "past_end": 8,  # else no window begins in the last frames of an episode, and an arm near its goal sees nothing it knows
        "height_px": 128,
        "width_px": 128,
        "heatmap_sigma_px": 6.0,  # wider than what the 5B learns: spots of 4 px are learned far slower (LOG.md)
        "text_tokens": 64,
    },
    "train": {
        "steps": 300,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 20,
        "schedule": "cosine",
        "save_every": 100,
        "evaluate_every": 50,
    },
}

_HIGH_NOISE = {"sigma_min": 0.6}
"""Where a tiny Wan learns what comes; below it copies what shows through the noise. Predictions stay above too (`flow.euler_sigmas`)."""

_READER = 100.0
"""Cells of heat are mostly blank, so the error of what is read is some hundredth of that of the latents."""

_FINETUNE: dict[str, Any] = {
    "base": {"source": "wan2.2-ti2v-5b", "dtype": "bfloat16"},
    "model": {"gradient_checkpointing": True},
    "trainable": {"lora": {"rank": 32}},
    "data": {"num_frames": 25, "frame_interval": 1, "height_px": 256, "width_px": 256, "heatmap_sigma_px": 1.5, "text_tokens": 512},
    "train": {
        "steps": 10_000,
        "batch_size": 1,
        "gradient_accumulation": 4,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "max_gradient_norm": 1.0,
        "warmup_steps": 100,
        "schedule": "constant",
        "precision": "bf16",
        "save_every": 500,
    },
}

_PRESETS: dict[str, dict[str, Any]] = {
    # Two steps of the tiny Wan at 64 px: does everything connect?
    "debug": merge(
        _TINY,
        {
            "trainable": {"lora": {"rank": 2}},
            "data": {
                "num_frames": 5,
                "frame_interval": 2,
                "past_end": 0,
                "height_px": 64,
                "width_px": 64,
                "window_stride": 16,
                "text_tokens": 32,
            },
            "train": {
                "steps": 2,
                "batch_size": 1,
                "warmup_steps": 0,
                "schedule": "constant",
                "movement_step": 2,
                "save_every": 2,
                "evaluate_every": 2,
                "evaluate_windows": 2,
            },
        },
    ),
    # The tiny Wan on a laptop's CPU, in minutes.
    "tiny": _TINY,
    # The tiny Wan learns, from many tasks, to see with several cameras and to track: an hour or more of training on two cores.
    "tiny-pretrain": merge(
        _TINY,
        {
            "unfreeze_modulation_and_norms": True,
            "data": {"window_stride": 6, "validation_share": 0.05},
            "flow": _HIGH_NOISE,
            "train": {
                "steps": 3600,
                "batch_size": 8,
                "learning_rate": 4e-3,
                "adam_betas": (0.9, 0.99),
                "warmup_steps": 50,
                "rgb_weight": 0.2,
                "heat_reader_weight": _READER,
                "save_every": 250,
                "evaluate_every": 250,
            },
        },
    ),
    # The tiny Wan on demonstrations, from the tracking checkpoint that ships with it.
    "tiny-finetune": merge(
        _TINY,
        {
            "flow": _HIGH_NOISE,  # as the checkpoint it starts from
            "train": {
                "from_checkpoint": "tiny-tracking",
                "steps": 1000,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "adam_betas": (0.9, 0.99),
                "rgb_weight": 0.2,
                "heat_reader_weight": _READER,
            },
        },
    ),
    # Fine-tuning of the 5B on robot demonstrations, and its pretraining on multi-view tracking before.
    "wan2.2-ti2v-5b": _FINETUNE,
    "wan2.2-ti2v-5b-pretrain": merge(_FINETUNE, {"data": {"num_frames": 13, "frame_interval": 2, "heatmap_sigma_px": 2.0}}),
}

PRESETS: tuple[str, ...] = tuple(_PRESETS)
"""Names that `preset` takes."""


def preset(name: str) -> dict[str, Any]:
    """Fresh nested settings of the preset, to be laid over the defaults of `config`. `MvwanError` names the nearest preset."""
    return deepcopy(_PRESETS[_known(name)])


def config_from_preset(name: str, *overrides: dict[str, Any], where: str | None = None) -> Config:
    """The checked config of a preset with overrides laid over it, the last one on top. `where` starts the message of an error."""
    return config_from_dict(merge(preset(name), *overrides), where or f"preset {name}")


def _known(name: str) -> str:
    if name not in _PRESETS:
        raise MvwanError(f"preset {name!r}: no such preset; there are {', '.join(PRESETS)}.{nearest(name, PRESETS)} Set --preset.")
    return name
