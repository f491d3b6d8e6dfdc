"""Ways in which such systems fail in silence, each shown as it happens elsewhere and absent here: masters, order, PEFT's own means."""

import peft
import pytest
import torch

from mvwan.config import TrainableConfig, TrainConfig
from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt
from mvwan.model.trainable import apply, optimizer_groups, parameters_by_name, resolve_groups, verify_trainable
from tests.stock import make_stock

SWITCH_ON = resolve_groups(TrainableConfig(), True, TrainConfig(learning_rate=1e-4))


def make_bfloat16_model() -> MultiViewWan:
    """Everything bfloat16, islands too, with modulation entries near 0.3 as in a trained Wan; norm weights start at 1."""
    torch.manual_seed(0)
    model, _ = adapt(make_stock())
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith("scale_shift_table"):
            parameter.data = 0.3 + 0.02 * torch.randn_like(parameter)
        parameter.data = parameter.data.bfloat16()
    return model


def share_that_moves(model: MultiViewWan, param_groups: list[dict]) -> dict[str, float]:
    """Share of the entries of both switch groups that differ after 1000 AdamW steps with the same made-up gradients."""
    watched = {name: parameter for name, parameter in parameters_by_name(model).items() if is_modulation(name) or is_norm(name)}
    before = {name: parameter.detach().clone() for name, parameter in watched.items()}
    optimizer = torch.optim.AdamW(param_groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        for parameter in watched.values():
            parameter.grad = (0.2 + torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        optimizer.step()
    moved = {name: parameter.detach() != before[name] for name, parameter in watched.items()}
    return {
        "modulation": float(torch.cat([change.flatten() for name, change in moved.items() if is_modulation(name)]).float().mean()),
        "mvs_norms": float(torch.cat([change for name, change in moved.items() if is_norm(name)]).float().mean()),
    }


def is_modulation(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".scale_shift_table")


def is_norm(name: str) -> bool:
    return ".mvs_attn.norm_" in name


def test_bfloat16_masters_stand_still_and_ours_all_move() -> None:
    naive = make_bfloat16_model()
    parameters = [parameter for name, parameter in naive.named_parameters() if is_modulation(name) or is_norm(name)]
    shares = share_that_moves(naive, [{"params": parameters, "lr": 1e-4, "weight_decay": 0.0}])
    assert shares["mvs_norms"] == 0
    assert shares["modulation"] < 0.2

    ours = make_bfloat16_model()
    apply(ours, SWITCH_ON, rank=4)
    assert share_that_moves(ours, optimizer_groups(ours, SWITCH_ON)) == {"modulation": 1.0, "mvs_norms": 1.0}


def test_verification_refuses_bfloat16_masters() -> None:
    model = make_bfloat16_model()
    table = apply(model, SWITCH_ON, rank=4)
    model.blocks[1].scale_shift_table.data = model.blocks[1].scale_shift_table.data.bfloat16()  # type: ignore[union-attr]
    with pytest.raises(MvwanError, match=r"not float32.*blocks\.1\.scale_shift_table"):
        verify_trainable(model, table)


def test_injection_freezes_what_was_unfrozen_and_our_order_survives_it() -> None:
    def unfrozen() -> MultiViewWan:
        model = make_bfloat16_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_modulation(name) or is_norm(name) or "projector" in name)
        return model

    elsewhere = unfrozen()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]), elsewhere)
    assert all(".lora_" in name for name, parameter in elsewhere.named_parameters() if parameter.requires_grad)

    here = unfrozen()
    table = apply(here, SWITCH_ON, rank=4)
    training = {name for name, parameter in here.named_parameters() if parameter.requires_grad}
    assert training == set(table.trainable_names)
    assert sum(is_modulation(name) for name in training) == 2
    assert sum(is_norm(name) for name in training) == 4


def test_verification_catches_a_later_freeze() -> None:
    model = make_bfloat16_model()
    table = apply(model, SWITCH_ON, rank=4)
    optimizer = torch.optim.AdamW(optimizer_groups(model, SWITCH_ON))
    verify_trainable(model, table, optimizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    with pytest.raises(MvwanError, match=r"the table trains them, the model has them frozen: patch_embedding\.weight"):
        verify_trainable(model, table, optimizer)


@pytest.mark.parametrize("modules_to_save", ["scale_shift_table", "modulation", "norm_qq"])
def test_pefts_modules_to_save_ignores_raw_parameters_and_typos(modules_to_save: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["to_q"], modules_to_save=[modules_to_save])
    wrapped = peft.get_peft_model(make_bfloat16_model(), config)  # type: ignore[arg-type]
    assert all(".lora_" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)


def test_pefts_export_leaves_out_what_the_table_names() -> None:
    model = make_bfloat16_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["to_q"]))  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or is_norm(name))
    assert all("lora_" in name for name in peft.get_peft_model_state_dict(wrapped))

    ours = make_bfloat16_model()
    table = apply(ours, SWITCH_ON, rank=4)
    assert sum(is_norm(name) for name in table.trainable_names) == 4
    assert sum(is_modulation(name) for name in table.trainable_names) == 2
