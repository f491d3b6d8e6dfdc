"""train: the whole trainer on demonstrations at 64 px: what it writes, resuming to the bit, accumulation, refusals.

Most runs are `golden_run` of the conftest; one goes through the codec and the tiny Wan. Several processes: `test_train_processes.py`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvwan import train as trainer
from mvwan.checkpoint import latest_checkpoint, list_checkpoints, load_trained, read_optimizer
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.data.dataset import global_indices
from mvwan.errors import MvwanError
from mvwan.files import read_json, sha256_file
from mvwan.precision import has_fast_bfloat16, settle
from mvwan.train import train
from mvwan.training_module import HeatmapWanTrainingModule
from tests.latents import change_entry, keys_of, put_nan

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def settings(golden_run: dict[str, Any]) -> dict[str, Any]:
    return golden_run


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, *overrides))


EXACT = {"base": {"dtype": "float32"}, "train": {"precision": "no"}}
"""Settings under which only the order of sums can differ."""


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [line[name] for line in history if line["kind"] == "train" for name in ("loss", "rgb_loss", "heat_loss", "gradient_norm")]


def final_digests(output: Path) -> dict[str, str]:
    newest = latest_checkpoint(output)
    assert newest is not None
    return {path.name: sha256_file(path) for path in newest.glob("*.safetensors")}


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in history]


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(golden_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, trainer.TrainResult]:
    """A run with everything on: switch, moving average, cosine schedule, TensorBoard."""
    output = tmp_path_factory.mktemp("runs") / "run"
    more = {"schedule": "cosine", "ema_decay": 0.5, "tracker": "tensorboard"}
    config = config_of(golden_run, {"unfreeze_modulation_and_norms": True, "train": more})
    return config, output, train(config, output)


def test_a_run_writes_what_its_docstring_says(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    config, output, result = run
    names = {path.name for path in output.iterdir()}
    assert names == {"config.yaml", "table.json", "first_batch.png", "metrics.jsonl", "movement.json", "logs", "checkpoints"}
    assert (output / "config.yaml").read_text() == dump_yaml(settle(config))
    assert result.checkpoint == output / "checkpoints" / "step-000004"
    assert [path.name for path in list_checkpoints(output)] == ["step-000002", "step-000004"]
    assert [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()] == result.history
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert result.step == 4
    assert result.losses["loss"] == pytest.approx(0.5 * result.losses["rgb_loss"] + 0.5 * result.losses["heat_loss"])


def test_the_table_the_checkpoint_and_the_optimizer_name_the_same_tensors_in_float32(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    _, output, result = run
    table = {group["name"]: group for group in read_json(output / "table.json")["groups"] if group["trainable"]}
    tensors, manifest = load_trained(output)
    saved = manifest["groups"]
    assert {name: (entry["parameters"], entry["tensors"]) for name, entry in saved.items()} == {
        name: (group["parameters"], group["tensors"]) for name, group in table.items()
    }
    moments, _ = read_optimizer(result.checkpoint)
    assert {name.split("/", 1)[1] for name in moments} == set(tensors)
    assert {tensor.dtype for tensor in (*tensors.values(), *moments.values())} == {torch.float32}
    fast = has_fast_bfloat16()
    settled = manifest["config"]["base"]["dtype"], manifest["config"]["train"]["precision"]
    assert settled == (("bfloat16", "bf16") if fast else ("float32", "no"))


def test_every_group_moved_in_the_real_trainer(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    _, output, result = run
    movement = read_json(output / "movement.json")
    assert movement == result.movement
    assert movement["steps"] == 2
    assert movement["frozen_tensors_unchanged"] > 0
    groups = {group["group"]: group for group in movement["groups"]}
    assert {"modulation", "mvs_norms", "lora", "lora_mvs", "projector"} <= groups.keys()
    for group in groups.values():
        assert group["tensors_moved"] > 0
        assert group["gradient_norm"] > 0
    assert groups["mvs_norms"]["tensors_moved"] == groups["mvs_norms"]["tensors"], "norm weights near 1 stand still in bf16"


def test_held_out_losses_come_per_band_and_stream_before_during_and_after(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    lines = [line for line in run[2].history if line["kind"] == "held_out"]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        assert list(line["bands"]) == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
        assert all(set(band) == {"loss", "rgb_loss", "heat_loss"} for band in line["bands"].values())
        assert line["loss"] == pytest.approx(np.mean([band["loss"] for band in line["bands"].values()]))
    assert run[2].held_out == lines[-1]


def test_first_batch_shows_the_windows_with_their_heatmaps(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    picture = np.asarray(Image.open(run[1] / "first_batch.png"))
    gap = 2
    assert picture.shape == (2 * 3 * (64 + gap) - gap, 5 * (64 + gap) - gap, 3)  # two windows of three views, five frames
    assert picture[:64, :64].std() > 5


def test_fact_5_optimizer_steps_are_counted_and_the_learning_rate_follows_them(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    _config, _, result = run
    assert set(read_optimizer(result.checkpoint)[1]["updates"].values()) == {4}
    rates = [line["learning_rates"]["lora"] for line in result.history if line["kind"] == "train"]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])  # warm-up over two steps, then a cosine over two


def test_the_moving_average_is_one(run: tuple[Config, Path, trainer.TrainResult], settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(settings, {"train": {"steps": 2, "save_every": 1, "evaluate_every": 0, "ema_decay": 0.5}})
    train(config, tmp_path / "run")
    start = HeatmapWanTrainingModule(config=config, print_banners=False).saved_tensors()
    first, second = (load_trained(tmp_path / "run" / "checkpoints" / f"step-00000{step}").tensors for step in (1, 2))
    average = load_trained(tmp_path / "run", ema=True).tensors
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.25 * start[name] + 0.25 * first[name] + 0.5 * second[name])


def test_a_run_through_the_codec_and_the_tiny_wan(settings: dict[str, Any], tmp_path: Path) -> None:
    data = {"cache": None, "window_stride": 4, "augment": {"variants": 1}}
    config = config_of(settings, {"base": {"source": "tiny", "codec": None}, "data": data, "train": {"steps": 2}})
    result = train(config, tmp_path / "run")
    assert np.isfinite(losses(result.history)).all()
    assert len(list((tmp_path / "run" / "latents").rglob("*.safetensors"))) == 1 + 1 + 1, "a shard per split and a text"
    assert len(list(keys_of(config, tmp_path / "run" / "latents", "train").all())) == 3 * 2 * 2
    assert load_trained(tmp_path / "run").manifest["base"]["id"] == "tiny"


# ── the stored loss curve ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_stored_loss_curve_is_reproduced(settings: dict[str, Any], tmp_path: Path) -> None:
    """Written by `MVWAN_WRITE_GOLDEN=1 pytest tests/test_train.py -k stored_loss_curve`, after a change that is meant to change it."""
    config = config_of(settings, EXACT, {"unfreeze_modulation_and_norms": True, "train": {"steps": 6, "save_every": 6, "rgb_weight": 0.3}})
    result = train(config, tmp_path / "run")
    held_out = [line["bands"][band]["heat_loss"] for line in result.history if line["kind"] == "held_out" for band in line["bands"]]
    curve = {"train": losses(result.history), "held_out": held_out}
    path = GOLDEN / "loss_curve.json"
    if "MVWAN_WRITE_GOLDEN" in os.environ:
        path.write_text(json.dumps(curve, indent=1) + "\n")
    stored = read_json(path)
    # float32 on another processor sums in another order; a changed formula, draw or order of windows shows in the second digit.
    assert curve["train"] == pytest.approx(stored["train"], rel=2e-4)
    assert curve["held_out"] == pytest.approx(stored["held_out"], rel=2e-4)


# ── the action head ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = {"model": {"action_head": "gripper"}}


@pytest.fixture(scope="module")
def headed(golden_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, trainer.TrainResult]:
    """A run with an action head."""
    output = tmp_path_factory.mktemp("headed") / "run"
    config = config_of(golden_run, HEAD)
    return config, output, train(config, output)


def test_an_action_head_is_in_the_losses_the_table_the_proof_and_the_checkpoint(headed: tuple[Config, Path, trainer.TrainResult]) -> None:
    _, output, result = headed
    for line in result.history:
        for losses_of in (line, *line.get("bands", {}).values()):
            video = 0.5 * losses_of["rgb_loss"] + 0.5 * losses_of["heat_loss"]
            assert losses_of["loss"] == pytest.approx(video + 0.1 * losses_of["gripper_loss"])
            assert "rotation_loss" not in losses_of
    assert result.history[0]["gripper_loss"] == pytest.approx(np.log(2)), "step 0 says that either is as likely"
    assert result.losses.keys() == {"loss", "rgb_loss", "heat_loss", "gripper_loss"}
    for groups in (read_json(output / "table.json")["groups"], read_json(output / "movement.json")["groups"]):
        assert "action_head" in [group.get("name", group.get("group")) for group in groups]
    manifest = load_trained(output).manifest
    assert (manifest["action_head"], manifest["groups"]["action_head"]["tensors"]) == ("gripper", 8)


def test_a_run_with_an_action_head_resumes_to_the_bit(headed: tuple[Config, Path, trainer.TrainResult], tmp_path: Path) -> None:
    config, whole, _ = headed
    shutil.copytree(whole, tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "step-000004")
    train(config, tmp_path / "halved", resume=True)
    assert final_digests(tmp_path / "halved") == final_digests(whole)
    with pytest.raises(MvwanError, match=r"model\.action_head: gripper in the checkpoint, none now"):
        train(config_of(config.to_dict(), {"model": {"action_head": "none"}}), tmp_path / "halved", resume=True)
    start = {"train": {"from_checkpoint": str(whole)}, "model": {"action_head": "none"}}
    with pytest.raises(MvwanError, match=r"was trained with model\.action_head gripper, here it is none"):
        train(config_of(config.to_dict(), start), tmp_path / "other")


def test_two_micro_batches_are_one_batch_of_two_for_the_action_head_too(settings: dict[str, Any], tmp_path: Path) -> None:
    quiet = {"train": {"evaluate_every": 0, "steps": 3, "max_gradient_norm": 0.0}}
    one = train(config_of(settings, EXACT, HEAD, quiet, {"train": {"batch_size": 2, "gradient_accumulation": 1}}), tmp_path / "one")
    two = train(config_of(settings, EXACT, HEAD, quiet), tmp_path / "two")
    names = ("loss", "gripper_loss", "gradient_norm")
    left, right = ([line[name] for line in run.history for name in names] for run in (one, two))
    assert left == pytest.approx(right, rel=1e-4)
    for line, other in zip(one.history, two.history, strict=True):
        assert line["gradient_norms"]["action_head"] == pytest.approx(other["gradient_norms"]["action_head"], rel=1e-4)


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_and_two_steps_are_four_to_the_bit(run: tuple[Config, Path, trainer.TrainResult], tmp_path: Path) -> None:
    config, whole, result = run
    halved = tmp_path / "halved"
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints" / "step-000004")  # as if it was killed after step 3: its last lines are there already
    lines = (halved / "metrics.jsonl").read_text().splitlines(keepends=True)
    (halved / "metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
    resumed = train(config, halved, resume=True)
    assert final_digests(halved) == final_digests(whole)
    assert read_json(resumed.checkpoint / "state.json") == read_json(result.checkpoint / "state.json")
    assert without_times(resumed.history) == without_times(result.history)
    assert without_times([json.loads(line) for line in (halved / "metrics.jsonl").read_text().splitlines()]) == without_times(
        result.history
    )


def test_resume_starts_where_nothing_is_and_may_go_further(settings: dict[str, Any], tmp_path: Path) -> None:
    quiet = {"train": {"evaluate_every": 0, "steps": 2}}
    train(config_of(settings, quiet), tmp_path / "run", resume=True)
    further = train(config_of(settings, quiet, {"train": {"steps": 3}}), tmp_path / "run", resume=True)
    assert further.step == 3
    direct = train(config_of(settings, quiet, {"train": {"steps": 3}}), tmp_path / "direct")
    assert final_digests(tmp_path / "run") == final_digests(tmp_path / "direct")
    assert losses(further.history) == losses(direct.history)
    again = train(config_of(settings, quiet, {"train": {"steps": 3}}), tmp_path / "run", resume=True)
    assert (again.step, again.losses) == (3, further.losses)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train(config_of(settings, quiet, {"train": {"steps": 3}}), tmp_path / "run", resume=True).losses == {}, "nothing is known"


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_with_a_run_is_not_trained_over(run: tuple[Config, Path, trainer.TrainResult]) -> None:
    config, output, _ = run
    before = files_of(output)
    with pytest.raises(MvwanError, match=r"holds a run at step-000004\. Use --resume"):
        train(config, output)
    assert files_of(output) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"unfreeze_modulation_and_norms": False}, "unfreeze_modulation_and_norms=true, now it is false.*--accept-trainable-change"),
        ({"model": {"fusion": "view"}}, "model.fusion"),
        ({"trainable": {"lora": {"rank": 2}}}, "trainable.lora.rank"),
        ({"data": {"window_stride": 4}}, "data.fingerprint"),
        ({"train": {"gradient_accumulation": 3}}, "windows per step: 2 in the checkpoint, 3 now"),
        ({"train": {"steps": 3}}, r"train\.steps: 4 in the checkpoint, 3 now"),
    ],
)
def test_other_settings_do_not_resume(run: tuple[Config, Path, trainer.TrainResult], change: dict[str, Any], words: str) -> None:
    config, output, _ = run
    before = files_of(output)
    with pytest.raises(MvwanError, match=words):
        train(config_of(config.to_dict(), change), output, resume=True)
    assert files_of(output) == before


# ── accumulation, workers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_5_two_micro_batches_are_one_batch_of_two(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"train": {"evaluate_every": 0, "steps": 3, "max_gradient_norm": 0.0}}
    one = train(config_of(settings, EXACT, quiet, {"train": {"batch_size": 2, "gradient_accumulation": 1}}), tmp_path / "one")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")  # accelerate would obey it in silence
    two = train(config_of(settings, EXACT, quiet), tmp_path / "two")
    assert losses(two.history) == pytest.approx(losses(one.history), rel=1e-4)
    left, right = load_trained(tmp_path / "one").tensors, load_trained(tmp_path / "two").tensors
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-4)


def test_worker_processes_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    quiet = {"train": {"evaluate_every": 0, "steps": 2}}
    here = train(config_of(settings, quiet), tmp_path / "here")
    there = train(config_of(settings, quiet, {"train": {"num_workers": 2}}), tmp_path / "there")
    assert without_times(there.history) == without_times(here.history)


# ── stops and refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def spoiled(settings: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], str]:
    """Settings with a copy of the latent cache in which one window of the first step is NaN, and the name of that window."""
    shutil.copytree(settings["data"]["cache"], tmp_path / "latents")
    values = merge(settings, {"data": {"cache": str(tmp_path / "latents")}})
    config = config_from_dict(values)
    keys = keys_of(config, tmp_path / "latents", "train")
    return values, change_entry(keys, int(global_indices(0, 0, 2, len(keys))[1]), put_nan)


def test_a_loss_that_is_not_a_number_stops_before_the_update_and_names_the_sample(settings: dict[str, Any], tmp_path: Path) -> None:
    values, name = spoiled(settings, tmp_path)
    with pytest.raises(MvwanError, match="step 1: the loss is NaN or infinite") as error:
        train(config_of(values, {"train": {"save_every": 1}}), tmp_path / "run")
    assert f"samples: {name}. " in str(error.value)
    assert list_checkpoints(tmp_path / "run") == []
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "train" not in kinds


def test_a_gradient_that_is_not_a_number_stops_too(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = trainer.gradient_norms

    def spoil_then_measure(model: torch.nn.Module, *rest: Any) -> dict[str, float]:
        next(parameter for parameter in model.parameters() if parameter.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return measure(model, *rest)

    monkeypatch.setattr(trainer, "gradient_norms", spoil_then_measure)
    with pytest.raises(MvwanError, match=r"step 1: the gradient is NaN or infinite; samples: ball/\d+@\d#0, ball/\d+@\d#0\."):
        train(config_of(settings), tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_a_group_that_stands_still_stops_the_run_before_it_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    still = {"trainable": {"groups": {"modulation_mvs": {"learning_rate": 1e-30}}}}
    with pytest.raises(MvwanError, match="the group 'modulation_mvs' trains but none of its 2 tensors moved"):
        train(config_of(settings, still), tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_training_starts_from_a_checkpoint_of_the_older_system(settings: dict[str, Any], tmp_path: Path) -> None:
    start = {"train": {"steps": 1, "from_checkpoint": str(GOLDEN / "trained_frozen.safetensors")}}
    config = config_of(settings, EXACT, start)
    result = train(config, tmp_path / "run")
    from_base = train(config_of(settings, EXACT, {"train": {"steps": 1}}), tmp_path / "base")
    assert result.history[0]["step"] == 0
    assert abs(result.history[0]["loss"] - from_base.history[0]["loss"]) > 0.01
    old = HeatmapWanTrainingModule(config=config, checkpoint=GOLDEN / "trained_frozen.safetensors", print_banners=False).saved_tensors()
    new = load_trained(tmp_path / "run").tensors
    assert max(float((new[name] - old[name]).abs().max()) for name in old) < 2e-3, "one step of the learning rate away from its start"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"unfreeze_modulation_and_norms": True, "train": {"from_checkpoint": str(GOLDEN / "trained_frozen.safetensors")}},
            "trained without the groups modulation and mvs_norms",
        ),
        ({"train": {"from_checkpoint": "no/such/run"}}, "no such file or folder"),
        ({"train": {"tracker": "swanlab"}}, r"the package swanlab is not installed\. Run `pip install swanlab`"),
        ({"data": {"root": "no/such/data"}}, "no such folder"),
        ({"model": {"views": 2}}, "model.views=2"),
        ({"model": {"action_head": "gripper_rotation"}}, "no window of the dataset says how the hand is turned"),
        ({"base": {"source": "no/such/base.safetensors"}}, "no such file"),
        ({"trainable": {"groups": {"projektor": {"mode": "full"}}}}, "Did you mean 'projector'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(MvwanError, match=words):
        train(config_of(settings, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
