"""checkpoint: what is saved comes back to the bit, damage is found and named, and each way of (not) fitting has its outcome."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvwan import checkpoint
from mvwan.checkpoint import TRAINED, latest_checkpoint, load_trained, save_checkpoint
from mvwan.compatibility import check_identity, check_resume, compatibility, load_into
from mvwan.config import BaseConfig, Config, GroupConfig, LoraConfig, TrainableConfig
from mvwan.errors import MvwanError
from mvwan.files import sha256_file
from mvwan.model.trainable import parameters_by_name
from mvwan.model.wan import base_digest
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do
GOLDEN = Path(__file__).parent / "golden"


def make_module(switch: bool = False, load: Path | None = None, groups: dict[str, GroupConfig] | None = None) -> HeatmapWanTrainingModule:
    config = Config(
        base=BaseConfig(source=str(GOLDEN / "base.safetensors"), dtype="float32"),
        trainable=TrainableConfig(lora=LoraConfig(rank=4), groups=groups or {}),
        unfreeze_modulation_and_norms=switch,
    )
    return HeatmapWanTrainingModule(config=config, checkpoint=load, print_banners=False)


def identity_of(module: HeatmapWanTrainingModule) -> dict[str, Any]:
    return {"base": base_digest(module.config.base.source), "views": 3, "fusion": "channel", "rank": 4, "alpha": 4.0}


def manifest_of(module: HeatmapWanTrainingModule) -> dict[str, Any]:
    identity = identity_of(module)
    return {
        "base": {"id": "golden", "digest": identity["base"]},
        "views": identity["views"],
        "fusion": identity["fusion"],
        "lora": {"rank": identity["rank"], "alpha": identity["alpha"]},
        "unfreeze_modulation_and_norms": module.config.unfreeze_modulation_and_norms,
        "groups": module.saved_groups(),
        "data": {"fingerprint": "d"},
        "items_per_step": 4,
        "config": module.config.to_dict(),
    }


def save(module: HeatmapWanTrainingModule, output: Path, step: int = 4, loss: float | None = None, **more: Any) -> Path:
    tensors = module.saved_tensors()
    moments = {f"exp_avg/{name}": torch.full_like(tensor, 0.5) for name, tensor in tensors.items()}
    return save_checkpoint(
        output, step, tensors, manifest_of(module) | {"held_out_loss": loss}, moments, {"updates": {"lora": step}}, **more
    )


def shake(module: HeatmapWanTrainingModule) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in parameters_by_name(module.model).items():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * (0.1 + 0.01 * (len(name) % 7))


@pytest.fixture(scope="module")
def off() -> HeatmapWanTrainingModule:
    module = make_module()
    shake(module)
    return module


@pytest.fixture(scope="module")
def on() -> HeatmapWanTrainingModule:
    module = make_module(switch=True)
    shake(module)
    return module


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ── the folder ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_saved_comes_back_to_the_bit(on: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    average = {name: tensor * 0.9 for name, tensor in on.saved_tensors().items()}
    folder = save(on, tmp_path, ema=average)
    assert folder == tmp_path / "checkpoints" / "step-000004"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000004\n"
    tensors, manifest = load_trained(tmp_path)
    assert same(tensors, on.saved_tensors())
    assert set(tensors) == set(on.table.trainable_names)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert same(load_trained(folder, ema=True).tensors, average)
    moments, state = checkpoint.read_optimizer(folder)
    assert set(moments) == {f"exp_avg/{name}" for name in tensors}
    assert state == {"step": 4, "updates": {"lora": 4}}
    for row in on.table.trainable_rows:
        entry = manifest["groups"][row.name]
        assert (entry["mode"], entry["parameters"], entry["tensors"], entry["dtype"]) == (row.mode, row.parameters, row.tensors, "float32")
    assert manifest["versions"]["torch"]

    module = make_module(switch=True, load=tmp_path)
    assert module.fit is not None
    assert module.fit.outcome == "exact"
    assert same(module.saved_tensors(), on.saved_tensors())


def test_a_checkpoint_is_readable_like_any_file_and_holds_no_pickle(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    folder = save(off, tmp_path)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ""}


def test_every_form_of_path_finds_the_newest(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    save(off, tmp_path, step=4)
    newest = save(off, tmp_path, step=12)
    for path in (tmp_path, tmp_path / "checkpoints", newest, newest / TRAINED):
        assert checkpoint.find_checkpoint(path) == newest
    assert latest_checkpoint(tmp_path) == newest
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(MvwanError, match="no such file"):
        load_trained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MvwanError, match="no complete checkpoint"):
        load_trained(tmp_path / "empty")


def test_old_checkpoints_go_when_new_ones_are_safe(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(off, tmp_path, step=step, keep_last=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000004", "step-000006"]
    save(off, tmp_path, step=6, keep_last=2)  # once more, as after a run was taken back
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000004", "step-000006"]


def test_the_best_stays_and_is_pointed_to(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    losses = {2: 0.5, 4: 0.2, 6: None, 8: 0.2, 10: 0.3}
    for step, loss in losses.items():
        save(off, tmp_path, step=step, loss=loss, keep_last=2, keep_best=True)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000004", "step-000008", "step-000010"]
    assert checkpoint.find_checkpoint(folder / "best") == folder / "step-000004"
    assert checkpoint.find_checkpoint(folder / "latest") == folder / "step-000010"
    assert load_trained(folder / "best").manifest["held_out_loss"] == 0.2

    spoiled = folder / "step-000004" / "manifest.json"
    spoiled.write_text(spoiled.read_text() + " ")  # it cannot be the best any more, and must not keep others from being saved
    save(off, tmp_path, step=12, loss=0.4, keep_last=2, keep_best=False)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000010", "step-000012"]
    assert (folder / "best").read_text() == "step-000008\n", "the best when it was chosen; it went by keep_best=False"
    with pytest.raises(MvwanError, match="step-000008: no such file or folder"):
        load_trained(folder / "best")
    (folder / "best").write_text("../../elsewhere")
    with pytest.raises(MvwanError, match="best: names no checkpoint folder"):
        load_trained(folder / "best")


def test_a_killed_save_never_shows(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    first = save(off, tmp_path, step=4)
    code = (
        "import sys, time, torch\nfrom mvwan import checkpoint\n"
        "write = checkpoint.write_tensors\n"
        "def slow(path, tensors):\n    write(path, tensors); print('half', flush=True); time.sleep(60)\n"
        "checkpoint.write_tensors = slow\n"
        "groups = {'g': {'mode': 'full', 'names': ['a']}}\n"
        "checkpoint.save_checkpoint(sys.argv[1], 8, {'a': torch.ones(3)}, {'groups': groups}, {}, {})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_checkpoint(tmp_path) == first
    save(off, tmp_path, step=8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000004", "step-000008"]


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["trained.safetensors", "manifest.json", "optimizer.safetensors", "state.json", "ema.safetensors"])
def test_one_flipped_bit_is_found(off: HeatmapWanTrainingModule, tmp_path: Path, name: str) -> None:
    folder = save(off, tmp_path, ema=off.saved_tensors())
    data = bytearray((folder / name).read_bytes())
    data[-20] ^= 1
    (folder / name).write_bytes(data)

    def load_all() -> None:
        load_trained(folder)
        load_trained(folder, ema=True)
        checkpoint.read_optimizer(folder)

    with pytest.raises(MvwanError, match=name):
        load_all()


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / TRAINED).unlink()
    save_file(tensors, folder / TRAINED)


def test_a_tensor_deleted_added_renamed_or_changed_is_named(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    folder = save(off, tmp_path)
    tensors = load_file(folder / TRAINED)
    name = "blocks.1.projector.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    for changed in (without, tensors | {f"{name}2": tensors[name].clone()}, without | {"blocks.1.projekt.weight": tensors[name]}):
        rewrite(folder, changed)
        with pytest.raises(MvwanError, match=r"blocks\.1\.proj"):
            load_trained(folder)
    rewrite(folder, tensors | {name: tensors[name].T.contiguous()})
    with pytest.raises(MvwanError, match="group projector has other bits"):
        load_trained(folder)


def test_without_its_mark_it_is_no_checkpoint(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    folder = save(off, tmp_path)
    (folder / "COMMITTED").unlink()
    with pytest.raises(MvwanError, match="never finished"):
        load_trained(folder)
    assert latest_checkpoint(tmp_path) is None


def forge(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMMITTED").write_text(sha256_file(folder / "manifest.json"))


def test_a_manifest_of_another_format_is_refused(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    folder = save(off, tmp_path)
    forge(folder, format_version=2)
    with pytest.raises(MvwanError, match="format version 2; this mvwan reads 1"):
        load_trained(folder)
    forge(folder, format_version=1, groups=[])
    with pytest.raises(MvwanError, match="no usable groups"):
        load_trained(folder)


def test_text_and_stray_tensors_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("not tensors at all")
    with pytest.raises(MvwanError, match="not a readable safetensors file"):
        load_trained(tmp_path / "notes.safetensors")
    save_file({"weights": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MvwanError, match="not a checkpoint of mvwan or of the older system"):
        load_trained(tmp_path / "other.safetensors")


def test_nan_is_not_loaded(off: HeatmapWanTrainingModule) -> None:
    tensors = dict(off.saved_tensors())
    tensors["patch_embedding.bias"] = torch.full_like(tensors["patch_embedding.bias"], float("nan"))
    module = make_module()
    before = {name: tensor.clone() for name, tensor in module.saved_tensors().items()}
    with pytest.raises(MvwanError, match=r"NaN or infinity in patch_embedding\.bias"):
        load_into(module.model, tensors, module.table, "infer", "file")
    assert same(module.saved_tensors(), before)


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


@pytest.mark.parametrize(("name", "value"), [("base", "sha256:0"), ("views", 4), ("fusion", "view"), ("rank", 8), ("alpha", 8.0)])
def test_another_identity_is_refused_with_both_values(off: HeatmapWanTrainingModule, name: str, value: Any) -> None:
    saved = manifest_of(off)
    check_identity(saved, "file", **identity_of(off))
    with pytest.raises(MvwanError) as error:
        check_identity(saved, "file", **(identity_of(off) | {name: value}))
    assert str(value) in str(error.value)
    assert str(identity_of(off)[name]) in str(error.value)


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


def test_a_save_that_fails_leaves_what_was_there(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    first = save(off, tmp_path, step=4)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    (tmp_path / "other").write_text("a file where the run's folder should be")
    with pytest.raises(MvwanError, match="cannot be written"):
        save(off, tmp_path / "other", step=8)
    assert latest_checkpoint(tmp_path) == first
