"""What a finished run left in its folder, and what its numbers allow one to say (`findings`).

Reads the files of `train` and `evaluate`. Knows no page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mvwan.evaluate import load_prediction
from mvwan.evaluation_table import read_closed_loop, read_evaluation
from mvwan.files import read_json, read_json_lines, read_text
from mvwan.markdown import count

_MOSTLY_LOST = 0.5
"""Where more heatmaps than this have no peak, an error near that of holding says nothing of the run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """What one run left in its folder."""

    label: str
    """`off` or `on`: also the name of its colour."""
    folder: Path

    @cached_property
    def table(self) -> dict[str, Any]:
        return read_json(self.folder / "table.json")

    @cached_property
    def movement(self) -> dict[str, Any]:
        return read_json(self.folder / "movement.json")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """Raises `MvwanError` for numbers of another version of the package."""
        return read_evaluation(self.folder / "evaluation.json")

    @cached_property
    def closed_loop(self) -> dict[str, Any] | None:
        """Success in Meta-World, None when no trials were run. Raises `MvwanError` for numbers of another version of the package."""
        path = self.folder / "closed_loop.json"
        return read_closed_loop(path) if path.is_file() else None

    @cached_property
    def settings(self) -> str:
        """The resolved config as YAML text."""
        return read_text(self.folder / "config.yaml")

    @cached_property
    def skipped(self) -> dict[str, list[dict[str, str]]]:
        """`episodes` and `windows` that were left out as damaged, each with `name` and `reason`; empty when there was none."""
        path = self.folder / "skipped.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_json_lines(self.folder / "metrics.jsonl")

    def training(self, stream: str) -> list[tuple[float, float | None]]:
        """(step, loss) of a stream, `rgb` or `heat`."""
        return [(line["step"], line[f"{stream}_loss"]) for line in self.log if line["kind"] == "train"]

    def held_out(self, stream: str) -> dict[str, list[tuple[float, float | None]]]:
        """Sigma band -> (step, held-out loss) of a stream."""
        bands: dict[str, list[tuple[float, float | None]]] = {}
        for line in self.log:
            for band, losses in line.get("bands", {}).items():
                bands.setdefault(band, []).append((line["step"], losses[f"{stream}_loss"]))
        return bands

    @cached_property
    def stored(self) -> list[dict[str, np.ndarray]]:
        """The predictions kept for pictures."""
        return [load_prediction(self.folder / row["pictures"]) for row in self.evaluation["windows"] if "pictures" in row]

    @property
    def trainable_parameters(self) -> int:
        return self.table["trainable_parameters"]

    def mean(self, measure: str, source: str = "predicted") -> float | None:
        """The mean of a measure over all held-out windows."""
        return self.evaluation["measures"][source][measure]["mean"]


def findings(records: Sequence[RunRecord]) -> list[str]:
    """Five plain sentences: what trained, errors beside the baseline, the codec's share, and what may not be concluded."""
    first = records[0]
    evaluation = first.evaluation
    where = f"{count(evaluation['num_windows'], 'held-out window')} of {count(len(evaluation['episodes']), 'episode')}"
    hold, codec = first.mean("peak_error_px", "hold_first"), first.mean("peak_error_px", "codec")
    found = [
        "Trained: " + ", ".join(f"{record.label} {record.trainable_parameters:,} parameters" for record in records) + _added(records),
        f"Heatmap peak error on {where}: {_each(records, 'peak_error_px', 'px', 2)}; holding the first frame {number(hold, 2)} px.",
        _rest(records),
        _against_baseline(records, hold, codec),
    ]
    return [*found, _off_against_on(records)] if len(records) == 2 else found


def _rest(records: Sequence[RunRecord]) -> str:
    held = {measure: records[0].mean(measure, "hold_first") for measure in ("error_3d_mm", "rgb_psnr_db")}
    return (
        f"3-D error: {_each(records, 'error_3d_mm', 'mm', 1)}; holding the first frame {number(held['error_3d_mm'], 1)} mm. "
        f"RGB PSNR: {_each(records, 'rgb_psnr_db', 'dB', 2)}; holding {number(held['rgb_psnr_db'], 2)} dB."
    )


def _added(records: Sequence[RunRecord]) -> str:
    if len(records) < 2:
        return "."
    more = records[1].trainable_parameters - records[0].trainable_parameters
    return f" ({more:+,}, {100 * more / records[0].trainable_parameters:+.2f} %)."


def _each(records: Sequence[RunRecord], measure: str, unit: str, digits: int) -> str:
    return ", ".join(f"{record.label} {number(record.mean(measure), digits)} {unit}" for record in records)


def _against_baseline(records: Sequence[RunRecord], hold: float | None, codec: float | None) -> str:
    floor = f"The truth, encoded and brought back as predictions are, is already {number(codec, 2)} px off."
    if hold is None:
        return f"No visible point in the held-out windows, so nothing can be compared. {floor}"
    lost = {record.label: record.mean("lost") or 0.0 for record in records}
    if max(lost.values()) > _MOSTLY_LOST:
        shares = ", ".join(f"{label} {100 * share:.0f} %" for label, share in lost.items())
        return f"Heatmaps without a peak, which count as holding: {shares}. So the errors are those of holding; train longer. {floor}"
    better = [record.label for record in records if (record.mean("peak_error_px") or np.inf) < hold]
    verdict = {
        0: "In peaks, no run beats holding the first frame yet: train longer, on more demonstrations, or on a better VAE.",
        len(records): f"In peaks, {'every' if len(records) > 1 else 'the'} run beats holding the first frame.",
    }.get(len(better), f"In peaks, only the run with the switch {' and '.join(better)} beats holding the first frame.")
    return f"{verdict} {floor}"


def _off_against_on(records: Sequence[RunRecord]) -> str:
    """One seed each never makes a winner; says what the difference is and that it is not more."""
    errors = [{row["sample_id"]: row["predicted_peak_error_px"] for row in record.evaluation["windows"]} for record in records]
    pairs = [(errors[0][name], errors[1][name]) for name in errors[0] if name in errors[1]]
    known = [(off, on) for off, on in pairs if off is not None and on is not None]
    if not known:
        return "Off and on share no measured window."
    difference = sum(on - off for off, on in known) / len(known)
    lower = sum(on < off for off, on in known)
    return (
        f"On minus off: {difference:+.2f} px of peak error on average, on lower in {lower} of {len(known)} windows. One seed of each and "
        "windows of few episodes decide nothing about the switch; that needs several seeds and more episodes."
    )


def number(value: float | None, digits: int) -> str:
    """The value with that many digits, or a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"
