"""Which tables of results there are, and what is settled before one is reproduced. Knows no stage and no number that was measured."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from mvwan.closed_loop import FIRST_TUNING_LAYOUT, TrialSettings
from mvwan.config import Config, parse_overrides
from mvwan.errors import MvwanError, nearest
from mvwan.files import flatten
from mvwan.presets import config_from_preset
from mvwan.sim.metaworld import RESERVED_LAYOUTS
from mvwan.sim.tasks import WIDENED, task_name

_OWNED = {
    "data.root": "--output",
    "data.cache": "--output",
    "seed": "--seed",
    "train.steps": "--steps",
    "unfreeze_modulation_and_norms": "--switch",
}
"""Settings that an option of the command decides."""

TEST_LAYOUTS = 700_000
"""Layouts of the demonstrations that predicted paths are measured on; those that are trained on lie below."""

Label = Literal["off", "on"]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A table of results."""

    name: str
    tasks: tuple[str, ...]
    demonstrations: tuple[int, ...]
    """Per task; each number is a model of its own."""
    widened: bool = False
    """Layouts further apart than Meta-World's."""
    has_baseline: bool = False
    published: Mapping[str, int] | None = None
    """Task -> successes of `published_trials`, as printed in `source`."""
    published_trials: int = 25
    source: str = ""


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="metaworld7",
            tasks=(
                *("door-open-v3", "door-close-v3", "button-press-v3", "button-press-topdown-v3", "faucet-close-v3", "faucet-open-v3"),
                "handle-press-v3",
            ),
            demonstrations=(5,),
            published={
                "door-open-v3": 25,
                "door-close-v3": 25,
                "button-press-v3": 25,
                "button-press-topdown-v3": 24,
                "faucet-close-v3": 8,
                "faucet-open-v3": 24,
                "handle-press-v3": 25,
            },
            source="a 5B model trained on GPUs from 5 demonstrations per task, arXiv 2604.03181",
        ),
        Suite(
            name="metaworld7-wide",
            tasks=(
                *("drawer-open-v3", "drawer-close-v3", "button-press-topdown-v3", "window-open-v3", "faucet-open-v3", "coffee-button-v3"),
                "plate-slide-v3",
            ),
            demonstrations=(5, 25),
            widened=True,
            has_baseline=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What to reproduce, and how. Raises `MvwanError` for what cannot be."""

    suite: str
    output: Path
    tasks: Sequence[str] | None = None
    """None: all of the suite."""
    demonstrations: Sequence[int] | None = None
    """None: as the suite has them."""
    switches: tuple[Label, ...] = ("off", "on")
    steps: int = 2000
    trials: int = 25
    execute: int = 8
    denoise_steps: int = 5
    test_demonstrations: int = 3
    """Per task, of layouts that nothing is trained on: predicted paths are measured on them; 0: not measured."""
    control_steps: int = 500
    videos: int = 1
    """Filmed trials per task and policy."""
    seed: int = 0
    tuning: bool = False
    """Layouts for tuning instead of the reserved ones."""
    processes: int = 2
    baseline: Path = Path("benchmarks/conv_baseline.py")
    baseline_steps: int = 1500
    overrides: Sequence[str] = ()
    """`section.field=value` laid over the preset `tiny-finetune`."""
    start_from: Path | None = None
    """Folder of another reproduction: each run goes on from that one's run of the same demonstrations and switch."""

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise MvwanError(f"{self.suite!r}: no such table; there are {', '.join(SUITES)}.{nearest(self.suite, SUITES)}")
        for name, least in (("steps", 2), ("trials", 1), ("test_demonstrations", 0), ("baseline_steps", 1), ("processes", 1)):
            if getattr(self, name) < least:
                raise MvwanError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.test_demonstrations > (FIRST_TUNING_LAYOUT - TEST_LAYOUTS) // 4:  # `record` looks at three layouts for each, and ten more
            raise MvwanError(f"--test-demonstrations {self.test_demonstrations}: at most {(FIRST_TUNING_LAYOUT - TEST_LAYOUTS) // 4}")
        if self.trials > RESERVED_LAYOUTS - FIRST_TUNING_LAYOUT:
            raise MvwanError(f"--trials {self.trials}: at most {RESERVED_LAYOUTS - FIRST_TUNING_LAYOUT}")
        given = flatten(parse_overrides(self.overrides), ".")
        if decided := [name for name in _OWNED if name in given]:
            raise MvwanError(f"--set {decided[0]}: {_OWNED[decided[0]]} decides it here")
        if self.start_from is not None and "train.from_checkpoint" in given:
            raise MvwanError("--set train.from_checkpoint: --start-from decides it here. Give one of them.")
        if min(self.counts) < 1:
            raise MvwanError(f"--demonstrations {min(self.counts)}: at least 1 per task")
        last = self.seed + 3 * max(self.counts) + 10  # `record` looks no further for layouts on which the expert succeeds
        if self.seed < 0 or last > TEST_LAYOUTS:
            raise MvwanError(
                f"--seed {self.seed}: demonstrations take layouts from the seed on and must stay below {TEST_LAYOUTS}, where those "
                "for tests and trials begin. Choose a smaller seed."
            )
        if self.kind.has_baseline and not self.baseline.is_file():
            raise MvwanError(f"--baseline {self.baseline}: no such script. Run this in the repository's folder, or give its path.")
        if self.kind.widened and (unknown := [task for task in self.names if task not in WIDENED]):
            raise MvwanError(f"--task {unknown[0]}: no widened layouts are known; there are for {', '.join(sorted(WIDENED))}")
        self.trial_settings.check(self.config(self.counts[0], self.switches[0]))

    @property
    def kind(self) -> Suite:
        """The suite itself."""
        return SUITES[self.suite]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Meta-World's names of the tasks."""
        return tuple(dict.fromkeys(map(task_name, self.tasks or self.kind.tasks)))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Demonstrations per task, smallest first."""
        return tuple(sorted(set(self.demonstrations or self.kind.demonstrations)))

    @property
    def first_layout(self) -> int:
        """Seed of the first layout of each task's trials."""
        return FIRST_TUNING_LAYOUT if self.tuning else RESERVED_LAYOUTS

    @property
    def trial_settings(self) -> TrialSettings:
        """How trials are run."""
        return TrialSettings(
            execute=self.execute,
            denoise_steps=self.denoise_steps,
            seed=self.seed,
            control_steps=self.control_steps,
            widened=self.kind.widened,
        )

    def config(self, count: int, label: Label) -> Config:
        """The settings of one training."""
        folder = self.output / str(count)
        defaults = {
            "data": {"validation_share": 0.0},
            "train": {"warmup_steps": min(20, self.steps // 4), "save_every": max(1, self.steps // 4), "evaluate_every": 0, "keep_last": 1},
        }
        owned = {
            "seed": self.seed,
            "unfreeze_modulation_and_norms": label == "on",
            "data": {"root": str(folder / "demonstrations"), "cache": str(folder / "latents")},
            "train": {
                "steps": self.steps,
                **({} if self.start_from is None else {"from_checkpoint": str(self.start_from / str(count) / label)}),
            },
        }
        return config_from_preset("tiny-finetune", defaults, parse_overrides(self.overrides), owned, where="settings")

    @property
    def command(self) -> str:
        """The command that gives this again, but for its folder."""
        words = ["mvwan", "reproduce", self.suite]
        words += [word for task in (self.names if self.tasks else ()) for word in ("--task", task)]
        words += [word for count in self.counts for word in ("--demonstrations", str(count))]
        words += ["--switch", self.switches[0] if len(self.switches) == 1 else "both"]
        for name in (
            "steps",
            "trials",
            "execute",
            "denoise_steps",
            "test_demonstrations",
            "control_steps",
            "seed",
            *(["baseline_steps"] if self.kind.has_baseline else []),
        ):
            words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        words += [word for setting in self.overrides for word in ("--set", setting)]
        words += [] if self.start_from is None else ["--start-from", str(self.start_from)]
        return shlex.join([*words, "--tuning"] if self.tuning else words)
