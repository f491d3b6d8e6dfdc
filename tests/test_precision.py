"""bfloat16 where the machine multiplies it fast, float32 elsewhere: decided once per run, remembered, and never by chance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvwan.config import config_from_dict, parse_overrides
from mvwan.errors import MvwanError
from mvwan.model.trainable import parameters_by_name
from mvwan.precision import WideningLinear, has_fast_bfloat16, in_words, settle
from mvwan.presets import config_from_preset
from mvwan.sample import load_run
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import BASE, save_run
from tests.test_training_module import make_batch


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize(("capability", "fast"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_a_processor_is_known_by_its_instructions(monkeypatch: pytest.MonkeyPatch, capability: str, fast: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert has_fast_bfloat16("cpu") is fast
    config = settle(config_from_preset("tiny"), "cpu")
    assert (config.base.dtype, config.train.precision) == (("bfloat16", "bf16") if fast else ("float32", "no"))


def test_torch_says_what_the_processor_has() -> None:
    code = "from mvwan.precision import has_fast_bfloat16; print(has_fast_bfloat16('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_what_was_asked_for_stays_and_is_called_slow_where_it_is(slow: None) -> None:
    asked = config_from_dict({"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}})
    assert settle(asked, "cpu") == asked
    assert "no instructions" in in_words(asked)
    assert in_words(settle(config_from_dict({}), "cpu")) == "products in float32"
    narrow = settle(config_from_dict({"base": {"dtype": "bfloat16"}}), "cpu")
    assert in_words(narrow) == "products in float32, of frozen weights held in bfloat16"


def test_a_run_goes_on_as_it_was_on_another_machine(slow: None) -> None:
    saved = config_from_dict({"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}})
    assert settle(config_from_dict({}), "cpu", saved.to_dict()) == saved


def test_no_is_what_yaml_reads_as_false() -> None:
    assert config_from_dict(parse_overrides(["train.precision=no"])).train.precision == "no"
    with pytest.raises(MvwanError, match=r"train\.precision=True: input should be 'auto', 'bf16' or 'no'\. Set train\.precision\."):
        config_from_dict(parse_overrides(["train.precision=yes"]))


def test_a_run_of_a_fast_machine_is_computed_in_float32_on_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    sections = {"base": {"source": str(BASE), "dtype": "bfloat16", "codec": "tiny"}, "train": {"precision": "bf16"}}
    save_run(tmp_path, **sections)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    as_trained = load_run(tmp_path)
    request.getfixturevalue("slow")
    here = load_run(tmp_path)
    assert (as_trained.config.train.precision, here.config.train.precision) == ("bf16", "no")
    for (name, trained), same in zip(as_trained.model.named_parameters(), here.model.parameters(), strict=True):
        assert same.dtype == trained.dtype, name
        assert torch.equal(trained, same), name
    latents, text = torch.randn(1, 3, 96, 2, 4, 4), torch.randn(1, 8, 32)
    with torch.no_grad():
        narrow = here.model(latents, torch.tensor([500.0]), text)
        wide = torch.nn.Module.float(as_trained.model)(latents, torch.tensor([500.0]), text)
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-5)


def test_a_narrow_weight_is_widened_for_its_product_and_kept_as_it_is() -> None:
    torch.manual_seed(0)
    narrow = WideningLinear(24, 40).requires_grad_(False).bfloat16()
    wide = torch.nn.Linear(24, 40)
    wide.load_state_dict(narrow.state_dict())
    kept: list[torch.Tensor] = []
    inputs = [torch.randn(5, 24).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = narrow(inputs[0])
    expected = wide(inputs[1])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradient = torch.randn(5, 40)
    found.backward(gradient)
    expected.backward(gradient)
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)
    assert [tensor.data_ptr() for tensor in kept] == [narrow.weight.data_ptr()], "only the weight as it is held waits for the backward pass"


def test_a_widened_layer_computes_as_stock_under_autocast_and_in_its_own_type() -> None:
    torch.manual_seed(0)
    ours = WideningLinear(24, 40).requires_grad_(False).bfloat16()
    stock = torch.nn.Linear(24, 40).bfloat16()
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(5, 24)
    assert torch.equal(ours(x.bfloat16()), stock(x.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), stock(x))


def test_a_narrow_weight_that_trains_gets_its_gradient() -> None:
    layer = WideningLinear(4, 4).bfloat16()
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert (layer.weight.grad == 2).all()
    assert (layer.bias.grad == 2).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_held_in_bfloat16_trains_in_float32_on_a_slow_machine(slow: None, checkpointing: bool) -> None:
    """As the same rounded weights held in float32 do, but for rounding."""
    values = {"base": {"source": str(BASE), "dtype": "bfloat16"}, "trainable": {"lora": {"rank": 4}}}
    config = config_from_dict(values | {"model": {"gradient_checkpointing": checkpointing}})
    narrow, wide = (HeatmapWanTrainingModule(config=config, print_banners=False) for _ in range(2))
    torch.nn.Module.float(wide.model)
    assert narrow.config.train.precision == "no"
    assert narrow.model.compute_dtype == torch.bfloat16
    losses = []
    for module in (narrow, wide):
        torch.nn.init.normal_(parameters_by_name(module.model)["blocks.0.projector.weight"], generator=torch.Generator().manual_seed(1))
        sums = module(make_batch(), 0, 0)
        losses.append(sums.sums.sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    theirs = parameters_by_name(wide.model)
    for name, parameter in parameters_by_name(narrow.model).items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_fast_machine_computes_in_the_type_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    config = config_from_dict({"base": {"source": str(BASE), "dtype": "bfloat16"}, "train": {"precision": "no"}})
    module, batch = HeatmapWanTrainingModule(config=config, print_banners=False), make_batch(size=1)
    with torch.no_grad():
        bare = module(batch, 0, 0).sums
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(batch, 0, 0).sums, bare)
