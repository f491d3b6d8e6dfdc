"""Folders of finished runs -> one HTML page that opens without network: what trained, what moved, losses, errors, pictures.

Reads what `train` and `evaluate` wrote and draws conclusions only as far as the numbers go (`findings`). Knows no model.
"""

import html
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mvwan import report_figures, report_page
from mvwan.errors import MvwanError
from mvwan.evaluation_table import measure_rows
from mvwan.files import write_file
from mvwan.markdown import count
from mvwan.model.trainable_table import human_bytes, percent
from mvwan.report_frames import SOURCE_NAMES, Window, source_name, window_block
from mvwan.report_page import Section
from mvwan.report_rollouts import rollouts
from mvwan.run_record import RunRecord, findings, number

_BASELINES = (("hold", "hold_first"), ("velocity", "constant_velocity"), ("nearest", "nearest"))
_DRAWN_BASELINES = (_BASELINES[0], _BASELINES[2])
_VERSIONS = ("mvwan", "torch", "diffusers", "transformers", "peft", "accelerate", "metaworld", "mujoco", "numpy")


def write_report(runs: Mapping[str, str | Path], output: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """The page at `output`, made from the run folders in `runs` (`{"off": dir, "on": dir}`, or one of them).

    `about` is shown as it is: what was recorded, seconds per stage. Raises `MvwanError` when a run lacks a file.
    """
    if not runs or not set(runs) <= {"off", "on"}:
        raise MvwanError(f"report: runs are {sorted(runs)}; give one or both of off, on")
    records = [RunRecord(label=label, folder=Path(runs[label])) for label in ("off", "on") if label in runs]
    sections = [
        Section("short", "In short", _short(records)),
        Section("trains", "What trains", _what_trains(records)),
        Section("moved", "What moved", _what_moved(records)),
        Section("losses", "Losses", _losses(records)),
        Section("errors", "Held-out predictions against the truth", _errors(records)),
        Section("pictures", "Predicted and true frames", _frames(records)),
        Section("rollouts", "The arm moves", rollouts(records)),
        Section("settings", "Settings, seeds, versions, time", _settings(records, about or {})),
    ]
    write_file(output, _page(records, sections))
    return Path(output)


# ── sections ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _short(records: Sequence[RunRecord]) -> str:
    first = records[0]
    cards = [
        _card(
            "Trainable parameters",
            [(source_name(record.label), f"{record.trainable_parameters:,}") for record in records],
            f"of {first.table['total_parameters']:,} in the model",
        )
    ]
    for title, measure, digits, remark in (
        ("Heatmap peak error, px", "peak_error_px", 2, f"pictures are {first.evaluation['size_px'][1]} px wide; lower is better"),
        ("3-D error, mm", "error_3d_mm", 1, "peaks of all views met in space; lower is better"),
        ("RGB PSNR, dB", "rgb_psnr_db", 2, "future frames only; higher is better"),
    ):
        rows = [(source_name(record.label), number(record.mean(measure), digits)) for record in records]
        rows += [
            (source_name(source), number(first.mean(measure, long), digits))
            for source, long in (("hold", "hold_first"), ("codec", "codec"))
        ]
        cards.append(_card(title, rows, remark))
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(records))
    return f'<div class="cards">{"".join(cards)}</div><div class="note"><ul>{sentences}</ul></div>'


def _card(title: str, rows: Sequence[tuple[str, str]], remark: str) -> str:
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows)
    return f'<div class="card"><h3>{html.escape(title)}</h3><dl>{lines}</dl><small>{html.escape(remark)}</small></div>'


def _what_trains(records: Sequence[RunRecord]) -> str:
    intro = (
        "<p>Every parameter belongs to exactly one group. The switch <code>--unfreeze_modulation_and_norms</code> adds two: "
        "<code>modulation</code>, the AdaLN tables of every block, and <code>mvs_norms</code>, view attention's query and key norms.</p>"
    )
    compared = f"<h3>Off and on, side by side</h3>{_compared(records)}" if len(records) == 2 else ""
    each = "".join(
        f"<details{' open' if len(records) == 1 else ''}><summary>All groups, {SOURCE_NAMES[record.label]}</summary>"
        f"{_group_table(record)}</details>"
        for record in records
    )
    return intro + compared + each


def _compared(records: Sequence[RunRecord]) -> str:
    off, on = ({group["name"]: group for group in record.table["groups"]} for record in records)
    lora = off["lora"]["parameters"] if off.get("lora", {}).get("mode") == "lora" else None
    rows, marks = [], []
    for name in dict.fromkeys([*off, *on]):
        before, after = _trained(off.get(name)), _trained(on.get(name))
        if not before[0] and not after[0]:
            continue
        rows.append(_compare_row(name, before, after, lora))
        marks.append("differs" if before != after else "")
    rows.append(
        _compare_row(
            "trainable",
            tuple(map(sum, zip(*map(_trained, off.values()), strict=True))),
            tuple(map(sum, zip(*map(_trained, on.values()), strict=True))),
            lora,
        )
    )
    return report_page.table(
        ("group", "trained, off", "trained, on", "difference", "tensors", "% of LoRA", "optimizer"), rows, [*marks, "total"]
    )


def _trained(group: Mapping[str, Any] | None) -> tuple[int, int, int]:
    return (group["parameters"], group["tensors"], group["optimizer_bytes"]) if group and group["trainable"] else (0, 0, 0)


def _compare_row(name: str, off: Sequence[int], on: Sequence[int], lora: int | None) -> tuple[str, ...]:
    parameters, tensors, optimizer = (after - before for before, after in zip(off, on, strict=True))
    share = percent(parameters / lora) if lora and parameters else ""
    return (
        name,
        f"{off[0]:,}",
        f"{on[0]:,}",
        f"{parameters:+,}" if parameters else "0",
        f"{tensors:+,}" if tensors else "0",
        share,
        f"+{human_bytes(optimizer)}" if optimizer > 0 else "",
    )


def _group_table(record: RunRecord) -> str:
    groups = record.table["groups"]
    lora = next((group["parameters"] for group in groups if group["name"] == "lora" and group["mode"] == "lora"), None)
    rows = [
        (
            group["name"],
            group["mode"],
            f"{group['parameters']:,}",
            f"{group['tensors']:,}",
            percent(group["parameters"] / lora) if lora and group["trainable"] else "",
            group["dtype"],
            human_bytes(group["optimizer_bytes"]),
        )
        for group in groups
    ]
    total = _trained(
        {
            "trainable": True,
            **{key: sum(group[key] for group in groups if group["trainable"]) for key in ("parameters", "tensors", "optimizer_bytes")},
        }
    )
    rows.append(("trainable", "", f"{total[0]:,}", f"{total[1]:,}", percent(total[0] / lora) if lora else "", "", human_bytes(total[2])))
    marks = ["" if group["trainable"] else "dim" for group in groups] + ["total"]
    return report_page.table(("group", "mode", "parameters", "tensors", "% of LoRA", "dtype", "optimizer"), rows, marks)


def _what_moved(records: Sequence[RunRecord]) -> str:
    steps = records[0].movement["steps"]
    frozen = " and ".join(f"{record.movement['frozen_tensors_unchanged']:,} ({SOURCE_NAMES[record.label]})" for record in records)
    intro = (
        f"<p>The proof that every run carries: after {steps} steps each trained group has moved and each frozen tensor is the same bit "
        f"for bit: {frozen}. A group that stood still, or a frozen tensor that moved, would have stopped the run.</p>"
    )
    plots = ""
    for field, title, x in (
        ("relative_change", "Change of what was not zero", "norm of the change / norm at the start"),
        ("change_from_zero", "Reached by what was zero", "norm"),
    ):
        changes = {record.label: {row["group"]: row[field] for row in record.movement["groups"]} for record in records}
        if any(change is not None for of_run in changes.values() for change in of_run.values()):  # nothing starts at zero in a later stage
            plots += report_page.plot(report_figures.movement(changes, title, x))
    rows = []
    for record in records:
        for row in record.movement["groups"]:
            numbers = (row["relative_change"], row["change_from_zero"], row["gradient_norm"])
            rows.append(
                (
                    row["group"],
                    record.label,
                    *("–" if value is None else f"{value:.2e}" for value in numbers),
                    f"{row['tensors_moved']}/{row['tensors']}",
                )
            )
    table = report_page.table(
        ("group", "switch", "relative change", "change from zero", "gradient norm", "tensors moved"), rows, [""] * len(rows)
    )
    remark = "Some tensors start at zero, such as LoRA's B and the projector: a relative change of them has no meaning."
    return f'{intro}<div class="figures">{plots}</div><p class="soft">{remark}</p><details><summary>All numbers</summary>{table}</details>'


def _losses(records: Sequence[RunRecord]) -> str:
    plots = [
        report_page.plot(report_figures.training_loss(stream, {record.label: record.training(stream) for record in records}))
        for stream in ("rgb", "heat")
    ]
    for stream in ("rgb", "heat"):
        bands = {record.label: record.held_out(stream) for record in records}
        if any(bands.values()):
            plots.append(report_page.plot(report_figures.held_out_loss(stream, bands)))
    intro = (
        "<p>Squared error of the velocity, per stream, given frames left out. Runs see the same windows, sigma and noise at each step. "
        "Held-out losses are taken on episodes that were never trained on, at fixed noise, in bands of sigma (0 is data, 1 is noise).</p>"
    )
    return f'{intro}<div class="figures">{"".join(plots)}</div>'


def _errors(records: Sequence[RunRecord]) -> str:
    first = records[0]
    evaluation = first.evaluation
    denoised = count(evaluation["denoise_steps"], "denoising step")
    intro = (
        f"<p>{evaluation['num_windows']} windows of {evaluation['num_frames']} frames from held-out episodes "
        f"({html.escape(', '.join(evaluation['episodes']))}), {denoised}, seed {evaluation['seed']}. "
        "<em>Hold first frame</em> predicts that nothing moves, <em>constant velocity</em> that the point goes on as it did over the frame "
        "before, which no run sees, <em>nearest demonstration</em> that it goes on as in the training window that begins most "
        "alike. <em>Encoded and back</em> is the truth encoded, and decoded or read as predictions are: what that alone "
        f"costs. A peak counts as found within {evaluation['found_within_px']:.1f} px. Where a heatmap shows no peak at all, the point is "
        "taken to stay where it last was: a lost peak cannot beat the baseline.</p>"
    )
    sources = [
        *((source_name(short), first, long) for short, long in _BASELINES if long in evaluation["measures"]),
        *((source_name(record.label), record, "predicted") for record in records),
        (source_name("codec"), first, "codec"),
    ]
    labels = measure_rows(first.evaluation["measures"])
    rows = []
    for place, (label, _, digits) in enumerate(labels):
        values = [measure_rows(record.evaluation["measures"])[place][1].get(source) for _, record, source in sources]
        rows.append((label, *(number(value, digits) for value in values)))
    table = report_page.table(("", *(name for name, _, _ in sources)), rows, [""] * len(rows), escape_head=False)
    per_view = [
        (
            view,
            *(
                number(record.evaluation["measures"][source]["peak_error_px"]["per_view"][index]["mean"], 2)
                for _, record, source in sources
            ),
        )
        for index, view in enumerate(evaluation["views"])
    ]
    views = report_page.table(
        ("peak error by view, px", *(name for name, _, _ in sources)), per_view, [""] * len(per_view), escape_head=False
    )
    over_time = [
        report_figures.error_over_time(
            {short: evaluation["measures"][long][name]["per_frame"] for short, long in _DRAWN_BASELINES if long in evaluation["measures"]}
            | {record.label: record.evaluation["measures"]["predicted"][name]["per_frame"] for record in records},
            evaluation["given_frames"],
            title,
            unit,
        )
        for name, title, unit in (
            ("peak_error_px", "Peak error by frame", "px"),
            ("error_3d_mm", "3-D error by frame", "mm"),
            ("rgb_psnr_db", "RGB PSNR by frame", "dB"),
        )
    ]
    by_window = {"hold": [row["hold_first_peak_error_px"] for row in evaluation["windows"]]}
    by_window |= {record.label: [row["predicted_peak_error_px"] for row in record.evaluation["windows"]] for record in records}
    plots = "".join(report_page.plot(figure) for figure in (*over_time, report_figures.error_by_window(by_window)))
    return f'{intro}{table}{views}<div class="figures">{plots}</div>'


def _frames(records: Sequence[RunRecord]) -> str:
    labels = [record.label for record in records]
    windows = [dict(zip(labels, stored, strict=True)) for stored in zip(*(record.stored for record in records), strict=True)]
    if not windows:
        return "<p>No predictions were kept.</p>"
    given = records[0].evaluation["given_frames"]
    blocks = [window_block(window, given, place, report_page.plot(_in_space(window))) for place, window in enumerate(windows, 1)]
    intro = "<p>The same held-out windows for every run. White rings mark where the point truly is.</p>"
    return intro + "".join(blocks)


def _in_space(window: Window) -> report_figures.Figure:
    paths = {"truth": next(iter(window.values()))["true_point_m"]}
    paths |= {label: stored["predicted_point_m"] for label, stored in window.items()}
    return report_figures.paths_in_space({source: _listed(points) for source, points in paths.items()})


# ── settings and page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(records: Sequence[RunRecord], about: Mapping[str, Any]) -> str:
    facts = [(str(name), str(value)) for name, value in about.items() if name != "seconds"]
    seconds = about.get("seconds", {})
    times = [(stage, f"{value:,.1f} s") for stage, value in seconds.items()] + (
        [("all", f"{sum(seconds.values()):,.1f} s")] if seconds else []
    )
    versions = [(name, version) for name in _VERSIONS if (version := _version(name))]
    blocks = [
        f"<div><h3>{title}</h3>{report_page.table(('', ''), rows, [''] * len(rows))}</div>"
        for title, rows in (("This run", facts), ("Wall time", times), ("Versions", versions))
        if rows
    ]
    yaml = "".join(
        f"<details><summary>All settings, {SOURCE_NAMES[record.label]}</summary><pre>{html.escape(record.settings)}</pre></details>"
        for record in records
    )
    return f'{_left_out(records)}<div class="figures">{"".join(blocks)}</div>{yaml}'


def _left_out(records: Sequence[RunRecord]) -> str:
    """What the runs went without because it is damaged; nothing when that is nothing."""
    parts = []
    for record in (record for record in records if record.skipped):
        counts = " and ".join(f"{len(found)} {kind}" for kind, found in record.skipped.items() if found)
        rows = [(one["name"], one["reason"]) for found in record.skipped.values() for one in found]
        parts.append(
            f"<details><summary>Data, {SOURCE_NAMES[record.label]}: {counts} were damaged and left out</summary>"
            f"{report_page.table(('', 'why'), rows, [''] * len(rows))}</details>"
        )
    return "".join(parts)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _page(records: Sequence[RunRecord], sections: Sequence[Section]) -> str:
    lead = (
        "Wan2.2-TI2V was extended so that several calibrated cameras are seen together and every video comes with a heatmap of where the "
        "robot's tool will be. Here it was fine-tuned on scripted demonstrations, "
        + ("twice from the same seed: with the switch off and on." if len(records) == 2 else f"with the switch {records[0].label}.")
    )
    return report_page.page(
        "mvwan report", "A multi-view RGB + heatmap Wan, fine-tuned on robot demonstrations", lead, sections, _version("mvwan")
    )


def _listed(values: np.ndarray) -> list[Any]:
    """Nested lists for the page, None where a number is not finite."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()
