"""A run that is killed and resumed is the run that nobody disturbed, bit for bit; and resuming needs no more memory than running.

`make soak` kills ten times as often.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mvwan.config import config_from_dict, field_names, merge
from mvwan.train import train
from tests.kill_and_resume import differences, final_state, kill_and_resume, small_run
from tests.resume_memory import resume_memory

IN_THE_BACKGROUND = {"train": {"async_save": True, "save_every": 1}}


def check(folder: Path, kills: int, overrides: dict[str, Any]) -> None:
    told: list[str] = []
    report = kill_and_resume(folder, kills, seed=kills, overrides=overrides, tell=told.append)
    assert not report.failures, "\n".join(told)
    assert report.kills == kills
    assert report.during_a_save >= kills // 8, "\n".join(told)
    assert report.resumes > kills // 3
    assert report.finished_runs >= 1


def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    check(tmp_path / "soak", 20, {})


@pytest.mark.skipif("train.async_save" not in field_names(), reason="checkpoints are not written in the background")
def test_kills_while_checkpoints_are_written_in_the_background_leave_no_trace(tmp_path: Path) -> None:
    check(tmp_path / "soak", 8, IN_THE_BACKGROUND)


def test_what_a_killed_run_left_half_done_is_finished_when_it_is_resumed(tmp_path: Path) -> None:
    """The kill that no later save repairs: after the last checkpoint got its name, before the pointer followed."""
    config = config_from_dict(merge(small_run(tmp_path), {"train": {"steps": 3, "save_every": 1, "evaluate_every": 3, "keep_last": 2}}))
    output, older = tmp_path / "run", tmp_path / "older"
    train(config_from_dict(merge(config.to_dict(), {"train": {"steps": 1}})), output)
    shutil.copytree(output / "checkpoints" / "step-000001", older)
    train(config, output, resume=True)
    whole = final_state(output)
    older.rename(output / "checkpoints" / "step-000001")
    (output / "checkpoints" / "latest").write_text("step-000002\n")
    folders = (output, output / "checkpoints", next((output / "latents").iterdir()))
    for folder in folders:
        (folder / ".half.0.partial").write_text("half")
    train(config, output, resume=True)
    assert differences(final_state(output), whole) == []
    assert not [folder for folder in folders if (folder / ".half.0.partial").exists()]


def test_resuming_takes_no_more_memory_than_running(tmp_path: Path) -> None:
    """Of three measurements the ratio was 1.00, 1.01 and 1.01; one spare copy of the optimizer's tensors makes it 1.23."""
    peaks = resume_memory(tmp_path / "wide", width=1024, rank=640)
    assert peaks.trained_bytes > 150 * 2**20
    assert peaks.fresh_bytes - peaks.start_bytes > 4 * peaks.trained_bytes, "parameters, gradients and two moments at least"
    assert peaks.ratio <= 1.05, str(peaks)
