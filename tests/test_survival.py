"""A run that is killed and resumed is the run that nobody disturbed, bit for bit; and resuming needs no more memory than running.

`make soak` kills ten times as often.
"""

from pathlib import Path
from typing import Any

from mvwan.checkpoint import list_checkpoints
from mvwan.config import config_from_dict, merge
from mvwan.train import train
from tests.kill_and_resume import Report, kill_and_resume, small_run
from tests.resume_memory import resume_memory

IN_THE_BACKGROUND = {"train": {"async_save": True, "save_every": 1}}


def killed(folder: Path, kills: int, overrides: dict[str, Any]) -> Report:
    told: list[str] = []
    report = kill_and_resume(folder, kills, seed=kills, overrides=overrides, tell=told.append)
    assert not report.failures, "\n".join(told)
    assert report.kills == kills
    assert report.resumes >= 1
    assert report.finished_runs >= 1
    return report


def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    report = killed(tmp_path / "soak", 20, {})
    assert report.during_a_save >= 1, "of twenty kills about nine do"


def test_kills_while_checkpoints_are_written_in_the_background_leave_no_trace(tmp_path: Path) -> None:
    killed(tmp_path / "soak", 8, IN_THE_BACKGROUND)


def test_what_a_killed_save_left_half_done_is_finished_at_the_resume(tmp_path: Path) -> None:
    """The kill that no later save repairs: after the last checkpoint got its name, before pointer and removals followed."""
    config = config_from_dict(merge(small_run(tmp_path), {"train": {"steps": 3, "save_every": 1, "evaluate_every": 3, "keep_last": 0}}))
    output = tmp_path / "run"
    checkpoints = output / "checkpoints"
    train(config, output)
    (checkpoints / "latest").write_text("step-000002\n")
    (checkpoints / "best").unlink()
    folders = (output, checkpoints, next((output / "latents").iterdir()))
    for folder in folders:
        (folder / ".half.0.partial").write_text("half")
    train(config_from_dict(merge(config.to_dict(), {"train": {"keep_last": 2}})), output, resume=True)
    assert [path.name for path in list_checkpoints(output)] == ["step-000002", "step-000003"]
    assert [(checkpoints / name).read_text() for name in ("latest", "best")] == ["step-000003\n"] * 2
    assert not [folder for folder in folders if (folder / ".half.0.partial").exists()]


def test_resuming_takes_no_more_memory_than_running(tmp_path: Path) -> None:
    """Measured: a ratio between 1.00 and 1.01; one spare copy of the optimizer's tensors makes it 1.23."""
    peaks = resume_memory(tmp_path / "wide", width=1024, rank=640)
    assert peaks.trained_bytes > 150 * 2**20
    assert peaks.fresh_bytes - peaks.start_bytes > 4 * peaks.trained_bytes, "parameters, gradients and two moments at least"
    assert peaks.ratio <= 1.05, str(peaks)
