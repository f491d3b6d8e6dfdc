"""The ablations that are committed say what their numbers say: tables made again from the rows, and the page quotes nothing else."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mvwan import sensitivity_report
from mvwan.ablate import COMPARISON, RESULTS, TABLE, comparison_of
from mvwan.ablation.grid import GRID, read_grid
from mvwan.ablation.report import AblationResult, table_markdown
from mvwan.ablation.statistics import Measurement
from mvwan.config import config_from_dict, read_yaml
from mvwan.files import read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = ROOT / "docs" / "ablation"
FOLDERS = sorted(path.parent for path in RESULTS_FOLDER.glob(f"*/{GRID}"))


def rows_of(folder: Path) -> list[Measurement]:
    return [Measurement(**row) for row in pq.read_table(folder / RESULTS).to_pylist()]


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]


def test_there_are_results() -> None:
    assert {folder.name for folder in FOLDERS} == {"switch", "parts", "pretraining", "two-stage", "suggestion"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_comparison_is_that_of_its_rows(folder: Path) -> None:
    grid, rows = read_grid(folder / GRID), rows_of(folder)
    found, stored = comparison_of(grid, rows), read_json(folder / COMPARISON)
    assert {choice.arm: choice.best for choice in found.choices} == {choice["arm"]: choice["best"] for choice in stored["choices"]}
    words = ("arm", "outcome", "verdict", "num_seeds", "num_episodes")
    assert [[getattr(one, name) for name in words] for one in found.differences] == [
        [one[name] for name in words] for one in stored["differences"]
    ]
    for one, other in zip(found.differences, stored["differences"], strict=True):
        for name in ("mean", "low", "high", "p", "p_corrected", "bootstrap_low", "bootstrap_high"):
            assert getattr(one, name) == (None if other[name] is None else pytest.approx(other[name], rel=1e-6, abs=1e-12)), (one.arm, name)
    made = table_lines(table_markdown(AblationResult(comparison=found, command="", grid={}, version="")))
    told, _, starts = (folder / TABLE).read_text(encoding="utf-8").partition("### What the arms start from")
    assert set(made) == set(table_lines(told))
    go_on = [arm.name for arm in grid.all_arms if grid.start(arm)]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table_lines(starts)[1:]] == go_on, "the rows do not say it"
    assert {row.seed for row in rows} == set(range(grid.seeds)), "no seed is missing"
    runs = {(row.arm, row.learning_rate, row.seed) for row in rows}
    assert runs == {(run.arm, run.learning_rate, run.seed) for run in grid.runs(folder)}, "no run is missing, and none is more"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_committed_result_is_of_the_grid_that_ships(folder: Path) -> None:
    shipped, done = read_grid(ROOT / "configs" / "ablation" / f"{folder.name}.yaml"), read_grid(folder / GRID)
    assert shipped == done


def test_the_sensitivity_table_is_that_of_its_numbers_and_its_suggestion_was_trained() -> None:
    folder = RESULTS_FOLDER / "sensitivity"
    assert (folder / TABLE).read_text(encoding="utf-8") == sensitivity_report.markdown(read_json(folder / "sensitivity.json"))
    suggested = config_from_dict(read_yaml(folder / "suggestion.yaml"))
    grid = read_grid(RESULTS_FOLDER / "suggestion" / GRID)
    (arm,) = [arm for arm in grid.all_arms if arm.name == "suggestion"]
    trained = grid.config(arm, grid.rates[0], 0)
    assert trained.trainable == suggested.trainable and not trained.unfreeze_modulation_and_norms


def test_the_page_quotes_tables_of_the_results_alone() -> None:
    known = {line for path in RESULTS_FOLDER.glob("*/table.md") for line in table_lines(path.read_text(encoding="utf-8"))}
    quoted = table_lines((ROOT / "docs" / "ablation.md").read_text(encoding="utf-8"))
    assert len(quoted) > 5
    assert not [line for line in quoted if line not in known]
