"""The page and the tables hold what a comparison found and no more, run nothing that a name contains, and leave out what is not there."""

import json
import math
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvwan import pictures
from mvwan.ablation import figures
from mvwan.ablation.report import AblationResult, report_html, table_markdown, verdict_sentences
from mvwan.ablation.statistics import Comparison, Measurement, Outcome, compare
from mvwan.errors import MvwanError
from tests.test_report import Page

OUTCOMES = {
    "loss": Outcome(primary=True, label="Velocity loss"),
    "loss@0.50-1.00": Outcome(label="Velocity loss (0.50-1.00)"),
    "loss@0.00-0.50": Outcome(label="Velocity loss (0.00-0.50)"),
    "psnr": Outcome(primary=True, better="higher", unit="dB"),
    "seconds": Outcome(unit="s", label="Time per step"),
}
ARMS = ("switch=off", "switch=on", "ffn=<b>|off")
EFFECTS = {("switch=on", "loss"): -1.0, ("switch=on", "psnr"): -1.0}
PICTURE = pictures.png(np.zeros((8, 8, 3), np.uint8))


def compared(effects: dict[tuple[str, str], float] = EFFECTS, arms: tuple[str, ...] = ARMS, num_seeds: int = 5) -> Comparison:
    draw, rows = np.random.default_rng(0), []
    for outcome in OUTCOMES:
        common = draw.normal(20, 3, (num_seeds, 4))
        for arm in arms:
            values = common + 0.1 * draw.normal(size=common.shape) + effects.get((arm, outcome.partition("@")[0]), 0)
            for (seed, episode), value in np.ndenumerate(values):
                told: dict[str, Any] = {"arm": arm, "seed": seed, "outcome": outcome}
                if outcome != "seconds":
                    for rate, added in ((1e-5, 2.0), (1e-4, 0.0), (1e-3, 1.0)):
                        more = told | {"learning_rate": rate, "value": value + added}
                        rows += [Measurement(**more, split=split, episode=f"{split}/{episode}") for split in ("validation", "test")]
                elif episode == 0:
                    rows.append(Measurement(**told, learning_rate=1e-4, split="test", episode="", value=value))
    return compare(rows, ARMS, "switch=off", OUTCOMES, "loss", 400)


CURVES = [
    {"arm": arm, "learning_rate": rate, "seed": seed, "step": step, "heat_loss": 1 / step + seed, "rgb_loss": None}
    for arm in ARMS
    for rate in (1e-4, 1e-3)
    for seed in range(2)
    for step in (10, 20)
]
MOVEMENT = [
    {"arm": "switch=on", "group": group, "block": block, "relative_movement": value}
    for group, block, value in (("lora", 0, 1e-3), ("lora", 0, 3e-3), ("lora", 10, 1e-2), ("lora", 2, 0.0), ("heads", None, 1e-4))
]


@pytest.fixture(scope="module")
def result() -> AblationResult:
    return AblationResult(
        comparison=compared(),
        command="mvwan ablate --vary 'switch=<off>,on'",
        grid={"vary": {"switch": ["<i>", "on"]}, "seeds": 5},
        version="1.2.3",
        curves=CURVES,
        movement=MOVEMENT,
        failed=[("switch=on/lr-0.001/seed-3 <script>", "loss is NaN & more")],
        pictures=[("drawer <script>", PICTURE)],
        controls={"hold": {"successes": 1, "trials": 4, "rate": 0.25, "low": 0.05, "high": 0.7}},
        starts={"switch=on": "from runs/<first>: exact"},
    )


@pytest.fixture(scope="module")
def page(result: AblationResult) -> Page:
    return Page(report_html(result))


def titles(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_the_page_has_all_sections_and_needs_no_network(result: AblationResult, page: Page) -> None:
    text = report_html(result)
    assert titles(text) == [
        "In short", "Differences", "By sigma and by frame", "Learning rates", "Learning curves", "Costs", "Controls of the closed loop",
        "What moved", "Samples, side by side", "Runs that did not finish", "What the arms start from", "Settings",
    ]  # fmt: skip
    assert all(f'href="#{name}"' in text for name in re.findall(r'<section id="(\w+)"', text))
    assert page.sources and all(source.startswith(("data:", "#")) for source in page.sources)
    assert text.count("plotly.js v") == 1


def test_names_are_shown_not_run(page: Page) -> None:
    assert "b" not in page.tags and "i" not in page.tags
    for text in (
        "from runs/<first>: exact",
        "ffn=<b>|off",
        "seed-3 <script>",
        "loss is NaN & more",
        "drawer <script>",
        "'switch=<off>,on'",
        "- <i>",
    ):
        assert text in page.text, text
    assert "<b>|off" not in json.dumps([figure["data"] for figure in page.figures]), "Plotly reads tags too"


def test_verdicts_stand_on_top_in_words(page: Page, result: AblationResult) -> None:
    on, ffn = verdict_sentences(result.comparison)
    assert re.match(
        r"switch=on against switch=off: better in Velocity loss \(-0\.97, -5\.0 %, 95 % interval -1\.\d+ to -0\.\d+, corrected p [<=] 0", on
    )
    assert "worse in psnr (-1.01 dB, 95 % interval" in on and on.endswith("n = 5).")
    assert ffn == "ffn=<b>|off against switch=off: no difference shown at n = 5 in Velocity loss, psnr."
    assert page.text.index(ffn) < page.text.index("Better or worse is said where")
    assert "corrected by Holm for 4 verdicts" in page.text


def test_what_is_not_there_has_no_section() -> None:
    bare = AblationResult(comparison=compared(), command="x", grid={}, version="1")
    text = report_html(bare)
    assert titles(text) == ["In short", "Differences", "By sigma and by frame", "Learning rates", "Costs", "Settings"]
    assert "Runs that did not finish" not in table_markdown(bare)


def test_tables_in_markdown(result: AblationResult) -> None:
    text = table_markdown(result)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
    main = tables[0]
    assert main[0] == "| arm | learning rate | n | Velocity loss | psnr, dB |"
    assert re.fullmatch(r"\| switch=off \| 0\.0001 \| 5 \| [\d.]+ \| [\d.]+ \|", main[2])
    assert re.fullmatch(r"\| switch=on \| 0\.0001 \| 5 \| [\d.]+ \(-[\d.]+, -[\d.]+ to -[\d.]+: better\) \| .*: worse\) \|", main[3])
    assert main[4].startswith(r"| ffn=\<b\>\|off |") and main[4].endswith("no difference shown) |")
    assert "| switch=on | from runs/\\<first\\>: exact |" in text
    assert "### Costs" in text and "Time per step, s" in text
    assert "| switch=on/lr-0.001/seed-3 \\<script\\> | loss is NaN & more |" in text
    assert "(chosen)" in text and "Velocity loss (0.00-0.50)" in text


def test_an_arm_that_never_finished_is_shown_as_that() -> None:
    found = compared(arms=ARMS[:2])
    bare = AblationResult(comparison=found, command="x", grid={}, version="1", failed=[("ffn/seed-0", "out of memory")])
    assert "not measured in Velocity loss, psnr." in verdict_sentences(found)[1]
    page = Page(report_html(bare))
    assert "no run finished" in page.text and "out of memory" in page.text
    assert r"| ffn=\<b\>\|off | – | 0 | – (not measured) | – (not measured) |" in table_markdown(bare)


def test_one_seed_is_said_everywhere() -> None:
    bare = AblationResult(comparison=compared(num_seeds=1), command="x", grid={}, version="1")
    text = table_markdown(bare)
    assert "no difference shown at n = 1" in text and "One seed:" in text and "1 seed: so few show large differences only" in text
    assert "One seed:" in Page(report_html(bare)).text


def test_figures_hold_the_numbers(result: AblationResult) -> None:
    found = result.comparison
    forest = {trace["name"]: trace for trace in figures.forest(found, "loss")["data"]}
    on, ffn = (found.difference(arm, "loss") for arm in ARMS[1:])
    assert on is not None and ffn is not None
    assert forest["95 %"]["x"] == [on.low, on.high, None, ffn.low, ffn.high, None]
    assert forest["95 %, bootstrap"]["x"][:2] == [on.bootstrap_low, on.bootstrap_high]
    assert forest["mean difference"]["marker"]["color"] == ["var:on", "var:ink"], "better, and nothing shown"
    first = figures.rates(found)["data"][0]
    assert first["x"] == [1e-5, 1e-4, 1e-3] and first["marker"]["symbol"] == ["circle", "circle-open", "circle"]
    assert figures.banded(found) == {"loss": ["loss@0.00-0.50", "loss@0.50-1.00"]}
    means, differences = figures.by_band(found, "loss", ["loss@0.00-0.50", "loss@0.50-1.00"])
    mean, band = found.mean("switch=on", "loss@0.00-0.50"), found.difference("switch=on", "loss@0.00-0.50")
    assert mean is not None and band is not None and band.high is not None and band.mean is not None
    assert means["data"][1]["y"][0] == mean.mean and differences["data"][0]["y"][0] == band.mean
    assert differences["data"][0]["error_y"]["array"][0] == pytest.approx(band.high - band.mean)


def test_a_long_name_of_an_arm_has_each_factor_on_a_line_of_its_own_and_makes_the_figure_higher() -> None:
    long = "model.fusion=<view>,trainable.lora.feed_forward=false in both of the stages"
    told: dict[str, Any] = {"learning_rate": 1e-4, "split": "test", "outcome": "loss", "episode": "0"}
    rows = {
        arm: [Measurement(arm=name, seed=seed, value=seed + shift, **told) for shift, name in enumerate(("off", arm)) for seed in range(3)]
        for arm in (long, "on")
    }
    wide, narrow = (compare(rows[arm], ["off", arm], "off", {"loss": OUTCOMES["loss"]}, "loss", 400) for arm in (long, "on"))
    tick = figures.forest(wide, "loss")["layout"]["yaxis"]["ticktext"][0]
    lines = tick.split("</b>")[0].removeprefix("<b>").split("<br>")
    assert lines == ["model.fusion=&lt;view&gt;", "trainable.lora.feed_forward=false", "in both of the stages"], "no word is broken"
    assert figures.forest_height_px(wide) > figures.forest_height_px(narrow)


def test_curves_are_of_the_chosen_rate_and_mean_over_seeds(result: AblationResult) -> None:
    figure = figures.learning_curves(result.comparison, CURVES, "heat_loss", "Heat")
    assert figure is not None
    assert len(figure["data"]) == 3 * (2 + 1), "two seeds and their mean, for every arm"
    assert figure["data"][2]["x"] == [10, 20] and figure["data"][2]["y"] == pytest.approx([0.6, 0.55])
    assert figures.learning_curves(result.comparison, CURVES, "rgb_loss", "RGB") is None
    long = [CURVES[0] | {"step": step, "heat_loss": float(step % 2)} for step in range(1, 2001)]
    figure = figures.learning_curves(result.comparison, long, "heat_loss", "Heat")
    assert figure is not None
    mean = figure["data"][1]
    assert mean["x"][-1] == 2000 and len(mean["x"]) <= 400 and mean["y"][-1] == pytest.approx(0.5)


def test_movement_is_a_cell_per_group_and_block() -> None:
    (heatmap,) = figures.movement(MOVEMENT)["switch=on"]["data"]
    assert (heatmap["x"], heatmap["y"]) == (["0", "10", "none"], ["lora", "heads"])
    assert heatmap["z"][0] == [pytest.approx(math.log10(2e-3)), pytest.approx(-2), None]
    assert heatmap["z"][1] == [None, None, pytest.approx(-4)]
    assert figures.movement([]) == {}


def test_every_colour_is_in_the_style(page: Page) -> None:
    style = (resources.files("mvwan") / "assets" / "report.css").read_text()
    used = set(re.findall(r"var:([\w-]+)", json.dumps(page.figures))) | set(figures.PALETTE)
    assert {"truth", "ink", "wash"} < used
    assert all(style.count(f"--{name}:") == 2 for name in used), "once for light, once for dark"


def test_samples_are_read_from_files_too_and_others_are_refused(result: AblationResult, tmp_path: Path) -> None:
    path, video = tmp_path / "sample.png", pictures.mp4(np.zeros((2, 16, 16, 3), np.uint8), 10)
    path.write_bytes(PICTURE)
    page = Page(report_html(replace(result, pictures=[("file", path), ("film", video)])))
    assert pictures.data_uri(PICTURE, "image/png") in page.sources and page.tags.count("video") == 1
    with pytest.raises(MvwanError, match="sample 'odd': neither PNG"):
        report_html(replace(result, pictures=[("odd", b"<svg>")]))
    with pytest.raises(MvwanError, match=r"missing\.png"):
        report_html(replace(result, pictures=[("gone", tmp_path / "missing.png")]))
