"""Back ends of attention by name: they compute the same, and one that cannot run here is refused with the reason."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from mvwan.cli import app
from mvwan.cli_settings import Kernel
from mvwan.config import Attention, config_from_dict, merge
from mvwan.errors import MvwanError
from mvwan.model import attention
from mvwan.model.attention import check_attention
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt
from mvwan.train import train
from tests.saved import BASE, save_run
from tests.stock import make_stock

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

NAMES: tuple[Attention, ...] = get_args(Attention)
HERE: tuple[Attention, ...] = ("auto", "math", "native")


class Operations(TorchDispatchMode):
    """Within it, the names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> MultiViewWan:
    made = adapt(make_stock(), views=2)[0]
    with torch.no_grad():
        for block in made.blocks:
            block.projector.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # so that view attention counts
    return made


def answer(model: MultiViewWan, name: Attention, device: str = "cpu") -> tuple[torch.Tensor, bool]:
    """(velocity, whether torch's fused kernel of the CPU took part)."""
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config
    latents = torch.randn(1, 2, 2 * config.in_channels, 3, 4, 4, generator=generator).to(device)
    text = torch.randn(1, 5, config.text_dim, generator=generator).to(device)
    model.attend_with(name)
    with torch.no_grad(), Operations() as ran:
        velocity = model(latents, torch.tensor([300.0], device=device), text)
    return velocity, any("flash_attention_for_cpu" in name for name in ran.names)


def test_every_back_end_of_this_machine_gives_the_same_answer(model: MultiViewWan) -> None:
    (auto, _), (multiplied, fused), (native, native_fused) = (answer(model, name) for name in HERE)
    assert torch.equal(auto, multiplied)
    assert torch.allclose(auto, native, rtol=1e-4, atol=1e-5)
    assert (fused, native_fused) == (False, True), "each name is what it says"


def test_a_large_matrix_is_never_made_by_itself(model: MultiViewWan, monkeypatch: pytest.MonkeyPatch) -> None:
    small = answer(model, "auto")
    monkeypatch.setattr(attention, "_LARGEST_MATRIX", 0)
    large = answer(model, "auto")
    assert (small[1], large[1]) == (False, True)
    assert answer(model, "math")[1] is False, "who asks for it by name gets it"
    assert torch.allclose(small[0], large[0], rtol=1e-4, atol=1e-5)


def test_an_environment_variable_of_diffusers_decides_nothing(model: MultiViewWan, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    before = answer(model, "auto")[0]
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLASH)  # what DIFFUSERS_ATTN_BACKEND=flash sets
    assert torch.equal(answer(model, "auto")[0], before)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HERE])
def test_what_needs_a_gpu_is_refused_without_one(name: Attention) -> None:
    with pytest.raises(MvwanError, match=rf"attention '{name}': it needs a CUDA device.*auto always works"):
        check_attention(name, "cpu", half=True, trains=False)


@pytest.mark.parametrize("name", HERE)
def test_what_runs_anywhere_is_not_refused(name: Attention) -> None:
    check_attention(name, "cpu", half=False, trains=True)


@pytest.mark.parametrize(
    ("name", "half", "trains", "reason"),
    [
        ("sage", True, True, "it has no gradient"),
        ("flash", False, True, "it computes in bfloat16 or float16 alone"),
        ("sage", False, False, "it computes in bfloat16 or float16 alone"),
        ("flash", True, True, "the package flash-attn is missing"),
        ("flash3", True, True, "the package flash-attn-3 is missing"),
        ("sage", True, False, "the package sageattention is missing"),
        ("xformers", False, True, "the package xformers is missing"),
    ],
)
def test_on_a_gpu_the_reason_is_named(name: Attention, half: bool, trains: bool, reason: str) -> None:
    with pytest.raises(MvwanError, match=reason):
        check_attention(name, "cuda", half=half, trains=trains)


def test_several_processes_share_a_prediction_around_some_alone() -> None:
    for name in ("math", "flex", "flash3", "xformers"):
        with pytest.raises(MvwanError, match="cannot exchange tokens"):
            check_attention(name, "cuda", half=True, trains=False, is_split=True)
    check_attention("auto", "cpu", half=False, trains=False, is_split=True)


def test_training_refuses_it_before_anything_is_written_and_may_change_it_later(golden_run: dict[str, Any], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(MvwanError, match="attention 'flash': it needs a CUDA device"):
            train(config_from_dict(merge(golden_run, {"model": {"attention": "flash"}})), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    train(config_from_dict(merge(golden_run, {"model": {"attention": "native"}, "train": {"steps": 2}})), tmp_path / "run")
    result = train(config_from_dict(merge(golden_run, {"model": {"attention": "math"}})), tmp_path / "run", resume=True)
    plain = train(config_from_dict(golden_run), tmp_path / "plain")
    assert result.losses["loss"] == pytest.approx(plain.losses["loss"], rel=1e-3)


def test_sample_takes_it_by_name(tmp_path: Path) -> None:
    assert [kernel.value for kernel in Kernel] == list(NAMES)
    save_run(tmp_path / "run", base={"source": str(BASE), "codec": "tiny"})
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--attention", "flash"])
    assert done.exit_code == 2
    assert "attention 'flash': it needs a CUDA device" in done.output
