"""Point -> heatmap picture -> JET colours, and back: colours -> heat -> sub-pixel peak and confidence. Both directions in one file.

Pixel coordinates are those of `batch`: the first pixel's centre is (0.5, 0.5). Knows no cameras and no VAE; a point outside the
picture gives an empty picture, never a spot on its edge.
"""

import numpy as np

_JET_STOPS = np.array([0, 1, 3, 5, 7, 8], np.float32) / 8
"""Heat at the corners of the JET curve, which runs straight from each to the next."""
_JET_CORNERS = np.array([(0, 0, 0.5), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0), (0.5, 0, 0)], np.float32)
"""[6 3] RGB in 0..1 at the stops."""
_JET_ENTRIES = 256
_CHUNK = 1 << 14
"""Pixels looked up at a time: small enough to stay in the processor's cache."""

_BACKGROUND_QUANTILE = 0.95
"""A spot covers less than the remaining share of its picture, so this quantile of the heat is background."""
_FAINTEST_PEAK = 0.02
"""Peaks that stand less than this above the background are none: five steps of an 8-bit picture."""
_FIT_LEVEL = 0.3
"""Pixels above this share of the peak's height take part in the sub-pixel fit."""


def render(uv_px: np.ndarray, visible: np.ndarray, height_px: int, width_px: int, sigma_px: float) -> np.ndarray:
    """[... H W] float32 in 0..1: a Gaussian of height 1 at each uv_px [... 2], all zero where `visible` [...] is false.

    `uv_px` may be anything, NaN included, where not visible. A point that is called visible must be inside the picture (asserted).
    """
    uv = np.asarray(uv_px, np.float64)
    shown = np.asarray(visible, bool)
    assert uv.shape == (*shown.shape, 2), f"render: uv_px {uv.shape} for visible {shown.shape}"
    uv = np.where(shown[..., None], uv, 0.0)
    assert np.all((uv >= 0) & (uv <= (width_px, height_px))), "render: a visible point lies outside the picture"
    across = np.exp(-0.5 * np.square((np.arange(width_px) + 0.5 - uv[..., :1]) / sigma_px))
    down = np.exp(-0.5 * np.square((np.arange(height_px) + 0.5 - uv[..., 1:]) / sigma_px))
    return (np.where(shown[..., None], down, 0.0)[..., :, None] * across[..., None, :]).astype(np.float32)


def colour(heat: np.ndarray) -> np.ndarray:
    """[... 3] uint8 RGB of heat [...] in 0..1, by the 256-entry JET table: 0 dark blue, 1 dark red. Values beyond 0..1 are cut."""
    entries = np.linspace(0, 1, _JET_ENTRIES, dtype=np.float32)
    table = np.stack([np.interp(entries, _JET_STOPS, _JET_CORNERS[:, channel]) for channel in range(3)], axis=-1)
    index = np.rint(np.clip(heat, 0, 1) * (_JET_ENTRIES - 1)).astype(np.uint8)
    return np.rint(table * 255).astype(np.uint8)[index]


def uncolour(rgb: np.ndarray) -> np.ndarray:
    """[...] float32 heat in 0..1 of rgb [... 3] uint8: where the nearest point of the JET curve lies. The inverse of `colour`."""
    pixels = np.asarray(rgb).reshape(-1, 3)
    heat = np.empty(len(pixels), np.float32)
    for start in range(0, len(pixels), _CHUNK):
        heat[start : start + _CHUNK] = _nearest_on_jet(pixels[start : start + _CHUNK].astype(np.float32) / 255)
    return heat.reshape(np.shape(rgb)[:-1])


def _nearest_on_jet(pixels: np.ndarray) -> np.ndarray:
    """[n] heat at the point of the JET curve nearest to each of the pixels [n 3] in 0..1."""
    heat = np.empty(len(pixels), np.float32)
    nearest = np.full(len(pixels), np.inf, np.float32)
    for corner in range(len(_JET_STOPS) - 1):
        start, direction = _JET_CORNERS[corner], _JET_CORNERS[corner + 1] - _JET_CORNERS[corner]
        along = np.clip((pixels - start) @ (direction / np.square(direction).sum()), 0, 1)
        distance = np.square(pixels - start - along[:, None] * direction).sum(axis=-1)
        closer = distance < nearest
        np.copyto(nearest, distance, where=closer)
        np.copyto(heat, _JET_STOPS[corner] + along * (_JET_STOPS[corner + 1] - _JET_STOPS[corner]), where=closer)
    return heat


def peak(heat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uv_px [... 2] float32, confidence [...] float32 in 0..1) of the strongest spot in each picture of heat [... H W].

    Confidence is the spot's height above the background, times its share of all pixels that rise half as high: 1 for a lone clean
    spot, about 1/2 for two equal ones, 0 for a picture without a peak, whose uv_px is then the middle of the picture. A spot so wide
    that more than a twentieth of the picture lies under it counts in part as background, and so for less.
    """
    height_px, width_px = heat.shape[-2:]
    found = [_peak_of_picture(picture) for picture in np.asarray(heat, np.float32).reshape(-1, height_px, width_px)]
    values = np.array(found, np.float32).reshape(*heat.shape[:-2], 3)
    return values[..., :2], values[..., 2]


def _peak_of_picture(heat: np.ndarray) -> tuple[float, float, float]:
    """(u, v, confidence) of one picture [H W]."""
    height_px, width_px = heat.shape
    background = float(np.quantile(heat, _BACKGROUND_QUANTILE))
    padded = np.pad(heat, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    row, column = np.unravel_index(int(np.argmax(smooth)), heat.shape)
    near = heat[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    height = float(near.max()) - background
    if height < _FAINTEST_PEAK:
        return width_px / 2, height_px / 2, 0.0

    down, across = np.ogrid[:height_px, :width_px]
    square_distance = (down - row) ** 2 + (across - column) ** 2
    half = heat >= background + height / 2
    spread = np.sqrt(np.count_nonzero(half) / np.pi)
    around = half & (square_distance <= (1.5 * spread + 1.5) ** 2)
    share = np.count_nonzero(around) / np.count_nonzero(half)
    radius = 1.5 * np.sqrt(np.count_nonzero(around) / np.pi) + 1
    fitted = (heat >= background + height * _FIT_LEVEL) & (square_distance <= radius**2)
    v_index, u_index = np.nonzero(fitted)
    u, v = _fit_centre(heat[fitted], u_index + 0.5, v_index + 0.5)
    return min(max(u, 0.0), width_px), min(max(v, 0.0), height_px), min(height, 1.0) * share


def _fit_centre(heat: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """Centre of the Gaussian through the values [n] at (u, v): least squares on log heat, weighted by heat squared.

    Exact for a Gaussian, also one that the edge of the picture cuts. The weighted mean where the values have no such fit.
    Source: H. Guo, A simple algorithm for fitting a Gaussian function, IEEE Signal Processing Magazine 28 (2011), equation 7.
    """
    middle_u, middle_v = np.average(u, weights=heat), np.average(v, weights=heat)
    du, dv = u - middle_u, v - middle_v
    terms = np.stack([np.ones_like(du), du, dv, du**2 + dv**2], axis=-1) * heat[:, None]
    answer, _, rank, _ = np.linalg.lstsq(terms, heat * np.log(heat), rcond=None)
    if rank < 4 or answer[3] >= 0:
        return middle_u, middle_v
    shift_u, shift_v = -answer[1] / (2 * answer[3]), -answer[2] / (2 * answer[3])
    reach = max(float(np.abs(du).max()), float(np.abs(dv).max())) + 0.5
    if max(abs(shift_u), abs(shift_v)) > reach:
        return middle_u, middle_v
    return middle_u + shift_u, middle_v + shift_v
