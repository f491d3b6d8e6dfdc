"""The scaling page says what its script prints, and the script's sums are those of a ring."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import GPUS, NETWORKS, STRATEGIES, ddp_bytes, fsdp2_bytes, network_s, ring_bytes, zero2_bytes
from mvwan.config import config_from_dict
from mvwan.step_trace import StepTrace, trace

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def step() -> StepTrace:
    """Of a small run."""
    return trace(config_from_dict({"base": {"source": str(ROOT / "tests" / "golden" / "base.safetensors")}}), "gpu")


def test_the_page_has_every_line_that_is_printed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    printed = [line for line in done.stdout.splitlines() if line]
    assert len(printed) > 20
    assert [line for line in printed if line not in page] == []


def test_what_strategies_move(step: StepTrace) -> None:
    assert ring_bytes(80, 8) == 70
    step = replace(step, frozen=1000, trained=80)
    assert ddp_bytes(step, 4, 8) == 140, "once per update, however many micro-batches"
    assert zero2_bytes(step, 4, 8) == 350
    assert fsdp2_bytes(step, 4, 8) == 4 * (2 * 945 + 70)


def test_slower_links_and_more_gpus_take_longer(step: StepTrace) -> None:
    for moved in STRATEGIES.values():
        for network in NETWORKS:
            taken = [network_s(moved(step, 4, gpus), step, network, gpus) for gpus in GPUS]
            assert taken == sorted(taken)
        taken = [network_s(moved(step, 4, 64), step, network, 64) for network in NETWORKS]
        assert taken == sorted(taken)
