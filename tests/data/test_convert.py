"""Conversion to LeRobot v3: the same demonstrations before and after, and nothing written where the format has no word for something."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvwan.batch import Episode
from mvwan.config import DataConfig, TrailConfig
from mvwan.data import convert as module
from mvwan.data.convert import convert
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.errors import MvwanError
from tests.formats import write_mvtrack, write_trail

DATA = DataConfig(
    num_frames=5,
    height_px=64,
    width_px=64,
    trail=TrailConfig(scene_bounds_m=(-0.45, 0.3, -0.05, 0.45, 1.0, 0.6), size_px=64),
)


@pytest.fixture(scope="module")
def trails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trail(tmp_path_factory.mktemp("trail") / "data", "button-press-topdown-v3", (3, 4), size_px=64)


def same(before: Episode, after: Episode) -> None:
    assert (after.name, after.instruction, after.fps) == (before.name, before.instruction, before.fps)
    assert [camera.to_dict() for camera in after.cameras] == [camera.to_dict() for camera in before.cameras]
    np.testing.assert_allclose(after.point_m, before.point_m, atol=1e-6)
    assert np.array_equal(after.gripper_open, before.gripper_open)
    frames = [0, before.num_frames - 1]
    assert np.abs(after.read_rgb(frames).astype(int) - before.read_rgb(frames)).mean() < 2, "nearly lossless video"


def test_trail_becomes_lerobot_and_is_the_same_demonstration(trails: Path, tmp_path: Path) -> None:
    done = convert(trails, tmp_path / "out", DATA, progress=False)
    before, after = read_episodes(trails, None, DATA.trail), read_episodes(tmp_path / "out")
    assert (done.source_format, done.episodes, done.views) == ("trail", 2, ("top", "front", "side"))
    assert done.frames == sum(episode.num_frames for episode in after)
    for one, other in zip(before, after, strict=True):
        same(one, other)
        np.testing.assert_allclose(other.extra["hand_quaternion_wxyz"], one.extra["hand_quaternion_wxyz"], atol=1e-6)
        np.testing.assert_allclose(other.extra["action"][:-1, :3], np.diff(one.point_m, axis=0), atol=1e-6)
        assert other.extra["success"].ravel().tolist() == [False] * (one.num_frames - 1) + [True]
    windows = [WindowDataset(episodes, DATA, 3, "train", 0).sample(0) for episodes in (before, after)]
    np.testing.assert_allclose(windows[0].uv_px, windows[1].uv_px, atol=1e-3)


def test_lerobot_stays_as_it_is_and_cameras_are_chosen(tiny_demonstrations: Path, tmp_path: Path) -> None:
    done = convert(tiny_demonstrations, tmp_path / "out", replace(DATA, cameras=("right", "front")), progress=False)
    assert done.views == ("right", "front")
    for one, other in zip(read_episodes(tiny_demonstrations, ("right", "front")), read_episodes(tmp_path / "out"), strict=True):
        same(one, other)


def test_labels_in_pictures_are_refused(tiny_demonstrations: Path, tmp_path: Path) -> None:
    scenes = write_mvtrack(tmp_path / "mvtrack", read_episodes(tiny_demonstrations)[:1])
    with pytest.raises(MvwanError, match=r"episode ball0: its cameras are not calibrated"):
        convert(scenes, tmp_path / "out", DATA, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda episode: replace(episode, point_m=np.full_like(episode.point_m, np.nan)), r"frame 0: point_m is unknown"),
        (
            lambda episode: replace(episode, cameras=episode.cameras[::-1]),
            r"its cameras or its 10 frames per second are not those of ball/000000",
        ),
        (lambda episode: replace(episode, fps=7.5), r"7\.5 frames per second"),
    ],
)
def test_what_lerobot_has_no_word_for_is_named(
    tiny_demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil, message: str
) -> None:
    first, second, *_ = read_episodes(tiny_demonstrations)
    monkeypatch.setattr(module, "episodes_of", lambda *_: (first, spoil(second)))
    with pytest.raises(MvwanError, match=message):
        convert(tiny_demonstrations, tmp_path / "out", DATA, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command(trails: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mvwan", "data", "convert", str(trails), str(tmp_path / "out"), "--set", "data.trail.size_px=32"]
    words += ["--set", "data.trail.scene_bounds_m=[-0.45,0.3,-0.05,0.45,1.0,0.6]", "--set", "data.trail.last=1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 episodes" in done.stdout and "from trail" in done.stdout
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
