"""The page holds every number it was given, opens without network, and concludes no more than the numbers allow.

A run's folder is written by hand here, in the formats of `train` and `evaluate`; tests/test_demo.py reads real ones.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvwan import report_figures
from mvwan.errors import MvwanError
from mvwan.files import write_json
from mvwan.report import write_report
from mvwan.run_record import RunRecord, findings

GROUPS = (
    ("lora", "lora", 1000, 20),
    ("projector", "full", 400, 4),
    ("modulation", "frozen", 60, 3),
    ("mvs_norms", "frozen", 20, 6),
    ("all", "frozen", 9000, 50),
)
SWITCH = ("modulation", "mvs_norms")


def write_run(folder: Path, switch: bool, errors: list[float], hold: float = 8.0) -> Path:
    """A finished run with these peak errors by window."""
    folder.mkdir(parents=True)
    groups = []
    for name, usual, parameters, tensors in GROUPS:
        mode = "full" if switch and name in SWITCH else usual
        trainable = mode != "frozen"
        groups.append(
            {"name": name, "mode": mode, "trainable": trainable, "parameters": parameters, "tensors": tensors, "dtype": "float32"}
            | {"optimizer_bytes": 8 * parameters * trainable}
        )
    trained = [group for group in groups if group["trainable"]]
    table = {"base": "tiny", "views": 2, "fusion": "channel", "groups": groups}
    write_json(
        folder / "table.json",
        table
        | {
            "trainable_parameters": sum(group["parameters"] for group in trained),
            "total_parameters": sum(group["parameters"] for group in groups),
        },
    )
    rows = [
        {"group": group["name"], "tensors": group["tensors"], "tensors_moved": group["tensors"], "relative_change": 0.0123 * place}
        | {"change_from_zero": None, "gradient_norm": 0.5}
        for place, group in enumerate(trained, 1)
    ]
    write_json(folder / "movement.json", {"first_step": 0, "steps": 3, "frozen_tensors_unchanged": 77, "groups": rows})
    lines: list[dict[str, Any]] = []
    for step in range(1, 6):
        lines.append({"kind": "train", "step": step, "loss": 1 / step, "rgb_loss": 1.5 / step, "heat_loss": 0.5 / step})
    bands = {band: {"loss": 0.4, "rgb_loss": 0.5, "heat_loss": 0.3} for band in ("0.00-0.25", "0.25-0.50")}
    lines.append({"kind": "held_out", "step": 5, "loss": 0.4, "rgb_loss": 0.5, "heat_loss": 0.3, "bands": bands, "windows": 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"unfreeze_modulation_and_norms: {str(switch).lower()}\nseed: 4 # <b>\n")

    def measures(error: float) -> dict[str, Any]:
        names = {
            "peak_error_px": error,
            "found": 0.5,
            "within_2_px": 0.2,
            "within_4_px": 0.4,
            "within_8_px": 0.6,
            "lost": 0.1,
            "error_3d_mm": 10 * error,
            "rgb_squared_error": 65.0,
            "rgb_psnr_db": 30 - error,
            "rgb_ssim": 0.9,
        }
        statistics = {name: {"mean": value, "median": value, "p95": 2 * value, "count": 9, "lost": 0} for name, value in names.items()}
        growing = [None, *(error * frame for frame in range(1, 5))]
        return {
            name: {**told, "per_frame": growing, "per_view": [told, told | {"mean": told["mean"] + 1}]} for name, told in statistics.items()
        }

    mean = sum(errors) / len(errors)
    predicted = measures(mean) | {"view_disagreement_px": {"mean": 1.25, "median": 1.0, "p95": 2.0}}
    windows = [
        {"sample_id": f"drawer/000001@{4 * place}#0", "predicted_peak_error_px": error, "hold_first_peak_error_px": hold}
        for place, error in enumerate(errors)
    ]
    windows[0]["pictures"] = "predictions/00.npz"
    evaluation = {
        "format_version": 3, "num_windows": len(errors),
        "episodes": ["drawer/000001"], "views": ["left", "top"], "num_frames": 5, "given_frames": 1,
        "denoise_steps": 5, "seed": 0, "size_px": [32, 48], "found_within_px": 1.6, "windows": windows,
        "measures": {"predicted": predicted, "hold_first": measures(hold), "codec": measures(2.0), "nearest": measures(3.0)},
    }  # fmt: skip
    write_json(folder / "evaluation.json", evaluation)
    draw = np.random.default_rng(int(switch))
    video, path = draw.integers(0, 255, (4, 2, 5, 32, 48, 3), dtype=np.uint8), np.cumsum(np.ones((2, 5, 2)) * 3, axis=1)
    point = np.linspace((0, 0, 0), (0.1, 0.2, 0.3), 5)
    (folder / "predictions").mkdir()
    lost = point.copy()
    lost[2] = np.nan
    np.savez_compressed(
        folder / "predictions" / "00.npz", allow_pickle=False, sample_id=np.array(windows[0]["sample_id"]),
        prompt=np.array("Open the <drawer>."),
        views=np.array(["left", "top"]), true_rgb=video[0], predicted_rgb=video[1], true_heat=video[2], predicted_heat=video[3],
        true_uv_px=path, predicted_uv_px=path + 2, true_point_m=point, predicted_point_m=lost,
    )  # fmt: skip
    return folder


class Page(HTMLParser):
    """What a browser would fetch, and what it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.figures: list[Any] = []
        self._in_figure = False
        self._skipped = 0
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "poster", "action", "data") and value]
        self._in_figure = tag == "script" and given.get("type") == "application/json"
        self._skipped += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._in_figure = False
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._in_figure:
            self.figures.append(json.loads(data))
        elif not self._skipped:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {"off": write_run(folder / "off", False, [6.0, 7.0, 8.0]), "on": write_run(folder / "on", True, [5.0, 7.5, 7.0])}


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = write_report(
        runs, tmp_path_factory.mktemp("page") / "report.html", {"task": "drawer <open>", "seconds": {"Record": 12.0, "Train": 30.5}}
    )
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_no_network(page: Page, runs: dict[str, Path], tmp_path: Path) -> None:
    assert page.sources
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "link" in page.tags
    assert page.tags.count("video") == 1
    text = write_report(runs, tmp_path / "again.html").read_text(encoding="utf-8")
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert style
    assert not re.search(r"url\(|@import", style)
    assert text.count("plotly.js v") == 1, "plotly is inlined once"


def test_tables_of_both_runs(page: Page) -> None:
    for text in ("switch off", "switch on", "1,400", "1,480", "+80", "+60", "+20", "8.00 %", "mvs_norms", "10,480"):
        assert text in page.text, text
    assert "77 (switch off) and 77 (switch on)" in page.text


def test_strange_names_are_shown_not_run(page: Page) -> None:
    assert "Open the <drawer>." in page.text
    assert "drawer <open>" in page.text
    assert "seed: 4 # <b>" in page.text
    assert "b" not in page.tags


def test_pictures_are_there(page: Page) -> None:
    pictures = [source for source in page.sources if source.startswith("data:image/webp")]
    assert len(pictures) == 2 + 2 * 6, "a path per view, and six strips per view"
    assert sum(source.startswith("data:video/mp4") for source in page.sources) == 1
    assert "0 (given)" in page.text


def test_times_and_versions(page: Page) -> None:
    for text in ("12.0 s", "42.5 s", "torch", "numpy"):
        assert text in page.text


def test_figures_hold_the_numbers(page: Page) -> None:
    titles = [figure["layout"]["title"]["text"] for figure in page.figures]
    assert titles == [
        "Change of what was not zero",
        "Training, rgb",
        "Training, heat",
        "Held out, rgb",
        "Held out, heat",
        "Peak error by frame",
        "3-D error by frame",
        "RGB PSNR by frame",
        "Peak error by window",
        "Path of the tool point",
    ]
    by_title = dict(zip(titles, page.figures, strict=True))
    changes = {dots["name"]: dict(zip(dots["y"], dots["x"], strict=True)) for dots in by_title["Change of what was not zero"]["data"]}
    assert changes["on"]["mvs_norms"] == pytest.approx(0.0123 * 4)
    assert "mvs_norms" not in changes["off"]
    faint = by_title["Training, rgb"]["data"][0]
    assert (faint["x"], faint["y"]) == ([1, 2, 3, 4, 5], [1.5 / step for step in range(1, 6)])
    assert [line["name"] for line in by_title["Held out, heat"]["data"]] == [
        f"{run}, sigma {band}" for run in ("off", "on") for band in ("0.00-0.25", "0.25-0.50")
    ]
    hold = by_title["Peak error by frame"]["data"][0]
    assert (hold["x"], hold["y"]) == ([1, 2, 3, 4], [8, 16, 24, 32])
    assert by_title["Path of the tool point"]["data"][1]["x"][2] is None
    assert {line["line"]["color"] for line in by_title["Peak error by frame"]["data"]} == {"var:hold", "var:nearest", "var:off", "var:on"}


def test_every_colour_of_a_figure_is_in_the_style(page: Page) -> None:
    from importlib import resources

    style = (resources.files("mvwan") / "assets" / "report.css").read_text()
    used = set(re.findall(r"var:(\w+)", json.dumps(page.figures)))
    assert used
    assert all(style.count(f"--{name}:") == 2 for name in used), "once for light, once for dark"


def test_one_run_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    page = Page(write_report({"on": runs["on"]}, tmp_path / "one.html").read_text(encoding="utf-8"))
    assert "1,480" in page.text
    assert "Off and on, side by side" not in page.text
    assert len([source for source in page.sources if source.startswith("data:image/webp")]) == 2 + 2 * 4


def test_a_missing_file_is_named_and_nothing_written(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "half", False, [1.0])
    old = json.loads((folder / "evaluation.json").read_text()) | {"format_version": 2}
    (folder / "evaluation.json").write_text(json.dumps(old))
    with pytest.raises(MvwanError, match=r"format 2, this version reads 3. Run `mvwan evaluate` again"):
        write_report({"off": folder}, tmp_path / "report.html")
    (folder / "evaluation.json").unlink()
    with pytest.raises(MvwanError, match=r"evaluation\.json"):
        write_report({"off": folder}, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(MvwanError, match="give one or both of off, on"):
        write_report({"left": runs["on"]}, tmp_path / "page.html")


# ── conclusions ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sentences(tmp_path: Path, off: list[float], on: list[float], hold: float = 8.0) -> list[str]:
    folders = {"off": write_run(tmp_path / "off", False, off, hold), "on": write_run(tmp_path / "on", True, on, hold)}
    return findings([RunRecord(label=label, folder=folder) for label, folder in folders.items()])


def test_a_clear_difference_still_makes_no_winner(tmp_path: Path) -> None:
    found = sentences(tmp_path, off=[7.0, 7.0, 7.0], on=[1.0, 1.0, 1.0])
    assert len(found) == 5
    assert "-6.00 px" in found[4]
    assert "on lower in 3 of 3 windows" in found[4]
    assert "decide nothing about the switch" in found[4]
    assert "better" not in found[4]


@pytest.mark.parametrize(
    ("off", "on", "verdict"),
    [
        (9.0, 9.5, "In peaks, no run beats holding the first frame yet"),
        (3.0, 9.5, "only the run with the switch off beats"),
        (9.0, 3.0, "only the run with the switch on beats"),
        (3.0, 3.0, "In peaks, every run beats holding the first frame"),
    ],
)
def test_the_baseline_is_named_first(tmp_path: Path, off: float, on: float, verdict: str) -> None:
    found = sentences(tmp_path, [off, off], [on, on])
    assert verdict in found[3]
    assert "2 held-out windows of 1 episode" in found[1]
    assert "8.00 px" in found[1]
    assert "(+80, +5.71 %)" in found[0]


def test_a_run_that_finds_no_peaks_beats_nothing(tmp_path: Path) -> None:
    """Lost peaks count as held, so its error is a shade below that of holding by itself."""
    sentences(tmp_path, [7.9, 7.9], [7.9, 7.9])
    records = []
    for label in ("off", "on"):
        path = tmp_path / label / "evaluation.json"
        told = json.loads(path.read_text())
        told["measures"]["predicted"]["lost"]["mean"] = 0.77
        path.write_text(json.dumps(told))
        records.append(RunRecord(label=label, folder=tmp_path / label))
    verdict = findings(records)[3]
    assert "off 77 %, on 77 %" in verdict and "train longer" in verdict and "beats" not in verdict


def test_movement_has_labels_to_read_a_place_by() -> None:
    def ticks(*changes: float | None) -> dict[str, Any]:
        return report_figures.movement({"on": {f"group {row}": change for row, change in enumerate(changes)}}, "", "")["layout"]["xaxis"]

    assert ticks(4e-4, None, 3e-3)["ticktext"] == ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005"]
    for changes in ((1e-5, 2e-3), (0.0, 1e-3, 1.0), (0.0, None)):
        assert ticks(*changes)["dtick"] == 1


def test_smoothing_is_a_mean_of_what_came_before() -> None:
    assert report_figures.smoothed([(1, 2.0), (2, None), (3, 4.0), (4, 9.0)], 2) == [(1, 2.0), (3, 3.0), (4, 6.5)]
