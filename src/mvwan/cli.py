"""The door: parses the command line, resolves the settings, calls one function, prints what it returns.

Knows no model and no data. Everything heavy is imported inside the verb that needs it, so that help and a mistyped setting
answer at once. A mistake of the user (`MvwanError`) is one sentence on stderr and exit code 2; a training that SIGTERM stopped is 75,
Ctrl-C 130; anything else keeps its traceback.
"""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mvwan import __version__
from mvwan.cli_ablate import ablate
from mvwan.cli_bench import bench
from mvwan.cli_checkpoint import checkpoints
from mvwan.cli_data import datasets
from mvwan.cli_plan import plan
from mvwan.cli_reproduce import reproduce
from mvwan.cli_sensitivity import sensitivity
from mvwan.cli_settings import (
    ActionHead,
    AsJson,
    ConfigFile,
    Dataset,
    DenoiseSteps,
    Fusion,
    HeatFrom,
    HeatSource,
    Kernel,
    Layouts,
    Preset,
    Run,
    Seed,
    Settings,
    Switch,
    ViewCode,
    console,
    environment_note,
    note,
    resolve_config,
    switch_from_environment,
)
from mvwan.config import Config, LoraConfig, TrainableConfig, dump_yaml
from mvwan.errors import MvwanError, PreemptedError


class Door(TyperGroup):
    """The verbs, in the order they are written, with the user's mistakes turned into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """What the verb returns; `typer.Exit` with code 2 for a `MvwanError`, 75 for a training that SIGTERM stopped."""
        try:
            return super().invoke(ctx)
        except MvwanError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except PreemptedError as stop:
            typer.echo(f"stopped: {stop}", err=True)
            raise typer.Exit(PreemptedError.EXIT_CODE) from None


app = typer.Typer(
    cls=Door,
    name="mvwan",
    help="Wan2.2-TI2V as a multi-view RGB + heatmap video model, trained on robot demonstrations.",
    epilog="Start with: mvwan demo. Or see what would train: mvwan params --compare",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(checkpoints, name="checkpoint")
app.add_typer(datasets, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mvwan {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Holds the options that belong to no verb."""


@app.command(epilog="Example: mvwan params --base wan2.2-ti2v-5b --unfreeze_modulation_and_norms --json")
def params(
    base: Annotated[
        str, typer.Option("--base", help="tiny, wan2.2-ti2v-5b, a diffusers folder, a hub id or Wan-native safetensors.")
    ] = "wan2.2-ti2v-5b",
    views: Annotated[int, typer.Option("--views", min=1, help="Cameras seen together.")] = 3,
    fusion: Annotated[Fusion, typer.Option("--fusion", help="RGB and heatmap share tokens, or are streams of their own.")] = Fusion.channel,
    action_head: Annotated[
        ActionHead, typer.Option("--action-head", help="The gripper's opening per frame, or that and how the hand turned.")
    ] = ActionHead.none,
    view_code: Annotated[
        ViewCode, typer.Option("--view-code", help="Views are told apart by their order, by their cameras, or by both.")
    ] = ViewCode.slot,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1, help="Width of the low-rank adapters.")] = 32,
    unfreeze_modulation_and_norms: Switch = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A Markdown table.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="The switch off and on, side by side.")] = False,
) -> None:
    """What would train: exact counts per group, from the shapes alone; needs no weights."""
    if as_json and markdown:
        raise MvwanError("--json and --markdown: give one of them")
    if compare and unfreeze_modulation_and_norms is not None:
        raise MvwanError("--compare shows the switch off and on; leave --unfreeze_modulation_and_norms out")
    variable = None if compare or unfreeze_modulation_and_norms is not None else switch_from_environment(os.environ)
    if variable is not None:
        note(environment_note(variable))
    from mvwan.model import surgery
    from mvwan.model.trainable_table import compare as side_by_side

    trainable = TrainableConfig(lora=LoraConfig(rank=lora_rank))

    def table(switch: bool) -> Any:
        parts: dict[str, Any] = {"action_head": action_head.value, "view_code": view_code.value}
        return surgery.trainable_table(base, views, fusion.value, switch, trainable=trainable, **parts)

    shown = side_by_side(table(False), table(True)) if compare else table(bool(unfreeze_modulation_and_norms or variable))
    if as_json:
        typer.echo(json.dumps(shown.to_json(base, views, fusion.value), indent=2))
    elif markdown:
        typer.echo(shown.to_markdown())
    else:
        heading = "off and on" if compare else "on" if unfreeze_modulation_and_norms or variable else "off"
        console().print(shown.render(f"What trains: {base}, {views} views, fusion {fusion.value}, switch {heading}"))


@app.command(epilog="Example: mvwan record --task drawer-open-v3 --episodes 10 --output data/drawer")
def record(
    output: Annotated[Path, typer.Option("--output", help="Folder to write the dataset to; must not exist yet.", show_default=False)],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Meta-World task; repeatable. Not given: drawer-open-v3.", show_default=False)
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Demonstrations per task.")] = 10,
    size_px: Annotated[int, typer.Option("--size-px", help="Side of the square pictures.")] = 128,
    layouts: Annotated[Layouts, typer.Option("--layouts", help="Where objects may stand: Meta-World's own limits, or wider ones.")] = (
        Layouts.stock
    ),
    seed: Seed = 0,
) -> None:
    """Record scripted Meta-World demonstrations from three calibrated cameras, as a LeRobot v3 dataset."""
    from mvwan.sim.metaworld import record as record_demonstrations

    report = record_demonstrations(task or ["drawer-open-v3"], episodes, output, seed=seed, size_px=size_px, widened=layouts == "widened")
    kept, failed = sum(report.episodes.values()), sum(report.failed.values())
    typer.echo(
        f"{report.output}: {kept} demonstrations, {report.num_frames} frames per camera, {report.seconds:.1f} s; "
        f"{failed} layouts on which the expert failed were left out"
    )


@app.command(epilog="Example: mvwan cache --preset tiny --set data.root=data/drawer --output data/drawer-latents")
def cache(
    output: Annotated[Path, typer.Option("--output", help="Folder of the latents; what is in it already is kept.", show_default=False)],
    preset_name: Preset = "tiny",
    config_file: ConfigFile = None,
    settings: Settings = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode pictures beside the one that encodes.")] = 0,
) -> None:
    """Encode every window of a dataset once; `train --set data.cache=…` then never needs the VAE or the text encoder."""
    config, _ = resolve_config(preset_name, config_file, settings, None, {})
    datasets = _datasets(config)
    from mvwan.latent_cache import build_cache
    from mvwan.model.latents import LatentCodec

    codec = LatentCodec.load(config.base.codec or config.base.source, config.data.text_tokens)
    for split, dataset in datasets.items():
        built = build_cache(dataset, codec, output, config.data.heatmap_sigma_px, workers=workers)
        left_out = f"; {len(built.skipped)} windows are damaged and left out, {built.skipped[0].reason}" if built.skipped else ""
        typer.echo(f"{split}: {len(built)} entries in {output}, {built.encoded} of them encoded now{left_out}")


@app.command(epilog="Example: mvwan train --preset tiny --set data.root=data/drawer --set train.steps=100 --output runs/first")
def train(
    output: Annotated[Path, typer.Option("--output", help="Folder of the run.", show_default=False)],
    preset_name: Preset = "tiny",
    config_file: ConfigFile = None,
    settings: Settings = None,
    unfreeze_modulation_and_norms: Switch = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder, or start where there is none.")
    ] = False,
    accept_trainable_change: Annotated[
        bool,
        typer.Option(
            "--accept-trainable-change",
            help="Go on although the checkpoint was trained with the switch set otherwise: new groups start from the base.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all that can be checked; print settings, parameter table and windows; train nothing."),
    ] = False,
) -> None:
    """Fine-tune on demonstrations."""
    config, said = resolve_config(preset_name, config_file, settings, unfreeze_modulation_and_norms, os.environ)
    note(said)
    if dry_run:
        _dry_run(config, output, resume, accept_trainable_change)
        return
    from mvwan.train import train as run_training

    result = run_training(config, output, resume=resume, accept_trainable_change=accept_trainable_change)
    typer.echo(f"checkpoint: {result.checkpoint}")


def _dry_run(config: Config, output: Path, resume: bool, accept_trainable_change: bool) -> None:
    """Prints what `train` would do: settings as YAML, what trains, how the checkpoint to start from fits, how many windows."""
    from mvwan.train_check import check_groups, check_resumed, check_start, check_windows, checkpoint_to_resume

    found = checkpoint_to_resume(output, resume)
    typer.echo(dump_yaml(config))
    table, counts = check_groups(config), "unknown, data.root is not set"
    begins = "at step 0"
    if config.data.root:
        windows = check_windows(config)
        _note_left_out(windows.episodes)
        counts = f"{len(windows.training)} train, {len(windows.validation)} validation"
        if found is not None:
            begins = f"at step {check_resumed(config, found, windows.training, accept_trainable_change)}, from {found}"
    elif found is not None:
        raise MvwanError(f"{output}: a run goes on with its data. Set data.root.")
    console().print(table.render())
    fit = check_start(config, found, accept_trainable_change)
    if fit is not None:
        typer.echo("\n".join([f"checkpoint {found or config.train.from_checkpoint}: {fit.outcome}", *fit.describe()]))
    typer.echo(f"windows: {counts}\ntraining: {begins}, to step {config.train.steps}")


def _datasets(config: Config) -> dict[str, Any]:
    """The windows of both splits by name of the split."""
    from mvwan.data.dataset import WindowDataset, episodes_of

    episodes = episodes_of(config.data)
    _note_left_out(episodes)
    return {split: WindowDataset(episodes, config.data, config.model.views, split, config.seed) for split in ("train", "validation")}


def _note_left_out(episodes: Any) -> None:
    """Says how many `Episodes` are damaged, when some are."""
    if episodes.left_out:
        note(f"{len(episodes.left_out)} episodes are damaged and left out; the first: {episodes.left_out[0].reason}")


@app.command(
    epilog="Example: mvwan sample runs/first --window 0 --output predictions/first. With pictures of your own: mvwan sample runs/first "
    "--image left.png --image right.png --image top.png --cameras cameras.json --prompt 'Open the drawer.' --point 0,0.6,0.2 --output out"
)
def sample(
    run: Run,
    output: Annotated[Path, typer.Option("--output", help="Folder to write to; must not exist yet.", show_default=False)],
    dataset: Dataset = None,
    window: Annotated[int, typer.Option("--window", min=0, help="Which held-out window, counted from 0.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Your own first picture, one per camera in order; repeatable.", show_default=False)
    ] = None,
    cameras: Annotated[
        Path | None, typer.Option("--cameras", help="JSON file of their cameras, as in a trajectory.json.", show_default=False)
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the robot shall do, for --image.", show_default=False)] = None,
    point: Annotated[
        str | None, typer.Option("--point", metavar="X,Y,Z", help="Where the tool point is now, metres, for --image.", show_default=False)
    ] = None,
    point_px: Annotated[
        list[str] | None,
        typer.Option(
            "--point-px",
            metavar="U,V",
            help="Instead: where each picture shows the tracked point, from its top left, or none; as often as --image, in its order.",
            show_default=False,
        ),
    ] = None,
    gripper_open: Annotated[
        float | None, typer.Option("--gripper-open", min=0, max=1, help="How far the gripper is open now, for --image.", show_default=False)
    ] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", min=0.01, help="Predicted frames per second; not given: as in training.", show_default=False)
    ] = None,
    denoise_steps: DenoiseSteps = 5,
    seed: Seed = 0,
    attention: Annotated[
        Kernel, typer.Option("--attention", help="Kernel that attends; refused with the reason where it cannot run.")
    ] = Kernel.auto,
    heat_from: HeatSource = HeatFrom.auto,
    context_parallel: Annotated[
        bool,
        typer.Option(
            "--context-parallel", help="Several processes make the prediction together; start them by torchrun --nproc-per-node N -m mvwan."
        ),
    ] = False,
) -> None:
    """Predict what follows the first pictures of a held-out window, or your own: videos, a sheet of pictures, the 3-D path."""
    steps: dict[str, Any] = {"denoise_steps": denoise_steps, "seed": seed, "attention": attention.value, "heat_from": heat_from.value}
    if context_parallel:
        from mvwan.strategy import join_for_prediction

        steps["split"], steps["device"] = join_for_prediction()
    own = {"--cameras": cameras, "--prompt": prompt, "--point": point, "--gripper-open": gripper_open, "--fps": fps}
    own["--point-px"] = point_px or None
    if not image:
        if given := [name for name, value in own.items() if value is not None]:
            raise MvwanError(f"{given[0]} belongs to pictures of your own: give them with --image")
        from mvwan.evaluate import sample_window

        written = sample_window(run, output, dataset=dataset, window=window, **steps)
    elif dataset is not None or window:
        raise MvwanError("--dataset and --window choose a held-out window: leave them out beside --image")
    elif cameras is None or prompt is None:
        raise MvwanError("--image: pictures of your own need --cameras and --prompt as well")
    elif point is not None and point_px:
        raise MvwanError("--point and --point-px both say where the point is: give one of them")
    else:
        place: dict[str, Any] = {"point_m": None if point is None else _point(point)}
        place["point_px"] = [_pixel(text) for text in point_px] if point_px else None
        note(
            "" if point or point_px else "neither --point nor --point-px: the run is not told where the point is now, and may then lose it"
        )
        from mvwan.evaluate import sample_pictures

        written = sample_pictures(run, output, image, cameras, prompt, gripper_open=gripper_open, fps=fps, **place, **steps)
    for path in written:
        typer.echo(path)


def _point(text: str) -> list[float]:
    """Three metres out of `x,y,z`, or `MvwanError`."""
    if len(point_m := _numbers(text)) != 3:
        raise MvwanError(f"--point {text!r}: three numbers in metres are needed, for example 0,0.6,0.2")
    return point_m


def _pixel(text: str) -> list[float] | None:
    """Two pixels out of `u,v`, None of `none`, or `MvwanError`."""
    if text == "none":
        return None
    if len(uv_px := _numbers(text)) != 2:
        raise MvwanError(f"--point-px {text!r}: two numbers in pixels of that picture are needed, for example 120,80, or none")
    return uv_px


def _numbers(text: str) -> list[float]:
    """The finite numbers between the commas, none where something else is there."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


@app.command(epilog="Example: mvwan evaluate runs/first --windows 16 --trials 10")
def evaluate(
    run: Run,
    dataset: Dataset = None,
    windows: Annotated[int, typer.Option("--windows", min=0, help="Held-out windows at most, spread evenly; 0: closed loop only.")] = 16,
    denoise_steps: DenoiseSteps = 5,
    heat_from: HeatSource = HeatFrom.auto,
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="JSON file; not given: evaluation.json in the run, with --dataset evaluation_NAME.json.", show_default=False
        ),
    ] = None,
    cameras: Annotated[
        str | None,
        typer.Option(
            "--cameras", help="Views to look through instead, e.g. left,top; written to evaluation_left_top.json.", show_default=False
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=0, help="Closed-loop trials per task and policy; 0: none.")] = 0,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Task of the trials; repeatable. Not given: those of the demonstrations.", show_default=False),
    ] = None,
    layouts: Annotated[
        Layouts | None,
        typer.Option("--layouts", help="Where objects may stand in the trials; not given: as in the demonstrations.", show_default=False),
    ] = None,
    execute: Annotated[int, typer.Option("--execute", min=1, help="Waypoints to follow before the run looks again.")] = 8,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Trials at the same time.")] = 2,
    videos: Annotated[int, typer.Option("--videos", min=0, help="Filmed trials per task and policy.")] = 1,
    final: Annotated[
        bool, typer.Option("--final", help="Use the layouts kept for final evaluation (from 900000); not for tuning.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many trials there are and how many are still to run.")] = False,
) -> None:
    """Measure predictions on held-out windows beside baselines; with --trials also success in Meta-World beside its controls."""
    if not windows and not trials:
        raise MvwanError("--windows 0 without --trials: nothing is left to measure")
    if trials and dataset is not None:
        raise MvwanError("--dataset gives held-out windows alone; trials need the demonstrations of the run's training. Run them apart.")
    if trials and cameras is not None:
        raise MvwanError("--cameras is for held-out windows; trials look through the cameras of the run's training. Run them apart.")
    if dry_run and not trials:
        raise MvwanError("--dry-run counts trials; give --trials")
    if trials:
        from mvwan.closed_loop import TrialSettings, count_missing, evaluate_closed_loop, is_widened, plan_trials
        from mvwan.closed_loop import render as render_trials

        widened = is_widened(run) if layouts is None else layouts == "widened"
        settings = TrialSettings(execute=execute, denoise_steps=denoise_steps, seed=seed, widened=widened, heat_from=heat_from.value)
        planned = plan_trials(run, trials=trials, tasks=task, settings=settings, final=final, videos=videos)
        named = ", ".join(dict.fromkeys(trial.task for trial in planned))
        kind = "widened" if widened else "stock"
        typer.echo(f"closed loop: {len(planned)} trials of {named} on {kind} layouts, {count_missing(planned)} of them still to run")
    if dry_run:
        return
    if windows:
        from mvwan.evaluate import evaluate_prediction
        from mvwan.evaluation_table import render

        result = evaluate_prediction(
            run,
            dataset=dataset,
            cameras=None if cameras is None else tuple(name.strip() for name in cameras.split(",")),
            windows=windows,
            denoise_steps=denoise_steps,
            seed=seed,
            output=output,
            heat_from=heat_from.value,
            progress=True,
        )
        console().print(render(result))
    if trials:
        measured = evaluate_closed_loop(
            run, trials=trials, tasks=task, settings=settings, final=final, processes=processes, videos=videos, progress=True
        )
        console().print(render_trials(measured))


@app.command(epilog="Example: mvwan demo --output runs/demo")
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder of the demo; finished stages in it are not repeated.")] = Path(
        "runs/demo"
    ),
    task: Annotated[str, typer.Option("--task", help="Meta-World task.")] = "handle-press-v3",
    episodes: Annotated[int, typer.Option("--episodes", min=2, help="Demonstrations; a fifth is held out.")] = 10,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=2, help="Optimizer steps of each of the two runs. Not given: what takes ten minutes in all, 400 or 120."
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Held-out windows that are measured, at most.")] = 8,
    trials: Annotated[int, typer.Option("--trials", min=0, help="Closed-loop trials of each run and control; 0: none.")] = 4,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo left in the folder first.")] = False,
) -> None:
    """Record, fine-tune with the switch off and on, evaluate, let the arm move, and write report.html: ten minutes on two cores."""
    from mvwan.demo import run_demo

    run_demo(output, task=task, episodes=episodes, steps=steps, windows=windows, trials=trials, seed=seed, fresh=fresh)


app.command(epilog="Example: mvwan reproduce metaworld7 --dry-run")(reproduce)
app.command(
    epilog="Example: mvwan ablate --set data.root=data/drawer --vary unfreeze_modulation_and_norms=false,true --learning-rates 1e-3,3e-3 "
    "--output runs/ablation"
)(ablate)
app.command(epilog="Example: mvwan sensitivity --set data.root=data/drawer --output runs/sensitivity --budget 800000")(sensitivity)
app.command(epilog="Example: mvwan plan --preset wan2.2-ti2v-5b --device '8 x h100-80gb'")(plan)
app.command(epilog="Example: mvwan bench --size middle --part steps --repeats 5")(bench)


def main() -> None:
    """Runs the command line and exits."""
    app()
