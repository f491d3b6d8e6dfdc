"""train under DeepSpeed's ZeRO, two real processes: the same files as one process writes, and a run that goes on under another strategy.

Tolerances are those of `test_train_sharded`: only the order of sums can differ.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mvwan.checkpoint import list_checkpoints, load_trained, read_manifest
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError
from mvwan.train import train
from tests.test_train_processes import launch, spoil
from tests.test_train_sharded import DDP, EXACT, PAIR, ROUNDED, assert_same_checkpoint, assert_same_run, history_of, keep_until
from tests.test_train_sharded import SCRIPT as RESUMING_SCRIPT

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mvwan[deepspeed]'"
)
CLIPPED: dict[str, Any] = {"train": {"max_gradient_norm": 0.02}}
ZERO = ["--use_deepspeed", "--zero_stage", "2", "--main_process_port", "0"]

# One run after the other in the same processes. "+" in front of a place: go on with the run there. "1": under ZeRO-1. In the place
# `stopped` one process gets SIGTERM, in `infinite` one has an infinite gradient and a loss that is none.
SCRIPT = """
import os, signal, sys, threading, time, torch, yaml
from pathlib import Path
import mvwan.train as trainer
from mvwan import flow
from mvwan.config import config_from_dict
from mvwan.errors import MvwanError, PreemptedError
from mvwan.model.trainable import parameters_by_name
from mvwan.train import train

measure, draw_noise = trainer.gradient_norms, flow.draw_noise
autocast = set()

def look_then_draw(*given):
    autocast.add(torch.is_autocast_enabled("cpu"))
    return draw_noise(*given)

def spoil_then_measure(model, table, gradient_of):
    parts = [gradient_of(parameters_by_name(model)[name]) for name in table.trainable_names]
    held, whole = sum(part.values.numel() for part in parts), sum(part.shape.numel() for part in parts)
    sys.stdout.write(f"holds {held} {whole}\\n")
    if os.environ["RANK"] == "1":
        next(part for part in parts if part.values.numel()).values[0] = float("inf")
    return measure(model, table, gradient_of)

def stop_after_the_first_step(metrics):
    while not metrics.is_file() or '"kind": "train"' not in metrics.read_text():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

torch.set_num_threads(1)
flow.draw_noise = look_then_draw
for given in sys.argv[1:]:
    place = given.lstrip("+1")
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "1" if "1" in given.removesuffix(place) else "2"
    if place.endswith("stopped") and os.environ["RANK"] == "1":
        threading.Thread(target=stop_after_the_first_step, args=[Path(place, "metrics.jsonl")], daemon=True).start()
    trainer.gradient_norms = spoil_then_measure if place.endswith("infinite") else measure
    try:
        train(config_from_dict(yaml.safe_load(open(place + ".yaml"))), place, resume="+" in given.removesuffix(place))
    except MvwanError as error:
        sys.stdout.write(f"refused: {error}\\n")
    except PreemptedError as stop:
        sys.stdout.write(f"stopped: {stop}\\n")
    sys.stdout.write(f"autocast in {Path(place).name}: {autocast}\\n")
    sys.stdout.flush()
    autocast.clear()
"""


@pytest.fixture(scope="module")
def runs(golden_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder of the runs, output of the processes under ZeRO, name of the spoiled window)."""
    folder = tmp_path_factory.mktemp("zero")

    def config(name: str, *changes: dict[str, Any]) -> Config:
        made = config_from_dict(merge(golden_run, *changes))
        (folder / f"{name}.yaml").write_text(dump_yaml(made))
        return made

    def start(script: str, flags: list[str], *given: str) -> str:
        places = [mark + str(folder / name) for mark, name in (re.fullmatch(r"([+1]*)(\w+)", each).groups() for each in given)]
        done = launch(folder, flags, script, *places)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    train(config("alone", EXACT, CLIPPED), folder / "alone")
    train(config("rounded_alone", ROUNDED), folder / "rounded_alone")
    for name in ("spread", "chain", "moments_only", "infinite"):
        config(name, EXACT, CLIPPED, PAIR)
    for name in ("rounded", "rounded_moments_only"):
        config(name, ROUNDED, {"train": {"gradient_accumulation": 2}})
    endless = {"train": {"steps": 100_000, "evaluate_every": 0, "save_every": 100_000}}
    config("stopped", EXACT, PAIR, endless)
    shutil.copytree(golden_run["data"]["cache"], folder / "latents")
    spoiled = config("spoiled", EXACT, PAIR, {"train": {"evaluate_every": 0}, "data": {"cache": str(folder / "latents")}})
    bad_name = spoil(spoiled, folder / "latents")

    for name in ("chain", "moments_only"):
        shutil.copytree(folder / "alone", folder / name)
        keep_until(folder / name, 1)
    given = ("spread", "rounded", "1rounded_moments_only", "+chain", "+1moments_only", "spoiled", "infinite", "stopped")
    out = start(SCRIPT, ZERO, *given)
    assert_same_run(folder / "chain", folder / "alone")
    keep_until(folder / "chain", 2)
    start(RESUMING_SCRIPT, DDP, "+chain")
    for name, step in (("chain", 3), ("moments_only", 2)):
        keep_until(folder / name, step)
        train(config(name, EXACT, CLIPPED), folder / name, resume=True)
    return folder, out, bad_name


@needs_deepspeed
def test_it_is_the_run_of_one_process(runs: tuple[Path, str, str]) -> None:
    folder = runs[0]
    assert_same_run(folder / "spread", folder / "alone")
    norms = [line["gradient_norm"] for line in history_of(folder / "alone") if line["kind"] == "train"]
    assert min(norms) > CLIPPED["train"]["max_gradient_norm"], "nothing is clipped"
    for step in (1, 4):
        assert_same_checkpoint(*(folder / name / "checkpoints" / f"step-{step:06d}" for name in ("spread", "alone")))
    proofs = [json.loads((folder / name / "movement.json").read_text()) for name in ("spread", "alone")]
    assert proofs[0]["frozen_tensors_unchanged"] == proofs[1]["frozen_tensors_unchanged"] > 0
    for left, right in zip(*(proof["groups"] for proof in proofs), strict=True):
        assert left == {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in right.items()}


@needs_deepspeed
def test_each_process_holds_its_part(runs: tuple[Path, str, str]) -> None:
    """Else all the rest here would be about DDP."""
    held = [[int(number) for number in line.split()[1:]] for line in runs[1].splitlines() if line.startswith("holds ")]
    assert len(held) == 2
    assert held[0][0] + held[1][0] == held[0][1] == held[1][1]
    assert all(0.4 < part / whole < 0.6 for part, whole in held)


@needs_deepspeed
@pytest.mark.parametrize("name", ["rounded", "rounded_moments_only"])
def test_bfloat16_base_with_several_micro_batches(runs: tuple[Path, str, str], name: str) -> None:
    """Looser: rounding to 8 bits turns another order of sums into other last bits."""
    folder, out, _ = runs
    assert_same_run(folder / name, folder / "rounded_alone", rel=2e-3)
    assert out.count(f"autocast in {name}: {{True}}") == out.count("autocast in spread: {False}") == 2
    assert {str(tensor.dtype) for tensor in load_trained(folder / name).tensors.values()} == {"torch.float32"}


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", ["one process", "DeepSpeed ZeRO-2", "DDP", "one process"]),
        ("moments_only", ["one process", "DeepSpeed ZeRO-1", "one process", "one process"]),
    ],
)
def test_a_run_that_changes_its_strategy_is_the_uninterrupted_run(runs: tuple[Path, str, str], name: str, expected: list[str]) -> None:
    folder = runs[0]
    assert [read_manifest(path)["strategy"] for path in list_checkpoints(folder / name)] == expected
    assert_same_run(folder / name, folder / "alone")
    for step in (2, 3, 4):
        assert_same_checkpoint(*(folder / place / "checkpoints" / f"step-{step:06d}" for place in (name, "alone")))


@needs_deepspeed
def test_all_processes_stop_when_one_has_a_bad_window_or_a_signal(runs: tuple[Path, str, str]) -> None:
    folder, out, bad_name = runs
    refusals = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 4
    assert all(f"step 1: the loss is NaN or infinite; samples: {bad_name}. " in line for line in refusals[:2])
    assert all("step 1: the gradient is NaN or infinite; samples: " in line for line in refusals[2:])
    assert list_checkpoints(folder / "spoiled") == list_checkpoints(folder / "infinite") == []
    stops = [line for line in out.splitlines() if line.startswith("stopped: ")]
    assert len(stops) == 2, "both processes stop when one gets SIGTERM"
    (saved,) = list_checkpoints(folder / "stopped")
    assert all(f"stopped by SIGTERM at step {int(saved.name.removeprefix('step-'))} of 100000" in line for line in stops)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZERO_STAGE=3 is not supported, only 1 or 2"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "without offload"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "without offload"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "CONFIG_FILE=zero.json is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "MIXED_PRECISION=fp16 is not supported, only no or bf16"),
        ({}, "without a group of processes"),
        ({"LOCAL_RANK": "0"}, "the package deepspeed is not installed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2 and DeepSpeed"),
    ],
)
def test_what_is_not_supported_is_refused(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    if "LOCAL_RANK" in environment and importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MvwanError, match=message):
        train(config_from_dict(golden_run), tmp_path / "run")
    assert not (tmp_path / "run").exists()
