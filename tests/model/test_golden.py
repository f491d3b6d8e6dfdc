"""Tensors of a published implementation of this model are reproduced, and older files load by path alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mvwan
from mvwan.errors import MvwanError
from mvwan.model.native_names import is_native, to_native, to_ours
from mvwan.model.wan import describe

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}


def run(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    io = load_file(GOLDEN / "io.safetensors")
    with torch.no_grad():
        return model(io["latents"][None].to(dtype), io["timestep"].to(dtype), io["context"].to(dtype))[0]


def expected(name: str) -> torch.Tensor:
    return load_file(GOLDEN / "io.safetensors")[f"output_{name}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["untrained", "frozen", "unfrozen"])
def test_golden_outputs(name: str, dtype: torch.dtype) -> None:
    checkpoint = None if name == "untrained" else GOLDEN / f"trained_{name}.safetensors"
    model, _ = mvwan.load_model(GOLDEN / "base.safetensors", checkpoint, unfreeze_modulation_and_norms=name == "unfrozen")
    output = run(model.to(dtype), dtype)
    assert (output - expected(name)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("trained", "switch", "outcome"),
    [("frozen", False, "exact"), ("frozen", True, "older"), ("unfrozen", True, "exact"), ("unfrozen", False, "newer")],
)
def test_every_combination_of_trained_and_requested_switch_gives_the_trained_output(trained: str, switch: bool, outcome: str) -> None:
    model, report = mvwan.load_model(
        GOLDEN / "base.safetensors", GOLDEN / f"trained_{trained}.safetensors", unfreeze_modulation_and_norms=switch
    )
    assert report.fit.outcome == outcome
    assert (run(model) - expected(trained)).abs().max() < TOLERANCE[torch.float32]
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("scale_shift_table" in name and name.startswith("blocks.") for name in trains) is switch


def test_going_on_training_an_off_checkpoint_with_the_switch_on_is_refused() -> None:
    with pytest.raises(MvwanError, match=r"modulation and mvs_norms.*inconsistent"):
        mvwan.load_model(
            GOLDEN / "base.safetensors",
            GOLDEN / "trained_frozen.safetensors",
            unfreeze_modulation_and_norms=True,
            purpose="train",
        )


def test_the_rank_of_an_older_file_is_read_from_its_shapes_and_alpha_can_be_given() -> None:
    model, report = mvwan.load_model(GOLDEN / "base.safetensors", GOLDEN / "trained_frozen.safetensors")
    assert report.manifest["lora"]["rank"] == 4
    scaled, _ = mvwan.load_model(GOLDEN / "base.safetensors", GOLDEN / "trained_frozen.safetensors", lora_alpha=8)
    assert model.blocks[0].attn1.to_q.scaling["default"] == 1.0
    assert scaled.blocks[0].attn1.to_q.scaling["default"] == 2.0


def test_names_without_default_and_with_a_prefix_load_the_same(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "trained_unfrozen.safetensors")
    renamed = {f"pipe.dit.{name.replace('.default', '')}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "epoch-9.safetensors")
    model, _ = mvwan.load_model(GOLDEN / "base.safetensors", tmp_path / "epoch-9.safetensors")
    assert (run(model) - expected("unfrozen")).abs().max() < TOLERANCE[torch.float32]


def test_the_oldest_files_bring_trained_view_attention_weights(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "trained_frozen.safetensors")
    base = load_file(GOLDEN / "base.safetensors")
    for leaf in "qkvo":
        for part in ("weight", "bias"):
            original = base[f"blocks.0.self_attn.{leaf}.{part}"]
            tensors[f"blocks.0.mvs_attn.{leaf}.base_layer.{part}"] = original + 0.5
    save_file(tensors, tmp_path / "step-100.safetensors")
    model, report = mvwan.load_model(GOLDEN / "base.safetensors", tmp_path / "step-100.safetensors")
    assert report.fit.outcome == "newer"
    loaded = model.blocks[0].mvs_attn.to_q.base_layer.weight
    assert torch.equal(loaded, base["blocks.0.self_attn.q.weight"] + 0.5)
    assert not loaded.requires_grad
    assert (run(model) - expected("frozen")).abs().max() > 1e-3


def test_trained_modulation_is_never_dropped(tmp_path: Path) -> None:
    """The older loader kept keys by substring, dropped `blocks.N.modulation` and printed a perfect match."""
    tensors = load_file(GOLDEN / "trained_unfrozen.safetensors")
    for switch in (False, True):
        model, _ = mvwan.load_model(
            GOLDEN / "base.safetensors", GOLDEN / "trained_unfrozen.safetensors", unfreeze_modulation_and_norms=switch
        )
        for block in (0, 1):
            assert torch.equal(model.blocks[block].scale_shift_table.data, tensors[f"blocks.{block}.modulation"])
            assert torch.equal(model.blocks[block].mvs_attn.norm_q.weight.data, tensors[f"blocks.{block}.mvs_attn.norm_q.weight"])


@pytest.mark.parametrize("file", ["base", "trained_frozen", "trained_unfrozen"])
def test_native_names_round_trip(file: str) -> None:
    names = load_file(GOLDEN / f"{file}.safetensors")
    ours = to_ours(names)
    assert is_native(names)
    assert not is_native(ours.values())
    assert to_native(ours.values()) == {our: name for name, our in ours.items()}


def test_an_unknown_name_is_listed_and_a_double_is_refused() -> None:
    with pytest.raises(MvwanError, match=r"blocks\.0\.self_attn\.x\.weight"):
        to_ours(["blocks.0.self_attn.x.weight", "blocks.0.modulation"])
    with pytest.raises(MvwanError, match="both mean"):
        to_ours(["blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_A.default.weight"])


def test_a_native_base_in_shards_with_an_index_and_a_config_beside(tmp_path: Path) -> None:
    import json

    from safetensors import safe_open

    tensors = load_file(GOLDEN / "base.safetensors")
    with safe_open(GOLDEN / "base.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    names = sorted(tensors)
    half = {name: "a-00001-of-00002.safetensors" if index < 20 else "a-00002-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(half.values()):
        save_file({name: tensors[name] for name in names if half[name] == shard}, tmp_path / shard)
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": half}))
    # The release's own config: no text width, a class name of its own.
    del config["text_dim"], config["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "ti2v", **config}))
    assert describe(tmp_path).kind == "native"
    model, _ = mvwan.load_model(tmp_path, GOLDEN / "trained_frozen.safetensors")
    assert (run(model) - expected("frozen")).abs().max() < TOLERANCE[torch.float32]
    (tmp_path / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(MvwanError, match=r"a-00002-of-00002\.safetensors missing"):
        describe(tmp_path)


def test_bases_that_are_none_say_so(tmp_path: Path) -> None:
    with pytest.raises(MvwanError, match="Did you mean 'tiny'"):
        describe("./tinny")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(MvwanError, match="not a readable safetensors file"):
        describe(tmp_path / "text.safetensors")
    with pytest.raises(MvwanError, match=r"neither transformer/config\.json nor config\.json"):
        describe(tmp_path)
    tensors = load_file(GOLDEN / "base.safetensors")
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"][:90].contiguous()
    from safetensors import safe_open

    with safe_open(GOLDEN / "base.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "wrong.safetensors", metadata=metadata)
    with pytest.raises(MvwanError, match=r"blocks\.0\.ffn\.net\.0\.proj\.weight is \[90, 48\], needs \[96, 48\]"):
        mvwan.load_model(tmp_path / "wrong.safetensors")
