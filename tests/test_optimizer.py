"""The optimizers: what each keeps of a tensor, what that takes, and that a run goes on with it to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan.checkpoint import load_trained, read_optimizer
from mvwan.checkpoint_compare import verify_checkpoint
from mvwan.config import config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError
from mvwan.files import read_json
from mvwan.model.trainable import parameters_by_name
from mvwan.model.trainable_table import moment_bytes, moment_shapes
from mvwan.optimizer import make_optimizer, optimizer_tensors
from mvwan.plan import make_plan
from mvwan.train import train
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import BASE
from tests.test_train_processes import SCRIPT, launch
from tests.test_training_module import make_batch

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

OPTIMIZERS = ("adamw", "adafactor")
ADAFACTOR: dict[str, Any] = {"train": {"optimizer": "adafactor"}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_kept_is_what_tables_checkpoints_and_plans_say(name: str) -> None:
    config = config_from_dict({"base": {"source": str(BASE)}, "unfreeze_modulation_and_norms": True, "train": {"optimizer": name}})
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    optimizer = make_optimizer(module, config.train)
    for _ in range(2):
        module(make_batch(), 0, 0).sums.sum().backward()
        optimizer.step()
    moments, updates = optimizer_tensors(optimizer, module)
    parameters = parameters_by_name(module.model)
    expected = {
        key: shape for held in module.table.trainable_names for key, shape in moment_shapes(name, held, parameters[held].shape).items()
    }
    assert {key: tuple(moment.shape) for key, moment in moments.items()} == expected
    assert set(updates.values()) == {2}
    held = sum(moment.nbytes for moment in moments.values())
    assert held == module.table.optimizer_bytes
    assert held == sum(moment_bytes(name, parameters[trained].shape) for trained in module.table.trainable_names)
    trained = 4 * module.table.trainable_parameters
    assert held == 2 * trained if name == "adamw" else held < trained / 4
    assert make_plan(config, []).checkpoint_bytes == trained + held


def test_adafactor_moves_by_the_rate_that_it_is_given_whatever_a_tensor_starts_at() -> None:
    """Scaled by a tensor's size, as is its usual way, what starts at zero would stand still."""
    config = config_from_dict(merge({"base": {"source": str(BASE)}}, ADAFACTOR, {"train": {"learning_rate": 1e-3}}))
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    optimizer = make_optimizer(module, config.train)
    before = {name: tensor.clone() for name, tensor in module.saved_tensors().items()}
    module(make_batch(), 0, 0).sums.sum().backward()
    optimizer.step()
    for name, tensor in module.saved_tensors().items():
        gradient = parameters_by_name(module.model)[name].grad
        assert gradient is not None
        moved = float((tensor - before[name]).square().mean().sqrt())
        if gradient.count_nonzero() == 0:
            assert moved == 0, name
        else:
            assert 1e-5 < moved <= 1.0001e-3, f"{name}: root mean square {moved}"


def test_a_run_with_adafactor_goes_on_to_the_bit(golden_run: dict[str, Any], tmp_path: Path) -> None:
    config = config_from_dict(merge(golden_run, ADAFACTOR))
    whole = train(config, tmp_path / "whole")
    train(config_from_dict(merge(golden_run, ADAFACTOR, {"train": {"steps": 2}})), tmp_path / "cut")
    with pytest.raises(MvwanError, match=r"train\.optimizer"):
        train(config_from_dict(golden_run), tmp_path / "cut", resume=True)
    again = train(config, tmp_path / "cut", resume=True)
    tensors, same = load_trained(tmp_path / "whole").tensors, load_trained(tmp_path / "cut").tensors
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert "all finite" in verify_checkpoint(whole.checkpoint)[1]
    moments, _ = read_optimizer(again.checkpoint)
    assert not any(name.startswith("exp_avg/") for name in moments)
    assert whole.movement is not None
    assert all(group["tensors_moved"] for group in whole.movement["groups"])
    groups = {group["name"]: group for group in read_json(tmp_path / "whole" / "table.json")["groups"]}
    assert groups["projector"]["optimizer_bytes"] < groups["projector"]["parameters"]


def test_strategies_that_cut_tensors_apart_refuse_it(golden_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(config_from_dict(merge(golden_run, ADAFACTOR))))
    done = launch(tmp_path, ["--use_fsdp", "--fsdp_version", "2"], SCRIPT, str(tmp_path / "run"))
    assert "train.optimizer=adafactor: not with FSDP2 or DeepSpeed" in done.stdout, done.stderr
