"""compatibility: each way of (not) fitting a model, and of (not) being the same run, has its outcome."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvwan.checkpoint import load_trained
from mvwan.checkpoint_export import export_checkpoint
from mvwan.compatibility import check_identity, check_resume, compatibility, load_into
from mvwan.config import BaseConfig, Config, LoraConfig, TrainableConfig, config_from_dict
from mvwan.errors import MvwanError
from mvwan.model.trainable import parameters_by_name
from mvwan.model.wan import base_digest
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import BASE, GOLDEN, make_module, manifest_of, same, save

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do


IDENTITY = {"base": base_digest(BASE), "views": 3, "fusion": "channel", "action_head": "none", "rank": 4, "alpha": 4.0}


# ── rules of compatibility ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("older_system", [True, False])
@pytest.mark.parametrize(("trained", "wanted", "outcome"), [(0, 0, "exact"), (0, 1, "older"), (1, 0, "newer"), (1, 1, "exact")])
def test_the_four_combinations_of_the_switch(
    off: HeatmapWanTrainingModule, on: HeatmapWanTrainingModule, tmp_path: Path, trained: int, wanted: int, outcome: str, older_system: bool
) -> None:
    if older_system:
        path = GOLDEN / ("trained_unfrozen.safetensors" if trained else "trained_frozen.safetensors")
    else:
        path = save(on if trained else off, tmp_path)
    tensors, manifest = load_trained(path)
    assert manifest["unfreeze_modulation_and_norms"] == bool(trained)
    module = make_module(switch=bool(wanted))
    base = {name: parameter.detach().clone() for name, parameter in parameters_by_name(module.model).items()}
    fit = load_into(module.model, tensors, module.table, "infer", path)
    assert fit.outcome == outcome
    now = parameters_by_name(module.model)
    assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items()), "a value of the checkpoint was dropped"
    assert all(torch.equal(now[name], base[name]) for name in base if name not in tensors)
    switch_names = {name for group in ("modulation", "mvs_norms") for name in module.table.row(group).names}  # type: ignore[union-attr]
    assert (outcome == "newer") == (switch_names <= tensors.keys() and not now[min(switch_names)].requires_grad)
    if outcome in ("older", "newer"):
        assert len(fit.describe()) == 2
        assert "modulation: 2 tensors" in fit.describe()[0]


def test_going_on_with_the_switch_on_is_refused_with_the_reason(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    path = save(off, tmp_path)
    with pytest.raises(MvwanError, match="without the groups modulation and mvs_norms") as refusal:
        make_module(switch=True, load=path)
    assert "unfreeze_modulation_and_norms off" in str(refusal.value)
    with pytest.raises(MvwanError, match="without the groups modulation and mvs_norms"):
        make_module(switch=True, load=GOLDEN / "trained_frozen.safetensors")


def test_values_that_stay_frozen_are_saved_again(on: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    module = make_module(switch=False, load=save(on, tmp_path / "first"))
    again = save(module, tmp_path / "second")
    tensors, manifest = load_trained(again)
    assert same(tensors, on.saved_tensors())
    assert manifest["groups"]["modulation"]["mode"] == "frozen"
    third = make_module(switch=False, load=again)
    assert same(third.saved_tensors(), on.saved_tensors())


def test_frozen_values_are_not_rounded_to_the_base_s_dtype(on: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    config = Config(
        base=BaseConfig(source=str(GOLDEN / "base.safetensors"), dtype="bfloat16"), trainable=TrainableConfig(lora=LoraConfig(rank=4))
    )
    module = HeatmapWanTrainingModule(config=config, checkpoint=save(on, tmp_path), print_banners=False)
    assert same(module.saved_tensors(), on.saved_tensors())


def test_every_single_change_of_a_checkpoint_is_a_conflict_that_names_it(off: HeatmapWanTrainingModule) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in off.saved_tensors().items()}
    for name, shape in shapes.items():
        without = {key: value for key, value in shapes.items() if key != name}
        changes = [without, without | {f"{name}s": shape}, shapes | {name: (*shape, 2)}]
        if len(shape) == 2 and shape[0] != shape[1]:
            changes.append(shapes | {name: shape[::-1]})
        for changed in changes:
            fit = compatibility(changed, off.model, off.table)
            assert fit.outcome == "conflict"
            for purpose in ("infer", "train"):
                with pytest.raises(MvwanError) as error:
                    fit.require(purpose, "file")
                assert name in str(error.value)


def test_part_of_a_switch_group_is_not_an_older_checkpoint(on: HeatmapWanTrainingModule) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in on.saved_tensors().items()}
    norms = [name for name in shapes if ".norm_q." in name or ".norm_k." in name]
    assert compatibility({name: shapes[name] for name in shapes if name not in norms}, on.model, on.table).outcome == "older"
    fit = compatibility({name: shapes[name] for name in shapes if name != norms[0]}, on.model, on.table)
    assert fit.outcome == "conflict"
    with pytest.raises(MvwanError, match=f"missing of the group mvs_norms: {norms[0]}"):
        fit.require("infer", "file")


def test_missing_tensors_are_listed_by_group_and_block(off: HeatmapWanTrainingModule) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in off.saved_tensors().items()}
    for name in ("blocks.0.projector.weight", "blocks.1.projector.weight", "blocks.1.modulation_mvs", "patch_embedding.bias"):
        del shapes[name]
    with pytest.raises(MvwanError) as error:
        compatibility(shapes, off.model, off.table).require("infer", "file")
    assert "missing of the group projector: blocks.{0-1}.projector.weight; " in str(error.value)
    assert "missing of the group modulation_mvs: blocks.1.modulation_mvs" in str(error.value)
    assert "missing of the group patch_embedding: patch_embedding.bias" in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest(off: HeatmapWanTrainingModule) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in off.saved_tensors().items()}
    shapes["blocks.0.projectr.weight"] = shapes["blocks.0.projector.weight"]
    with pytest.raises(MvwanError, match=r"blocks\.0\.projectr\.weight \(nearest is blocks\.0\.projector\.weight\)"):
        compatibility(shapes, off.model, off.table).require("infer", "file")


def test_fully_trained_attention_of_the_oldest_files_is_taken_over(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "trained_frozen.safetensors")
    name = "blocks.0.mvs_attn.q.base_layer.weight"
    tensors[name] = torch.full((48, 48), 0.125)
    save_file(tensors, tmp_path / "oldest.safetensors")
    module = make_module(load=tmp_path / "oldest.safetensors")
    assert module.fit is not None
    assert module.fit.outcome == "newer"
    weight = parameters_by_name(module.model)["blocks.0.mvs_attn.to_q.base_layer.weight"]
    assert bool((weight == 0.125).all())
    assert not weight.requires_grad


# ── the same run? ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value"), [("base", "sha256:0"), ("views", 4), ("fusion", "view"), ("action_head", "gripper"), ("rank", 8), ("alpha", 8.0)]
)
def test_another_identity_is_refused_with_both_values(off: HeatmapWanTrainingModule, name: str, value: Any) -> None:
    saved = manifest_of(off)
    check_identity(saved, "file", **IDENTITY)
    with pytest.raises(MvwanError) as error:
        check_identity(saved, "file", **(IDENTITY | {name: value}))
    assert str(value) in str(error.value)
    assert str(IDENTITY[name]) in str(error.value)


def changed_config(config: dict[str, Any], section: str, name: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    (copy[section] if section else copy)[name] = value
    return copy


@pytest.mark.parametrize(
    ("section", "name", "value", "allowed"),
    [
        ("train", "steps", 2000, True),
        ("train", "save_every", 7, True),
        ("data", "root", "moved", True),
        ("train", "learning_rate", 0.5, False),
        ("model", "views", 4, False),
        ("model", "fusion", "view", False),
        ("model", "action_head", "gripper", False),
        ("train", "action_weight", 0.5, False),
        ("", "seed", 1, False),
        ("flow", "shift", 3.0, False),
    ],
)
def test_the_resume_guard_names_each_change(off: HeatmapWanTrainingModule, section: str, name: str, value: Any, allowed: bool) -> None:
    saved = manifest_of(off) | {"step": 4}
    now = manifest_of(off) | {"config": changed_config(saved["config"], section, name, value)}
    check_resume(saved, saved, "run")
    if allowed:
        check_resume(saved, now, "run")
        return
    before = (saved["config"][section] if section else saved["config"])[name]
    with pytest.raises(MvwanError, match=rf"{name}: {before} in the checkpoint, {value} now"):
        check_resume(saved, now, "run")


def test_the_resume_guard_looks_at_base_data_step_and_windows_per_step(off: HeatmapWanTrainingModule) -> None:
    saved = manifest_of(off) | {"step": 4}
    for change, words in (
        ({"base": {"digest": "sha256:0"}}, "base.digest"),
        ({"data": {"fingerprint": "e"}}, "data.fingerprint: d in the checkpoint, e now"),
        ({"items_per_step": 8}, "windows per step: 4 in the checkpoint, 8 now"),
        ({"config": changed_config(saved["config"], "train", "steps", 3)}, r"train\.steps=3 ends before"),
    ):
        with pytest.raises(MvwanError, match=words):
            check_resume(saved, saved | change, "run")


def test_the_resume_guard_sees_what_is_new(off: HeatmapWanTrainingModule) -> None:
    saved = manifest_of(off) | {"step": 4, "codec": "a"}
    groups = changed_config(saved["config"], "trainable", "groups", {"projector": {"learning_rate": 0.05}})
    with pytest.raises(MvwanError, match=r"trainable\.groups\.projector\.learning_rate: absent in the checkpoint, 0\.05 now"):
        check_resume(saved, saved | {"config": groups}, "run")
    with pytest.raises(MvwanError, match="digest of VAE and text encoder: a in the checkpoint, b now"):
        check_resume(saved, saved | {"codec": "b"}, "run")
    older = json.loads(json.dumps(saved))
    del older["config"]["train"]["heat_reader_weight"], older["codec"]  # from before there were any
    check_resume(older, saved, "run")
    with pytest.raises(MvwanError, match=r"train\.heat_reader_weight: 0\.0 in the checkpoint, 100 now"):
        check_resume(older, saved | {"config": changed_config(saved["config"], "train", "heat_reader_weight", 100)}, "run")


def test_a_cosine_schedule_ends_where_it_was_to_end(off: HeatmapWanTrainingModule) -> None:
    saved = manifest_of(off) | {"step": 4}
    saved["config"] = changed_config(saved["config"], "train", "schedule", "cosine")
    with pytest.raises(MvwanError, match=r"train\.steps: 1000 in the checkpoint, 2000 now"):
        check_resume(saved, saved | {"config": changed_config(saved["config"], "train", "steps", 2000)}, "run")


def test_the_switch_changes_only_by_name(off: HeatmapWanTrainingModule) -> None:
    saved = manifest_of(off) | {"step": 4}
    now = saved | {"config": changed_config(saved["config"], "", "unfreeze_modulation_and_norms", True)}
    with pytest.raises(MvwanError, match=r"unfreeze_modulation_and_norms=false, now it is true.*--accept-trainable-change"):
        check_resume(saved, now, "run")
    check_resume(saved, now, "run", accept_trainable_change=True)
    now["config"] = changed_config(now["config"], "", "seed", 5)
    with pytest.raises(MvwanError, match="seed: 0 in the checkpoint, 5 now"):
        check_resume(saved, now, "run", accept_trainable_change=True)


def test_nan_is_not_loaded(off: HeatmapWanTrainingModule) -> None:
    tensors = dict(off.saved_tensors())
    tensors["patch_embedding.bias"] = torch.full_like(tensors["patch_embedding.bias"], float("nan"))
    module = make_module()
    before = {name: tensor.clone() for name, tensor in module.saved_tensors().items()}
    with pytest.raises(MvwanError, match=r"NaN or infinity in patch_embedding\.bias"):
        load_into(module.model, tensors, module.table, "infer", "file")
    assert same(module.saved_tensors(), before)


# ── the action head ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_head(head: str, load: Path | None = None) -> HeatmapWanTrainingModule:
    config = config_from_dict(
        {"base": {"source": str(BASE), "dtype": "float32"}, "trainable": {"lora": {"rank": 4}}, "model": {"action_head": head}}
    )
    return HeatmapWanTrainingModule(config=config, checkpoint=load, print_banners=False)


@pytest.mark.parametrize(("trained", "wanted"), [("none", "gripper"), ("gripper", "none"), ("gripper", "gripper_rotation")])
def test_another_action_head_is_refused_whatever_wrote_the_checkpoint(tmp_path: Path, trained: str, wanted: str) -> None:
    path = save(with_head(trained), tmp_path / "run")
    native = export_checkpoint(path, tmp_path / "native.safetensors", "wan-native").path
    for file in (path, native):
        with pytest.raises(MvwanError, match=rf"was trained with model\.action_head {trained}, here it is {wanted}\. Set it back"):
            with_head(wanted, load=file)
        assert with_head(trained, load=file).fit.outcome == "exact"  # type: ignore[union-attr]


def test_a_manifest_from_before_there_was_an_action_head_has_none(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    before = manifest_of(off)
    del before["action_head"], before["config"]["model"]["action_head"], before["config"]["train"]["action_weight"]
    check_identity(before, "file", action_head="none")
    check_resume(before | {"step": 4}, manifest_of(off), "run")
    with pytest.raises(MvwanError, match=r"model\.action_head none, here it is gripper"):
        check_identity(before, "file", action_head="gripper")


def test_tensors_of_a_head_are_never_dropped_or_invented(off: HeatmapWanTrainingModule) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in with_head("gripper").saved_tensors().items()}
    with pytest.raises(MvwanError, match=r"unknown: head_action\..* and \d more"):
        compatibility(shapes, off.model, off.table).require("infer", "file")
    module = with_head("gripper")
    without = {name: shape for name, shape in shapes.items() if not name.startswith("head_action.")}
    for purpose in ("infer", "train", "train changed"):
        with pytest.raises(MvwanError, match=r"missing of the group action_head: head_action\.scale_shift_table"):
            compatibility(without, module.model, module.table).require(purpose, "file")  # type: ignore[arg-type]
