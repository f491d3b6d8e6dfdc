"""Trainings of one command side by side: really trained at their smallest, in processes of their own."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mvwan.checkpoint import latest_checkpoint
from mvwan.errors import MvwanError
from mvwan.presets import config_from_preset
from mvwan.trainings import Training, train_side_by_side


def training(name: str, data: Path, folder: Path) -> Training:
    settings = {"data": {"root": str(data), "heatmap_sigma_px": 2.0}, "train": {"tracker": "none", "evaluate_every": 0}}
    return Training(name=name, config=config_from_preset("debug", settings), folder=folder / name)


def test_one_that_fails_says_why_and_stops_no_other(tiny_demonstrations: Path, tmp_path: Path) -> None:
    good, bad = training("good", tiny_demonstrations, tmp_path), training("bad", tmp_path / "nowhere", tmp_path)
    said, done = io.StringIO(), list[Training]()
    with pytest.raises(MvwanError, match=r"^bad: .*nowhere.*\(all of it: .*bad/train\.log\)$"):
        train_side_by_side([bad, good], 2, Console(file=said, width=200), done.append)
    assert done == [good] and good.is_done and not bad.is_done
    assert latest_checkpoint(good.folder) == good.folder / "checkpoints" / "step-000002"
    assert good.cost["seconds"] > 0 and good.cost["peak_memory_mb"] > 100
    assert f"good: 2 of 2 steps, loss {good.last_step['loss']:.3f}\n" in said.getvalue()
    assert "MODULATION PARAMETERS: KEEPING FROZEN" in good.log.read_text(encoding="utf-8")
