"""The benchmark measures real steps of all three arms, and refuses numbers that mean nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mvwan.bench import OFF, ON, STOCK, Arm, BenchReport, Sizes, run_bench
from mvwan.errors import MvwanError

BASE = str(Path(__file__).parent / "golden" / "base.safetensors")
SMALL = Sizes(batch=1, views=2, latent_frames=2, latent_height=4, latent_width=4, text_tokens=4)


def test_arms_take_turns_on_the_same_batch() -> None:
    report = run_bench(BASE, SMALL, repeats=2)
    assert [arm.name for arm in report.arms] == [STOCK, OFF, ON]
    assert all(len(arm.seconds) == 2 and min(arm.seconds) > 0 for arm in report.arms)
    stock, off, on = (arm.trainable_parameters for arm in report.arms)
    assert 0 < stock < off < on
    assert json.loads(json.dumps(report.to_json()))["arms"][0]["ratio_to_stock"] == 1


def test_ratio_is_of_medians() -> None:
    arms = tuple(Arm(name=name, trainable_parameters=1, seconds=times) for name, times in (("a", (1.0, 2.0, 9.0)), ("b", (3.0, 3.0, 3.0))))
    report = BenchReport(base="x", sizes=SMALL, threads=1, arms=arms)
    assert report.ratio(arms[1]) == 1.5


@pytest.mark.parametrize(("field", "value"), [("views", 0), ("latent_frames", 1), ("latent_height", 3)])
def test_sizes_are_checked(field: str, value: int) -> None:
    with pytest.raises(MvwanError, match=f"{field}={value}"):
        dataclasses.replace(SMALL, **{field: value})


def test_a_bad_base_is_one_sentence() -> None:
    command = [sys.executable, "-m", "mvwan.bench", "--base", "no/such.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "no/such.safetensors" in done.stderr
