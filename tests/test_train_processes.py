"""train in two processes: the same losses as one process with two micro-batches, and the same stop on both."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan.checkpoint import list_checkpoints, load_trained, read_optimizer
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.data.dataset import global_indices
from mvwan.errors import MvwanError
from mvwan.train import train
from tests.latents import change_entry, keys_of, put_nan

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

EXACT: dict[str, Any] = {
    "base": {"dtype": "float32"},
    "model": {"action_head": "gripper"},
    "train": {"precision": "no", "steps": 3, "heat_reader_weight": 10.0},
}
"""Settings under which only the order of sums can differ."""

# Runs one after the other in the same processes: the second meets a window that is not a number; in the third, one process gets SIGTERM.
SCRIPT = """
import os, pathlib, signal, sys, threading, time, torch, yaml
from mvwan.config import config_from_dict
from mvwan.errors import MvwanError, PreemptedError
from mvwan.train import train

def stop_after_the_first_step(metrics):
    while not metrics.is_file() or '"kind": "train"' not in metrics.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

torch.set_num_threads(1)
for place in sys.argv[1:]:
    if place.endswith("stopped") and os.environ["RANK"] == "1":
        threading.Thread(target=stop_after_the_first_step, args=[pathlib.Path(place, "metrics.jsonl")], daemon=True).start()
    try:
        train(config_from_dict(yaml.safe_load(open(place + ".yaml"))), place)
    except MvwanError as error:
        sys.stdout.write(f"refused: {error}\\n")
    except PreemptedError as stop:
        sys.stdout.write(f"stopped: {stop}\\n")
    sys.stdout.flush()
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]


def launch(folder: Path, flags: list[str], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.py").write_text(script)
    command = [*LAUNCH, *flags, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def spoil(config: Config, folder: Path) -> str:
    """The name of the window that the second process takes first, of which the copied cache now holds a NaN."""
    keys = keys_of(config, folder, "train")
    return change_entry(keys, int(global_indices(config.seed, 0, 2, len(keys))[1]), put_nan)


def losses(history: list[dict[str, Any]]) -> list[float]:
    names = ("loss", "rgb_loss", "heat_loss", "gripper_loss", "gradient_norm")
    return [line[name] for line in history if line["kind"] == "train" for name in names]


def test_two_processes_are_one_process_with_two_micro_batches(golden_run: dict[str, Any], tmp_path: Path) -> None:
    """Tolerance 1e-5, relative: losses, gradient norms and trained tensors differ only by the order in which two numbers are added."""
    alone = train(config_from_dict(merge(golden_run, EXACT)), tmp_path / "alone")
    pair = config_from_dict(merge(golden_run, EXACT, {"train": {"gradient_accumulation": 1}}))
    (tmp_path / "pair.yaml").write_text(dump_yaml(pair))
    shutil.copytree(golden_run["data"]["cache"], tmp_path / "latents")
    spoiled = config_from_dict(merge(pair.to_dict(), {"data": {"cache": str(tmp_path / "latents")}, "train": {"evaluate_every": 0}}))
    bad_name = spoil(spoiled, tmp_path / "latents")
    (tmp_path / "spoiled.yaml").write_text(dump_yaml(spoiled))

    endless = {"train": {"steps": 100_000, "evaluate_every": 0, "save_every": 100_000}}
    (tmp_path / "stopped.yaml").write_text(dump_yaml(config_from_dict(merge(pair.to_dict(), endless))))
    flags = ["--multi_gpu", "--main_process_port", "0"]
    done = launch(tmp_path, flags, SCRIPT, *(str(tmp_path / name) for name in ("pair", "spoiled", "stopped")))

    assert done.returncode == 0, done.stderr[-3000:]
    history = [json.loads(line) for line in (tmp_path / "pair" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in history] == [(line["kind"], line["step"]) for line in alone.history]
    assert losses(history) == pytest.approx(losses(alone.history), rel=1e-5)
    rates = [[line["learning_rates"] for line in lines if line["kind"] == "train"] for lines in (history, alone.history)]
    assert rates[0] == rates[1], "the schedule is stepped once per update, not once per process"
    left, right = load_trained(tmp_path / "pair").tensors, load_trained(tmp_path / "alone").tensors
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)
    assert set(read_optimizer(tmp_path / "pair" / "checkpoints" / "step-000003")[1]["updates"].values()) == {3}

    assert done.stdout.count("MULTI-VIEW MODULE PARAMETER UNFREEZING") == 3, "one banner per run: they are for the main process"
    refusals = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 2, "both processes stop when one has the bad window"
    assert all(f"step 1: the loss is NaN or infinite; samples: {bad_name}. " in line for line in refusals)
    assert list_checkpoints(tmp_path / "spoiled") == []
    stops = [line for line in done.stdout.splitlines() if line.startswith("stopped: ")]
    assert len(stops) == 2, "both processes stop when one gets SIGTERM"
    (saved,) = list_checkpoints(tmp_path / "stopped")
    assert all(f"stopped by SIGTERM at step {int(saved.name.removeprefix('step-'))} of 100000" in line for line in stops)


def test_a_launch_that_starts_one_process_instead_of_two_is_refused(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MASTER_PORT", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
    done = launch(tmp_path, ["--cpu"], f"import os\nprint({{name: os.environ.get(name) for name in {names}}})\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WORLD_SIZE") == 1, "accelerate started one process"
    environment = ast.literal_eval(done.stdout.strip())
    for name, value in environment.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(MvwanError, match="asked for several processes and started one"):
        train(config_from_dict(golden_run), tmp_path / "run")
    assert not (tmp_path / "run").exists()
