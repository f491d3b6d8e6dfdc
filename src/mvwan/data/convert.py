"""Datasets of other formats -> LeRobot v3 with calibration: the format that the ecosystem reads. Knows no format's layout."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvwan.batch import Episode
from mvwan.config import DataConfig
from mvwan.data.dataset import episodes_of, format_of
from mvwan.data.lerobot import write_dataset
from mvwan.errors import MvwanError

ACTION_NAMES = ("tool_dx_m", "tool_dy_m", "tool_dz_m", "gripper_open")
_ROBOT = "unknown"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written."""

    source_format: str
    episodes: int
    frames: int
    views: tuple[str, ...]


def convert(source: str | Path, output: str | Path, data: DataConfig, progress: bool = True) -> Conversion:
    """What was written to `output`, a LeRobot v3 dataset of everything in `source`, seen by `data.cameras`.

    Pictures are those that training would see before it resizes them: clouds become the views of `data.trail`. An action is the step of
    the tool point to the next frame and the gripper there; a demonstration that was kept is a success. Raises `MvwanError`, and writes
    nothing, for datasets without calibration, for cameras that differ from episode to episode, and for frames without a label.
    """
    kind = format_of(source)
    episodes = episodes_of(replace(data, on_corrupt="stop"), source)
    for episode in episodes:
        _check(episode, episodes[0])
    turns = all("hand_quaternion_wxyz" in episode.extra for episode in episodes)
    with write_dataset(
        output,
        cameras=episodes[0].cameras,
        fps=round(episodes[0].fps),
        action_names=ACTION_NAMES,
        robot_type=_ROBOT,
        with_quaternion=turns,
    ) as writer:
        for number, episode in enumerate(tqdm(episodes, desc="convert", unit="episode", disable=not progress)):
            frames = episode.num_frames
            later = np.minimum(np.arange(frames) + 1, frames - 1)
            step_m = episode.point_m[later] - episode.point_m
            writer.add_episode(
                name=episode.name,
                instruction=episode.instruction,
                layout_seed=number,
                rgb=episode.read_rgb(range(frames)),
                point_m=episode.point_m,
                hand_m=episode.extra.get("hand_m", episode.point_m),
                gripper_open=episode.gripper_open,
                action=np.concatenate([step_m, episode.gripper_open[later, None]], axis=1),
                success=np.arange(frames) == frames - 1,
                hand_quaternion_wxyz=episode.extra["hand_quaternion_wxyz"] if turns else None,
            )
    return Conversion(
        source_format=kind,
        episodes=len(episodes),
        frames=sum(episode.num_frames for episode in episodes),
        views=tuple(camera.name for camera in episodes[0].cameras),
    )


def _check(episode: Episode, first: Episode) -> None:
    if episode.uv_px is not None:
        raise MvwanError(
            f"episode {episode.name}: its cameras are not calibrated and its point is labelled in pictures, for which LeRobot v3 has no "
            "place. Train on it as it is."
        )
    same = [camera.to_dict() for camera in episode.cameras] == [camera.to_dict() for camera in first.cameras]
    if not same or episode.fps != first.fps or episode.fps != round(episode.fps):
        raise MvwanError(
            f"episode {episode.name}: its cameras or its {episode.fps:g} frames per second are not those of {first.name}, or no whole "
            "number; a dataset has one rig and one rate. Convert them apart."
        )
    labels = {"point_m": episode.point_m, "gripper_open": episode.gripper_open}
    for name, values in labels.items():
        if not np.isfinite(values).all():
            frame = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
            raise MvwanError(
                f"episode {episode.name}, frame {frame}: {name} is unknown, which LeRobot v3 cannot say. Leave the episode out."
            )
