"""The benchmark compares what computes the same, measures real steps, and refuses numbers that mean nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mvwan import bench, bench_points
from mvwan.bench import (
    COMPILED,
    COMPILED_ON,
    FLOOR,
    OFF,
    ON,
    SECTIONS,
    STOCK,
    STOCK_STYLE,
    Table,
    measure_costs,
    measure_steps,
    run_bench,
    take_turns,
)
from mvwan.bench_networks import Sizes, base_of, config_for, in_stock_style, random_batch, untrained
from mvwan.bench_pipeline import measure_pipeline
from mvwan.bench_points import at, line_through, measure_growth, run_point
from mvwan.bench_report import draw_growth, markdown, number
from mvwan.cli import app
from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.files import read_json
from tests.stock import make_stock

SMALL = Sizes(batch=1, views=2, latent_frames=2, latent_height=4, latent_width=4, text_tokens=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of the tiny preset on a base of two thin blocks."""
    folder = tmp_path_factory.mktemp("base")
    make_stock().save_pretrained(folder / "transformer")
    return config_for("tiny", str(folder), SMALL.views)


@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_stock_style_is_the_same_network(small: Config, fusion: str) -> None:
    exact = dataclasses.replace(small.base, dtype="float32")  # bfloat16, where `auto` chose it, would hide a difference
    config = dataclasses.replace(small, base=exact, model=dataclasses.replace(small.model, fusion=fusion))
    model, batch = untrained(config), random_batch(config, dataclasses.replace(SMALL, batch=2), 32, seed=0)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "projector" in name or "head_action" in name:  # what starts at zero would hide a difference
            parameter.data.normal_(std=0.05, generator=draw)
    call = (batch.latents, torch.tensor([900.0, 300.0]), batch.text)
    with torch.inference_mode():
        velocity, action = model(*call, return_action=True)
        same_velocity, same_action = in_stock_style(model)(*call, return_action=True)
    assert torch.allclose(velocity, same_velocity, atol=1e-5)
    assert torch.allclose(action, same_action, atol=1e-5)
    assert action.std() > 0


def test_steps_stand_beside_peer_and_floor(small: Config) -> None:
    training, denoising = measure_steps(small, SMALL, repeats=2, seed=0, compiled=False)
    rows = {row.what: row for row in training.rows}
    assert set(rows) == {STOCK_STYLE, OFF, ON, STOCK, FLOOR}
    assert rows[STOCK_STYLE].ratio == 1
    assert rows[OFF].ratio == pytest.approx(rows[OFF].value / rows[STOCK_STYLE].value)
    assert all(row.low is None or 0 < row.low <= row.value <= row.high for row in rows.values())
    assert 0 < rows[FLOOR].value < rows[OFF].value, "no step is faster than its products"
    assert "GFLOP" in rows[FLOOR].note
    trained = [int(rows[name].note.split()[0].replace(",", "")) for name in (STOCK, OFF, ON)]
    assert trained == sorted(trained) and trained[0] > 0
    assert {row.what for row in denoising.rows} == {STOCK_STYLE, OFF, "MultiViewWan, LoRA merged", FLOOR}


def test_the_compiled_model_is_an_arm_of_its_own(small: Config) -> None:
    training, _ = measure_steps(small, SMALL, repeats=1, seed=0, compiled=True)
    assert COMPILED in {row.what for row in training.rows}


def test_costs_are_of_real_runs(small: Config) -> None:
    table = measure_costs(small, SMALL, repeats=1, seed=0, compiled=True)
    rows = {row.what: row for row in table.rows}
    assert rows[ON].beside == OFF and rows[COMPILED_ON].beside == COMPILED
    assert rows["peak memory, switch on"].value > 100
    more = rows["trained tensors in a checkpoint, switch on"]
    assert more.ratio is not None and 1 < more.ratio < 1.5
    assert rows["movement proof, once per run"].value > 0


def test_the_way_of_the_data(tmp_path: Path) -> None:
    sizes = Sizes(batch=1, views=2, latent_frames=2, latent_height=4, latent_width=4)
    with base_of("tiny") as base:
        found = measure_pipeline(config_for("tiny", base, sizes.views), sizes, tmp_path, repeats=1, seed=0)
    rows = {row["what"]: row for table in found.values() for row in table}
    assert rows["training from the latent cache"]["ratio"] > 1
    assert rows["saving a checkpoint with its optimizer"]["value"] > 0
    assert rows["from `mvwan train` to its first step"]["value"] > 1
    assert rows["latents of a prediction, 50 denoising steps"]["ratio"] > 5
    assert rows["reading the heat of all views from them, without the VAE"]["ratio"] < 1
    assert (tmp_path / "start-starts" / "movement.json").is_file(), "the start is that of a real run"


def test_growth_is_measured_fitted_and_drawn(small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_points, "GROWTH", {"views": (1, 4)})
    heard: list[str] = []
    growth = measure_growth(small, SMALL, "views", heard.append)
    assert heard == ["growth with views: 1", "growth with views: 4"]
    assert min(growth.seconds) > 0 and min(growth.peak_mb) > 100
    start, slope = growth.peak_mb_fit
    assert [start + slope * place for place in growth.at] == pytest.approx(growth.peak_mb)
    report = bench.BenchReport(size="tiny", sizes=SMALL, machine=bench.machine(small), tables=(), growth=(growth,))
    draw_growth(report, tmp_path / "growth.png")
    picture = (tmp_path / "growth.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert "| views | 1, 4 |" in markdown(report, "growth.png")
    assert json.loads(json.dumps(report.to_json()))["growth"][0]["axis"] == "views"


@pytest.mark.parametrize(
    ("axis", "place", "changed"),
    [("views", 5, {"views": 5}), ("latent frames", 5, {"latent_frames": 5}), ("picture side, px", 256, {"latent_height": 16})],
)
def test_an_axis_moves_one_size(small: Config, axis, place: int, changed: dict[str, int]) -> None:
    config, sizes = at(small, SMALL, axis, place)
    assert changed.items() <= dataclasses.asdict(sizes).items()
    assert config.model.views == sizes.views
    assert at(small, SMALL, "LoRA rank", 5)[0].trainable.lora.rank == 5


def test_memory_is_that_of_the_point_alone(small: Config) -> None:
    held = torch.ones(2**28)  # a gigabyte of this process
    point = run_point(small, SMALL)
    assert 100 < point["built_mb"] <= point["peak_mb"] < held.nbytes / 2**20


def test_a_point_that_fails_says_so(small: Config) -> None:
    wrong = dataclasses.replace(small, base=dataclasses.replace(small.base, source="no/such.safetensors"))
    with pytest.raises(MvwanError, match=r"ended with code .*no/such\.safetensors"):
        run_point(wrong, SMALL)


def test_arms_take_turns() -> None:
    order: list[tuple[str, int]] = []
    seconds = take_turns({"a": lambda n: order.append(("a", n)), "b": lambda n: order.append(("b", n))}, repeats=2)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(times) for times in seconds.values()] == [2, 2], "the first step of each is not counted"


def test_ratios_are_of_medians_and_lines_of_least_squares() -> None:
    row = bench.row("b", (3.0, 3.0, 9.0), ("a", (1.0, 2.0, 9.0)))
    assert (row.value, row.ratio, row.high) == (3.0, 1.5, 9.0)
    assert line_through((1, 2, 3, 4), (2, 4, 6, 8)) == pytest.approx((0, 2))
    assert line_through((0, 1, 2), (1, 0, 2)) == pytest.approx((0.5, 0.5))
    assert [number(value) for value in (1234.5, 12.345, 0.00123)] == ["1234", "12.3", "0.00123"]


@pytest.mark.parametrize(("field", "value"), [("views", 0), ("latent_frames", 1), ("latent_height", 3)])
def test_sizes_are_checked(field: str, value: int) -> None:
    with pytest.raises(MvwanError, match=f"{field}={value}"):
        dataclasses.replace(SMALL, **{field: value})


def test_the_option_that_is_named_is_one_that_there_is() -> None:
    done = CliRunner().invoke(app, ["bench", "--latent-side", "7"])
    assert done.exit_code == 2 and "Set --latent-side" in done.stderr


def test_only_the_tiny_wan_has_a_way_for_data() -> None:
    with pytest.raises(MvwanError, match=r"size middle has random weights and no VAE"):
        run_bench("middle", sections=["pipeline"])
    assert "pipeline" in SECTIONS


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    words = ["bench", "--part", "steps", "--repeats", "1", "--batch", "1", "--views", "2", "--latent-frames", "2", "--latent-side", "4"]
    command = [sys.executable, "-m", "mvwan", *words, "--output", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "measuring training and denoising steps" in done.stderr
    printed = json.loads(done.stdout)
    assert printed == read_json(tmp_path / "bench.json")
    titles = [table["title"] for table in printed["tables"]]
    assert titles == ["Training step: forward, backward, AdamW", "Denoising step: one network call"]
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert f"| {OFF} |" in text and printed["machine"]["torch"] in text
    assert not (tmp_path / "growth.png").exists()


def test_a_bad_number_is_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "mvwan", "bench", "--views", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: views=0: must be at least 1. Set --views.\n"


def test_tables_become_markdown() -> None:
    table = Table(title="Steps", rows=(bench.row("a", (1.0, 1.5, 2.0)),))
    report = bench.BenchReport(size="tiny", sizes=SMALL, machine=bench.machine(config_for("tiny", "tiny", 2)), tables=(table,))
    lines = markdown(report).splitlines()
    assert lines[2:5] == ["### Steps", "", "| what | median | fastest | slowest | ratio | to |  |"]
    assert lines[6] == "| a | 1.5 s | 1 | 2 |  |  |  |"
