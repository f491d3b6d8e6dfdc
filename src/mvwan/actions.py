"""What the action head says and learns: gripper openings and turns of the hand, as labels, as bins, as a loss, and read out.

A turn is the rotation of the hand since frame 0 of its window, told in the hand's own axes of that frame: whatever moves or turns the
world leaves it alone, and small turns are far from the angles where Euler angles jump. Its three angles are about x, then y, then z of
those axes (scipy's `Rotation.as_euler("xyz")`), each in one of 72 bins whose centres are the multiples of 5 degrees, so that bin 0 is
no turn and the last bin lies beside it.

The head answers with logits [B F A] per frame: A[0] is the gripper's, the other 3 * 72 (where it has them) the bins'. Given frames and
frames without a label are in neither sum nor count of the loss. Knows no network, no data set and no weight of a loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional

from mvwan.errors import MvwanError
from mvwan.shapes import FRAMES_PER_LATENT, num_frames_of

NUM_BINS = 72
BIN_DEG = 360 / NUM_BINS
GRIPPER_LOGITS = 1
ACTION_HEADS = {"none": 0, "gripper": GRIPPER_LOGITS, "gripper_rotation": GRIPPER_LOGITS + 3 * NUM_BINS}
"""Values of `model.action_head` -> A, its logits per frame."""


def action_head_of(shapes: Mapping[str, Sequence[int]]) -> str:
    """The value of `model.action_head` that a model with tensors of these names and shapes has, by the rows of the head's last layer."""
    shape = shapes.get("head_action.proj_out.bias", (0,))
    rows = {FRAMES_PER_LATENT * logits: name for name, logits in ACTION_HEADS.items()}
    if len(shape) != 1 or shape[0] not in rows:
        sizes = " or ".join(str(size) for size in rows if size)
        raise MvwanError(f"head_action.proj_out.bias is {list(shape)}; an action head has {sizes} values there")
    return rows[shape[0]]


# ── turns of the hand ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rotation_from_first(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """[F 3] float32 degrees in -180..180: the turn from frame 0 to each frame of quaternion_wxyz [F 4]; NaN where either is NaN.

    The inverse of `turned`. A quaternion and its negative are the same orientation.
    """
    matrices = _matrices(quaternion_wxyz)
    relative = np.swapaxes(matrices[:1], -1, -2) @ matrices
    about_y = np.arcsin(np.clip(-relative[:, 2, 0], -1, 1))
    is_upright = np.abs(relative[:, 2, 0]) < 1 - 1e-9
    # At 90 degrees about y only the sum of the other two angles is determined: all of it is told about x.
    about_x = np.where(is_upright, np.arctan2(relative[:, 2, 1], relative[:, 2, 2]), np.arctan2(-relative[:, 1, 2], relative[:, 1, 1]))
    about_z = np.where(is_upright, np.arctan2(relative[:, 1, 0], relative[:, 0, 0]), 0.0)
    turns = np.degrees(np.stack([about_x, about_y, about_z], axis=1)).astype(np.float32)
    turns[~np.isfinite(relative).all(axis=(1, 2))] = np.nan
    return turns


def turned(first_wxyz: np.ndarray, rotation_deg: np.ndarray) -> np.ndarray:
    """[F 4] float64 unit quaternions (w, x, y, z): the orientation first_wxyz [4] after each turn of rotation_deg [F 3]."""
    result = np.broadcast_to(np.asarray(first_wxyz, np.float64), (len(rotation_deg), 4))
    half_rad = np.radians(np.asarray(rotation_deg, np.float64)) / 2
    for axis in (2, 1, 0):  # about fixed axes the last turn stands first
        turn = np.zeros_like(result)
        turn[:, 0], turn[:, 1 + axis] = np.cos(half_rad[:, axis]), np.sin(half_rad[:, axis])
        result = _product(result, turn)
    return result / np.linalg.norm(result, axis=1, keepdims=True)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hamilton's product of quaternions [F 4]."""
    w, vector = left[:, :1] * right[:, :1], left[:, :1] * right[:, 1:] + right[:, :1] * left[:, 1:]
    w = w - (left[:, 1:] * right[:, 1:]).sum(axis=1, keepdims=True)
    return np.concatenate([w, vector + np.cross(left[:, 1:], right[:, 1:])], axis=1)


def _matrices(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """[F 3 3] rotation matrices of quaternions [F 4]."""
    quaternion = np.asarray(quaternion_wxyz, np.float64)
    w, x, y, z = (quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def bins_of(rotation_deg: torch.Tensor) -> torch.Tensor:
    """int64 in 0..71 of finite degrees, same shape: the bin with the nearest centre, round the circle. The inverse of `degrees_of`."""
    return (rotation_deg / BIN_DEG).round().long().remainder(NUM_BINS)


def degrees_of(bins: torch.Tensor) -> torch.Tensor:
    """float32 degrees in -180..175, same shape: the centres of the bins."""
    return (bins + NUM_BINS // 2).remainder(NUM_BINS).float() * BIN_DEG - 180


# ── the loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def action_counts(action_head: str, gripper_open: torch.Tensor, rotation_deg: torch.Tensor, condition_frames: int) -> torch.Tensor:
    """[2] int64: frames with an opening and with a turn that count for `model.action_head`, known before any forward pass."""
    learns = ("gripper" in action_head, "rotation" in action_head)
    masks = labelled(gripper_open, rotation_deg, condition_frames)
    return torch.stack([mask.sum() * does for mask, does in zip(masks, learns, strict=True)])


def labelled(gripper_open: torch.Tensor, rotation_deg: torch.Tensor, condition_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gripper, rotation) [B F] bool: the frames that count, labelled and not given. `condition_frames` are latent frames."""
    given = num_frames_of(condition_frames) if condition_frames else 0
    predicted = torch.arange(gripper_open.shape[1], device=gripper_open.device) >= given
    return torch.isfinite(gripper_open) & predicted, torch.isfinite(rotation_deg).all(dim=-1) & predicted


def action_losses(
    logits: torch.Tensor, gripper_open: torch.Tensor, rotation_deg: torch.Tensor, condition_frames: int
) -> dict[str, torch.Tensor]:
    """The fields of `flow.StreamSums` about actions: cross entropy of logits [B F A] with openings [B F] and turns [B F 3].

    An opening is the probability of "open", so the loss of the right answer is its entropy, not 0. Of a turn the mean over the three
    axes is taken. Nothing of rotation counts where the head has no bins.
    """
    has_opening, has_turn = labelled(gripper_open, rotation_deg, condition_frames)
    gripper = functional.binary_cross_entropy_with_logits(logits[..., 0].float(), gripper_open.nan_to_num(), reduction="none")
    sums = {"gripper_sum": torch.where(has_opening, gripper, torch.zeros_like(gripper)).sum(dim=1), "gripper_count": has_opening.sum(dim=1)}
    if logits.shape[-1] == GRIPPER_LOGITS:
        return sums
    by_bin = rearrange(_rotation_logits(logits).float(), "B F xyz bin -> B bin F xyz")
    rotation = functional.cross_entropy(by_bin, bins_of(rotation_deg.nan_to_num()), reduction="none").mean(dim=-1)
    sums["rotation_sum"] = torch.where(has_turn, rotation, torch.zeros_like(rotation)).sum(dim=1)
    return sums | {"rotation_count": has_turn.sum(dim=1)}


def _rotation_logits(logits: torch.Tensor) -> torch.Tensor:
    """[B F 3 72] of logits [B F A]."""
    return rearrange(logits[..., GRIPPER_LOGITS:], "B F (xyz bin) -> B F xyz bin", xyz=3)


# ── read out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_out(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(gripper_open [B F], rotation_deg [B F 3]) float32 of logits [B F A]: the opening, and the centre of the likeliest bin per axis.

    Turns are NaN where the head has no bins; the turn of frame 0 is none by definition.
    """
    gripper_open = torch.sigmoid(logits[..., 0].float())
    rotation_deg = gripper_open.new_full((*gripper_open.shape, 3), torch.nan)
    if logits.shape[-1] > GRIPPER_LOGITS:
        rotation_deg = degrees_of(_rotation_logits(logits).argmax(dim=-1))
        rotation_deg[:, 0] = 0
    return gripper_open.cpu().numpy(), rotation_deg.cpu().numpy()
