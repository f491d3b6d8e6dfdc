"""Four processes under torchrun, one of which is killed: all start again, go on from the newest checkpoint, and end where nobody was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mvwan.checkpoint import latest_checkpoint, load_trained
from mvwan.config import config_from_dict, dump_yaml, merge
from mvwan.train import train

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

STEPS = 6
PROCESSES = 4
EXACT: dict[str, Any] = {
    "base": {"dtype": "float32"},
    "train": {"precision": "no", "steps": STEPS, "save_every": 1, "keep_last": 2, "evaluate_every": 0, "gradient_accumulation": PROCESSES},
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES), "--max_restarts", "1"]
"""As the command `torchrun`."""


def one_worker(launcher: psutil.Process) -> psutil.Process:
    """The process of the highest rank."""
    workers = [child for child in launcher.children(recursive=True) if "mvwan" in " ".join(child.cmdline())]
    return max(workers, key=lambda child: int(child.environ().get("RANK", "-1")))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


def test_a_killed_process_is_started_again_and_nothing_is_lost(golden_run: dict[str, Any], tmp_path: Path) -> None:
    """Tolerance 1e-5, relative: only the order in which numbers are added differs."""
    alone = train(config_from_dict(merge(golden_run, EXACT)), tmp_path / "alone")
    config = config_from_dict(merge(golden_run, EXACT, {"train": {"gradient_accumulation": 1}}))
    (tmp_path / "four.yaml").write_text(dump_yaml(config))
    run = tmp_path / "four"
    command = [*TORCHRUN, "-m", "mvwan", "train", "--config", str(tmp_path / "four.yaml"), "--output", str(run), "--resume"]
    # Else torch 2.13 hands those that start again the store in which the addresses of the dead ones stand.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + 240
        while latest_checkpoint(run) is None and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        killed = one_worker(psutil.Process(launcher.pid))
        assert killed.environ()["RANK"] == str(PROCESSES - 1)
        killed.send_signal(signal.SIGKILL)
        before = len(lines(run))
        code = launcher.wait(timeout=240)
    said = (tmp_path / "log").read_text()
    assert code == 0, said[-3000:]
    assert before < STEPS, "it was killed on the way"
    steps = lines(run)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)), "each step once"
    expected = lines(tmp_path / "alone")
    for name in ("loss", "rgb_loss", "heat_loss", "gradient_norm"):
        assert [line[name] for line in steps] == pytest.approx([line[name] for line in expected], rel=1e-5)
    tensors, wanted = load_trained(run).tensors, load_trained(alone.checkpoint).tensors
    assert set(tensors) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-5, atol=1e-7)
