"""train under FSDP2, two real processes: the same files as one process writes, and a run that goes on under another strategy.

Tolerances are those of `test_train_processes`: only the order of sums can differ.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mvwan.checkpoint import list_checkpoints, load_trained, read_manifest, read_optimizer
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError
from mvwan.train import train
from tests.test_train_processes import launch, losses, spoil

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

STEPS = {"steps": 4, "save_every": 1, "keep_last": 0, "evaluate_every": 4, "evaluate_windows": 3, "ema_decay": 0.9, "schedule": "cosine"}
"""Three held-out windows: one process has one more than the other."""
# Norms are near 0.8: clipping acts. A heat reader is a frozen layer that no strategy may spread or train.
EXACT: dict[str, Any] = {
    "base": {"dtype": "float32"},
    "model": {"action_head": "gripper"},
    "unfreeze_modulation_and_norms": True,
    "train": {**STEPS, "precision": "no", "gradient_accumulation": 2, "max_gradient_norm": 0.02, "heat_reader_weight": 10.0},
}
ROUNDED: dict[str, Any] = {
    "base": {"dtype": "bfloat16"},
    "model": {"gradient_checkpointing": True, "action_head": "gripper"},
    "train": {**STEPS, "precision": "bf16", "gradient_accumulation": 4, "save_every": 4, "evaluate_every": 0},
}
"""A bfloat16 base under autocast, with blocks computed twice, and several micro-batches in each of two processes."""
PAIR: dict[str, Any] = {"train": {"gradient_accumulation": 1}}
LOSSES = ("loss", "rgb_loss", "heat_loss", "gripper_loss")
CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"
FSDP2, DDP = (["--config_file", str(CONFIGS / name), "--main_process_port", "0"] for name in ("fsdp2.yaml", "ddp.yaml"))

# One run after the other in the same processes. "+" in front of a place: go on with the run there. "=": spread its model, and back.
SCRIPT = """
import sys, torch, yaml
from pathlib import Path
from mvwan import flow, sharding
from mvwan.config import config_from_dict
from mvwan.errors import MvwanError
from mvwan.model.trainable import parameters_by_name
from mvwan.optimizer import make_optimizer
from mvwan.strategy import make_accelerator, prepare
from mvwan.train import train
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)

def spread_and_gather(config, place):
    accelerator = make_accelerator(config, Path(place))
    own = HeatmapWanTrainingModule(config=config, print_banners=False)
    whole = {name: parameter.detach().clone() for name, parameter in parameters_by_name(own.model).items()}
    prepare(accelerator, own, make_optimizer(own, config.train))
    parameters = parameters_by_name(own.model)
    again = {name: sharding.shard_like(parameter, whole[name]) for name, parameter in parameters.items()}
    own.unshard()  # as a forward pass without a backward one leaves some
    assert not all(map(sharding.is_spread, parameters_by_name(own.model).values()))
    sharding.release_full_parameters(own)
    assert list(map(id, parameters_by_name(own.model).values())) == list(map(id, parameters.values()))
    is_main = accelerator.is_main_process
    for tensors in (parameters, again):
        gathered = sharding.gathered(tensors, is_main, copy=False)
        assert gathered.keys() == (whole.keys() if is_main else set())
        assert all(torch.equal(gathered[name], whole[name]) and gathered[name].dtype == whole[name].dtype for name in gathered)
    held = sum(sharding.local_part(parameter).numel() for parameter in parameters.values())
    numbers = [held, sum(parameter.numel() for parameter in whole.values()), sum(map(sharding.is_spread, parameters.values())), len(whole)]
    sys.stdout.write(" ".join(map(str, ["holds", *numbers])) + "\\n")  # in one piece: two processes write

autocast = set()

def look_then_draw(*given):
    autocast.add(torch.is_autocast_enabled("cpu"))
    return draw_noise(*given)

draw_noise, flow.draw_noise = flow.draw_noise, look_then_draw
for given in sys.argv[1:]:
    place = given.lstrip("+=")
    config = config_from_dict(yaml.safe_load(open(place + ".yaml")))
    try:
        spread_and_gather(config, place) if given[0] == "=" else train(config, place, resume=given[0] == "+")
    except MvwanError as error:
        sys.stdout.write(f"refused: {error}\\n")
    sys.stdout.write(f"autocast in {Path(place).name}: {autocast}\\n")
    sys.stdout.flush()
    autocast.clear()
"""


def history_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(place: Path, other: Path, rel: float = 1e-5) -> None:
    left, right = history_of(place), history_of(other)
    assert [(line["kind"], line["step"]) for line in left] == [(line["kind"], line["step"]) for line in right]
    assert losses(left) == pytest.approx(losses(right), rel=rel)
    for one, two in zip(left, right, strict=True):
        if one["kind"] == "train":
            assert one["learning_rates"] == two["learning_rates"]
            assert one["gradient_norms"] == pytest.approx(two["gradient_norms"], rel=10 * rel)
        else:
            assert [one[name] for name in LOSSES] == pytest.approx([two[name] for name in LOSSES], rel=rel)
            assert one["windows"] == two["windows"] == 3


def assert_same_checkpoint(folder: Path, other: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    pairs = [(load_trained(folder, ema=ema).tensors, load_trained(other, ema=ema).tensors) for ema in (False, True)]
    (moments, state), (other_moments, other_state) = read_optimizer(folder), read_optimizer(other)
    assert state == other_state
    for left, right in [*pairs, (moments, other_moments)]:
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)
    manifests = [read_manifest(path) for path in (folder, other)]
    assert manifests[0].keys() == manifests[1].keys()
    groups = [{name: (group["mode"], group["names"]) for name, group in manifest["groups"].items()} for manifest in manifests]
    assert groups[0] == groups[1]


def keep_until(place: Path, step: int) -> None:
    """Removes later checkpoints, as if the run had been killed before them."""
    for folder in (place / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(golden_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder of the runs, output of the processes under FSDP2, name of the spoiled window)."""
    folder = tmp_path_factory.mktemp("sharded")

    def config(name: str, *changes: dict[str, Any]) -> Config:
        made = config_from_dict(merge(golden_run, *changes))
        (folder / f"{name}.yaml").write_text(dump_yaml(made))
        return made

    def start(flags: list[str], *given: str) -> str:
        places = [mark + str(folder / name) for mark, name in (re.fullmatch(r"([+=]?)(\w+)", each).groups() for each in given)]
        done = launch(folder, flags, SCRIPT, *places)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    train(config("alone", EXACT), folder / "alone")
    train(config("rounded_alone", ROUNDED), folder / "rounded_alone")
    for name in ("spread", "chain"):
        config(name, EXACT, PAIR)
    config("rounded", ROUNDED, {"train": {"gradient_accumulation": 2}})
    shutil.copytree(golden_run["data"]["cache"], folder / "latents")
    spoiled = config("spoiled", EXACT, PAIR, {"train": {"evaluate_every": 0}, "data": {"cache": str(folder / "latents")}})
    bad_name = spoil(spoiled, folder / "latents")

    shutil.copytree(folder / "alone", folder / "chain")
    keep_until(folder / "chain", 1)
    out = start(FSDP2, "spread", "rounded", "+chain", "spoiled", "=rounded")
    assert_same_run(folder / "chain", folder / "alone")
    keep_until(folder / "chain", 2)
    start(DDP, "+chain")
    keep_until(folder / "chain", 3)
    train(config("chain", EXACT), folder / "chain", resume=True)
    return folder, out, bad_name


def test_it_is_the_run_of_one_process(runs: tuple[Path, str, str]) -> None:
    folder = runs[0]
    assert_same_run(folder / "spread", folder / "alone")
    for step in (1, 4):
        assert_same_checkpoint(*(folder / name / "checkpoints" / f"step-{step:06d}" for name in ("spread", "alone")))
    proofs = [json.loads((folder / name / "movement.json").read_text()) for name in ("spread", "alone")]
    assert proofs[0]["frozen_tensors_unchanged"] == proofs[1]["frozen_tensors_unchanged"] > 0
    for left, right in zip(*(proof["groups"] for proof in proofs), strict=True):
        assert left == {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in right.items()}


def test_each_process_holds_its_part(runs: tuple[Path, str, str]) -> None:
    """Else all the rest here would be about DDP. What has one row cannot be cut, so the parts are not equal."""
    held = [[int(number) for number in line.split()[1:]] for line in runs[1].splitlines() if line.startswith("holds ")]
    assert len(held) == 2
    assert held[0][0] + held[1][0] == held[0][1] == held[1][1]
    assert all(0.4 < part / whole < 0.6 and spread == tensors for part, whole, spread, tensors in held)


def test_bfloat16_base_with_gradient_checkpointing(runs: tuple[Path, str, str]) -> None:
    """Looser: rounding to 8 bits turns another order of sums into other last bits."""
    folder = runs[0]
    assert_same_run(folder / "rounded", folder / "rounded_alone", rel=2e-3)
    said = [line for line in runs[1].splitlines() if line.startswith("autocast in ")]
    assert said.count("autocast in rounded: {True}") == said.count("autocast in spread: {False}") == 2, said
    assert {str(tensor.dtype) for tensor in load_trained(folder / "rounded").tensors.values()} == {"torch.float32"}


def test_one_process_then_fsdp2_then_ddp_then_one_is_the_uninterrupted_run(runs: tuple[Path, str, str]) -> None:
    folder = runs[0]
    strategies = {path.name: read_manifest(path)["strategy"] for path in list_checkpoints(folder / "chain")}
    assert list(strategies.values()) == ["one process", "FSDP2", "DDP", "one process"]
    assert_same_run(folder / "chain", folder / "alone")
    for step in (2, 3, 4):
        assert_same_checkpoint(*(folder / name / "checkpoints" / f"step-{step:06d}" for name in ("chain", "alone")))


def test_all_processes_stop_when_one_has_a_bad_window(runs: tuple[Path, str, str]) -> None:
    folder, out, bad_name = runs
    refusals = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert len(refusals) == 2
    assert all(f"step 1: the loss is NaN or infinite; samples: {bad_name}. " in line for line in refusals)
    assert list_checkpoints(folder / "spoiled") == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "Leave --fsdp_offload_params out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing=true"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "each MultiViewWanBlock is one unit"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor and context parallelism"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({}, "without a group of processes"),
    ],
)
def test_what_is_not_supported_is_refused(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MvwanError, match=message):
        train(config_from_dict(golden_run), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not AcceleratorState._shared_state, "the next run of this process would inherit these settings"


def test_a_torch_that_cannot_spread_over_cpus_is_refused(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch 2.6 cannot, whose streams of a CPU record no events."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delattr("torch.cpu.Stream.record_event")
    with pytest.raises(MvwanError, match="FSDP2 on CPUs needs a newer torch than"):
        train(config_from_dict(golden_run), tmp_path / "run")
