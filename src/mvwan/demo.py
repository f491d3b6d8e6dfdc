"""The whole way in one command: record, encode, fine-tune with the switch off and on, evaluate, let the arm move, report.

A stage that `stages` finds finished is not repeated, and a training that was cut off goes on from its newest checkpoint. Knows no model
and no pixel.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel

from mvwan.checkpoint import checkpoint_digest
from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.evaluate import evaluate_prediction
from mvwan.evaluation_table import FORMAT_VERSION, read_evaluation, render
from mvwan.files import read_json
from mvwan.latent_cache import build_cache
from mvwan.model.latents import LatentCodec, codec_digest
from mvwan.model.movement import MovementReport
from mvwan.model.surgery import trainable_table
from mvwan.model.trainable_table import compare, modulation_banner, multiview_banner
from mvwan.model.wan import base_digest
from mvwan.precision import has_fast_bfloat16
from mvwan.presets import config_from_preset
from mvwan.report import write_report
from mvwan.run_record import RunRecord, findings
from mvwan.stages import Stages, own_folder
from mvwan.trainings import Training, train_side_by_side

STEPS, STEPS_WITHOUT_BFLOAT16 = 400, 120
"""Of each run: what leaves the demo under ten minutes on two cores."""
_PRODUCTS = ("demonstrations", "latents", "off", "on", "report.html")
_PICTURED_WINDOWS = 2
_DENOISE_STEPS = 1
"""As good as more where heat is read from latents, and faster."""
_FILMS = 3
"""Of the trials of each run and control: a single one may be of a layout that is hard for all."""
_CONTROL_STEPS = 400
"""After which a trial is given up; the expert's waypoints need some 60 to press a handle, some 270 to open a drawer."""


def run_demo(
    output: str | Path = "runs/demo",
    *,
    task: str = "handle-press-v3",
    episodes: int = 10,
    steps: int | None = None,
    windows: int = 8,
    trials: int = 4,
    seed: int = 0,
    fresh: bool = False,
    console: Console | None = None,
) -> Path:
    """The report's path, after recording `episodes` demonstrations of a Meta-World task and two fine-tunings of `steps` steps.

    `steps` None takes 400 where products in bfloat16 are fast, and 120 elsewhere, where a step takes three times as long.

    `windows` held-out windows are measured at most; `trials` layouts are tried in closed loop (0: none). `fresh` removes what an
    earlier demo left. Raises `MvwanError` when `output` holds something that is no demo.
    """
    output, console = Path(output), console or Console(highlight=False)
    steps = steps or (STEPS if has_fast_bfloat16() else STEPS_WITHOUT_BFLOAT16)
    with own_folder(output, "demo", fresh, _PRODUCTS):
        return _demo(output, task, episodes, steps, windows, trials, seed, console)


def _demo(output: Path, task: str, episodes: int, steps: int, windows: int, trials: int, seed: int, console: Console) -> Path:
    from mvwan.closed_loop import TrialSettings, evaluate_closed_loop
    from mvwan.closed_loop import render as render_trials
    from mvwan.sim.metaworld import record
    from mvwan.sim.tasks import task_name

    task = task_name(task)
    stages = Stages(output, console)
    demonstrations, latents = output / "demonstrations", output / "latents"
    configs = {label: _config(demonstrations, latents, steps, seed, label == "on") for label in ("off", "on")}
    source, text_tokens, size_px = configs["off"].base.source, configs["off"].data.text_tokens, configs["off"].data.height_px

    stages.run(
        f"Record {episodes} demonstrations of {task}",
        {"task": task, "episodes": episodes, "seed": seed, "size_px": size_px},
        demonstrations,
        lambda: record(task, episodes, demonstrations, seed=seed, size_px=size_px),
    )
    stages.heading("What trains")
    _print_tables(configs, console)
    stages.run(
        "Encode every window once, for both runs",
        {"data": configs["off"].to_dict()["data"], "seed": seed, "codec": codec_digest(source, text_tokens)},
        latents,
        lambda: _encode(configs["off"], latents),
        keep_stale=True,
    )
    trainings = {label: Training(name=f"switch {label}", config=config, folder=output / label) for label, config in configs.items()}
    waiting = {}
    for label, training in trainings.items():
        start = checkpoint_digest(training.config.train.from_checkpoint)
        settings = {"config": training.config.to_dict(), "base": base_digest(source), "start": start}
        if stages.begin(f"Fine-tune, switch {label}", settings, training.folder):
            waiting[training] = f"Fine-tune, switch {label}"
    train_side_by_side(list(waiting), len(trainings), console, lambda training: stages.finish(waiting[training], training.cost))
    for training in trainings.values():
        if (movement := training.folder / "movement.json").is_file():
            console.print(MovementReport.from_json(read_json(movement)).render(training.name))
    measured: Any = None
    for label in configs:
        measured_with = {"windows": windows, "denoise_steps": _DENOISE_STEPS, "seed": seed}
        settings = {**measured_with, "format": FORMAT_VERSION}
        product = output / label / "evaluation.json"
        work = partial(evaluate_prediction, output / label, **measured_with, keep=_PICTURED_WINDOWS, codec_from=measured, progress=True)
        stages.run(f"Measure on held-out episodes, switch {label}", settings, product, work)
        measured = read_evaluation(product)
        console.print(render(measured))

    for label in configs if trials else ():
        trial_settings = TrialSettings(denoise_steps=_DENOISE_STEPS, seed=seed, control_steps=_CONTROL_STEPS)
        settings = {"trials": trials, "settings": asdict(trial_settings), "films": _FILMS}
        product = output / label / "closed_loop.json"
        work = partial(evaluate_closed_loop, output / label, trials=trials, settings=trial_settings, videos=_FILMS, progress=True)
        stages.run(f"Let the arm move, switch {label}", settings, product, work)
        console.print(render_trials(read_json(product)))

    stages.heading("Report")
    about = {"task": task, "demonstrations": episodes, "base": configs["off"].base.source, "steps of each run": steps, "seed": seed}
    path = write_report({label: output / label for label in configs}, output / "report.html", {**about, "seconds": stages.seconds})
    records = [RunRecord(label=label, folder=output / label) for label in configs]
    console.print(Panel("\n".join(f"• {sentence}" for sentence in findings(records)), title="In short", title_align="left"))
    console.print(f"report: {path}", soft_wrap=True)
    return path


def _config(demonstrations: Path, latents: Path, steps: int, seed: int, switch: bool) -> Config:
    settings = {
        "seed": seed,
        "unfreeze_modulation_and_norms": switch,
        "data": {"root": str(demonstrations), "cache": str(latents), "window_stride": 7},
        "train": {
            "steps": steps,
            "warmup_steps": min(20, steps // 4),
            "save_every": max(1, steps // 3),
            "evaluate_every": max(1, steps // 6),
            "keep_last": 1,
        },
    }
    return config_from_preset("tiny-finetune", settings, where="demo")


def _print_tables(configs: Mapping[str, Config], console: Console) -> None:
    tables = {}
    for label, config in configs.items():
        switch = config.unfreeze_modulation_and_norms
        model, trainable = config.model, config.trainable
        tables[label] = trainable_table(
            config.base.source,
            model.views,
            model.fusion,
            switch,
            trainable=trainable,
            train=config.train,
            action_head=model.action_head,
            view_code=model.view_code,
        )
        console.print(modulation_banner(tables[label]) + multiview_banner(tables[label]), markup=False, soft_wrap=True)
        console.print(tables[label].render(f"Switch {label}"))
    console.print(compare(tables["off"], tables["on"]).render("Off and on, side by side"))


def _encode(config: Config, latents: Path) -> None:
    episodes = episodes_of(config.data)
    codec = LatentCodec.load(config.base.codec or config.base.source, config.data.text_tokens)
    for split in ("train", "validation"):
        build_cache(
            WindowDataset(episodes, config.data, config.model.views, split, config.seed), codec, latents, config.data.heatmap_sigma_px
        )
