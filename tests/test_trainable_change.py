"""Going on with the switch set otherwise than before: refused, unless it is insisted on by name, and then on record."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan.checkpoint import load_trained, read_optimizer
from mvwan.config import Config, config_from_dict, merge
from mvwan.errors import MvwanError
from mvwan.model.trainable import SWITCH_GROUPS
from mvwan.train import TrainResult, train
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

GOLDEN = Path(__file__).parent / "golden"
ON, OFF = ({"unfreeze_modulation_and_norms": switch} for switch in (True, False))
QUIET: dict[str, Any] = {"train": {"steps": 2, "evaluate_every": 0, "ema_decay": 0.5}}


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, *overrides))


def at_base(config: Config) -> dict[str, torch.Tensor]:
    """The switch's tensors as the base has them."""
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    return {name: tensor for name, tensor in module.saved_tensors().items() if name in names_of_switch(module)}


def names_of_switch(module: HeatmapWanTrainingModule) -> set[str]:
    return {name for row in module.table.rows if row.name in SWITCH_GROUPS for name in row.names}


def changes(result: TrainResult) -> list[dict[str, Any]]:
    return load_trained(result.checkpoint).manifest["trainable_changes"]


def test_resuming_with_the_switch_on_is_refused_and_then_accepted_by_name(golden_run: dict[str, Any], tmp_path: Path) -> None:
    off = train(config_of(golden_run, QUIET, OFF), tmp_path / "run")
    assert changes(off) == []
    further = config_of(golden_run, QUIET, ON, {"train": {"steps": 4}})
    with pytest.raises(MvwanError, match=r"unfreeze_modulation_and_norms=false, now it is true; .*--accept-trainable-change"):
        train(further, tmp_path / "run", resume=True)
    on = train(further, tmp_path / "run", resume=True, accept_trainable_change=True)

    counts = {"modulation": 2, "mvs_norms": 4}  # two blocks
    assert changes(on) == [{"from": "step-000002", "at_step": 2, "added": counts, "frozen": {}}]
    updates = read_optimizer(on.checkpoint)[1]["updates"]
    assert {group: updates[group] for group in counts} == {"modulation": 2, "mvs_norms": 2}, "fresh optimizer state"
    assert {updates[group] for group in updates.keys() - counts.keys()} == {4}, "the others go on"
    trained, base = load_trained(on.checkpoint).tensors, at_base(further)
    for name, tensor in base.items():
        distance = float((trained[name] - tensor).abs().max())
        assert 0 < distance < 4e-3, f"{name}: two steps of the learning rate away from the base"
    assert set(base) <= set(load_trained(on.checkpoint, ema=True).tensors)
    assert on.movement is not None
    assert {row["group"] for row in on.movement["groups"]} >= set(counts)

    again = train(config_of(further.to_dict(), {"train": {"steps": 5}}), tmp_path / "run", resume=True)
    assert changes(again) == changes(on), "on record once, and no flag is needed any more"


def test_resuming_with_the_switch_off_keeps_what_was_trained_frozen(golden_run: dict[str, Any], tmp_path: Path) -> None:
    on = train(config_of(golden_run, QUIET, ON), tmp_path / "run")
    before = {name: load_trained(on.checkpoint).tensors[name] for name in at_base(config_of(golden_run, ON))}
    further = config_of(golden_run, QUIET, OFF, {"train": {"steps": 4}})
    with pytest.raises(MvwanError, match="unfreeze_modulation_and_norms=true, now it is false"):
        train(further, tmp_path / "run", resume=True)
    off = train(further, tmp_path / "run", resume=True, accept_trainable_change=True)
    assert changes(off) == [{"from": "step-000002", "at_step": 2, "added": {}, "frozen": {"modulation": 2, "mvs_norms": 4}}]
    tensors, manifest = load_trained(off.checkpoint)
    assert all(torch.equal(tensors[name], before[name]) for name in before), "never dropped"
    assert {manifest["groups"][group]["mode"] for group in SWITCH_GROUPS} == {"frozen"}
    assert set(read_optimizer(off.checkpoint)[1]["updates"]).isdisjoint(SWITCH_GROUPS)

    again = train(config_of(further.to_dict(), {"train": {"steps": 5}}), tmp_path / "run", resume=True)
    assert changes(again) == changes(off)
    assert all(torch.equal(load_trained(again.checkpoint).tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("start", ["ours", "older"])
def test_a_new_run_may_start_from_an_off_checkpoint_by_name(
    golden_run: dict[str, Any], tmp_path: Path, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = GOLDEN / "trained_frozen.safetensors"
    if start == "ours":
        path = train(config_of(golden_run, QUIET, OFF), tmp_path / "off").checkpoint
    config = config_of(golden_run, QUIET, ON, {"train": {"from_checkpoint": str(path)}})
    with pytest.raises(MvwanError, match=r"trained without the groups modulation and mvs_norms;.*--accept-trainable-change"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    result = train(config, tmp_path / "run", accept_trainable_change=True)
    assert changes(result) == [{"from": path.name, "at_step": 0, "added": {"modulation": 2, "mvs_norms": 4}, "frozen": {}}]
    assert "modulation: 2 tensors not in the checkpoint, they keep the base's values" in capsys.readouterr().out
    assert set(read_optimizer(result.checkpoint)[1]["updates"].values()) == {2}


def test_nothing_to_accept_changes_nothing(golden_run: dict[str, Any], tmp_path: Path) -> None:
    train(config_of(golden_run, QUIET), tmp_path / "run")
    result = train(config_of(golden_run, QUIET, {"train": {"steps": 3}}), tmp_path / "run", resume=True, accept_trainable_change=True)
    assert changes(result) == []
    with pytest.raises(MvwanError, match="seed: 0 in the checkpoint, 1 now"):
        train(config_of(golden_run, QUIET, {"seed": 1}), tmp_path / "run", resume=True, accept_trainable_change=True)
