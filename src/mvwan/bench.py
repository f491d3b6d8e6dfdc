"""Seconds of a training step: the multi-view model, switch off and on, beside stock diffusers on the same views one by one.

All arms run in one process, taking turns, so that a busy machine slows them alike; what counts is the ratio of their medians.
Stock Wan gets per-token timesteps, as its own pipeline gives them, and the same LoRA. Measures steps alone: no data, no disk.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from mvwan import flow
from mvwan.batch import Batch
from mvwan.config import Config, config_from_dict
from mvwan.errors import MvwanError
from mvwan.model.trainable import apply, optimizer_groups, resolve_groups
from mvwan.model.wan import load_transformer
from mvwan.precision import settle
from mvwan.shapes import LATENT_CHANNELS, PATCH_SIZE, num_frames_of, num_tokens
from mvwan.training_module import HeatmapWanTrainingModule

STOCK, OFF, ON, COMPILED = "stock, views alone", "multi-view, off", "multi-view, on", "multi-view, off, compiled"
_STOCK_GROUPS = ("lora", "all")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The batch that every arm trains on."""

    batch: int = 2
    views: int = 3
    latent_frames: int = 4
    latent_height: int = 8
    latent_width: int = 8
    text_tokens: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise MvwanError(f"{name}={value}: must be at least 1. Set --{name}.")
        if self.latent_frames < 2:
            raise MvwanError("latent_frames=1: the first one is given, so nothing would be predicted. Set --latent_frames 2 or more.")
        for name in ("latent_height", "latent_width"):
            if getattr(self, name) % PATCH_SIZE[1]:
                raise MvwanError(f"{name}={getattr(self, name)}: must be a multiple of {PATCH_SIZE[1]}. Set --{name}.")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What was measured of one model."""

    name: str
    trainable_parameters: int
    seconds: tuple[float, ...]
    """Of each step, in the order they ran."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The arms, stock first."""

    base: str
    sizes: Sizes
    threads: int
    arms: tuple[Arm, ...]

    def ratio(self, arm: Arm) -> float:
        """Median of `arm` over the median of stock."""
        return arm.median_s / self.arms[0].median_s

    def to_json(self) -> dict[str, object]:
        """Plain dicts and numbers, ready for `json.dumps`."""
        arms = [asdict(arm) | {"median_s": arm.median_s, "ratio_to_stock": self.ratio(arm)} for arm in self.arms]
        return {"base": self.base, "sizes": asdict(self.sizes), "threads": self.threads, "arms": arms}

    def render(self) -> Table:
        """A rich table for `Console.print`."""
        sizes = self.sizes
        table = Table(
            title=f"Training step of {self.base}: {sizes.batch} samples x {sizes.views} views x {sizes.latent_frames} latent frames"
        )
        for header in ("model", "trained", "median s", "fastest", "slowest", "x stock"):
            table.add_column(header, justify="left" if header == "model" else "right", no_wrap=True)
        for arm in self.arms:
            times = [f"{value:.3f}" for value in (arm.median_s, min(arm.seconds), max(arm.seconds))]
            table.add_row(arm.name, f"{arm.trainable_parameters:,}", *times, f"{self.ratio(arm):.2f}")
        return table


def run_bench(
    base: str = "tiny", sizes: Sizes | None = None, repeats: int = 9, seed: int = 0, random_weights: bool = False, compiled: bool = False
) -> BenchReport:
    """Times of `repeats` steps of each arm, after one step each that is not counted; `compiled` adds an arm as `train.compile` makes it.

    Raises `MvwanError` for a bad base or number.
    """
    if repeats < 1:
        raise MvwanError(f"repeats={repeats}: must be at least 1. Set --repeats.")
    sizes = sizes or Sizes()
    configs = {name: _config(base, sizes, switch, random_weights) for name, switch in ((OFF, False), (ON, True))}
    steps = {STOCK: _stock_arm(configs[OFF], sizes, seed)} | {name: _multiview_arm(config, sizes, seed) for name, config in configs.items()}
    if compiled:
        steps[COMPILED] = _multiview_arm(configs[OFF], sizes, seed, compiled=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, (step, _) in steps.items():
            start = time.perf_counter()
            step(repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    arms = tuple(Arm(name=name, trainable_parameters=count, seconds=tuple(seconds[name])) for name, (_, count) in steps.items())
    return BenchReport(base=base, sizes=sizes, threads=torch.get_num_threads(), arms=arms)


Step = Callable[[int], None]


def _config(base: str, sizes: Sizes, switch: bool, random_weights: bool) -> Config:
    settings = {
        "base": {"source": base, "random_weights": random_weights},
        "model": {"views": sizes.views},
        "trainable": {"lora": {"rank": 8}},
        "unfreeze_modulation_and_norms": switch,
    }
    return settle(config_from_dict(settings, "bench"))


def _multiview_arm(config: Config, sizes: Sizes, seed: int, compiled: bool = False) -> tuple[Step, int]:
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    if compiled:
        module.compile_blocks()
    optimizer = torch.optim.AdamW(optimizer_groups(module.model, module.groups))
    shape = (sizes.batch, sizes.views, LATENT_CHANNELS, sizes.latent_frames, sizes.latent_height, sizes.latent_width)
    generator = torch.Generator().manual_seed(seed)
    batch = Batch(
        sample_ids=tuple(f"bench@{index}" for index in range(sizes.batch)),
        rgb=torch.randn(shape, generator=generator),
        heat=torch.randn(shape, generator=generator),
        text=torch.randn(sizes.batch, sizes.text_tokens, module.model.config["text_dim"], generator=generator),
        heat_valid=torch.ones(sizes.batch, sizes.views, sizes.latent_frames, dtype=torch.bool),
        gripper_open=torch.full((sizes.batch, num_frames_of(sizes.latent_frames)), torch.nan),
        rotation_deg=torch.full((sizes.batch, num_frames_of(sizes.latent_frames), 3), torch.nan),
    ).check()

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, module.config.train.precision == "bf16"):
            sums = module(batch, seed, number)
        _update(optimizer, flow.total_loss(sums, sums.rgb_count.sum(), sums.heat_count.sum(), config.train.rgb_weight))

    return step, module.table.trainable_parameters


def _stock_arm(config: Config, sizes: Sizes, seed: int) -> tuple[Step, int]:
    base = config.base
    model = load_transformer(base.source, getattr(torch, base.dtype), random_weights=base.random_weights)
    groups = [group for group in resolve_groups(config.trainable) if group.name in _STOCK_GROUPS]
    table = apply(model, groups, rank=config.trainable.lora.rank)
    optimizer = torch.optim.AdamW(optimizer_groups(model, groups))
    generator = torch.Generator().manual_seed(seed)
    pictures = sizes.batch * sizes.views
    shape = (pictures, 1, LATENT_CHANNELS, sizes.latent_frames, sizes.latent_height, sizes.latent_width)
    clean, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    text = torch.randn(sizes.batch, sizes.text_tokens, model.config["text_dim"], generator=generator)
    text = text.repeat_interleave(sizes.views, dim=0)
    per_frame = num_tokens(1, sizes.latent_height, sizes.latent_width)

    def step(number: int) -> None:
        ids = [f"bench@{index}" for index in range(pictures)]
        sigma_bf = flow.sigma_per_frame(flow.draw_sigma(seed, number, ids, config.flow), sizes.latent_frames, 1)
        timestep = flow.timestep(sigma_bf).repeat_interleave(per_frame, dim=1)
        with torch.autocast("cpu", torch.bfloat16, config.train.precision == "bf16"):
            velocity = model(flow.add_noise(clean, noise, sigma_bf)[:, 0], timestep, text, return_dict=False)[0]
        _update(optimizer, (velocity.float() - flow.velocity_target(clean, noise)[:, 0])[:, :, 1:].square().mean())

    return step, table.trainable_parameters


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """`python -m mvwan.bench`: prints the table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="add an arm with train.compile")
    parser.add_argument("--json", action="store_true")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    try:
        report = run_bench(args.base, Sizes(**{name: getattr(args, name) for name in asdict(Sizes())}), args.repeats, compiled=args.compile)
    except MvwanError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        Console().print(report.render())


if __name__ == "__main__":
    main()
