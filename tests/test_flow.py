"""flow: the time convention by known solutions, draws as pure functions, what is in the loss and what is not."""

from itertools import pairwise

import pytest
import torch

from mvwan import flow
from mvwan.config import FlowConfig

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do
SHAPE = (2, 6, 4, 2, 3)  # V 2C f h w
IDS = ("drawer-open/000001@0#0", "drawer-open/000001@4#0", "faucet/000003@8#1")


def draw(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, *SHAPE), generator=generator), torch.randn((batch, *SHAPE), generator=generator)


def test_warp_keeps_the_ends_and_moves_the_middle_to_noise() -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    warped = flow.warp(sigma, 5.0)
    assert warped[0] == 0
    assert warped[-1] == 1
    assert bool((warped.diff() > 0).all())
    assert warped[50].item() == pytest.approx(5 / 6)
    torch.testing.assert_close(flow.warp(warped, 1 / 5.0), sigma)


def test_draws_do_not_depend_on_the_batch_around_a_sample() -> None:
    settings = FlowConfig()
    sigma = flow.draw_sigma(7, 3, IDS, settings)
    noise = flow.draw_noise(7, 3, IDS, SHAPE)
    assert sigma.dtype == torch.float32
    assert noise.shape == (3, *SHAPE)
    torch.manual_seed(99)
    for place, name in enumerate(IDS):
        assert flow.draw_sigma(7, 3, [name], settings)[0] == sigma[place]
        assert torch.equal(flow.draw_noise(7, 3, [name], SHAPE)[0], noise[place])
    assert torch.equal(flow.draw_sigma(7, 3, IDS[::-1], settings), sigma.flip(0))


@pytest.mark.parametrize("other", [(8, 3, IDS[0]), (7, 4, IDS[0]), (7, 3, IDS[1])])
def test_every_part_of_the_key_counts(other: tuple[int, int, str]) -> None:
    seed, step, name = other
    assert flow.draw_sigma(7, 3, IDS[:1], FlowConfig()) != flow.draw_sigma(seed, step, [name], FlowConfig())
    assert not torch.equal(flow.draw_noise(7, 3, IDS[:1], SHAPE), flow.draw_noise(seed, step, [name], SHAPE))


def test_the_distribution_of_sigma_is_the_warped_uniform() -> None:
    names = [f"s{i}" for i in range(4000)]
    sigma = flow.draw_sigma(0, 0, names, FlowConfig(sigma_min=0.2, sigma_max=0.8, shift=3.0)).double()
    before = flow.warp(sigma, 1 / 3.0)
    assert before.min() >= 0.2
    assert before.max() <= 0.8
    assert before.mean().item() == pytest.approx(0.5, abs=0.01)
    assert before.std().item() == pytest.approx(0.6 / 12**0.5, abs=0.01)
    noise = flow.draw_noise(0, 0, names[:200], SHAPE)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_the_path_ends_at_data_and_noise_and_its_slope_is_the_target() -> None:
    clean, noise = draw()
    clean, noise = clean.double(), noise.double()
    at = lambda value: flow.add_noise(clean, noise, torch.full((3, 4), value, dtype=torch.float64))  # noqa: E731
    assert torch.equal(at(0.0), clean)
    assert torch.equal(at(1.0), noise)
    torch.testing.assert_close((at(0.6) - at(0.5)) / 0.1, flow.velocity_target(clean, noise))


def test_given_frames_have_sigma_zero_and_stay_clean_without_sharing_memory() -> None:
    clean, noise = draw()
    sigma = flow.sigma_per_frame(torch.tensor([0.3, 0.9, 1.0]), 4, condition_frames=2)
    assert sigma.tolist() == [[0, 0, pytest.approx(s), pytest.approx(s)] for s in (0.3, 0.9, 1.0)]
    noisy = flow.add_noise(clean, noise, sigma)
    assert torch.equal(noisy[:, :, :, :2], clean[:, :, :, :2])
    assert not torch.isclose(noisy[:, :, :, 2:], clean[:, :, :, 2:]).all()
    assert noisy.untyped_storage().data_ptr() != clean.untyped_storage().data_ptr()
    assert torch.equal(flow.add_noise(clean, noise * 7, sigma)[:, :, :, :2], clean[:, :, :, :2])


def test_loss_counts_neither_given_frames_nor_invalid_heat_frames() -> None:
    clean, noise = draw()
    target = flow.velocity_target(clean, noise)
    valid = torch.ones(3, 2, 4, dtype=torch.bool)
    valid[0, 1, 2] = False
    valid[1, 0, 0] = False  # a given frame: out of the loss anyway
    right = flow.stream_losses(target, target, valid, condition_frames=1)
    assert right.rgb_sum.tolist() == [0, 0, 0]
    frame = 3 * 2 * 3
    assert right.rgb_count.tolist() == [2 * 3 * frame] * 3
    assert right.heat_count.tolist() == [5 * frame, 6 * frame, 6 * frame]

    wrong_where_it_does_not_count = target.clone()
    wrong_where_it_does_not_count[:, :, :, 0] += 100
    wrong_where_it_does_not_count[0, 1, 3:, 2] = float("nan")
    sums = flow.stream_losses(wrong_where_it_does_not_count, target, valid, condition_frames=1)
    assert sums.heat_sum.tolist() == [0, 0, 0]
    assert sums.rgb_sum.tolist() == [0, 0, 0]

    off_by_two = flow.stream_losses(target + 2, target, valid, condition_frames=1)
    torch.testing.assert_close(off_by_two.heat_sum, 4.0 * right.heat_count)
    torch.testing.assert_close(off_by_two.rgb_sum, 4.0 * right.rgb_count)


def test_invalid_heat_frames_give_no_gradient_even_when_they_are_nan() -> None:
    clean, noise = draw(1)
    target = flow.velocity_target(clean, noise)
    valid = torch.zeros(1, 2, 4, dtype=torch.bool)
    velocity = torch.zeros_like(target, requires_grad=True)
    target[:, :, 3:] = float("nan")
    sums = flow.stream_losses(velocity, target, valid, condition_frames=1)
    (gradient,) = torch.autograd.grad(flow.total_loss(sums, sums.rgb_count.sum(), sums.heat_count.sum(), 0.5), velocity)
    assert torch.isfinite(gradient).all()
    assert bool((gradient[:, :, 3:] == 0).all())
    assert bool((gradient[:, :, :3, 1:] != 0).any())


def test_loss_of_a_step_is_the_same_however_it_is_cut() -> None:
    clean, noise = draw()
    target = flow.velocity_target(clean, noise).double()
    valid = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    velocity = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = flow.stream_losses(velocity, target, valid, 1)
    rgb_count, heat_count = (counts.sum() for counts in flow.stream_counts(velocity.shape, valid, 1))
    assert (rgb_count, heat_count) == (whole.rgb_count.sum(), whole.heat_count.sum())
    parts = [flow.stream_losses(velocity[i : i + 1], target[i : i + 1], valid[i : i + 1], 1) for i in range(3)]
    total = sum(flow.total_loss(part, rgb_count, heat_count, 0.08) for part in parts)
    torch.testing.assert_close(total, flow.total_loss(whole, rgb_count, heat_count, 0.08))
    mean = lambda sums, count: sums.sum() / count  # noqa: E731
    torch.testing.assert_close(total, 0.08 * mean(whole.rgb_sum, rgb_count) + 0.92 * mean(whole.heat_sum, heat_count))


def test_euler_walks_a_straight_path_exactly_and_a_curved_one_better_with_more_steps() -> None:
    clean, noise = draw()
    latents = noise.double()
    sigmas = flow.euler_sigmas(5, shift=5.0).double()
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    for sigma, following in pairwise(sigmas):
        latents = flow.euler_step(latents, flow.velocity_target(clean.double(), noise.double()), sigma, following)
    torch.testing.assert_close(latents, clean.double())

    # Data of standard deviation 0.5 about 0: the velocity field is known, x(1) = noise flows to 0.5 * noise.
    def error(steps: int) -> float:
        x, path = noise.double(), flow.euler_sigmas(steps, shift=1.0).double()
        for s, following in pairwise(path):
            variance = (1 - s) ** 2 * 0.25 + s**2
            x = flow.euler_step(x, x * (s - (1 - s) * 0.25) / variance, s, following)
        return float((x - 0.5 * noise).abs().max())

    assert error(160) < 0.6 * error(80) < 0.05


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_euler_asks_for_no_sigma_below_the_trained_ones(steps: int) -> None:
    spaced = flow.euler_sigmas(steps, shift=5.0, sigma_min=0.6)
    lowest = flow.warp(torch.tensor(0.6), 5.0)
    assert spaced[0] == 1
    assert spaced[-1] == 0
    assert bool((spaced.diff() < 0).all())
    assert bool((spaced[:-1] > lowest).all())
    torch.testing.assert_close(spaced[-2], flow.warp(torch.tensor(0.6 + 0.4 / steps), 5.0))
    torch.testing.assert_close(flow.euler_sigmas(5, 5.0, 0.0), flow.warp(torch.linspace(1, 0, 6), 5.0))


def test_timesteps_keep_a_thousand_values_where_bf16_keeps_fewer() -> None:
    sigma = flow.euler_sigmas(1000, shift=5.0)[:-1]
    assert flow.timestep(sigma).dtype == torch.float32
    assert len(flow.timestep(sigma).unique()) == 1000
    assert len(flow.timestep(sigma).to(torch.bfloat16).unique()) == 294
    assert len(flow.timestep(sigma.to(torch.bfloat16)).unique()) == 294


def test_bands_cover_zero_to_one_without_gap() -> None:
    bands = flow.sigma_bands()
    assert bands[0][0] == 0
    assert bands[-1][1] == 1
    assert [high for _, high, _ in bands[:-1]] == [low for low, _, _ in bands[1:]]
    assert len({name for _, _, name in bands}) == len(bands)


def test_bands_of_a_run_end_where_its_noise_ends() -> None:
    assert flow.sigma_bands(FlowConfig()) == flow.sigma_bands()
    (only,) = flow.sigma_bands(FlowConfig(sigma_min=0.6))
    assert only == (pytest.approx(5 * 0.6 / 3.4), 1.0, "0.88-1.00")
    names = [name for _, _, name in flow.sigma_bands(FlowConfig(sigma_min=0.1, sigma_max=0.5, shift=1.0))]
    assert names == ["0.10-0.25", "0.25-0.50"]
