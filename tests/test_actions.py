"""actions: turns of the hand against known ones, bins and back, and a loss that counts what is labelled and not given."""

import math

import numpy as np
import pytest
import torch

from mvwan.actions import (
    ACTION_HEADS,
    action_counts,
    action_head_of,
    action_losses,
    bins_of,
    degrees_of,
    read_out,
    rotation_from_first,
    turned,
)
from mvwan.data.transforms import rigid
from mvwan.errors import MvwanError

HALF = math.sqrt(0.5)
UPRIGHT = (1.0, 0.0, 0.0, 0.0)


def random_quaternions(count: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, 4))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("quaternion", "degrees"),
    [
        (UPRIGHT, (0, 0, 0)),
        ((-1.0, 0.0, 0.0, 0.0), (0, 0, 0)),
        ((HALF, HALF, 0.0, 0.0), (90, 0, 0)),
        ((HALF, 0.0, 0.0, HALF), (0, 0, 90)),
        ((0.0, 0.0, 0.0, 1.0), (0, 0, 180)),
        ((math.cos(math.radians(15)), 0.0, math.sin(math.radians(15)), 0.0), (0, 30, 0)),
        ((HALF, 0.0, HALF, 0.0), (0, 90, 0)),  # where Euler angles are not unique
        ((0.5, 0.5, 0.5, 0.5), (90, 0, 90)),  # a third of a turn about the diagonal
    ],
)
def test_known_turns(quaternion: tuple[float, ...], degrees: tuple[float, ...]) -> None:
    found = rotation_from_first(np.array([UPRIGHT, quaternion]))
    np.testing.assert_allclose(found, [(0, 0, 0), degrees], atol=1e-4)
    assert found.dtype == np.float32


def test_angles_are_about_fixed_axes_x_first_like_those_of_an_augmentation() -> None:
    degrees = np.array([40.0, -25.0, 110.0])
    w, x, y, z = turned(np.array(UPRIGHT), degrees[None])[0]
    ahead = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)])
    np.testing.assert_allclose(ahead, rigid(np.radians(degrees).tolist(), (0, 0, 0))[:3, 0], atol=1e-12)


def test_turns_and_orientations_are_inverse() -> None:
    quaternions = random_quaternions(200)
    back = turned(quaternions[0], rotation_from_first(quaternions))
    np.testing.assert_allclose(np.abs((back * quaternions).sum(axis=1)), 1, atol=1e-6)


def test_turning_the_world_changes_no_turn_of_the_hand() -> None:
    quaternions = random_quaternions(20)
    w, x, y, z = random_quaternions(1, seed=1)[0]
    world = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    np.testing.assert_allclose(rotation_from_first(quaternions @ world.T), rotation_from_first(quaternions), atol=1e-3)


def test_an_orientation_that_is_missing_is_missing_alone_unless_it_is_the_first() -> None:
    quaternions = random_quaternions(5)
    quaternions[3] = np.nan
    assert np.isnan(rotation_from_first(quaternions)).all(axis=1).tolist() == [False, False, False, True, False]
    quaternions[0] = np.nan
    assert np.isnan(rotation_from_first(quaternions)).all()


# ── bins ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bins_go_round_the_circle_and_back() -> None:
    assert bins_of(torch.tensor([0.0, 2.4, 2.6, -2.4, -2.6, 177.4, 177.6, 180.0, -180.0])).tolist() == [0, 0, 1, 0, 71, 35, 36, 36, 36]
    every = torch.arange(72)
    assert torch.equal(bins_of(degrees_of(every)), every)
    assert (degrees_of(every).min(), degrees_of(every).max(), degrees_of(every)[0]) == (-180, 175, 0)
    degrees = torch.linspace(-180, 180, 1001)
    off = (degrees_of(bins_of(degrees)) - degrees + 180).remainder(360) - 180
    assert off.abs().max() <= 2.5 + 1e-4


# ── the loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def labels(batch: int = 2, frames: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, frames, generator=generator), torch.rand(batch, frames, 3, generator=generator) * 360 - 180


def logits(head: str, batch: int = 2, frames: int = 9) -> torch.Tensor:
    return torch.randn(batch, frames, ACTION_HEADS[head], generator=torch.Generator().manual_seed(1))


def test_the_loss_is_cross_entropy_over_what_is_not_given() -> None:
    opening, turn = labels()
    answer = logits("gripper_rotation")
    sums = action_losses(answer, opening, turn, 2)  # two latent frames are five pictures
    says = torch.sigmoid(answer[:, 5:, 0])
    expected = -(opening[:, 5:] * says.log() + (1 - opening[:, 5:]) * (1 - says).log()).sum(dim=1)
    torch.testing.assert_close(sums["gripper_sum"], expected)
    chances = answer[:, 5:, 1:].reshape(2, 4, 3, 72).softmax(dim=-1)
    right = torch.gather(chances, -1, bins_of(turn[:, 5:])[..., None])[..., 0]
    torch.testing.assert_close(sums["rotation_sum"], -right.log().mean(dim=-1).sum(dim=1))
    assert (sums["gripper_count"].tolist(), sums["rotation_count"].tolist()) == ([4, 4], [4, 4])
    assert action_losses(answer, opening, turn, 0)["gripper_count"].tolist() == [9, 9]


def test_frames_without_a_label_are_in_neither_sum_nor_count_nor_gradient() -> None:
    opening, turn = labels()
    opening[0, 3:], turn[1, 4:, 0] = torch.nan, torch.nan
    answer = logits("gripper_rotation").requires_grad_()
    sums = action_losses(answer, opening, turn, 1)
    assert (sums["gripper_count"].tolist(), sums["rotation_count"].tolist()) == ([2, 8], [8, 3])
    (sums["gripper_sum"].sum() + sums["rotation_sum"].sum()).backward()
    assert answer.grad is not None and bool(torch.isfinite(answer.grad).all())
    assert not answer.grad[:, 0].any(), "the given frame"
    assert not answer.grad[0, 3:, 0].any() and bool(answer.grad[0, 1:3, 0].all())
    assert not answer.grad[1, 4:, 1:].any() and bool(answer.grad[1, 1:4, 1:].all())
    known = action_losses(answer[:1, :3], opening[:1, :3], turn[:1, :3], 1)
    torch.testing.assert_close(known["gripper_sum"][0], sums["gripper_sum"][0])


@pytest.mark.parametrize(("head", "counts"), [("none", [0, 0]), ("gripper", [16, 0]), ("gripper_rotation", [16, 13])])
def test_counts_are_known_before_the_forward_pass(head: str, counts: list[int]) -> None:
    opening, turn = labels()
    turn[0, 6:] = torch.nan
    assert action_counts(head, opening, turn, 1).tolist() == counts
    if head != "none":
        sums = action_losses(logits(head), opening, turn, 1)
        assert [int(sums[name].sum()) if name in sums else 0 for name in ("gripper_count", "rotation_count")] == counts


# ── read out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sure_answers_are_read_out_as_the_labels_that_they_mean() -> None:
    opening, turn = labels()
    answer = torch.full((2, 9, ACTION_HEADS["gripper_rotation"]), -20.0)
    answer[..., 0] = torch.logit(opening)
    answer[..., 1:].reshape(2, 9, 3, 72).scatter_(-1, bins_of(turn)[..., None], 20.0)
    found, degrees = read_out(answer)
    np.testing.assert_allclose(found, opening, atol=1e-6)
    assert np.array_equal(degrees[:, 1:], degrees_of(bins_of(turn))[:, 1:])
    assert not degrees[:, 0].any()
    assert np.isnan(read_out(answer[..., :1])[1]).all()


def test_a_head_is_known_by_its_last_layer() -> None:
    for name, count in ACTION_HEADS.items():
        assert action_head_of({"head_action.proj_out.bias": (4 * count,)} if count else {"heads": (4,)}) == name
    with pytest.raises(MvwanError, match=r"proj_out\.bias is \[5\]; an action head has 4 or 868 values"):
        action_head_of({"head_action.proj_out.bias": (5,)})
