"""training_module: what the class promises its users, and what goes into the loss, on the two-block base of the golden files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan import flow
from mvwan.actions import action_counts
from mvwan.batch import Batch
from mvwan.config import BaseConfig, Config, FlowConfig, GroupConfig, LoraConfig, ModelConfig, TrainableConfig, TrainConfig
from mvwan.errors import MvwanError
from mvwan.optimizer import make_optimizer
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
    assert module.table == make(dtype="auto", switch=True).table
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
    tensors = {name: value[1:] for name, value in vars(batch).items() if value is not None}
    alone = Batch(**tensors)
    with torch.no_grad():
        torch.testing.assert_close(module(alone, 0, 0).rgb_sum[0], module(batch, 0, 0).rgb_sum[1], rtol=1e-5, atol=0)


def test_more_given_frames_leave_fewer_to_learn() -> None:
    module = make(train=TrainConfig(condition_frames=2))
    batch = make_batch(frames=4)
    with torch.no_grad():
        assert module(batch, 0, 0).rgb_count.tolist() == [3 * 48 * 2 * 4 * 4] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("fusion", "head"), [("channel", "none"), ("view", "none"), ("channel", "gripper_rotation"), ("view", "gripper")])
def test_every_trained_tensor_gets_a_gradient_once_what_starts_at_zero_has_moved(fusion: Any, head: Any, checkpointing: bool) -> None:
    model = ModelConfig(fusion=fusion, gradient_checkpointing=checkpointing, action_head=head)
    module = make(dtype="bfloat16", switch=True, model=model)
    with torch.no_grad():
        for name, tensor in module.saved_tensors().items():
            if "projector" in name or ".lora_B." in name or name == "head_action.proj_out.weight":
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    batch = make_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        sums = module(batch, 0, 0)
    sums.sums.sum().backward()
    without = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad and not (parameter.grad != 0).any()]
    assert without == []
    assert all(parameter.grad is None for parameter in module.parameters() if not parameter.requires_grad)


def test_a_group_of_one_s_own_is_saved_under_its_name() -> None:
    own = {"time": GroupConfig(pattern=r"condition_embedder\.time_proj\.(weight|bias)", mode="full")}
    module = make(trainable=TrainableConfig(lora=LoraConfig(rank=4), groups=own))
    assert module.saved_groups()["time"]["names"] == ["condition_embedder.time_proj.weight", "condition_embedder.time_proj.bias"]
    assert set(module.saved_tensors()) == set(module.table.trainable_names)


# ── the action head ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_of(module: HeatmapWanTrainingModule, batches: list[Batch], step: int = 0) -> torch.Tensor:
    """The loss of a step that is cut into these micro-batches."""
    train, head = module.config.train, module.config.model.action_head
    every = torch.stack([module(batch, 0, step).counts.sum(dim=1) for batch in batches]).sum(dim=0).tolist()
    known = sum(action_counts(head, batch.gripper_open, batch.rotation_deg, train.condition_frames) for batch in batches)
    rgb, heat, gripper, rotation = every
    assert [gripper, rotation] == known.tolist()  # type: ignore[union-attr]
    sums = [module(batch, 0, step) for batch in batches]
    parts = [flow.total_loss(one, rgb, heat, train.rgb_weight, gripper, rotation, train.action_weight) for one in sums]
    return torch.stack(parts).sum()


def test_without_a_head_actions_count_nothing() -> None:
    sums = make()(make_batch(), 0, 0)
    assert not sums.sums[2:].any() and not sums.counts[2:].any()
    assert not sums.gripper_sum.requires_grad


@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_the_head_learns_when_the_gripper_closes(fusion: Any) -> None:
    """Two windows whose gripper closes in another latent frame, which a corner of each picture shows."""
    settings = TrainConfig(learning_rate=3e-3, warmup_steps=0)
    module = make(model=ModelConfig(fusion=fusion, action_head="gripper"), train=settings, flow=FlowConfig(shift=1.0))
    batch = make_batch()
    rgb, opening = batch.rgb.clone(), torch.ones(2, 9)
    for window, (frame, latent_frame) in enumerate(((5, 2), (1, 1))):
        opening[window, frame:] = 0
        rgb[window, :, :8, latent_frame:, :2, :2] += 3
    batch = replace(batch, rgb=rgb, gripper_open=opening)
    optimizer, losses = make_optimizer(module, settings), []
    for step in range(60):
        loss = loss_of(module, [batch], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sums = module(batch, 1, 0)
        losses.append(float(sums.gripper_sum.sum() / sums.gripper_count.sum()))
    assert losses[0] > 0.6
    assert max(losses[-5:]) < losses[0] / 2


def test_turns_are_learned_too() -> None:
    settings = TrainConfig(learning_rate=3e-3, warmup_steps=0, action_weight=1.0)
    module, batch = make(model=ModelConfig(action_head="gripper_rotation"), train=settings), make_batch()
    turn = torch.zeros(2, 9, 3)
    turn[..., 2] = torch.arange(9) * 40  # from 160 degrees on round the circle
    batch = replace(batch, rotation_deg=(turn + 180).remainder(360) - 180)
    optimizer, losses = make_optimizer(module, settings), []
    for step in range(60):
        sums = module(batch, 0, step)
        losses.append(float(sums.rotation_sum.detach().sum() / sums.rotation_count.sum()))
        loss_of(module, [batch], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(torch.tensor(72.0).log().item(), rel=1e-4), "every bin is as likely before training"
    assert losses[-1] < losses[0] / 2


def test_frames_without_labels_are_left_out_and_do_no_harm() -> None:
    module, batch = make(model=ModelConfig(action_head="gripper_rotation")), make_batch()
    unknown = replace(batch, gripper_open=torch.full((2, 9), torch.nan), rotation_deg=torch.full((2, 9, 3), torch.nan))
    known, nothing = module(batch, 0, 0), module(unknown, 0, 0)
    assert known.counts[2:].tolist() == [[8, 8], [8, 8]]
    assert not nothing.sums[2:].any() and not nothing.counts[2:].any()
    torch.testing.assert_close(nothing.sums[:2], known.sums[:2], rtol=0, atol=0)
    loss_of(module, [unknown]).backward()
    assert all(
        parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) for parameter in module.model.head_action.parameters()
    )


def test_micro_batches_of_any_size_and_labels_add_up_to_one_batch() -> None:
    batch = make_batch(3)
    opening, turn = batch.gripper_open.clone(), batch.rotation_deg.clone()
    opening[0, 2:], opening[2] = torch.nan, torch.nan
    turn[1, 4:] = torch.nan
    batch = replace(batch, gripper_open=opening, rotation_deg=turn)
    held = {name: value for name, value in vars(batch).items() if value is not None}
    cuts = [replace(batch, **{name: value[part] for name, value in held.items()}) for part in (slice(0, 1), slice(1, 3))]
    gradients = []
    for batches in ([batch], cuts):
        module = make(model=ModelConfig(action_head="gripper_rotation"))
        loss = loss_of(module, batches)
        loss.backward()
        gradients.append([float(loss.detach()), *(parameter.grad for parameter in module.model.head_action.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for one, two in zip(gradients[0][1:], gradients[1][1:], strict=True):
        torch.testing.assert_close(one, two)
    assert gradients[0][-1].abs().max() > 0
