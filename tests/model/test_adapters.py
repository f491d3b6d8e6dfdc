"""The LoRA layer gives what PEFT's own gives, gradients included."""

import copy

import peft
import pytest
import torch
from torch import nn

from mvwan.model.adapters import AdaptedLinear, exchange_layers
from mvwan.model.trainable import merge_adapters
from mvwan.precision import WideningLinear
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import make_module
from tests.test_training_module import make_batch


def pair(dtype: torch.dtype, base_dtype: torch.dtype | None = None, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer, and ours of the same numbers."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(12, 20)).to(dtype)
    holder[0].__class__ = WideningLinear
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], lora_dropout=dropout, bias="none")
    peft.inject_adapter_in_model(config, holder)
    nn.init.normal_(holder[0].lora_B["default"].weight)  # pyright: ignore[reportArgumentType]
    holder[0].base_layer.requires_grad_(False)
    if base_dtype is not None:
        holder[0].base_layer.to(base_dtype)
    ours = copy.deepcopy(holder)
    ours[0].__class__ = AdaptedLinear
    return holder[0], ours[0]


def answer(layer: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """The layer's output, and the gradients of input and adapters."""
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        y = layer(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (2, 3, 4, 12)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    theirs, ours = pair(torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for expected, found in zip(answer(theirs, x), answer(ours, x), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_types_are_those_of_peft(base_dtype: torch.dtype, autocast: bool) -> None:
    theirs, ours = pair(torch.float32, base_dtype)
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    near = 3e-2 if autocast else 1e-5
    for expected, found in zip(answer(theirs, x, autocast), answer(ours, x, autocast), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_what_it_does_not_do_it_leaves_to_peft() -> None:
    theirs, ours = pair(torch.float32, dropout=0.5)
    x = torch.randn(4, 12)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), expected), "dropout"
    theirs, ours = pair(torch.float32)
    for layer in (theirs, ours):
        layer.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x), ours.base_layer(x))  # pyright: ignore[reportCallIssue]


def test_every_adapter_of_the_model_is_one_and_starts_without_effect() -> None:
    module: HeatmapWanTrainingModule = make_module()
    layers = [layer for layer in module.model.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    assert layers
    assert {type(layer) for layer in layers} == {AdaptedLinear}
    with torch.no_grad():
        before = module(make_batch(), 0, 0).sums
        merge_adapters(module.model, torch.float32)
        assert torch.equal(module(make_batch(), 0, 0).sums, before), "B is zero, so no bit differs"


def test_layers_are_exchanged_there_and_back() -> None:
    module = make_module()
    expected = module(make_batch(), 0, 0).sums
    exchange_layers(module.model, ours=False)
    assert not any(type(layer) is AdaptedLinear for layer in module.modules())
    torch.testing.assert_close(module(make_batch(), 0, 0).sums, expected)
