"""checkpoint_compare: damage of every kind is found, distances are what the tensors say, and a diff names what differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvwan.checkpoint import load_trained
from mvwan.checkpoint_compare import GroupDistance, diff_checkpoints, distance_table, distances, verify_checkpoint
from mvwan.checkpoint_export import export_checkpoint
from mvwan.errors import MvwanError
from mvwan.files import read_json, sha256_file, write_json
from mvwan.model.surgery import load_model
from mvwan.model.trainable import parameters_by_name
from mvwan.tensors import digest
from tests.saved import BASE, GOLDEN, save_run
from tests.stock import make_stock

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and makes file digests and commit mark true again, so that only what the change says is wrong."""
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"]}
    write_json(folder / "manifest.json", manifest)
    (folder / "COMMITTED").write_text(sha256_file(folder / "manifest.json"))


def rewrite(file: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(file) | {name.replace("__", "/"): tensor for name, tensor in changes.items()}
    file.unlink()
    save_file(tensors, file)


# ── verify ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    module = save_run(tmp_path, ema=True, unfreeze_modulation_and_norms=True)
    found, sentence = verify_checkpoint(tmp_path)
    count = len(module.saved_tensors())
    assert found == tmp_path / "checkpoints" / "step-000004"
    assert sentence == f"{4 * count} tensors in 4 files, {count} trained ones in 8 groups: all digests match, all finite"
    assert "carries no digests" in verify_checkpoint(GOLDEN / "trained_frozen.safetensors")[1]


def test_a_checkpoint_that_carries_frozen_tensors_is_whole(tmp_path: Path) -> None:
    save_run(tmp_path / "on", unfreeze_modulation_and_norms=True)
    save_run(tmp_path / "off", load=tmp_path / "on", ema=True)
    assert "all digests match" in verify_checkpoint(tmp_path / "off")[1]


@pytest.mark.parametrize("name", ["trained", "ema", "optimizer", "state", "manifest", "COMMITTED"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_flipped_bit_or_a_missing_file_is_found(name: str, gone: bool, tmp_path: Path) -> None:
    save_run(tmp_path, ema=True)
    path = next((tmp_path / "checkpoints" / "step-000004").glob(f"{name}*"))
    data = bytearray(path.read_bytes())
    path.unlink()
    if not gone:
        data[20] ^= 1
        path.write_bytes(data)
    with pytest.raises(MvwanError):
        verify_checkpoint(path.parent)


def test_what_digests_cannot_see_is_found(tmp_path: Path) -> None:
    """Files whose digests are right, and whose content is not."""
    name = "patch_embedding.bias"

    def twice(manifest: dict[str, Any]) -> None:
        manifest["groups"]["heads"]["names"].append(name)
        names = manifest["groups"]["heads"]["names"]
        manifest["groups"]["heads"]["digest"] = digest({key: tensors[key] for key in names})

    def broken_group(manifest: dict[str, Any]) -> None:
        names = manifest["groups"]["patch_embedding"]["names"]
        manifest["groups"]["patch_embedding"]["digest"] = digest({key: load_file(folder / "trained.safetensors")[key] for key in names})

    def nothing(_: dict[str, Any]) -> None: ...

    nan = torch.full((48,), float("nan"))
    cases: list[tuple[str, Callable[[Path], None], Callable[[dict[str, Any]], None], str]] = [
        ("groups", lambda _: None, twice, f"{name} is in the groups patch_embedding and heads"),
        ("nan", lambda path: rewrite(path / "trained.safetensors", **{name: nan}), broken_group, f"NaN or infinity in {name}"),
        (
            "ema",
            lambda path: rewrite(path / "ema.safetensors", other=torch.ones(2)),
            nothing,
            "ema.*not those of trained.safetensors: other",
        ),
        ("ema nan", lambda path: rewrite(path / "ema.safetensors", **{name: nan}), nothing, "ema.safetensors: NaN"),
        ("moment", lambda path: rewrite(path / "optimizer.safetensors", **{f"exp_avg__{name}": torch.ones(2)}), nothing, f"exp_avg/{name}"),
        ("state", lambda path: write_json(path / "state.json", {"step": 5}), nothing, "its step is not that of the manifest"),
    ]
    for case, damage, change, says in cases:
        save_run(tmp_path / case, ema=True)
        folder = tmp_path / case / "checkpoints" / "step-000004"
        tensors = load_trained(folder).tensors
        damage(folder)
        forge(folder, change)
        with pytest.raises(MvwanError, match=says):
            verify_checkpoint(folder)


def test_half_an_adapter_and_nan_of_an_older_file_are_found(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "trained_frozen.safetensors")
    half = "blocks.0.ffn.0.lora_B.default.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != half}, tmp_path / "half.safetensors")
    with pytest.raises(MvwanError, match="half an adapter"):
        verify_checkpoint(tmp_path / "half.safetensors")
    save_file(tensors | {"patch_embedding.bias": torch.full((48,), float("inf"))}, tmp_path / "inf.safetensors")
    with pytest.raises(MvwanError, match=r"infinity in patch_embedding\.bias"):
        verify_checkpoint(tmp_path / "inf.safetensors")


# ── against the base ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_group_that_stood_still_is_said_to(dtype: str, tmp_path: Path) -> None:
    """In bfloat16, too, where trained tensors start from the rounded base."""
    still = ("lora_mvs", "modulation", "projector", "heads", "action_head")
    sections = {"base": {"source": str(BASE), "dtype": dtype}, "model": {"action_head": "gripper"}, "unfreeze_modulation_and_norms": True}
    save_run(tmp_path, still=still, **sections)
    rows = {row.group: row for row in distances(tmp_path, BASE)}
    assert {name for name, row in rows.items() if row.moved == 0} == set(still)
    assert all(row.moved == row.tensors for name, row in rows.items() if name not in still)
    assert rows["projector"] == GroupDistance(group="projector", tensors=4, moved=0, relative_change=None, change_from_zero=0.0)
    assert rows["heads"].relative_change == 0
    assert [cell for cell in distance_table(rows.values(), "base").columns[-1].cells if cell] == ["did not move"] * len(still)


def test_distances_are_those_of_the_weights(tmp_path: Path) -> None:
    module = save_run(tmp_path, trainable={"lora": {"rank": 4, "alpha": 10.0}})
    rows = {row.group: row for row in distances(tmp_path, BASE)}
    base = {name: parameter.detach() for name, parameter in parameters_by_name(load_model(BASE, lora_rank=4)[0]).items()}
    now = {name: parameter.detach() for name, parameter in parameters_by_name(module.model).items()}
    added, start = 0.0, 0.0
    for name in now:
        if ".mvs_attn." in name and ".lora_A." in name:
            added += float((now[name.replace("lora_A", "lora_B")] @ now[name] * 2.5).double().square().sum())
            start += float(now[name.replace("lora_A.default", "base_layer")].double().square().sum())
    assert rows["lora_mvs"].relative_change == pytest.approx((added / start) ** 0.5, rel=1e-5)
    assert (rows["lora_mvs"].tensors, rows["lora_mvs"].change_from_zero) == (8, None)
    projectors = torch.cat([now[name].flatten() for name in now if ".projector." in name])
    assert rows["projector"].change_from_zero == pytest.approx(float(projectors.norm()), rel=1e-5)
    tables = [(now[name] - base[name], base[name]) for name in now if name.endswith("modulation_mvs")]
    expected = sum(float(change.square().sum()) for change, _ in tables) / sum(float(table.square().sum()) for _, table in tables)
    assert rows["modulation_mvs"].relative_change == pytest.approx(expected**0.5, rel=1e-5)


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    make_stock().save_pretrained(tmp_path / "other")
    with pytest.raises(MvwanError, match="trained with a base of digest"):
        distances(tmp_path / "run", tmp_path / "other")
    with pytest.raises(MvwanError, match=r"does not fit the base: .* does not fit \["):
        distances(GOLDEN / "trained_frozen.safetensors", "tiny")
    assert all(row.moved for row in distances(GOLDEN / "trained_unfrozen.safetensors", BASE))
    tensors, half = load_file(GOLDEN / "trained_frozen.safetensors"), "blocks.0.ffn.0.lora_B.default.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != half}, tmp_path / "half.safetensors")
    with pytest.raises(MvwanError, match=r"lora_A\.default\.weight is without its lora_B"):
        distances(tmp_path / "half.safetensors", BASE)


# ── diff ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_and_its_wan_native_export_are_the_same(tmp_path: Path) -> None:
    save_run(tmp_path / "run", unfreeze_modulation_and_norms=True)
    older = export_checkpoint(tmp_path / "run", tmp_path / "older.safetensors", "wan-native").path
    for first, second in ((tmp_path / "run", older), (older, tmp_path / "run"), (older, older)):
        found = diff_checkpoints(first, second)
        assert found.same
        assert all(row.relative_change == row.difference_norm == 0 for row in found.groups)
    assert diff_checkpoints(older, older).identity == {}
    assert set(diff_checkpoints(tmp_path / "run", older).identity) == {"base", "base digest", "views", "LoRA alpha", "step"}
    assert [row.group for row in diff_checkpoints(older, older).groups] == [
        row.group for row in diff_checkpoints(tmp_path / "run", older).groups
    ]


def test_what_differs_is_named_by_group(tmp_path: Path) -> None:
    on = save_run(tmp_path / "on", unfreeze_modulation_and_norms=True, step=6)
    off = save_run(tmp_path / "off", still=("projector", "heads"))
    found = diff_checkpoints(tmp_path / "off", tmp_path / "on")
    assert found.identity == {"switch": (False, True), "step": (4, 6)}
    rows = {row.group: row for row in found.groups}
    assert not found.same
    assert (rows["modulation"].shared, len(rows["modulation"].only_b), rows["modulation"].only_a) == (0, 2, ())
    assert (rows["projector"].relative_change, rows["projector"].changed) == (None, 4)
    before, after = (parameters_by_name(module.model) for module in (off, on))
    heads = [name for name in before if name.startswith("head_")]
    change, norm = (
        torch.cat([part(name).detach().flatten() for name in heads]).norm()
        for part in (lambda name: after[name] - before[name], lambda name: before[name])
    )
    assert rows["heads"].relative_change == pytest.approx(float(change / norm), rel=1e-5)
    assert rows["heads"].difference_norm == pytest.approx(float(change), rel=1e-5)
    assert json.loads(json.dumps(found.to_json()))["identity"]["step"] == {"a": 4, "b": 6}


def test_one_bit_another_shape_and_one_tensor_less_are_differences(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "trained_frozen.safetensors")
    bias = tensors["patch_embedding.bias"].clone()
    bias.view(torch.int32)[0] ^= 1
    changed = tensors | {"patch_embedding.bias": bias, "blocks.0.projector.bias": torch.ones(47)}
    del changed["head_rgb.modulation"]
    save_file(changed, tmp_path / "changed.safetensors")
    rows = {row.group: row for row in diff_checkpoints(GOLDEN / "trained_frozen.safetensors", tmp_path / "changed.safetensors").groups}
    assert {name: row.changed for name, row in rows.items() if row.changed} == {"patch_embedding": 1, "projector": 1}
    assert rows["projector"].reshaped == ("blocks.0.projector.bias",)
    assert rows["heads"].only_a == ("head_rgb.scale_shift_table",)
    assert rows["patch_embedding"].difference_norm > 0
