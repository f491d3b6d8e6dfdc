"""Dimension letters, and the arithmetic from pixels to latents to tokens. Plain integers, no tensors.

Letters, used in names, docstrings and einops strings everywhere:

    B  batch (samples)          V  views (cameras)          S  streams (rgb, heat)
    F  frames (pictures)        H  height in px             W  width in px
    f  latent frames            h  latent height            w  latent width
    C  channels                 L  text tokens              D  text width
    n  tokens of one latent frame and view: (h / 2) * (w / 2)

Source of the numbers: the Wan2.2 VAE (16x spatial, 4x temporal, first frame alone) and the (1, 2, 2) patch of Wan2.2-TI2V.
"""

from mvwan.errors import MvwanError

FRAMES_PER_LATENT = 4
PIXELS_PER_LATENT = 16
PATCH_SIZE = (1, 2, 2)
PIXELS_PER_TOKEN = PIXELS_PER_LATENT * PATCH_SIZE[1]
LATENT_CHANNELS = 48


def check_num_frames(num_frames: int, field: str = "data.num_frames") -> None:
    """Nothing, or `MvwanError` naming `field` when `num_frames` is not 4*k + 1."""
    if num_frames < 1 or (num_frames - 1) % FRAMES_PER_LATENT:
        below = max(1, num_frames - (num_frames - 1) % FRAMES_PER_LATENT)
        raise MvwanError(f"{field}={num_frames}: Wan needs 4*k+1 frames; nearest are {below} and {below + FRAMES_PER_LATENT}. Set {field}.")


def check_picture_size(height_px: int, width_px: int, field: str = "data.height_px, data.width_px") -> None:
    """Nothing, or `MvwanError` naming `field` when a side is not a positive multiple of 32 px."""
    for side in (height_px, width_px):
        if side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN:
            below = max(PIXELS_PER_TOKEN, side - side % PIXELS_PER_TOKEN)
            raise MvwanError(
                f"{field}={height_px}x{width_px}: each side must be a multiple of {PIXELS_PER_TOKEN} px; "
                f"nearest to {side} are {below} and {below + PIXELS_PER_TOKEN}. Set {field}."
            )


def num_latent_frames(num_frames: int) -> int:
    """f = (F - 1) / 4 + 1. Raises `MvwanError` when `num_frames` is not 4*k + 1."""
    check_num_frames(num_frames)
    return (num_frames - 1) // FRAMES_PER_LATENT + 1


def num_frames_of(latent_frames: int) -> int:
    """F = (f - 1) * 4 + 1, the inverse of `num_latent_frames`."""
    return (latent_frames - 1) * FRAMES_PER_LATENT + 1


def latent_size(height_px: int, width_px: int) -> tuple[int, int]:
    """(h, w) of the latents of an H x W picture. Raises `MvwanError` when a side is not a multiple of 32 px."""
    check_picture_size(height_px, width_px)
    return height_px // PIXELS_PER_LATENT, width_px // PIXELS_PER_LATENT


def num_tokens(latent_frames: int, latent_height: int, latent_width: int) -> int:
    """Tokens of one view: f * (h / 2) * (w / 2)."""
    frames, height, width = PATCH_SIZE
    return (latent_frames // frames) * (latent_height // height) * (latent_width // width)


def frames_of_latent(latent_frame: int) -> range:
    """The frames that latent frame `latent_frame` holds: frame 0 alone, then groups of four."""
    if latent_frame == 0:
        return range(1)
    start = (latent_frame - 1) * FRAMES_PER_LATENT + 1
    return range(start, start + FRAMES_PER_LATENT)
