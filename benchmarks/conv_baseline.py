"""The bar for `mvwan`: a plain convolutional net of 0.9 M parameters, minutes on one core, that predicts the same tool points.

    python benchmarks/conv_baseline.py train data/drawer --output runs/conv
    python benchmarks/conv_baseline.py measure runs/conv data/drawer-test
    python benchmarks/conv_baseline.py trials runs/conv --trials 25

First pictures of all views at 64 px, a spot at the tool point now and the instruction go in, the tool point in all later frames
comes out. Windows, the episodes held out and the windows measured are those of `mvwan train --preset tiny` and `mvwan evaluate` under
the same seed and settings: errors compare horizon for horizon. It trains on windows from every frame.

    <output>/weights.safetensors, settings.json    the net, and what it was made from
    <output>/evaluation.json                       errors on held-out windows beside holding the first frame
    <output>/closed_loop.json                      successes in Meta-World, as `mvwan evaluate --trials` writes them
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from conv_net import SIZE_PX, ConvNet, Windows, fit, one_window, place_of, predict, read_windows

from mvwan.cli import Door
from mvwan.cli_settings import Layouts, Seed
from mvwan.closed_loop import FIRST_TUNING_LAYOUT, TrialSettings, attempt, successes
from mvwan.config import config_from_dict, parse_overrides
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.data.transforms import resize
from mvwan.data.windows import spread
from mvwan.errors import MvwanError
from mvwan.evaluate import all_held_out, filled
from mvwan.files import read_json, whole_directory, write_json
from mvwan.memory import peak_bytes
from mvwan.metrics import Tally, error_3d_mm
from mvwan.policies import Demonstrations, Seen
from mvwan.presets import config_from_preset
from mvwan.sim.execution import Plan, stay
from mvwan.sim.metaworld import RESERVED_LAYOUTS, Simulator
from mvwan.sim.tasks import task_name
from mvwan.tensors import TensorFile, write_tensors

app = typer.Typer(cls=Door, help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

NumWindows = Annotated[int, typer.Option("--windows", min=1, help="Held-out windows at most, spread evenly.")]


@app.command(epilog="Example: python benchmarks/conv_baseline.py train data/drawer --output runs/conv --set data.window_stride=7")
def train(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of demonstrations, as `mvwan record` writes it.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write to; must not exist yet.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.")] = 1500,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows per update.")] = 16,
    rate: Annotated[float, typer.Option("--learning-rate", min=1e-9, help="Highest learning rate.")] = 2e-3,
    shift_px: Annotated[int, typer.Option("--shift-px", min=0, max=SIZE_PX // 4, help="Pictures are moved by so much at most.")] = 4,
    jitter: Annotated[float, typer.Option("--jitter", min=0, max=1, help="Colours are scaled by so much at most.")] = 0.2,
    windows: NumWindows = 16,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="As for `mvwan train`: data.* counts.")] = None,
    seed: Seed = 0,
) -> None:
    """Train on the training episodes, and measure on held-out ones."""
    started = time.monotonic()
    own = {"seed": seed, "data": {"root": str(dataset), "height_px": SIZE_PX, "width_px": SIZE_PX}}
    config = config_from_preset("tiny", parse_overrides(settings or []), own, where="settings")
    episodes = episodes_of(config.data)
    views = len(config.data.cameras or episodes[0].cameras)
    instructions = sorted({episode.instruction for episode in episodes})
    training = WindowDataset(episodes, replace(config.data, window_stride=1), views, "train", seed)
    held_out = WindowDataset(episodes, config.data, views, "validation", seed)
    with whole_directory(output) as folder:
        read = read_windows(training, range(len(training)), instructions)
        net = fit(read, len(instructions), steps, batch, rate, shift_px, jitter, seed)
        trained = {"steps": steps, "batch": batch, "learning_rate": rate, "shift_px": shift_px, "jitter": jitter}
        about = {
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "training_windows": len(training),
            "seconds": round(time.monotonic() - started, 1),
            "peak_memory_mb": peak_bytes(children=True) // 2**20,
        }
        write_tensors(folder / "weights.safetensors", net.state_dict())
        write_json(folder / "settings.json", {**trained, **about, "instructions": instructions, "views": views, "config": config.to_dict()})
        typer.echo(f"{about['parameters']:,} parameters, {len(training)} windows, {about['seconds']} s, {about['peak_memory_mb']} MB")
        if not len(held_out):
            typer.echo("no episode is held out, so no error is measured")
            return
        _write_errors(net, held_out, windows, instructions, seed, folder)


def _write_errors(net: ConvNet, held_out: WindowDataset, windows: int, instructions: Sequence[str], seed: int, folder: Path) -> None:
    chosen = spread(len(held_out), windows)
    result = errors_of(net, read_windows(held_out, chosen, instructions), [held_out.sample_id(index) for index in chosen])
    write_json(folder / "evaluation.json", {"seed": seed, "held_out_windows": len(held_out), **result})
    for source, measures in result["measures"].items():
        numbers = ", ".join(f"{name} {value:g} mm" for name, value in measures["error_3d_mm"].items() if name != "count")
        typer.echo(f"{source}: {numbers} over {result['num_windows']} held-out windows")


@app.command(epilog="Example: python benchmarks/conv_baseline.py measure runs/conv data/drawer-test --windows 80")
def measure(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `train` wrote.")],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Demonstrations that it was not trained on, of the same tasks.")],
    windows: NumWindows = 16,
) -> None:
    """Measure on another dataset, on the windows that `mvwan evaluate --dataset` takes; writes evaluation.json anew."""
    known = read_json(run / "settings.json")
    config = config_from_dict(known["config"], f"{run}: config")
    episodes = episodes_of(config.data, dataset)
    data = all_held_out(config.data, config.seed, str(dataset), episodes)
    held_out = WindowDataset(episodes, data, known["views"], "validation", config.seed)
    if not len(held_out):
        raise MvwanError(f"{dataset}: its episodes are too short for a window")
    _write_errors(_net(run, known), held_out, windows, known["instructions"], config.seed, run)


def _net(run: Path, known: Mapping[str, Any]) -> ConvNet:
    net = ConvNet(known["views"], known["config"]["data"]["num_frames"] - 1, len(known["instructions"]))
    net.load_state_dict(dict(TensorFile(run / "weights.safetensors")))
    return net.eval()


def errors_of(net: ConvNet, windows: Windows, names: Sequence[str]) -> dict[str, Any]:
    """3-D errors in mm over the later frames of held-out windows, by the names that `mvwan evaluate` gives them.

    A point that is not found counts as held.
    """
    later_m = windows.point_m[:, 1:]
    held_m = np.broadcast_to(windows.point_m[:, :1], later_m.shape)
    answers = {"predicted": filled(predict(net, windows)[0], held_m), "hold_first": held_m}
    errors = {source: [[error_3d_mm(a[None], b[None], 0) for a, b in zip(*pair, strict=True)] for pair in zip(answer, later_m, strict=True)]
              for source, answer in answers.items()}  # fmt: skip
    by_frame = {source: [sum(frame, Tally()) for frame in zip(*error, strict=True)] for source, error in errors.items()}
    by_window = {source: [sum(window, Tally()) for window in error] for source, error in errors.items()}
    return {
        "num_windows": len(names),
        "measures": {source: {"error_3d_mm": _summary(sum(error, Tally()))} for source, error in by_window.items()},
        "per_frame_error_3d_mm": {source: [round(frame.mean, 4) for frame in frames] for source, frames in by_frame.items()},
        "windows": [
            {"sample_id": name, **{f"{source}_error_3d_mm": round(by_window[source][row].mean, 4) for source in answers}}
            for row, name in enumerate(names)
        ],
    }


def _summary(errors: Tally) -> dict[str, float]:
    numbers = {"mean": errors.mean, "median": errors.quantile(0.5), "p95": errors.quantile(0.95), "count": errors.count}
    return {name: round(value, 4) for name, value in numbers.items()}


class Conv:
    """The net as a policy of closed-loop trials: follows the first `execute` predicted points, then looks again."""

    looks = True

    def __init__(self, net: ConvNet, instructions: Sequence[str], stride: int, execute: int) -> None:
        self._net, self._instructions, self._stride, self._execute = net, instructions, stride, execute

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing; it remembers nothing."""

    def plan(self, seen: Seen) -> Plan:
        """The predicted path from here."""
        rgb, cameras = resize(seen.rgb[:, None], seen.cameras, SIZE_PX, SIZE_PX)
        grip, place = np.full(1, np.nan, np.float32), place_of(seen.instruction, self._instructions)
        (point_m,), (gripper_open,) = predict(self._net, one_window(rgb[:, 0], cameras, seen.state.point_m[None], grip, place))
        found = np.flatnonzero(np.isfinite(point_m[: self._execute]).all(axis=-1))
        if not len(found):  # the arm stays and looks again
            return stay(seen.state.point_m, self._execute, self._stride)
        return Plan(point_m=point_m[found], gripper_open=gripper_open[found], stride=self._stride)


@app.command(epilog="Example: python benchmarks/conv_baseline.py trials runs/conv --trials 25 --layouts widened")
def trials(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `train` wrote.")],
    number: Annotated[int, typer.Option("--trials", min=1, help="Layouts per task.")] = 25,
    task: Annotated[list[str] | None, typer.Option("--task", help="Repeatable. Not given: those of the demonstrations.")] = None,
    layouts: Annotated[Layouts, typer.Option("--layouts", help="Where objects may stand.")] = Layouts.stock,
    execute: Annotated[int, typer.Option("--execute", min=1, help="Waypoints to follow before looking again.")] = 8,
    control_steps: Annotated[int, typer.Option("--control-steps", min=1, help="After which a trial is given up.")] = 500,
    final: Annotated[bool, typer.Option("--final", help="Use the layouts kept for final evaluation; not for tuning.")] = False,
) -> None:
    """Success in Meta-World, on the layouts that `mvwan evaluate --trials` takes."""
    started = time.monotonic()
    known = read_json(run / "settings.json")
    config = config_from_dict(known["config"], f"{run}: config")
    settings = TrialSettings(execute=execute, control_steps=control_steps, widened=layouts == "widened").check(config)
    data, first = config.data, RESERVED_LAYOUTS if final else FIRST_TUNING_LAYOUT
    source = Demonstrations(data=data, seed=config.seed)
    policy = Conv(_net(run, known), known["instructions"], source.control_steps_per_frame * data.frame_interval, execute)
    recorded = {camera.name: camera for camera in source.training[0].cameras}
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys([task_name(given) for given in task] if task else source.tasks):
        with Simulator(name, [recorded[camera] for camera in data.cameras or recorded], settings.widened) as simulator:
            lines += [{"policy": "conv", **attempt(policy, simulator, seed, settings)} for seed in range(first, first + number)]
        typer.echo(f"{name}: {sum(line['success'] for line in lines if line['task'] == name)} of {number}")
    result = {"settings": asdict(settings), "final": final, "trials": number, "policies": ["conv"], "tasks": successes(lines)}
    seconds = round(time.monotonic() - started, 1)
    write_json(
        run / "closed_loop.json", {**result, "lines": lines, "seconds": seconds, "peak_memory_mb": peak_bytes(children=True) // 2**20}
    )


if __name__ == "__main__":
    app()
