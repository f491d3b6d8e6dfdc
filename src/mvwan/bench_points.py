"""Time and memory of training steps at one point, in a process of its own; and how both grow along an axis.

    python -m mvwan.bench_points < point.json        settings and sizes -> {"seconds": [...], "built_mb": ..., "peak_mb": ...}

A process has one largest size in its life, so each point gets one. Knows no table.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mvwan.bench_networks import Sizes, training_step
from mvwan.config import Config, config_from_dict
from mvwan.errors import MvwanError
from mvwan.memory import peak_bytes
from mvwan.training_module import HeatmapWanTrainingModule

Axis = Literal["views", "latent frames", "picture side, px", "batch", "LoRA rank"]
GROWTH: Mapping[Axis, tuple[int, ...]] = {
    "views": (1, 2, 3, 4, 6),
    "latent frames": (2, 3, 5, 7),
    "picture side, px": (64, 128, 192, 256),
    "batch": (1, 2, 4, 8),
    "LoRA rank": (4, 16, 64, 256),
}
"""Axis -> where it is measured; everything else stays as it is."""
_PX_PER_LATENT = 16
_STEPS = 4
"""Of a point; the first is not counted."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Time and memory along an axis."""

    axis: Axis
    at: tuple[int, ...]
    seconds: tuple[float, ...]
    """Fastest step at each place: what other work on the machine adds is not growth."""
    peak_mb: tuple[float, ...]
    seconds_fit: tuple[float, float]
    """(a, b) of a + b * x, x counted in the axis's own unit, or in its square for the side of a picture."""
    peak_mb_fit: tuple[float, float]
    exponent: float
    """Of the seconds: the slope of their logarithm over that of the axis."""

    @property
    def power(self) -> int:
        """Of x in the fits."""
        return power_of(self.axis)


def power_of(axis: Axis) -> int:
    """Of x in the fits along an axis: pictures count by their area."""
    return 2 if axis == "picture side, px" else 1


def measure_growth(config: Config, sizes: Sizes, axis: Axis, say: Callable[[str], None]) -> Growth:
    """Time and memory at every place of the axis, and what was fitted to them."""
    found = []
    for place in GROWTH[axis]:
        say(f"growth with {axis}: {place}")
        found.append(run_point(*at(config, sizes, axis, place)))
    seconds, peaks = [min(point["seconds"]) for point in found], [point["peak_mb"] for point in found]
    places = GROWTH[axis]
    x = [float(place ** power_of(axis)) for place in places]
    return Growth(
        axis=axis,
        at=places,
        seconds=tuple(seconds),
        peak_mb=tuple(peaks),
        seconds_fit=line_through(x, seconds),
        peak_mb_fit=line_through(x, peaks),
        exponent=line_through([math.log(place) for place in places], [math.log(value) for value in seconds])[1],
    )


def at(config: Config, sizes: Sizes, axis: Axis, place: int) -> tuple[Config, Sizes]:
    """Settings and sizes with the axis at `place`."""
    if axis == "views":
        return replace(config, model=replace(config.model, views=place)), replace(sizes, views=place)
    if axis == "LoRA rank":
        lora = replace(config.trainable.lora, rank=place, alpha=float(place))
        return replace(config, trainable=replace(config.trainable, lora=lora)), sizes
    if axis == "picture side, px":
        side = place // _PX_PER_LATENT
        return config, replace(sizes, latent_height=side, latent_width=side)
    return config, replace(sizes, latent_frames=place) if axis == "latent frames" else replace(sizes, batch=place)


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(a, b) of the least-squares line a + b * x."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / sum((one - mean_x) ** 2 for one in x)
    return mean_y - slope * mean_x, slope


def run_point(config: Config, sizes: Sizes) -> dict[str, Any]:
    """`seconds` of steps, `built_mb` when the model stood and `peak_mb` in the end, from a process of its own."""
    point = json.dumps({"config": config.to_dict(), "sizes": asdict(sizes)})
    done = subprocess.run([sys.executable, "-m", "mvwan.bench_points"], input=point, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MvwanError(f"bench: {sizes} ended with code {done.returncode}: {last}. Choose smaller sizes.")
    return json.loads(done.stdout)


def main() -> None:
    """Measures the point on standard input and prints it."""
    point = json.load(sys.stdin)
    config, sizes = config_from_dict(point["config"], "bench"), Sizes(**point["sizes"])
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    built_mb, step, seconds = peak_bytes() / 2**20, training_step(module, sizes, config.seed), []
    for number in range(_STEPS):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds[1:], "built_mb": built_mb, "peak_mb": peak_bytes() / 2**20}))


if __name__ == "__main__":
    main()
