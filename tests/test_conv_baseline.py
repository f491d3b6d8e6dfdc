"""The convolutional bar, through its command: it learns, is measured on mvwan's held-out windows, and drives the same trials."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.data.windows import spread
from mvwan.presets import config_from_preset
from mvwan.sim.metaworld import record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "conv_baseline.py"


def command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_learns_is_measured_on_held_out_windows_and_drives(tmp_path: Path) -> None:
    record("handle-press-v3", 3, tmp_path / "data", seed=11, size_px=64, progress=False)
    settings = [word for value in ("data.num_frames=5", "data.window_stride=4") for word in ("--set", value)]
    said = command("train", str(tmp_path / "data"), "--output", str(tmp_path / "net"), "--steps", "60", "--batch", "8", *settings)
    result = json.loads((tmp_path / "net" / "evaluation.json").read_text())
    config = config_from_preset("tiny", {"data": {"root": str(tmp_path / "data"), "num_frames": 5, "window_stride": 4}})
    held_out = WindowDataset(read_episodes(config.data.root), config.data, 3, "validation", config.seed)
    assert {row["sample_id"] for row in result["windows"]} <= {held_out.sample_id(index) for index in range(len(held_out))}
    assert result["num_windows"] == len(result["windows"])
    errors = {source: measured["error_3d_mm"] for source, measured in result["measures"].items()}
    assert errors["predicted"]["count"] == 4 * result["num_windows"]
    assert 0 < errors["predicted"]["median"] <= errors["predicted"]["p95"] < 300
    assert "predicted: mean" in said and "hold_first: mean" in said
    about = json.loads((tmp_path / "net" / "settings.json").read_text())
    assert 0.7e6 < about["parameters"] < 1.1e6
    record("handle-press-v3", 1, tmp_path / "test", seed=50, size_px=64, progress=False)
    assert "predicted: mean" in command("measure", str(tmp_path / "net"), str(tmp_path / "test"), "--windows", "3")
    result = json.loads((tmp_path / "net" / "evaluation.json").read_text())
    whole = replace(config.data, root=str(tmp_path / "test"), validation_share=1.0)
    others = WindowDataset(read_episodes(whole.root), whole, 3, "validation", config.seed)
    assert [row["sample_id"] for row in result["windows"]] == [others.sample_id(index) for index in spread(len(others), 3)]
    command("trials", str(tmp_path / "net"), "--trials", "1", "--execute", "4")
    trials = json.loads((tmp_path / "net" / "closed_loop.json").read_text())
    assert trials["tasks"]["handle-press-v3"]["conv"]["trials"] == 1
    assert trials["lines"][0]["plans"] >= 1
