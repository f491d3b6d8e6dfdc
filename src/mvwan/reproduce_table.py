"""The results of a reproduction as Markdown: success rates, settings, costs. Knows no run and no file."""

from collections.abc import Mapping, Sequence
from typing import Any

from mvwan.markdown import count, markdown_table
from mvwan.metrics import rate_in_words

_SETTINGS = (
    ("base", "base.source"),
    ("started from", "train.from_checkpoint"),
    ("fusion", "model.fusion"),
    ("action head", "model.action_head"),
    ("LoRA rank", "trainable.lora.rank"),
    ("optimizer steps", "train.steps"),
    ("windows per micro-batch", "train.batch_size"),
    ("micro-batches per step", "train.gradient_accumulation"),
    ("learning rate", "train.learning_rate"),
    ("schedule", "train.schedule"),
    ("weight of RGB", "train.rgb_weight"),
    ("weight of heat as read", "train.heat_reader_weight"),
    ("frames per window", "data.num_frames"),
    ("recorded frames apart", "data.frame_interval"),
    ("frames from window to window", "data.window_stride"),
    ("frames past an episode's end", "data.past_end"),
    ("augmented variants", "data.augment.variants"),
    ("picture height", "data.height_px"),
    ("picture width", "data.width_px"),
    ("spot in heatmaps, sigma", "data.heatmap_sigma_px"),
    ("share held out", "data.validation_share"),
    ("seed", "seed"),
)


def markdown(result: Mapping[str, Any]) -> str:
    """The text of `results.md` for what `reproduce.collect` gives, a heading of level 2 at its top."""
    parts = [f"## {result['suite']}", _about(result)]
    for table in result["tables"]:
        parts += [f"### {table['demonstrations']} demonstrations per task", _rates(table["rates"], result["tasks"])]
        if table["paths"]:
            parts.append(_paths(table["paths"], result["test_demonstrations"]))
    parts += ["### Settings", f"```bash\n{result['command']}\n```", _settings(result)]
    parts += ["### Cost", _cost(result["stages"])]
    return "\n\n".join(parts) + "\n"


def _about(result: Mapping[str, Any]) -> str:
    first, last = result["layouts"]
    kind = "widened" if result["widened"] else "stock"
    lines = [
        f"Successes in Meta-World on {kind} layouts {first} to {last} of each task, with 95 % Wilson intervals. One model for all tasks."
    ]
    if result["config"]["train"]["from_checkpoint"] == "tiny-tracking":
        lines.append(
            "Runs start from `tiny-tracking`: that checkpoint has learned to track from 12 demonstrations of each of 38 other tasks, with "
            "the switch on; where the switch is off, its modulation and norms stay as they are."
        )
    if result["start_from"]:
        made = f", made by `{result['start_made_by']}`" if result["start_made_by"] else ""
        lines.append(f"Each run goes on from the one of the same switch in `{result['start_from']}`{made}.")
    if result["final"]:
        lines.append("These layouts are kept for this measurement; nothing is chosen on them.")
    else:
        lines.append("**Tuning layouts**: settings may have been chosen on them, so these are not final results.")
    lines.append(
        "`replay` follows a demonstration without looking, `expert waypoints` the scripted expert's own path on that very layout, `hold` "
        "stays."
    )
    if result["published"]:
        lines.append(f"`published`: {result['published']['source']}; its layouts and its protocol are not ours.")
    if missing := result["unfinished_stages"]:
        lines.append(f"**Unfinished**: {count(len(missing), 'stage')} still to come.")
    return " ".join(lines)


def _rates(rates: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> str:
    rows = [
        [
            f"**{task}**" if task == "all" else task,
            *(rate_in_words(rates[column][task]) if task in rates[column] else "–" for column in rates),
        ]
        for task in (*tasks, "all")
    ]
    return markdown_table(["task", *rates], rows)


def _paths(paths: Mapping[str, Mapping[str, float]], demonstrations: int) -> str:
    windows = int(max(numbers["windows"] for numbers in paths.values()))
    said = (
        f"Predicted paths on {count(windows, 'window')} from {count(demonstrations, 'demonstration')} per task on other layouts: 3-D error "
        "in mm; a point that is not found counts as held. `nearest` is a training demonstration of the same task, moved to where the "
        "window begins, `hold first` stays there."
    )
    order = sorted(paths, key=lambda column: column in ("nearest", "hold first"))
    rows = [[column, *(f"{paths[column][name]:.1f}" for name in ("mean", "median", "p95", "last_frame"))] for column in order]
    return f"{said}\n\n{markdown_table(['', 'mean', 'median', '95th percentile', 'last frame'], rows)}"


def _settings(result: Mapping[str, Any]) -> str:
    rows = []
    for label, name in _SETTINGS:
        value: Any = result["config"]
        for part in name.split("."):
            value = value[part]
        rows.append([label, f"{value:g}" if isinstance(value, float) else str(value)])
    trial = result["trial_settings"]
    rows += [[name.replace("_", " "), str(trial[name])] for name in ("execute", "denoise_steps", "control_steps")]
    rows += [["mvwan", result["version"]]]
    return markdown_table(["setting", "value"], rows, left=(0, 1))


def _cost(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows, total_s = [], 0.0
    for name, cost in stages.items():
        seconds, again = cost["seconds"], ""
        if cost["attempts"] > 1 and "steps_seconds" in cost:
            seconds, again = cost["steps_seconds"], f" ({cost['attempts']} attempts: their steps alone)"
        elif cost["attempts"] > 1:
            again = f" (attempt {cost['attempts']}; earlier ones not counted)"
        rows.append([name + again, _clock(seconds)])
        total_s += seconds
    rows.append(["**all**", _clock(total_s)])
    peak = max((cost["peak_memory_mb"] for cost in stages.values()), default=0)
    return f"{markdown_table(['stage', 'wall time'], rows)}\n\nThe largest process held {peak:,} MB."


def _clock(seconds: float) -> str:
    """`1 h 02 min`, `12 min 05 s`, `8 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
