"""Surgery's report, storage, and the loader's own rules."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mvwan
from mvwan.config import GroupConfig
from mvwan.errors import MvwanError
from mvwan.model.surgery import adapt, share_copies
from mvwan.model.trainable import merge_adapters, parameters_by_name
from mvwan.model.wan import load_transformer
from mvwan.optimizer import MovingAverage
from tests.saved import make_module, save, shake

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("head", ["none", "gripper_rotation"])
@pytest.mark.parametrize(("fusion", "widened"), [("channel", ["patch_embedding.weight"]), ("view", [])])
def test_the_report_accounts_for_every_tensor_once(fusion: str, widened: list[str], head: str) -> None:
    stock = load_transformer(GOLDEN / "base.safetensors")
    stock_names = set(dict(stock.named_parameters()))
    model, report = adapt(stock, fusion=fusion, action_head=head)  # type: ignore[arg-type]
    names = set(dict(model.named_parameters()))
    assert {*report.kept, *report.widened, *report.added} == names
    assert len(report.kept) + len(report.widened) + len(report.added) == len(names)
    assert list(report.widened) == widened
    assert stock_names - names == {"proj_out.weight", "proj_out.bias", "scale_shift_table"}, "only the head moves"
    assert report.adapted_parameters == sum(parameter.numel() for parameter in model.parameters())
    for text in ("left alone", "copy of self-attention", "zero"):
        assert text in report.render()
    assert ("2 tensors (drawn from the seed)" in report.render()) == (head != "none")


def test_new_tensors_have_the_published_initial_values_and_storage_of_their_own() -> None:
    stock = load_transformer(GOLDEN / "base.safetensors")
    before = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    model, _ = adapt(stock)
    block = model.blocks[1]
    assert torch.equal(block.modulation_mvs, before["blocks.1.scale_shift_table"][:, :3])
    assert torch.equal(block.mvs_attn.to_out[0].weight, before["blocks.1.attn1.to_out.0.weight"])
    assert not block.projector.weight.any() and not block.projector.bias.any()
    assert torch.equal(model.patch_embedding.weight[:, :48], before["patch_embedding.weight"])
    assert not model.patch_embedding.weight[:, 48:].any()
    assert torch.equal(model.head_heatmap.proj_out.weight, before["proj_out.weight"])
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(places)) == len(places), "no two parameters share storage"


def test_the_base_file_is_left_as_it_was() -> None:
    before = (GOLDEN / "base.safetensors").read_bytes()
    model, _ = mvwan.load_model(GOLDEN / "base.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (GOLDEN / "base.safetensors").read_bytes() == before


def test_dtype_is_for_frozen_products_and_trained_tensors_stay_float32() -> None:
    model, report = mvwan.load_model(GOLDEN / "base.safetensors", dtype=torch.bfloat16, unfreeze_modulation_and_norms=True)
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in report.table.trainable_names} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    io = load_file(GOLDEN / "io.safetensors")
    with torch.no_grad():  # no autocast by the caller: the model brings its own
        output = model(io["latents"][None], io["timestep"], io["context"])[0]
    assert output.dtype == torch.float32
    assert (output - io["output_untrained"]).abs().max() < 0.06


def test_new_adapters_are_a_function_of_the_seed() -> None:
    def adapter(seed: int) -> torch.Tensor:
        model, _ = mvwan.load_model(GOLDEN / "base.safetensors", seed=seed)
        return model.blocks[0].attn1.to_q.lora_A["default"].weight

    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"


def test_an_action_head_is_a_function_of_the_seed_and_leaves_every_other_tensor_as_it_is() -> None:
    def tensors(seed: int, head: str) -> dict[str, torch.Tensor]:
        model, _ = mvwan.load_model(GOLDEN / "base.safetensors", seed=seed, action_head=head)  # type: ignore[arg-type]
        return dict(model.named_parameters())

    state = torch.random.get_rng_state()
    plain, first, again, other = tensors(1, "none"), tensors(1, "gripper"), tensors(1, "gripper"), tensors(2, "gripper")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], plain[name]) for name in plain)
    own = first.keys() - plain.keys()
    assert len(own) == 8 and all(name.startswith("head_action.") for name in own)
    assert all(torch.equal(first[name], again[name]) for name in own)
    assert not torch.equal(first["head_action.proj_in.weight"], other["head_action.proj_in.weight"])
    assert not first["head_action.proj_out.weight"].any()


def test_a_checkpoint_of_another_shape_or_rank_names_both() -> None:
    with pytest.raises(MvwanError, match=r"rank 4, here it is 8"):
        mvwan.load_model(GOLDEN / "base.safetensors", GOLDEN / "trained_frozen.safetensors", lora_rank=8)
    with pytest.raises(MvwanError, match="fusion channel, here it is view"):
        mvwan.load_model(GOLDEN / "base.safetensors", GOLDEN / "trained_frozen.safetensors", fusion="view")
    with pytest.raises(MvwanError, match="does not fit this model"):
        mvwan.load_model("tiny", GOLDEN / "trained_frozen.safetensors")


def test_the_5b_is_built_on_the_meta_device_without_weights() -> None:
    table = mvwan.trainable_table(base="wan2.2-ti2v-5b", unfreeze_modulation_and_norms=True)
    assert table.trainable_parameters == 390_798_720
    assert 6.515e9 < table.total_parameters < 6.525e9
    model, _ = mvwan.load_model("wan2.2-ti2v-5b", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def shared_places(model: torch.nn.Module) -> set[str]:
    """Names of the parameters of view attention that have the storage of self-attention's."""
    parameters = parameters_by_name(model)
    places = {parameter.data_ptr() for name, parameter in parameters.items() if ".attn1." in name}
    return {name for name, parameter in parameters.items() if ".mvs_attn." in name and parameter.data_ptr() in places}


def test_frozen_copies_share_storage_and_nothing_else_of_the_model_changes() -> None:
    module = make_module()
    shake(module)
    before = {name: parameter.clone() for name, parameter in parameters_by_name(module.model).items()}
    frozen = {name for name in module.table.frozen_names if ".mvs_attn." in name}
    saved = share_copies(module.model)
    after = parameters_by_name(module.model)
    assert shared_places(module.model) == frozen
    assert saved == sum(after[name].nbytes for name in frozen) > 0
    assert list(after) == list(before), "counted as before"
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert share_copies(module.model) == 0
    torch.nn.Module.double(module.model)
    assert not shared_places(module.model), "what casts or moves a model gives each its own"


@pytest.mark.parametrize("trained", ["attn1", "mvs_attn"])
def test_what_trains_keeps_its_own_storage(trained: str) -> None:
    module = make_module(groups={"mine": GroupConfig(pattern=rf"blocks\.0\.{trained}\..+", mode="full")})
    share_copies(module.model)
    shared = shared_places(module.model)
    assert shared
    assert all(name.startswith("blocks.1.") for name in shared)


def test_copies_that_differ_are_left_alone() -> None:
    module = make_module()
    parameters = parameters_by_name(module.model)
    parameters["blocks.1.mvs_attn.to_q.base_layer.bias"].data[3] += 1
    share_copies(module.model)
    assert "blocks.1.mvs_attn.to_q.base_layer.bias" not in shared_places(module.model)
    assert "blocks.1.mvs_attn.to_k.base_layer.bias" in shared_places(module.model)


def test_merging_an_adapter_into_a_shared_weight_leaves_the_other_one_alone() -> None:
    apart, shared = make_module(), make_module()
    for module in (apart, shared):
        shake(module)
    share_copies(shared.model)
    for module in (apart, shared):
        merge_adapters(module.model, torch.float32)
    expected = parameters_by_name(apart.model)
    for name, parameter in parameters_by_name(shared.model).items():
        assert torch.equal(parameter, expected[name]), name


def test_a_checkpoint_and_its_moving_average_are_the_same_with_shared_copies(tmp_path: Path) -> None:
    module = make_module()
    shake(module)
    before = {name: tensor.clone() for name, tensor in module.saved_tensors().items()}
    share_copies(module.model)
    average = MovingAverage(module, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.saved_tensors().items())
    shake(module)
    average.update()
    again = make_module(load=save(module, tmp_path, ema=average.tensors))
    loaded, kept = parameters_by_name(again.model), parameters_by_name(module.model)
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    assert not shared_places(again.model)
