"""A base held in 8 or 4 bits: what is rounded and what is not, and what training, checkpoints and predictions make of it."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mvwan.checkpoint import load_trained
from mvwan.checkpoint_export import export_checkpoint
from mvwan.config import Config, Quantize, config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError
from mvwan.files import read_json
from mvwan.model.quantized import QuantizedLinear, is_quantizable, stored_bytes, stored_parts
from mvwan.model.surgery import share_copies
from mvwan.model.trainable import parameters_by_name
from mvwan.precision import WideningLinear
from mvwan.sample import load_run
from mvwan.step_trace import trace
from mvwan.train import train
from mvwan.train_check import check_groups
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import BASE, save_run
from tests.test_train_processes import SCRIPT, launch
from tests.test_training_module import make_batch

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)
KINDS = QUANTIZE[1:]
MOST = {"int8": 0.01, "fp8": 0.05, "nf4": 0.15}
"""How far a product may be off, as a share of its norm."""


def config_of(kind: str, *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge({"base": {"source": str(BASE), "dtype": "bfloat16", "quantize": kind}}, *overrides))


def made(kind: str, *overrides: dict[str, Any]) -> HeatmapWanTrainingModule:
    return HeatmapWanTrainingModule(config=config_of(kind, *overrides), print_banners=False)


def loss_and_gradients(module: HeatmapWanTrainingModule) -> tuple[float, dict[str, torch.Tensor]]:
    loss = module(make_batch(), 0, 0).sums.sum()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_zero_stays_zero(kind: Quantize) -> None:
    """As the projector of a fresh model, when it has adapters or is frozen."""
    module = made(kind, {"trainable": {"groups": {"projector": {"mode": "frozen"}}}})
    module.quantize_frozen()
    (narrow, *_) = [
        layer for name, layer in module.model.named_modules() if name.endswith("projector") and isinstance(layer, QuantizedLinear)
    ]
    assert not narrow(torch.randn(3, narrow.in_features)).sub(narrow.bias if narrow.bias is not None else 0).any()
    assert torch.isfinite(module(make_batch(), 0, 0).sums).all()


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_matrices_of_blocks_are_narrow_and_everything_else_is_as_it_was(kind: Quantize) -> None:
    plain, module = made("none"), made(kind)
    before = {name: parameter.clone() for name, parameter in parameters_by_name(module.model).items()}
    module.quantize_frozen()
    after = parameters_by_name(module.model)
    assert list(after) == list(before), "tables, groups and checkpoints go by these names"
    narrow = {f"{name}.weight": layer for name, layer in module.model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, parameter in after.items():
        assert (parameter.shape, parameter.dtype) == (before[name].shape, before[name].dtype)
        if name not in narrow:
            assert stored_parts(parameter)[0] is parameter
            assert torch.equal(parameter, before[name]), name
    parts = ("attn1", "attn2", "mvs_attn", "ffn")
    assert {name.split(".")[2] for name in narrow} == set(parts), "the projector trains"
    assert module.table == plain.table
    held = sum(part.nbytes for name in narrow for part in stored_parts(after[name]))
    counted = sum(stored_bytes(before[name], kind) for name in narrow)
    assert counted <= held < 1.25 * counted, "rows of 32 numbers have many scales; those of the 5B have few"


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_rounded_weights_to_the_bit_and_near_those_of_the_wide_ones(kind: Quantize) -> None:
    wide, narrow, rounded = made("none"), made(kind), made("none")
    narrow.quantize_frozen()
    held, layers = parameters_by_name(narrow.model), dict(rounded.model.named_modules())
    for name, layer in narrow.model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight: Any = held[f"{name}.weight"]
            values = weight.get_original_weight() if kind == "nf4" else weight.dequantize()
            layers[name].weight.data = values  # pyright: ignore[reportAttributeAccessIssue]
            off = values.float() - parameters_by_name(wide.model)[f"{name}.weight"].float()
            assert off.norm() < MOST[kind] * parameters_by_name(wide.model)[f"{name}.weight"].float().norm(), name
    (loss, gradients), (same, same_gradients), (other, _) = (loss_and_gradients(module) for module in (narrow, rounded, wide))
    assert loss == pytest.approx(same, rel=1e-6)
    assert loss == pytest.approx(other, rel=0.05)
    assert loss != other
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, same_gradients[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_copies_lie_in_memory_once(kind: Quantize) -> None:
    module = made(kind)
    module.quantize_frozen()
    before, _ = loss_and_gradients(module)
    saved = share_copies(module.model)
    held = parameters_by_name(module.model)
    copies = [name for name in held if ".mvs_attn.to_q." in name and name.endswith("base_layer.weight")]
    assert copies
    for name in copies:
        pairs = zip(stored_parts(held[name]), stored_parts(held[name.replace("mvs_attn", "attn1")]), strict=True)
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert saved > 0
    assert share_copies(module.model) == 0
    module.zero_grad()
    assert loss_and_gradients(module)[0] == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_narrow_base(golden_run: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """It trains, proves that nothing frozen moved, goes on to the bit, refuses another base, predicts as it trained, and is exported."""
    more = {"base": {"quantize": kind}, "train": {"ema_decay": 0.0}}
    config = config_from_dict(merge(golden_run, more))
    whole = train(config, tmp_path / "whole")
    assert read_json(tmp_path / "whole" / "movement.json")["frozen_tensors_unchanged"] > 0
    train(config_from_dict(merge(golden_run, more, {"train": {"steps": 2}})), tmp_path / "cut")
    with pytest.raises(MvwanError, match=r"base\.quantize"):
        train(config_from_dict(merge(golden_run, {"base": {"quantize": "none"}})), tmp_path / "cut", resume=True)
    train(config, tmp_path / "cut", resume=True)
    tensors, again = load_trained(tmp_path / "whole").tensors, load_trained(tmp_path / "cut").tensors
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    plain = train(config_from_dict(golden_run), tmp_path / "plain")
    assert whole.losses["loss"] == pytest.approx(plain.losses["loss"], rel=0.1)
    assert whole.losses["loss"] != plain.losses["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_made_with_the_base_that_was_trained_on(tmp_path: Path, kind: str) -> None:
    save_run(tmp_path / "run", base={"source": str(BASE), "dtype": "float32", "codec": "tiny", "quantize": kind})
    run = load_run(tmp_path / "run")
    assert any(isinstance(layer, QuantizedLinear) for layer in run.model.modules())
    export = export_checkpoint(tmp_path / "run", tmp_path / "exported", "multiview")
    assert any(kind in note for note in export.notes), "its weights are the unrounded ones, which the reader must know"


def test_two_processes_share_a_narrow_base(golden_run: dict[str, Any], tmp_path: Path) -> None:
    exact = {"base": {"dtype": "float32", "quantize": "int8"}, "train": {"precision": "no", "steps": 3}}
    alone = train(config_from_dict(merge(golden_run, exact)), tmp_path / "alone")
    pair = config_from_dict(merge(golden_run, exact, {"train": {"gradient_accumulation": 1}}))
    (tmp_path / "pair.yaml").write_text(dump_yaml(pair))
    done = launch(tmp_path, ["--multi_gpu"], SCRIPT, str(tmp_path / "pair"))
    assert done.returncode == 0, done.stderr
    tensors, both = load_trained(tmp_path / "alone").tensors, load_trained(tmp_path / "pair").tensors
    assert all(torch.allclose(tensors[name], both[name], rtol=1e-4, atol=1e-6) for name in tensors)
    assert alone.step == 3


def test_the_plan_counts_what_is_stored() -> None:
    sizes = {kind: trace(config_of(kind, {"train": {"batch_size": 1}}), "gpu") for kind in QUANTIZE}
    assert sizes["none"].frozen > sizes["int8"].frozen == sizes["fp8"].frozen > sizes["nf4"].frozen
    assert sizes["none"].shared > sizes["int8"].shared > sizes["nf4"].shared
    module = made("none")
    narrow = [layer.weight for name, layer in module.model.named_modules() if is_quantizable(name, layer, "nf4")]
    assert sizes["none"].frozen - sizes["nf4"].frozen == sum(weight.nbytes - stored_bytes(weight, "nf4") for weight in narrow)
    assert sizes["nf4"].trained == sizes["none"].trained


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, golden_run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MvwanError, match=r"base\.quantize='int7'.*'none', 'int8', 'fp8' or 'nf4'"):
        config_of("int7")
    with pytest.raises(MvwanError, match=r"nf4: torch\.compile"):
        config_of("nf4", {"train": {"compile": True}})
    module = made("int8")
    for layer in module.model.modules():
        if isinstance(layer, WideningLinear):
            layer.weight.requires_grad_(True)
    with pytest.raises(MvwanError, match="no weight of a block is frozen"):
        module.quantize_frozen()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "torchao" else object())
    with pytest.raises(MvwanError, match=r"needs torchao.*pip install 'mvwan\[quantize\]'"):
        train(config_from_dict(merge(golden_run, {"base": {"quantize": "int8"}})), tmp_path / "run")
    with pytest.raises(MvwanError, match="needs torchao"):
        check_groups(config_of("int8"))
    assert not (tmp_path / "run").exists()


def test_strategies_that_cut_tensors_apart_refuse_it(golden_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(config_from_dict(merge(golden_run, {"base": {"quantize": "int8"}}))))
    done = launch(tmp_path, ["--use_fsdp", "--fsdp_version", "2"], SCRIPT, str(tmp_path / "run"))
    assert "base.quantize=int8: not with FSDP2 or DeepSpeed" in done.stdout, done.stderr
