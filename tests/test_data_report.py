"""`mvwan data inspect`: what is there, what is missing, how many windows, and a sheet of what a training would see."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvwan import data_report
from mvwan.data.dataset import Episodes
from mvwan.data.lerobot import read_lerobot
from mvwan.data_report import contact_sheet, inspect
from mvwan.presets import config_from_preset
from tests.formats import write_mvtrack

SMALL = {"num_frames": 5, "frame_interval": 1, "past_end": 0, "window_stride": 2, "height_px": 64, "width_px": 64, "validation_share": 0.25}


def config_of(root: Path, **data: object):
    return config_from_preset("tiny", {"data": {"root": str(root), **SMALL, **data}})


@pytest.fixture(scope="module")
def tracking(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes; in the second the third view has lost the ball in four of nine frames."""
    root = write_mvtrack(tmp_path_factory.mktemp("mvtrack") / "data", list(read_lerobot(tiny_demonstrations))[:2])
    (root / "ball1/ball1-3/invisible.txt").write_text("0,0,0,0,0,1,1,1,1")
    return root


def test_recordings_of_a_robot(tiny_demonstrations: Path) -> None:
    report, splits = inspect(config_of(tiny_demonstrations))
    assert (report.format, report.episodes, report.frames, report.fps) == ("LeRobot v3", 4, 36, (10.0,))
    assert report.instructions == {"move the ball": 4}
    assert [(view.name, view.kind, view.width_px) for view in report.views] == [
        (name, "pinhole", 64) for name in ("left", "right", "front")
    ]
    assert (report.points_share, report.gripper_share, report.rotation_share) == (1, 1, 0)
    assert report.windows == {"train": 9, "validation": 3}
    assert report.windows == {"train": len(splits[0]), "validation": len(splits[1])}
    assert [sentence.split(":")[0] for sentence in report.missing] == ["no orientation of the hand"]


def test_tracking_without_calibration_says_what_it_lacks(tracking: Path) -> None:
    report, _ = inspect(config_of(tracking, validation_share=0.0))
    assert report.format == "MVTrack"
    assert {view.kind for view in report.views} == {"not calibrated"}
    assert report.views[0].seen_share > report.views[2].seen_share
    said = " ".join(report.missing)
    assert "no point in space" in said
    assert "model.action_head=none" in said


def test_a_view_is_the_camera_of_its_name(tiny_demonstrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one that sees nothing, the first of one episode and the last of another."""
    first, second = list(read_lerobot(tiny_demonstrations))[:2]
    left, *others = first.cameras
    away = np.eye(4)
    away[2, 3] = 100.0
    blind = left.moved(away)
    changed = Episodes((replace(first, cameras=(blind, *others)), replace(second, cameras=(*others, blind))))
    monkeypatch.setattr(data_report, "episodes_of", lambda *_, **__: changed)
    report, _ = inspect(config_of(tiny_demonstrations, validation_share=0.0))
    assert {view.name: view.seen_share > 0 for view in report.views} == {"left": False, "right": True, "front": True}


def test_short_episodes_are_told(tiny_demonstrations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(read_lerobot(tiny_demonstrations))
    short = replace(whole[0], point_m=whole[0].point_m[:3], gripper_open=whole[0].gripper_open[:3], extra={})
    monkeypatch.setattr(data_report, "episodes_of", lambda *_, **__: Episodes((short, *whole[1:])))
    report, _ = inspect(config_of(tiny_demonstrations, validation_share=0.0))
    assert report.too_short == (short.name,)
    assert report.missing[-1] == f"1 episodes are shorter than a window and left out, {short.name} among them"


def test_the_sheet_shows_windows_with_their_heatmaps(tiny_demonstrations: Path) -> None:
    _, splits = inspect(config_of(tiny_demonstrations))
    picture = contact_sheet(splits)
    gap = 2
    assert picture.shape == (3 * 3 * (64 + gap) - gap, 5 * (64 + gap) - gap, 3), "three training episodes, three views, five frames"
    sample = splits[0].sample(0)
    u, v = np.floor(sample.uv_px[0, 0]).astype(int)
    assert picture[v, u, 0] > 100 and picture[v, u, 2] < 100, "a heatmap's peak is red"


def test_the_command_prints_writes_the_sheet_and_speaks_json(tracking: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mvwan", "data", "inspect", str(tracking), "--set", "data.num_frames=5", "--set", "data.height_px=64"]
    words += ["--set", "data.width_px=64"]
    done = subprocess.run([*words, "--sheet", str(tmp_path / "sheet.png")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("MVTrack, 2 episodes", "not calibrated", "Track the ball", "windows: ", "missing: no gripper opening", "sheet.png"):
        assert said in done.stdout
    assert Image.open(tmp_path / "sheet.png").size[0] > 64
    told = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, check=True).stdout)
    assert (told["episodes"], told["format"]) == (2, "MVTrack")
    done = subprocess.run([*words[:5], str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no dataset that mvwan understands" in done.stderr
    assert done.stderr.count("\n") == 1
