"""training_module: what the class promises its users, and what goes into the loss, on the two-block base of the golden files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan import flow
from mvwan.batch import Batch
from mvwan.config import BaseConfig, Config, FlowConfig, GroupConfig, LoraConfig, ModelConfig, TrainableConfig, TrainConfig
from mvwan.errors import MvwanError
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do
BASE = Path(__file__).parent / "golden" / "base.safetensors"


def make_batch(size: int = 2, views: int = 3, frames: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, size, views, 48, frames, 4, 4, generator=generator)
    return Batch(
        sample_ids=tuple(f"episode/{number}@0#0" for number in range(size)),
        rgb=latents[0],
        heat=latents[1],
        text=torch.randn(size, 8, 32, generator=generator),
        heat_valid=torch.ones(size, views, frames, dtype=torch.bool),
        gripper_open=torch.rand(size, 4 * frames - 3, generator=generator),
        rotation_deg=torch.rand(size, 4 * frames - 3, 3, generator=generator) * 360 - 180,
    ).check()


def make(dtype: str = "float32", switch: bool = False, **more: Any) -> HeatmapWanTrainingModule:
    sections: dict[str, Any] = {"trainable": TrainableConfig(lora=LoraConfig(rank=4))} | more
    config = Config(base=BaseConfig(source=str(BASE), dtype=dtype), unfreeze_modulation_and_norms=switch, **sections)  # type: ignore[arg-type]
    return HeatmapWanTrainingModule(config=config, print_banners=False)


def test_banners_and_the_numbers_that_the_methods_return(capsys: pytest.CaptureFixture[str]) -> None:
    off = HeatmapWanTrainingModule(BASE, lora_rank=4)
    printed = capsys.readouterr().out
    assert "MODULATION PARAMETERS: KEEPING FROZEN (Backward Compatible)" in printed
    assert "✅ Unfroze 22 parameter(s):" in printed
    assert "MVS_Attn Norms" not in printed
    assert (off._unfreeze_modulation(), off._unfreeze_mv_modules()) == (0, 22)
    capsys.readouterr()

    on = HeatmapWanTrainingModule(BASE, lora_rank=4, unfreeze_modulation_and_norms=True)
    printed = capsys.readouterr().out
    assert "⚡ MODULATION PARAMETER UNFREEZING" in printed
    assert "✅ Unfroze 26 parameter(s):" in printed
    assert (on._unfreeze_modulation(), on._unfreeze_mv_modules()) == (2, 26)


def test_banners_are_for_the_main_process_and_can_be_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    HeatmapWanTrainingModule(BASE, lora_rank=4, print_banners=False)
    monkeypatch.setenv("RANK", "1")
    HeatmapWanTrainingModule(BASE, lora_rank=4)
    assert capsys.readouterr().out == ""


def test_settings_come_from_one_place() -> None:
    with pytest.raises(MvwanError, match="not from both"):
        HeatmapWanTrainingModule(config=Config(), views=2)


def test_it_can_be_counted_without_weights() -> None:
    module = HeatmapWanTrainingModule(BASE, lora_rank=4, unfreeze_modulation_and_norms=True, device="meta", print_banners=False)
    assert module.table == make(dtype="bfloat16", switch=True).table
    assert all(parameter.is_meta for parameter in module.parameters())


def test_the_same_seed_gives_the_same_adapters_and_leaves_torch_s_stream_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    name = "blocks.0.attn1.to_q.lora_A.default.weight"
    assert torch.equal(first.saved_tensors()[name], second.saved_tensors()[name])
    assert not torch.equal(first.saved_tensors()[name], other.saved_tensors()[name])


def test_train_mode_reaches_only_what_trains() -> None:
    module = make()
    module.train()
    for name, part in module.named_modules():
        has_trained = any(parameter.requires_grad for parameter in part.parameters())
        assert part.training == has_trained, name
    assert not module.model.condition_embedder.training
    assert all(not part.training for part in module.modules() if isinstance(part, torch.nn.Dropout))
    module.eval()
    assert not any(part.training for part in module.modules())


def test_losses_are_those_of_flow_with_the_draws_of_seed_step_and_sample() -> None:
    module, batch = make(), make_batch()
    clean = batch.latents
    noise = flow.draw_noise(7, 3, batch.sample_ids, clean.shape[1:])
    sigma = flow.draw_sigma(7, 3, batch.sample_ids, FlowConfig())
    noisy = clean.clone()
    noisy[:, :, :, 1:] = ((1 - sigma)[:, None, None, None, None, None] * clean + sigma[:, None, None, None, None, None] * noise)[
        :, :, :, 1:
    ]
    with torch.no_grad():
        velocity = module.model(noisy, 1000 * sigma, batch.text)
        sums = module(batch, seed=7, step=3)
    error = (velocity - (noise - clean)).square()[:, :, :, 1:]
    torch.testing.assert_close(sums.rgb_sum, error[:, :, :48].sum(dim=(1, 2, 3, 4, 5)))
    torch.testing.assert_close(sums.heat_sum, error[:, :, 48:].sum(dim=(1, 2, 3, 4, 5)))
    assert sums.rgb_count.tolist() == [error[0, :, :48].numel()] * 2


def test_a_sample_s_loss_does_not_depend_on_its_batch() -> None:
    module, batch = make(), make_batch()
    tensors = {name: value[1:] for name, value in vars(batch).items()}
    alone = Batch(**tensors)
    with torch.no_grad():
        torch.testing.assert_close(module(alone, 0, 0).rgb_sum[0], module(batch, 0, 0).rgb_sum[1], rtol=1e-5, atol=0)


def test_more_given_frames_leave_fewer_to_learn() -> None:
    module = make(train=TrainConfig(condition_frames=2))
    batch = make_batch(frames=4)
    with torch.no_grad():
        assert module(batch, 0, 0).rgb_count.tolist() == [3 * 48 * 2 * 4 * 4] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_every_trained_tensor_gets_a_gradient_once_the_projector_is_not_zero(fusion: str, checkpointing: bool) -> None:
    module = make(dtype="bfloat16", switch=True, model=ModelConfig(fusion=fusion, gradient_checkpointing=checkpointing))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, tensor in module.saved_tensors().items():
            if "projector" in name or ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    batch = make_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        sums = module(batch, 0, 0)
    (sums.rgb_sum.sum() + sums.heat_sum.sum()).backward()
    without = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad and not (parameter.grad != 0).any()]
    assert without == []
    assert all(parameter.grad is None for parameter in module.parameters() if not parameter.requires_grad)


def test_a_group_of_one_s_own_is_saved_under_its_name() -> None:
    own = {"time": GroupConfig(pattern=r"condition_embedder\.time_proj\.(weight|bias)", mode="full")}
    module = make(trainable=TrainableConfig(lora=LoraConfig(rank=4), groups=own))
    assert module.saved_groups()["time"]["names"] == ["condition_embedder.time_proj.weight", "condition_embedder.time_proj.bias"]
    assert set(module.saved_tensors()) == set(module.table.trainable_names)
