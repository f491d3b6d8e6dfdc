"""What a CUDA device alone can show: kernels by name, a narrow base, and a run whose losses are those of the processor.

Skipped with the reason where there is none, and where a kernel's package is missing.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mvwan.config import Attention, Quantize, config_from_dict, merge
from mvwan.errors import MvwanError
from mvwan.model.attention import check_attention
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt
from mvwan.model.wan import WanTransformer3DModel
from mvwan.sample import load_run
from mvwan.train import train

pytestmark = pytest.mark.gpu


def model_with_heads_of_64() -> MultiViewWan:
    """Two blocks with heads as wide as kernels want them, in bfloat16 on the GPU; view attention takes part."""
    torch.manual_seed(0)
    stock = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=48, out_channels=48, text_dim=32, freq_dim=32, ffn_dim=256, num_layers=2
    )
    made = adapt(stock.eval().requires_grad_(False), views=2)[0]
    with torch.no_grad():
        for block in made.blocks:
            block.projector.weight.normal_(0, 0.05)
    return made.to("cuda", torch.bfloat16)


@torch.no_grad()
def answer(model: MultiViewWan, name: Attention) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 2, 96, 3, 8, 8, generator=generator).cuda(), torch.randn(1, 16, 32, generator=generator).cuda()
    model.attend_with(name)
    return model(latents, torch.tensor([300.0], device="cuda"), text).float()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", get_args(Attention))
def test_every_kernel_gives_the_same_answer(name: Attention) -> None:
    try:
        check_attention(name, "cuda", half=True, trains=False)
    except MvwanError as error:
        pytest.skip(str(error))
    model = model_with_heads_of_64()
    expected = answer(model, "math")
    assert (answer(model, name) - expected).norm() < 0.03 * expected.norm()


def test_the_losses_are_those_of_the_processor(golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {"base": {"dtype": "float32"}, "train": {"precision": "no"}}
    config = config_from_dict(merge(golden_run, exact))
    on_gpu = train(config, tmp_path / "gpu")
    assert load_run(tmp_path / "gpu").model.device.type == "cuda"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    on_processor = train(config, tmp_path / "processor")
    assert on_gpu.losses["loss"] == pytest.approx(on_processor.losses["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", get_args(Quantize)[1:])
def test_a_narrow_base_trains_and_takes_less(golden_run: dict[str, Any], tmp_path: Path, kind: str) -> None:
    bits = {"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}}
    plain = train(config_from_dict(merge(golden_run, bits)), tmp_path / "plain")
    narrow = train(config_from_dict(merge(golden_run, bits, {"base": {"quantize": kind}})), tmp_path / "narrow")
    assert narrow.losses["loss"] == pytest.approx(plain.losses["loss"], rel=0.1)
    assert narrow.movement is not None
