"""What a camera that is moved, left out or added does to a model that tells views by order, and to one that knows its cameras.

    python benchmarks/view_code.py --output runs/view_code

Records one task with several rigs (each time the standard cameras, moved about their targets), trains a model per view code on the same
windows from `tiny-tracking`, and measures all of them on layouts of their own: as trained, one camera elsewhere, one fewer, one more,
other order. Finished stages are not repeated; an interrupted training goes on.

    <output>/rigs/*, elsewhere, five     recordings
    <output>/slot, camera, both          runs
    <output>/settings.json               what recordings and runs were made from
    <output>/view_code.json, table.md    what came of it
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mvwan.baselines import Answer, hold_first
from mvwan.batch import Sample
from mvwan.cameras import Camera
from mvwan.cli import Door
from mvwan.cli_settings import Seed
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.data.windows import spread
from mvwan.errors import MvwanError
from mvwan.evaluate import measure_answer
from mvwan.files import read_json, write_file, write_json
from mvwan.metrics import Tally
from mvwan.presets import config_from_preset
from mvwan.sample import LoadedRun, load_run, predict
from mvwan.sim.metaworld import pinhole, record
from mvwan.train import train

app = typer.Typer(
    cls=Door, help=__doc__, no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

CODES = ("slot", "camera", "both")
VIEWS = ("left", "right", "top")
SIZE_PX = 128


def rig(rng: np.random.Generator, extra: Sequence[str] = ()) -> tuple[Camera, ...]:
    """Left, right, top and `extra`, each turned about its target by up to 20 degrees and nearer or further by up to a tenth."""
    target = np.array([0.0, 0.65, 0.15])
    placed = {"left": (-65, 30), "right": (65, 30), "front": (0, 35), "behind": (-130, 35)}
    cameras = []
    for name in (*VIEWS, *extra):
        turn, distance = rng.uniform(-20, 20), 1.25 * rng.uniform(0.9, 1.1)
        if name == "top":
            eye = target + np.array([0.3 * np.sin(np.radians(turn)), 0.01, 1.6 * distance / 1.25])
            cameras.append(pinhole(name, tuple(eye), tuple(target), (0.0, 1.0, 0.0), 40, SIZE_PX))
            continue
        azimuth, elevation = np.radians(placed[name][0] + turn), np.radians(placed[name][1] + rng.uniform(-8, 8))
        towards = np.array([np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)])
        cameras.append(pinhole(name, tuple(target + distance * towards), tuple(target), (0.0, 0.0, 1.0), 42, SIZE_PX))
    return tuple(cameras)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to look at the test layouts."""

    name: str
    recording: str
    views: tuple[str, ...]


CONDITIONS = (
    Condition(name="as trained", recording="five", views=VIEWS),
    Condition(name="right camera elsewhere", recording="elsewhere", views=VIEWS),
    Condition(name="without the right camera", recording="five", views=("left", "top")),
    Condition(name="one more camera", recording="five", views=(*VIEWS, "front")),
    Condition(name="two more cameras", recording="five", views=(*VIEWS, "front", "behind")),
    Condition(name="other order", recording="five", views=("top", "left", "right")),
)


@app.command()
def main(
    output: Annotated[Path, typer.Option("--output", help="Folder to write to; goes on where it stopped.")] = Path("runs/view_code"),
    task: Annotated[str, typer.Option("--task", help="Meta-World task.")] = "drawer-open-v3",
    rigs: Annotated[int, typer.Option("--rigs", min=1, help="Rigs to train on.")] = 6,
    episodes: Annotated[int, typer.Option("--episodes", min=1, help="Demonstrations per rig.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Updates of 4 windows, each run.")] = 400,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows measured per condition.")] = 24,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Predictions of each window, each from other noise.")] = 3,
    seed: Seed = 0,
) -> None:
    """Records, trains, measures; prints the table and where it is."""
    made_from = {"task": task, "rigs": rigs, "episodes": episodes, "steps": steps, "seed": seed}
    known = output / "settings.json"
    if known.is_file() and read_json(known) != made_from:
        raise MvwanError(f"--output {output}: made from other settings, {read_json(known)}. Choose another --output.")
    write_json(known, made_from)
    roots = []
    for number in range(rigs):
        cameras = rig(np.random.default_rng([seed, number]))
        roots.append(_recorded(output / "rigs" / f"rig{number}", task, episodes, seed + 100 * number, cameras))
    test_rig = rig(np.random.default_rng([seed, 1000]), extra=("front", "behind"))
    far = rig(np.random.default_rng([seed, 1001]), extra=("front", "behind"))
    moved = tuple(replace(far[3], name="right") if camera.name == "right" else camera for camera in test_rig)
    recordings = {
        "five": _recorded(output / "five", task, 4, seed + 5000, test_rig),
        "elsewhere": _recorded(output / "elsewhere", task, 4, seed + 5000, moved[:3]),
    }
    rows = []
    for code in CODES:
        overrides = {
            "model": {"view_code": code},
            "data": {"root": roots, "cache": str(output / "latents"), "validation_share": 0.0, "window_stride": 3},
            "train": {"steps": steps, "save_every": steps, "evaluate_every": 0, "batch_size": 4, "tracker": "none"},
            "flow": {"sigma_min": 0.6},
            "seed": seed,
        }
        config = config_from_preset("tiny-finetune", overrides, where="settings")
        train(config, output / code, resume=(output / code).exists(), accept_trainable_change=code != "slot")
        run = load_run(output / code)
        for condition in CONDITIONS:
            rows.append({"code": code, "condition": condition.name, **_measure(run, condition, recordings, windows, draws, seed)})
            typer.echo(f"{code}, {condition.name}: {rows[-1]}")
    write_json(output / "view_code.json", {"settings": {**made_from, "windows": windows, "draws": draws}, "rows": rows})
    write_file(output / "table.md", _table(rows))
    typer.echo(_table(rows))


def _recorded(folder: Path, task: str, episodes: int, seed: int, cameras: Sequence[Camera]) -> str:
    if not folder.exists():
        record(task, episodes, folder, seed=seed, cameras=cameras)
    return str(folder)


def _measure(run: LoadedRun, condition: Condition, recordings: dict[str, str], windows: int, draws: int, seed: int) -> dict[str, float]:
    """Means over the predicted frames of test windows: peak error in px over the views that both sides have, error in space in mm."""
    data = replace(run.config.data, cameras=condition.views, root=recordings[condition.recording], validation_share=1.0)
    episodes = episodes_of(data)
    dataset = WindowDataset(episodes, data, len(condition.views), "validation", seed)
    samples = [dataset.sample(index) for index in spread(len(dataset), windows)]
    return _means([_errors(run, sample, seed + draw) for sample in samples for draw in range(draws)])


def _errors(run: LoadedRun, sample: Sample, seed: int) -> dict[str, Tally]:
    # A bare model, since a run refuses views that it was not trained for; here that is the question.
    prediction = predict(
        run.model, sample.rgb[:, 0], sample.instruction, sample.cameras, steps=1, seed=seed, point_m=sample.point_m[0], heat_only=True,
        codec=run.codec, config=run.config, reader=run.reader,
    )  # fmt: skip
    seen = np.where(prediction.confidence[..., None] > 0, prediction.uv_px, np.nan)
    held = hold_first(sample, 1)
    answers = {"": Answer(rgb=None, uv_px=seen, point_m=prediction.point_m), "hold_": held}
    return {
        f"{source}{name}": sum(tallies, Tally())
        for source, answer in answers.items()
        for name, tallies in measure_answer(sample, answer, held, 1).items()
        if name in ("peak_error_px", "error_3d_mm", "lost")
    }


def _means(errors: Sequence[dict[str, Tally]]) -> dict[str, float]:
    return {name: round(sum((error[name] for error in errors), Tally()).mean, 4) for name in errors[0]}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per condition, columns per code."""
    lines = [
        "| views at test time | " + " | ".join(f"{code}, mm (px)" for code in CODES) + " | holding |",
        "| --- " * (len(CODES) + 2) + "|",
    ]
    for condition in CONDITIONS:
        found = {row["code"]: row for row in rows if row["condition"] == condition.name}
        cells = [f"{found[code]['error_3d_mm']:.1f} ({found[code]['peak_error_px']:.2f})" for code in CODES]
        held = next(iter(found.values()))
        lines.append(f"| {condition.name} | {' | '.join(cells)} | {held['hold_error_3d_mm']:.1f} ({held['hold_peak_error_px']:.2f}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
