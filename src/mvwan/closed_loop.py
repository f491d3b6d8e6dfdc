"""Success in Meta-World: trials of a run and of its controls in parallel processes, one JSON line each, a table, videos.

    <run>/rollouts.jsonl        one line per finished trial; a restart runs only what is missing
    <run>/closed_loop.json      successes per task and policy, with Wilson intervals
    <run>/rollouts/*.mp4        the filmed trials

A success rate stands beside its controls, since some tasks are solved by replaying a demonstration blindly. Layouts from
`RESERVED_LAYOUTS` up are for final evaluation alone; without `final` trials use those from `FIRST_TUNING_LAYOUT`. Knows no prediction
metric and no page.
"""

import atexit
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mvwan import pictures
from mvwan.checkpoint import find_checkpoint, read_manifest
from mvwan.config import Config, config_from_dict
from mvwan.errors import MvwanError
from mvwan.evaluation_table import CLOSED_LOOP_FORMAT
from mvwan.files import json_line, only_worker, read_json_lines, sha256_json, write_file, write_json
from mvwan.memory import peak_bytes
from mvwan.metrics import rate_in_words, success_rate
from mvwan.policies import POLICIES, Demonstrations, ExpertWaypoints, Hold, Policy, PolicyName, Predicted, Replay, Seen
from mvwan.sample import HeatFrom, LoadedRun, load_run
from mvwan.sim.execution import Arm, Plan
from mvwan.sim.metaworld import CONTROL_STEPS_PER_SECOND, RESERVED_LAYOUTS, Simulator
from mvwan.sim.tasks import WIDENED, task_name

FIRST_TUNING_LAYOUT = 800_000
_FILM_EVERY = 4
_WAYPOINT_COLOUR = (255, 230, 0)


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """How trials are run. Whatever changes a trial's outcome is a field here or of `Trial`."""

    execute: int = 8
    """Waypoints of a prediction that are followed before the run looks again."""
    denoise_steps: int = 5
    seed: int = 0
    """Of the predictions' noise and of the choice of replayed demonstrations."""
    control_steps: int = 500
    """A trial without success ends after so many; Meta-World's own limit."""
    widened: bool = False
    """Layouts further apart than Meta-World's."""
    heat_from: HeatFrom = "auto"
    """As for `load_run`."""

    def check(self, run: Config) -> "TrialSettings":
        """Itself, or `MvwanError` that names the field at fault."""
        if run.model.views < 2:
            raise MvwanError("closed loop: the run has one view, and a point in space needs two. Train with more cameras.")
        if run.train.condition_frames != 1:
            raise MvwanError(f"closed loop: the run starts from {run.train.condition_frames} given latent frames, an arm sees one picture")
        most = run.data.num_frames - 1
        if not 1 <= self.execute <= most:
            raise MvwanError(f"--execute {self.execute}: the run predicts {most} later frames; choose 1 to {most}")
        if self.denoise_steps < 1 or self.control_steps < 1:
            raise MvwanError(
                f"denoise_steps={self.denoise_steps}, control_steps={self.control_steps}: at least 1 each. Five denoising steps are usual."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One attempt."""

    checkpoint: Path
    """Folder of the checkpoint that drives; its run's folder holds what trials leave."""
    task: str
    layout_seed: int
    policy: PolicyName
    settings: TrialSettings
    film: Path | None
    """Where its video goes, None: it is not filmed."""
    digest: str
    """Of all that its outcome depends on."""


def evaluate_closed_loop(
    run: str | Path,
    *,
    trials: int = 25,
    tasks: Sequence[str] | None = None,
    policies: Sequence[PolicyName] = POLICIES,
    settings: TrialSettings | None = None,
    final: bool = False,
    processes: int = 2,
    videos: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Successes per task and policy as plain dicts, also written to `closed_loop.json` in the run's folder.

    `trials` layouts of each task (None: the tasks of the run's demonstrations), the same for every policy; `final` takes the reserved
    ones. Finished trials are kept in `rollouts.jsonl` and not repeated. The first `videos` trials of each task and policy are filmed.
    Raises `MvwanError` for a run that knows none of Meta-World's tasks, for settings that do not fit it, or when another command is
    letting it move.
    """
    started = time.monotonic()
    settings = settings or TrialSettings()
    planned = plan_trials(run, trials=trials, tasks=tasks, policies=policies, settings=settings, final=final, videos=videos)
    run_folder = planned[0].checkpoint.parents[1]
    with only_worker(run_folder / "rollouts", wait=False):
        lines = _run_missing(planned, run_folder / "rollouts.jsonl", processes, progress)
    result = {
        "format_version": CLOSED_LOOP_FORMAT,
        "settings": asdict(settings),
        "final": final,
        "trials": trials,
        "policies": list(policies),
        "tasks": successes([lines[trial.digest] for trial in planned]),
        "films": [
            {name: lines[trial.digest][name] for name in ("task", "policy", "layout_seed", "success", "control_steps")}
            | {"file": f"rollouts/{trial.film.name}"}
            for trial in planned
            if trial.film is not None
        ],
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_mb": peak_bytes(children=True) // 2**20,
    }
    write_json(run_folder / "closed_loop.json", result)
    return result


def _run_missing(planned: Sequence[Trial], path: Path, processes: int, progress: bool) -> dict[str, dict[str, Any]]:
    """Digest -> line of all finished trials, after those that were missing."""
    lines = _finished(path)
    missing = [trial for trial in planned if _is_missing(trial, lines)]
    if missing:
        # What a killed writer left of a line goes before another is appended.
        write_file(path, "".join(json_line(line) for line in lines.values()))
        lines |= {line["digest"]: line for line in _run_all(missing, path, processes, progress)}
    return lines


def plan_trials(
    run: str | Path,
    *,
    trials: int,
    tasks: Sequence[str] | None = None,
    policies: Sequence[PolicyName] = POLICIES,
    settings: TrialSettings,
    final: bool = False,
    videos: int = 0,
) -> list[Trial]:
    """The trials, task by task. Raises `MvwanError` as `evaluate_closed_loop` does; runs nothing."""
    checkpoint = _checkpoint_of(run)
    manifest = read_manifest(checkpoint)
    config = config_from_dict(manifest["config"], f"checkpoint {checkpoint}: config")
    settings.check(config)
    if trials < 1:
        raise MvwanError(f"--trials {trials}: at least one layout per task")
    if trials > RESERVED_LAYOUTS - FIRST_TUNING_LAYOUT:
        raise MvwanError(f"--trials {trials}: at most {RESERVED_LAYOUTS - FIRST_TUNING_LAYOUT}")
    demonstrations = Demonstrations(data=config.data, seed=config.seed)
    names = [task_name(task) for task in tasks] if tasks else list(demonstrations.tasks)
    if not names:
        raise MvwanError(f"{config.data.root}: no demonstration has the instruction of a Meta-World task. Name tasks with --task.")
    first = RESERVED_LAYOUTS if final else FIRST_TUNING_LAYOUT
    planned = []
    for task in dict.fromkeys(names):
        if settings.widened and task not in WIDENED:
            raise MvwanError(f"task {task}: no widened layouts are known; there are for {', '.join(sorted(WIDENED))}")
        for policy in policies:
            for number in range(trials):
                digest = _digest(task, first + number, policy, settings, manifest, demonstrations)
                kind = "widened" if settings.widened else "stock"
                name = f"{task}-{kind}-{first + number}-{policy}-{digest[:8]}.mp4"
                planned.append(
                    Trial(
                        checkpoint=checkpoint,
                        task=task,
                        layout_seed=first + number,
                        policy=policy,
                        settings=settings,
                        film=checkpoint.parents[1] / "rollouts" / name if number < videos else None,
                        digest=digest,
                    )
                )
    return planned


def is_widened(run: str | Path) -> bool:
    """Whether the run was trained on widened layouts. Raises `MvwanError` as `plan_trials` does."""
    return _source(_checkpoint_of(run))[1].are_widened


def _checkpoint_of(run: str | Path) -> Path:
    checkpoint = find_checkpoint(run)
    if checkpoint.is_file():
        raise MvwanError(f"checkpoint {run}: a file of the older system does not know its demonstrations. Give a run's folder.")
    return checkpoint


def count_missing(planned: Sequence[Trial]) -> int:
    """How many of the trials have not been run yet."""
    lines = _finished(planned[0].checkpoint.parents[1] / "rollouts.jsonl")
    return sum(_is_missing(trial, lines) for trial in planned)


def _is_missing(trial: Trial, lines: Mapping[str, Any]) -> bool:
    return trial.digest not in lines or (trial.film is not None and not trial.film.is_file())


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """Digest -> line of the trials that were run. Raises `MvwanError` for a line that is none of a trial."""
    lines = read_json_lines(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not {"digest", "task", "policy", "success"} <= set(line):
            raise MvwanError(f"{path}: line {number} is not the line of a trial. Remove it, or the file: its trials are then run again.")
    return {line["digest"]: line for line in lines}


def _digest(
    task: str,
    layout_seed: int,
    policy: PolicyName,
    settings: TrialSettings,
    manifest: Mapping[str, Any],
    demonstrations: Demonstrations,
) -> str:
    """64 hex digits over what decides the trial's outcome."""
    wanted: dict[str, Any] = asdict(settings)
    if policy == "predicted":
        wanted["checkpoint"] = manifest
    else:
        del wanted["execute"], wanted["denoise_steps"], wanted["heat_from"]
    if policy == "replay":
        wanted["demonstrations"] = demonstrations.fingerprint
    interval = manifest["config"]["data"]["frame_interval"]
    return sha256_json([CLOSED_LOOP_FORMAT, task, layout_seed, policy, wanted, interval * demonstrations.control_steps_per_frame])


def _run_all(missing: Sequence[Trial], path: Path, processes: int, progress: bool) -> list[dict[str, Any]]:
    """The lines of the trials, each appended to `path` as soon as it is there."""
    done: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(processes, len(missing)))
    with (
        Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar,
        path.open("a") as log,
        ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool,
    ):
        line_of_bar = bar.add_task("trials", total=len(missing))
        futures = [pool.submit(run_trial, trial) for trial in missing]
        try:
            for future in as_completed(futures):
                line = future.result()
                log.write(json_line(line))
                log.flush()
                os.fsync(log.fileno())
                done.append(line)
                bar.advance(line_of_bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return done


def _begin_worker() -> None:
    """One thread each: several processes share the machine."""
    torch.set_num_threads(1)


def run_trial(trial: Trial) -> dict[str, Any]:
    """What happened, ready for a JSON line; the same trial always gives the same but for `seconds`.

    On one thread, whatever the caller has: sums over several round otherwise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run_trial(trial)
    finally:
        torch.set_num_threads(threads)


def _run_trial(trial: Trial) -> dict[str, Any]:
    started = time.monotonic()
    config, demonstrations = _source(trial.checkpoint)
    policy = _policy(trial, config, demonstrations)
    simulator = _simulator(trial.checkpoint, trial.task, trial.settings.widened)
    line = {"policy": trial.policy, **attempt(policy, simulator, trial.layout_seed, trial.settings, trial.film)}
    if isinstance(policy, Predicted):
        residual = np.array(policy.residual_px)
        line |= {
            "checkpoint_step": _loaded(trial.checkpoint, trial.settings.heat_from).step,
            "waypoints_lost": policy.num_lost,
            "residual_px": {"mean": float(residual.mean()), "largest": float(residual.max())} if len(residual) else None,
        }
    return line | {"seconds": round(time.monotonic() - started, 2), "digest": trial.digest}


def attempt(policy: Policy, simulator: Simulator, layout_seed: int, settings: TrialSettings, film: Path | None = None) -> dict[str, Any]:
    """What happened when any policy tried one layout of the simulator's task; the video of it is written to `film`.

    The simulator was made with `settings.widened`, and with the cameras whose pictures the policy looks at.
    """
    simulator.reset(layout_seed)
    policy.begin(simulator.task, layout_seed, settings.widened)
    watch = _Film(simulator) if film is not None else None
    arm = Arm(simulator, settings.control_steps, watch=watch)
    plans = 0
    while not arm.is_done:
        rgb = simulator.render() if policy.looks else np.zeros((0, 0, 0, 3), np.uint8)
        plan = policy.plan(Seen(rgb=rgb, cameras=simulator.cameras, state=simulator.state, instruction=simulator.instruction))
        plans += 1
        if watch is not None:
            watch.plan = plan
        arm.follow(plan)
        if plan.is_whole:
            break
    if watch is not None and film is not None:
        film.parent.mkdir(parents=True, exist_ok=True)
        write_file(film, watch.mp4())
    return {
        "task": simulator.task,
        "layout_seed": layout_seed,
        "layouts": "widened" if settings.widened else "stock",
        "success": arm.succeeded,
        "control_steps": arm.num_steps,
        "plans": plans,
        "final_point_m": [round(float(value), 6) for value in simulator.state.point_m],
    }


def _policy(trial: Trial, config: Config, demonstrations: Demonstrations) -> Policy:
    settings = trial.settings
    stride = demonstrations.control_steps_per_frame * config.data.frame_interval
    match trial.policy:
        case "predicted":
            return Predicted(_loaded(trial.checkpoint, settings.heat_from), stride, settings.execute, settings.denoise_steps, settings.seed)
        case "expert_waypoints":
            return ExpertWaypoints(stride)
        case "replay":
            return Replay(demonstrations.training, stride, settings.seed)
        case "hold":
            return Hold()


# What a worker keeps between trials: they come task by task.


@lru_cache(maxsize=1)
def _source(checkpoint: Path) -> tuple[Config, Demonstrations]:
    config = config_from_dict(read_manifest(checkpoint)["config"], f"checkpoint {checkpoint}: config")
    return config, Demonstrations(data=config.data, seed=config.seed)


@lru_cache(maxsize=1)
def _loaded(checkpoint: Path, heat_from: HeatFrom) -> LoadedRun:
    return load_run(checkpoint, heat_from=heat_from)


_open_simulators: dict[tuple[Path, str, bool], Simulator] = {}


def _simulator(checkpoint: Path, task: str, widened: bool) -> Simulator:
    """Seen by the cameras that the demonstrations were recorded with. The one before is closed: a renderer left open complains at exit."""
    key = (checkpoint, task, widened)
    if key not in _open_simulators:
        _close_simulators()
        config, demonstrations = _source(checkpoint)
        recorded = {camera.name: camera for camera in demonstrations.training[0].cameras}
        _open_simulators[key] = Simulator(task, [recorded[name] for name in config.data.cameras or recorded], widened)
        # Last in, first out: MuJoCo's own farewell, which it says when the first renderer is made, must come after this one.
        atexit.unregister(_close_simulators)
        atexit.register(_close_simulators)
    return _open_simulators[key]


def _close_simulators() -> None:
    while _open_simulators:
        _open_simulators.popitem()[1].close()


class _Film:
    """Watches a trial: every few control steps all views side by side, the plan's waypoints marked."""

    def __init__(self, simulator: Simulator) -> None:
        self.plan: Plan | None = None
        self._frames: list[np.ndarray] = []
        self._steps = 0
        self(simulator)

    def __call__(self, simulator: Simulator) -> None:
        if self._steps % _FILM_EVERY == 0:
            views = []
            for picture, camera in zip(simulator.render(), simulator.cameras, strict=True):
                large = pictures.enlarge(picture, 2)
                if self.plan is not None:
                    large = pictures.mark_points(large, 2 * camera.project(self.plan.point_m)[0], _WAYPOINT_COLOUR)
                views.append(large)
            self._frames.append(np.concatenate(views, axis=1))
        self._steps += 1

    def mp4(self) -> bytes:
        return pictures.mp4(np.stack(self._frames), CONTROL_STEPS_PER_SECOND / _FILM_EVERY)


def successes(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Task -> policy -> successes, trials and the Wilson interval of the rate; `all` holds the sums over tasks."""
    tasks: dict[str, dict[str, Any]] = {}
    for name in [*dict.fromkeys(line["task"] for line in lines), "all"]:
        of_task = [line for line in lines if name in (line["task"], "all")]
        tasks[name] = {
            policy: success_rate([line["success"] for line in of_task if line["policy"] == policy])
            for policy in dict.fromkeys(line["policy"] for line in of_task)
        }
    return tasks


def render(result: Mapping[str, Any]) -> Table:
    """A rich table of a closed-loop evaluation, for `Console.print`."""
    kind = "widened" if result["settings"]["widened"] else "stock"
    seeds = "reserved layouts (final)" if result["final"] else "tuning layouts"
    table = Table(title=f"Closed loop: successes of {result['trials']} trials, {kind} {seeds}, 95 % intervals", title_justify="left")
    table.add_column("task")
    for policy in result["policies"]:
        table.add_column(policy.replace("_", " "), justify="right")
    last = list(result["tasks"])[-2]
    for task, measured in result["tasks"].items():
        table.add_row(task, *(rate_in_words(measured[policy]) for policy in result["policies"]), end_section=task == last)
    return table
