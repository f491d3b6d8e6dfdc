"""The tables of results in one command: record, train one model for several tasks with the switch off and on, let the arm move, write.

    <output>/test                                        demonstrations of other layouts, which predicted paths are measured on
    <output>/<demonstrations>/demonstrations, latents    of every task, in one dataset
    <output>/<demonstrations>/off, on                    the runs, each with its `evaluation.json` and `closed_loop.json`
    <output>/<demonstrations>/conv                       the convolutional baseline, where there is one, with the same files
    <output>/results.md, results.json                    the tables; written anew whenever trials are finished

A stage that `stages` finds finished is not repeated; trainings and trials that were cut off go on. All demonstrations are trained on:
success is measured on layouts of its own, reserved ones unless tuning. Knows no model and no pixel.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

import mvwan
from mvwan.checkpoint import checkpoint_digest
from mvwan.closed_loop import evaluate_closed_loop, render
from mvwan.config import Config, dump_yaml
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.errors import MvwanError
from mvwan.evaluate import evaluate_prediction
from mvwan.evaluation_table import FORMAT_VERSION as EVALUATION_FORMAT
from mvwan.evaluation_table import read_evaluation
from mvwan.files import read_json, read_json_lines, write_file, write_json
from mvwan.latent_cache import build_cache
from mvwan.metrics import success_rate
from mvwan.model.latents import LatentCodec, codec_digest
from mvwan.model.wan import base_digest
from mvwan.policies import POLICIES, PolicyName
from mvwan.reproduce_table import markdown
from mvwan.sim.metaworld import record
from mvwan.stages import Stages, own_folder, remove
from mvwan.suites import TEST_LAYOUTS, Label, Reproduction
from mvwan.trainings import Training, train_side_by_side

FORMAT_VERSION = 1
_PRODUCTS = ("results.md", "results.json", "test")
_WINDOWS_PER_TASK = 12
"""Of the test demonstrations at most: their windows overlap, so more say little more."""
Phase = Literal["data", "training", "trials"]
_PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that may be run, and what it stands on."""

    name: str
    phase: Phase
    settings: Mapping[str, Any]
    product: Path
    work: Callable[[], Any] | Training
    """What makes the product. Trainings that come one after another are run side by side."""
    after: str | None = None
    """Name of the stage it stands on; None: on none."""
    keep_stale: bool = False
    is_costly: bool = False
    """Its product is not replaced by that of other settings, unless that is asked for."""


def plan_stages(wanted: Reproduction) -> list[Stage]:
    """The stages in their order: first all data, then all trainings, then all trials. Controls that do not depend on a run are tried
    beside the first one alone."""
    tests = _recording(wanted, "Record test demonstrations", wanted.test_demonstrations, TEST_LAYOUTS, wanted.output / "test")
    stages = [*([tests] if wanted.test_demonstrations else []), *(stage for count in wanted.counts for stage in _stages_of(wanted, count))]
    return sorted(stages, key=lambda stage: _PHASES.index(stage.phase))


def _stages_of(wanted: Reproduction, count: int) -> list[Stage]:
    folder, of = wanted.output / str(count), f"{count} demonstrations per task"
    config = wanted.config(count, wanted.switches[0])
    demonstrations, latents, data = folder / "demonstrations", folder / "latents", config.data
    stages = [_recording(wanted, f"Record {of}", count, wanted.seed, demonstrations)]
    codec = codec_digest(config.base.codec or config.base.source, data.text_tokens)
    encoded = {"data": config.to_dict()["data"], "seed": wanted.seed, "codec": codec}
    work = partial(_encode, config, latents)
    encode = Stage(name=f"Encode, {of}", phase="data", settings=encoded, product=latents, work=work, after=f"Record {of}", keep_stale=True)
    stages.append(encode)
    for label in wanted.switches:
        config = wanted.config(count, label)
        start = checkpoint_digest(config.train.from_checkpoint)
        fit = {"config": config.to_dict(), "base": base_digest(config.base.source), "start": start}
        name, run = f"{of}, switch {label}", folder / label
        work = Training(name=name, config=config, folder=run)
        trained = _training_of(count, label)
        stages.append(Stage(name=trained, phase="training", settings=fit, product=run, work=work, after=encode.name, is_costly=True))
        if wanted.test_demonstrations:
            work = partial(_measure, wanted, run)
            stages.append(
                Stage(
                    name=_measuring_of(count, f"switch {label}"),
                    phase="trials",
                    settings={**_measured(wanted), "denoise_steps": wanted.denoise_steps, "seed": wanted.seed},
                    product=run / "evaluation.json",
                    work=work,
                    after=trained,
                )
            )
        policies = policies_beside(wanted, count, label)
        work = partial(_try, wanted, run, policies)
        tried = {**_trials(wanted), "videos": wanted.videos, "settings": asdict(wanted.trial_settings), "policies": policies}
        stages.append(
            Stage(
                name=f"Let the arm move, {name}",
                phase="trials",
                settings=tried,
                product=run / "closed_loop.json",
                work=work,
                after=trained,
            )
        )
    if wanted.kind.has_baseline:
        stages += _baseline_stages(wanted, count, folder, of)
    return stages


def _recording(wanted: Reproduction, name: str, count: int, seed: int, output: Path) -> Stage:
    """Records `count` demonstrations of each task from the layout `seed` on."""
    data = wanted.config(wanted.counts[0], wanted.switches[0]).data
    settings = {"episodes": count, "seed": seed, "size_px": max(data.height_px, data.width_px), "widened": wanted.kind.widened}
    work = partial(record, wanted.names, output=output, **settings)
    return Stage(name=name, phase="data", settings={"tasks": wanted.names, **settings}, product=output, work=work, is_costly=True)


def _measured(wanted: Reproduction) -> dict[str, Any]:
    return {
        "tasks": wanted.names,
        "test_demonstrations": wanted.test_demonstrations,
        "first_layout": TEST_LAYOUTS,
        "windows": _WINDOWS_PER_TASK * len(wanted.names),
        "format": EVALUATION_FORMAT,
    }


def _measuring_of(count: int, measured: str) -> str:
    return f"Measure predicted paths, {count} demonstrations per task, {measured}"


def _training_of(count: int, label: Label) -> str:
    return f"Train on {count} demonstrations per task, switch {label}"


def _trials(wanted: Reproduction) -> dict[str, Any]:
    return {"tasks": wanted.names, "trials": wanted.trials, "first_layout": wanted.first_layout}


def policies_beside(wanted: Reproduction, count: int, label: Label) -> tuple[PolicyName, ...]:
    """What is tried with a run: `replay` depends on the demonstrations alone, `expert_waypoints` and `hold` on nothing."""
    if label != wanted.switches[0]:
        return ("predicted",)
    return POLICIES if count == wanted.counts[0] else ("predicted", "replay")


def _baseline_stages(wanted: Reproduction, count: int, folder: Path, of: str) -> list[Stage]:
    net = folder / "conv"
    data = [setting for setting in ("data.validation_share=0.0", *wanted.overrides) if setting.startswith("data.")]
    fit = ["--steps", str(wanted.baseline_steps), "--seed", str(wanted.seed), *(word for setting in data for word in ("--set", setting))]
    tasks = [word for task in wanted.names for word in ("--task", task)]
    layouts = ["--layouts", "widened" if wanted.kind.widened else "stock", *([] if wanted.tuning else ["--final"])]
    tried = [*tasks, "--trials", str(wanted.trials), "--execute", str(wanted.execute), *layouts]
    tried += ["--control-steps", str(wanted.control_steps)]
    # A script of a folder may import what lies beside it.
    code = {path.name: path.read_text(encoding="utf-8") for path in sorted(wanted.baseline.parent.glob("*.py"))}
    train_words = ["train", str(folder / "demonstrations"), "--output", str(net), *fit]
    measured = _measured(wanted)
    measure_words = ["measure", str(net), str(wanted.output / "test"), "--windows", str(measured["windows"])]
    trained = Stage(
        name=f"Train the baseline on {of}",
        phase="trials",  # a script of its own, which runs alone
        settings={"options": fit, "code": code},
        product=net,
        work=partial(_run_baseline, wanted.baseline, train_words, net),
        after=f"Record {of}",
    )
    measure = Stage(
        name=_measuring_of(count, "baseline"),
        phase="trials",
        settings={**measured, "code": code},
        product=net / "evaluation.json",
        work=partial(_run_baseline, wanted.baseline, measure_words, net / "evaluation.json"),
        after=trained.name,
    )
    return [
        trained,
        *([measure] if wanted.test_demonstrations else []),
        Stage(
            name=f"Let the arm move, {of}, baseline",
            phase="trials",
            settings={"options": tried, "code": code},
            product=net / "closed_loop.json",
            work=partial(_run_baseline, wanted.baseline, ["trials", str(net), *tried], net / "closed_loop.json"),
            after=trained.name,
        ),
    ]


def _run_baseline(script: Path, words: Sequence[str], product: Path) -> None:
    """Nothing; the script made `product`, in a process of its own. `MvwanError` when it failed: it said why."""
    remove(product)
    done = subprocess.run([sys.executable, str(script), *words], check=False)
    if done.returncode:
        raise MvwanError(f"{script} {words[0]} ended with code {done.returncode}; what it said stands above")


def _encode(config: Config, latents: Path) -> None:
    codec = LatentCodec.load(config.base.codec or config.base.source, config.data.text_tokens)
    episodes = episodes_of(config.data)
    for split in ("train", "validation"):
        windows = WindowDataset(episodes, config.data, config.model.views, split, config.seed)
        if len(windows):
            build_cache(windows, codec, latents, config.data.heatmap_sigma_px)


def _measure(wanted: Reproduction, run: Path) -> None:
    windows = _measured(wanted)["windows"]
    evaluate_prediction(
        run,
        dataset=wanted.output / "test",
        output=run / "evaluation.json",
        windows=windows,
        denoise_steps=wanted.denoise_steps,
        seed=wanted.seed,
        progress=True,
    )


def _try(wanted: Reproduction, run: Path, policies: Sequence[PolicyName]) -> None:
    evaluate_closed_loop(
        run,
        trials=wanted.trials,
        tasks=wanted.names,
        policies=policies,
        settings=wanted.trial_settings,
        final=not wanted.tuning,
        processes=wanted.processes,
        videos=wanted.videos,
        progress=True,
    )


def run_reproduction(wanted: Reproduction, *, fresh: bool = False, console: Console | None = None) -> Path:
    """The path of `results.md`, after all stages that are not finished. `fresh` removes what an earlier reproduction left.

    Raises `MvwanError` when the folder holds something else, and whatever a stage raises.
    """
    console = console or Console(highlight=False)
    earlier = [path.name for path in wanted.output.iterdir() if path.name.isdigit()] if fresh and wanted.output.is_dir() else []
    with own_folder(wanted.output, "reproduction", fresh, (*_PRODUCTS, *earlier)):
        return _reproduce(wanted, console)


def _reproduce(wanted: Reproduction, console: Console) -> Path:
    planned, stages = plan_stages(wanted), Stages(wanted.output, console)
    keys: dict[str | None, str] = {None: stages.start}
    for stage in planned:
        keys[stage.name] = stages.key_of(stage.name, stage.settings, keys[stage.after])
        if stage.is_costly and stages.is_of_others(stage.name, keys[stage.name], stage.product):
            raise MvwanError(
                f"{stage.product}: made with other settings, or by another version of mvwan ({stage.name}). Choose another --output, or "
                "remove everything with --fresh."
            )
    path = wanted.output / "results.md"
    for are_trainings, group in groupby(planned, lambda stage: isinstance(stage.work, Training)):
        if are_trainings:
            _train_all(list(group), stages, keys, wanted.processes, console)
            continue
        for stage in group:
            assert not isinstance(stage.work, Training)
            stages.run(stage.name, stage.settings, stage.product, stage.work, stage.keep_stale, after=keys[stage.after])
            if stage.product.name == "closed_loop.json":
                console.print(render(read_json(stage.product)))
            if stage.phase == "trials":
                result = collect(wanted, stages.costs, [stage.name for stage in planned])
                write_json(wanted.output / "results.json", result)
                write_file(path, markdown(result))
    console.print(f"results: {path}", soft_wrap=True)
    return path


def _train_all(group: Sequence[Stage], stages: Stages, keys: Mapping[str | None, str], processes: int, console: Console) -> None:
    waiting: dict[Training, Stage] = {}
    for stage in group:
        if stages.begin(stage.name, stage.settings, stage.product, stage.keep_stale, keys[stage.after]):
            assert isinstance(stage.work, Training)
            waiting[stage.work] = stage
    at_a_time = min(processes, len(group))  # also when some are finished: sums over more threads round otherwise
    train_side_by_side(list(waiting), at_a_time, console, lambda training: stages.finish(waiting[training].name, training.cost))


def describe(wanted: Reproduction) -> str:
    """What would be done: the settings of the first training, and every stage with what it is made from."""
    lines = [dump_yaml(wanted.config(wanted.counts[0], wanted.switches[0])), wanted.command]
    for number, stage in enumerate(plan_stages(wanted), 1):
        shown = {name: value for name, value in stage.settings.items() if name not in ("config", "code", "base", "start", "codec", "data")}
        said = ", ".join(f"{name} {_words(value)}" for name, value in shown.items())
        lines.append(f"{number}. {stage.name}: {stage.product}{f' ({said})' if said else ''}")
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def collect(wanted: Reproduction, costs: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What the tables show, out of the stages that are finished so far: `costs` has their cost, `names` are all there are."""
    config = wanted.config(wanted.counts[0], wanted.switches[0])
    return {
        "format_version": FORMAT_VERSION,
        "suite": wanted.suite,
        "command": wanted.command,
        "start_from": None if wanted.start_from is None else str(wanted.start_from),
        "start_made_by": _earlier_command(wanted.start_from),
        "version": mvwan.__version__,
        "tasks": list(wanted.names),
        "widened": wanted.kind.widened,
        "final": not wanted.tuning,
        "layouts": [wanted.first_layout, wanted.first_layout + wanted.trials - 1],
        "trials": wanted.trials,
        "trial_settings": asdict(wanted.trial_settings),
        "overrides": list(wanted.overrides),
        "config": config.to_dict(),
        "test_demonstrations": wanted.test_demonstrations,
        "tables": [
            {"demonstrations": count, "rates": _rates(wanted, count, costs), "paths": _paths(wanted, count, costs)}
            for count in wanted.counts
        ],
        "published": {"source": wanted.kind.source, "trials": wanted.kind.published_trials} if wanted.kind.published else None,
        "stages": {name: {**costs[name], **_steps_of(wanted, name)} for name in names if name in costs},
        "unfinished_stages": [name for name in names if name not in costs],
    }


def _earlier_command(start_from: Path | None) -> str | None:
    """The command that made the runs which these go on from; None where there are none, or it is not known."""
    written = None if start_from is None else start_from / "results.json"
    return read_json(written)["command"] if written is not None and written.is_file() else None


def _steps_of(wanted: Reproduction, stage: str) -> dict[str, float]:
    """`steps_seconds` of a training, which its log adds up over all attempts; nothing of other stages."""
    runs = {_training_of(count, label): wanted.output / str(count) / label for count in wanted.counts for label in wanted.switches}
    if stage not in runs:
        return {}
    lines = read_json_lines(runs[stage] / "metrics.jsonl")
    return {"steps_seconds": round(sum(line["seconds"] for line in lines if line["kind"] == "train"), 1)}


def _paths(wanted: Reproduction, count: int, costs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Column -> `mean`, `median`, `p95` of the 3-D error in mm, its mean in the `last_frame`, and the number of `windows`."""
    folder, found = wanted.output / str(count), dict[str, dict[str, float]]()

    def add(column: str, result: Mapping[str, Any], source: str, last_frame: float) -> None:
        error = result["measures"][source]["error_3d_mm"]
        numbers = {name: error[name] for name in ("mean", "median", "p95")}
        found[column] = {**numbers, "last_frame": last_frame, "windows": result["num_windows"]}

    for label in wanted.switches:
        if _measuring_of(count, f"switch {label}") in costs:
            result = read_evaluation(folder / label / "evaluation.json")
            columns = {"predicted": f"switch {label}", "nearest": "nearest", "hold_first": "hold first"}
            for source in (source for source in columns if source in result["measures"]):
                add(columns[source], result, source, result["measures"][source]["error_3d_mm"]["per_frame"][-1])
    if _measuring_of(count, "baseline") in costs:
        result = read_json(folder / "conv" / "evaluation.json")
        add("conv baseline", result, "predicted", result["per_frame_error_3d_mm"]["predicted"][-1])
    return found


def _rates(wanted: Reproduction, count: int, costs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Column -> task (and `all`) -> `success_rate`, of the stages that are finished."""
    columns: dict[str, dict[str, Any]] = {}
    of = f"{count} demonstrations per task"
    measured: dict[str, tuple[Path, str]] = {
        f"switch {label}": (wanted.output / str(count) / label, "predicted") for label in wanted.switches
    }
    stage_of = {column: f"Let the arm move, {of}, {column}" for column in measured}
    if wanted.kind.has_baseline:
        measured["conv baseline"], stage_of["conv baseline"] = (
            (wanted.output / str(count) / "conv", "conv"),
            f"Let the arm move, {of}, baseline",
        )
    first = wanted.switches[0]
    for policy in ("replay", "expert_waypoints", "hold"):
        beside = count if policy == "replay" else wanted.counts[0]
        measured[policy.replace("_", " ")] = (wanted.output / str(beside) / first, policy)
        stage_of[policy.replace("_", " ")] = f"Let the arm move, {beside} demonstrations per task, switch {first}"
    for column, (run, policy) in measured.items():
        if stage_of[column] in costs:
            tasks = read_json(run / "closed_loop.json")["tasks"]
            columns[column] = {task: tasks[task][policy] for task in (*wanted.names, "all")}
    if wanted.kind.published:
        known = {task: wanted.kind.published[task] for task in wanted.names if task in wanted.kind.published}
        trials = wanted.kind.published_trials
        of_task = {task: success_rate([True] * good + [False] * (trials - good)) for task, good in known.items()}
        every = success_rate([number < good for good in known.values() for number in range(trials)]) if known else None
        columns["published"] = {**of_task, **({"all": every} if len(known) == len(wanted.names) and every else {})}
    return columns
