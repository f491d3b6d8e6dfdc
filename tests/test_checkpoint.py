"""checkpoint: what is saved comes back to the bit, and damage is found and named."""

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
from mvwan.checkpoint import TRAINED, latest_checkpoint, load_trained
from mvwan.errors import MvwanError
from mvwan.files import sha256_file
from mvwan.model.surgery import load_as_trained
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import make_module, same, save, save_run

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do


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


@pytest.mark.parametrize("head", ["gripper", "gripper_rotation"])
def test_an_action_head_is_saved_under_its_group_and_comes_back(head: str, tmp_path: Path) -> None:
    module = save_run(tmp_path, ema=True, model={"action_head": head})
    tensors, manifest = load_trained(tmp_path)
    assert manifest["action_head"] == head
    names = manifest["groups"]["action_head"]["names"]
    assert manifest["groups"]["action_head"]["mode"] == "full"
    assert len(names) == 8 and all(name.startswith("head_action.") for name in names)
    assert tensors["head_action.proj_out.weight"].any(), "the comparison would hold without moved values"
    again = HeatmapWanTrainingModule(config=module.config, checkpoint=tmp_path, print_banners=False)
    assert again.fit is not None and again.fit.outcome == "exact"
    assert same(again.saved_tensors(), module.saved_tensors())
    model, config = load_as_trained(checkpoint.find_checkpoint(tmp_path))
    assert config.model.action_head == head
    assert same({name: dict(model.named_parameters())[name] for name in names}, {name: tensors[name] for name in names})


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


def test_a_folder_named_as_the_checkpoint_that_ships_is_not_passed_over(
    off: HeatmapWanTrainingModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find_checkpoint("tiny-tracking").is_absolute()
    own = save(off, tmp_path / "tiny-tracking", step=2)
    with pytest.raises(MvwanError, match=f"there is a {tmp_path / 'tiny-tracking'}, and one that ships"):
        checkpoint.find_checkpoint("tiny-tracking")
    assert checkpoint.find_checkpoint(tmp_path / "tiny-tracking") == own


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
    assert checkpoint.find_checkpoint(folder / "best") == folder / "step-000010", "the best of those that are left"
    save(off, tmp_path, step=14, keep_last=1, keep_best=False)
    assert not (folder / "best").exists(), "no loss was measured of what is left"
    (folder / "best").write_text("../../elsewhere")
    with pytest.raises(MvwanError, match="best: names no checkpoint folder"):
        load_trained(folder / "best")


def test_the_best_is_one_of_those_measured_on_the_windows_of_the_last(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    for step, (loss, windows) in {2: (0.1, 16), 4: (0.5, 64), 6: (0.4, 64), 8: (0.4, 64)}.items():
        save(off, tmp_path, step=step, loss=loss, windows=windows)
        best = checkpoint.find_checkpoint(tmp_path / "checkpoints" / "best").name
        assert best == {2: "step-000002", 4: "step-000004", 6: "step-000006", 8: "step-000006"}[step]


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
    for head in ("hand", ["gripper"], None):
        forge(folder, format_version=1, action_head=head)
        with pytest.raises(MvwanError, match="no usable action_head"):
            load_trained(folder)
    for spoiled in ({"view_names": ["left", 2]}, {"view_names": "left"}, {"fps": 0}, {"fps": "10"}):
        forge(folder, action_head="none", **({"view_names": [], "fps": 5} | spoiled))
        with pytest.raises(MvwanError, match=f"no usable {next(iter(spoiled))}"):
            load_trained(folder)
    forge(folder, format_version=1, view_names=[], fps=5, groups=[])
    with pytest.raises(MvwanError, match="no usable groups"):
        load_trained(folder)


def test_text_and_stray_tensors_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("not tensors at all")
    with pytest.raises(MvwanError, match="not a readable safetensors file"):
        load_trained(tmp_path / "notes.safetensors")
    save_file({"weights": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MvwanError, match="not a checkpoint of mvwan or of the older system"):
        load_trained(tmp_path / "other.safetensors")


def test_a_save_that_fails_leaves_what_was_there(off: HeatmapWanTrainingModule, tmp_path: Path) -> None:
    first = save(off, tmp_path, step=4)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    (tmp_path / "other").write_text("a file where the run's folder should be")
    with pytest.raises(MvwanError, match="cannot be written"):
        save(off, tmp_path / "other", step=8)
    assert latest_checkpoint(tmp_path) == first
