"""Ways in which training of such systems fails in silence (each was found in public code), as tests of the real parts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan import flow
from mvwan.batch import Batch
from mvwan.config import BaseConfig, Config, LoraConfig, TrainableConfig, TrainConfig
from mvwan.optimizer import learning_rate_factor, make_optimizer, make_schedule
from mvwan.training_module import HeatmapWanTrainingModule

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do
BASE = Path(__file__).parent / "golden" / "base.safetensors"


def make_batch(frames: int = 3, side: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, 3, 48, frames, side, side, generator=generator)
    return Batch(
        sample_ids=("episode/0@0#0",),
        rgb=latents[0],
        heat=latents[1],
        text=torch.randn(1, 8, 32, generator=generator),
        heat_valid=torch.ones(1, 3, frames, dtype=torch.bool),
        gripper_open=torch.ones(1, 4 * frames - 3),
        rotation_deg=torch.zeros(1, 4 * frames - 3, 3),
    )


def make_module(dtype: str = "bfloat16", switch: bool = True, **train: Any) -> HeatmapWanTrainingModule:
    config = Config(
        base=BaseConfig(source=str(BASE), dtype=dtype),  # type: ignore[arg-type]
        trainable=TrainableConfig(lora=LoraConfig(rank=4)),
        unfreeze_modulation_and_norms=switch,
        train=TrainConfig(**train),
    )
    return HeatmapWanTrainingModule(config=config, print_banners=False)


# ── 1: bf16 weights do not move ───────────────────────────────────────────────────────────────────────────────────────────────────


def moved_share(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before != after).float().mean())


def update(dtype: torch.dtype, steps: int = 10) -> dict[str, float]:
    """Share of entries that moved, of view attention's norms and of the modulation tables, with trained tensors of `dtype`."""
    module, batch = make_module(), make_batch()
    with torch.no_grad():
        for name, tensor in module.saved_tensors().items():
            if "projector.weight" in name:
                tensor.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    before = {name: tensor.clone() for name, tensor in module.saved_tensors().items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            sums = module(batch, 0, step)
        (sums.rgb_sum.sum() + sums.heat_sum.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = module.saved_tensors()
    norms = [name for name in before if name.endswith(("mvs_attn.norm_q.weight", "mvs_attn.norm_k.weight"))]
    near_one = {
        "norms": [name for name in norms if float(before[name].float().mean()) > 0.5],
        "tables": [n for n in before if n.endswith("scale_shift_table")],
    }
    return {kind: min(moved_share(before[name], after[name]) for name in names) for kind, names in near_one.items()}


def test_fact_1_float32_masters_move_where_bf16_ones_stand_still() -> None:
    ours, theirs = update(torch.float32), update(torch.bfloat16)
    assert theirs["norms"] == 0, "bf16 norm weights near 1 are expected to stand still: this is the failure"
    assert theirs["tables"] < 0.9
    assert ours["norms"] > 0.99
    assert ours["tables"] > 0.99


# ── 5: warm-up flags that nobody reads ────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_5_warm_up_is_read_per_group_and_the_schedule_counts_optimizer_steps() -> None:
    groups = {"projector": {"warmup_steps": 2, "learning_rate": 2e-3}}
    config = Config(
        base=BaseConfig(source=str(BASE)),
        trainable=TrainableConfig(lora=LoraConfig(rank=4), groups=groups),  # type: ignore[arg-type]
        train=TrainConfig(steps=8, warmup_steps=4, learning_rate=1e-3, schedule="cosine"),
    )
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    optimizer = make_optimizer(module, config.train)
    schedule = make_schedule(optimizer, config.train, step=0)
    seen: dict[str, list[float]] = {}
    for _ in range(8):
        for group in optimizer.param_groups:
            seen.setdefault(group["group"], []).append(group["lr"])
        optimizer.step()
        schedule.step()
    assert seen["lora"][:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert seen["lora"][4:] == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert seen["projector"][:3] == pytest.approx([1e-3, 2e-3, 2e-3])
    resumed = make_schedule(make_optimizer(module, config.train), config.train, step=5)
    assert resumed.get_last_lr() == pytest.approx([seen[group["group"]][5] for group in optimizer.param_groups])


def test_fact_5_the_first_update_is_not_wasted_and_the_last_is_not_past_the_end() -> None:
    assert learning_rate_factor(0, 10, 100, "constant") == 0.1
    assert learning_rate_factor(0, 0, 100, "cosine") == 1.0
    assert learning_rate_factor(9, 10, 100, "cosine") == 1.0
    assert 0 < learning_rate_factor(99, 10, 100, "cosine") < 0.001
    assert learning_rate_factor(200, 10, 100, "cosine") == 0


# ── 6: dropout left on ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_6_nothing_random_is_left_in_the_forward_pass() -> None:
    module, batch = make_module(dtype="float32"), make_batch()
    module.train()
    with torch.no_grad():
        first, second = module(batch, 0, 0), module(batch, 0, 0)
    assert torch.equal(first.rgb_sum, second.rgb_sum)
    assert torch.equal(first.heat_sum, second.heat_sum)
    assert not [part for part in module.modules() if isinstance(part, torch.nn.Dropout) and part.training]


# ── 7: conditioning by aliasing ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_7_the_given_frame_is_clean_by_arithmetic_and_out_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = make_module(dtype="float32"), make_batch()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.model.register_forward_pre_hook(lambda _, given: seen.append((given[0].clone(), given[1].clone())))
    clean = batch.latents
    kept = clean.clone()
    with torch.no_grad():
        plain = module(batch, 0, 0)
        draw = flow.draw_noise

        def other_noise_on_frame_0(*key: Any) -> torch.Tensor:
            noise = draw(*key)
            noise[:, :, :, 0] = 1000
            return noise

        monkeypatch.setattr(flow, "draw_noise", other_noise_on_frame_0)
        other = module(batch, 0, 0)
    for latents, timestep in seen:
        assert torch.equal(latents[:, :, :, 0], clean[:, :, :, 0])
        assert timestep[0, 0] == 0
        assert bool((timestep[0, 1:] > 0).all())
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(plain.rgb_sum, other.rgb_sum)
    assert torch.equal(plain.heat_sum, other.heat_sum)
    assert torch.equal(batch.latents, kept), "the batch was written to"


def test_fact_7_a_wrong_answer_on_the_given_frame_costs_nothing() -> None:
    module, batch = make_module(dtype="float32"), make_batch()
    with torch.no_grad():
        right = module(batch, 0, 0)
        spoil = module.model.register_forward_hook(
            lambda _, given, output: output + 100 * (torch.arange(output.shape[3]) == 0)[:, None, None]
        )
        wrong = module(batch, 0, 0)
        spoil.remove()
        module.model.register_forward_hook(lambda _, given, output: output + 100 * (torch.arange(output.shape[3]) == 1)[:, None, None])
        seen = module(batch, 0, 0)
    assert torch.equal(right.rgb_sum, wrong.rgb_sum)
    assert seen.rgb_sum > 10 * right.rgb_sum


# ── 8: bf16 timesteps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_8_a_thousand_timesteps_stay_apart_up_to_the_time_embedding() -> None:
    module = make_module(dtype="bfloat16")
    seen: list[torch.Tensor] = []
    module.model.condition_embedder.time_embedder.register_forward_hook(lambda _, given, output: seen.append(output.detach()))
    sigma = flow.euler_sigmas(1000, shift=5.0)[:-1]
    assert sigma.dtype == torch.float32
    latents = torch.zeros(1, 1, 96, 1000, 2, 2)
    text = torch.zeros(1, 1, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.model(latents, flow.timestep(sigma)[None], text, 0)
        module.model(latents, flow.timestep(sigma).to(torch.bfloat16)[None], text, 0)
    ours, rounded = seen
    assert len(ours.unique(dim=0)) == 1000
    assert len(rounded.unique(dim=0)) == 294, "rounding timesteps to bf16 is expected to merge them: this is the failure"


def test_fact_8_the_module_tells_the_network_the_exact_timestep() -> None:
    module, batch = make_module(dtype="bfloat16"), make_batch()
    seen: list[torch.Tensor] = []
    module.model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(batch, 3, 5)
    assert seen[0].dtype == torch.float32
    expected = 1000 * flow.draw_sigma(3, 5, batch.sample_ids, module.config.flow)
    assert torch.equal(seen[0][:, 1:], expected[:, None].expand(1, 2))


# ── 9: zero-initialised projector ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_fact_9_before_the_projector_gradients_come_with_the_second_step() -> None:
    module, batch = make_module(dtype="float32"), make_batch()
    optimizer = make_optimizer(module, TrainConfig(learning_rate=1e-3, warmup_steps=0))
    norms = []
    for step in range(2):
        sums = module(batch, 0, step)
        (sums.rgb_sum.sum() + sums.heat_sum.sum()).backward()
        gradients = dict(module.model.named_parameters())
        norms.append(float(gradients["blocks.0.mvs_attn.to_v.lora_B.default.weight"].grad.norm()))  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert norms[0] == 0
    assert norms[1] > 0
