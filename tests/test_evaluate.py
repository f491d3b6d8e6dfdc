"""Measures of a real two-step run: the baselines are what they claim, held-out means held out, and nothing counts the given frame."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mvwan import metrics
from mvwan.baselines import NearestDemonstration
from mvwan.batch import Prediction, Sample
from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.errors import MvwanError
from mvwan.evaluate import (
    Tallies,
    answers_of,
    evaluate_prediction,
    held_out_windows,
    load_prediction,
    measure_window,
    predict_sample,
    sample_window,
)
from mvwan.evaluation_table import read_evaluation, render
from mvwan.heatmaps import render as render_heat
from mvwan.metrics import Tally
from mvwan.sample import LoadedRun, load_run
from tests.demonstrations import write_demonstrations


@pytest.fixture(scope="module")
def run(debug_run: Path) -> LoadedRun:
    return load_run(debug_run)


@pytest.fixture(scope="module")
def sample(run: LoadedRun) -> Sample:
    return held_out_windows(run).sample(0)


def perfect(sample: Sample, **changes: np.ndarray) -> Prediction:
    """The truth as if it had been predicted."""
    views, frames, height, width = sample.rgb.shape[:4]
    truth = Prediction(
        rgb=sample.rgb,
        heat=render_heat(sample.uv_px, sample.visible, height, width, 2.0),
        uv_px=sample.uv_px,
        confidence=np.ones((views, frames), np.float32),
        point_m=sample.point_m,
        residual_px=np.zeros(frames),
        gripper_open=sample.gripper_open,
        rotation_deg=sample.rotation_deg,
        cameras=sample.cameras,
        prompt=sample.instruction,
    )
    return dataclasses.replace(truth, **changes)


def measured_of(run: LoadedRun, sample: Sample, prediction: Prediction) -> Tallies:
    return measure_window(run, sample, prediction, answers_of(run, sample, prediction, held_out_windows(run).windows[0], None))


def total(tallies: tuple[Tally, ...]) -> Tally:
    return sum(tallies, Tally())


def test_the_truth_scores_perfectly_and_the_given_frame_never_counts(run: LoadedRun, sample: Sample) -> None:
    spoiled = {"rgb": sample.rgb.copy(), "uv_px": sample.uv_px.copy(), "point_m": sample.point_m.copy()}
    spoiled["rgb"][:, 0], spoiled["uv_px"][:, 0], spoiled["point_m"][0] = 0, 0, 9.0
    for prediction in (perfect(sample), perfect(sample, **spoiled)):
        measured = measured_of(run, sample, prediction)["predicted"]
        assert total(measured["peak_error_px"]).mean == 0
        assert total(measured["peak_error_px"]).count == sample.visible[:, 1:].sum()
        assert total(measured["found"]).mean == 1
        assert total(measured["error_3d_mm"]).mean == 0
        assert total(measured["rgb_squared_error"]).mean == 0
        assert total(measured["view_disagreement_px"]).mean < 1e-3


def test_known_errors_are_measured_as_such(run: LoadedRun, sample: Sample) -> None:
    moved = perfect(sample, uv_px=sample.uv_px + np.array([3.0, 4.0], np.float32), point_m=sample.point_m + np.array([0, 0, 0.01]))
    measured = measured_of(run, sample, moved)
    assert total(measured["predicted"]["peak_error_px"]).mean == pytest.approx(5, abs=1e-4)
    assert total(measured["predicted"]["error_3d_mm"]).mean == pytest.approx(10)
    held = np.linalg.norm(sample.uv_px - sample.uv_px[:, :1], axis=-1)[:, 1:][sample.visible[:, 1:]].mean()
    assert total(measured["hold_first"]["peak_error_px"]).mean == pytest.approx(held)
    walked = 1000 * np.linalg.norm(sample.point_m - sample.point_m[0], axis=-1)[1:].mean()
    assert total(measured["hold_first"]["error_3d_mm"]).mean == pytest.approx(walked)
    assert "nearest" not in measured
    assert total(measured["predicted"]["within_4_px"]).mean == 0 and total(measured["predicted"]["within_8_px"]).mean == 1


def test_losing_every_peak_scores_like_holding_the_first_frame(run: LoadedRun, sample: Sample) -> None:
    """A heatmap without a peak reads as the middle of the picture, which is often near the truth."""
    middle, nothing = np.full_like(sample.uv_px, 32.0), np.zeros(sample.visible.shape, np.float32)
    lost = perfect(sample, uv_px=middle, confidence=nothing, point_m=np.full_like(sample.point_m, np.nan))
    measured = measured_of(run, sample, lost)
    for name in ("peak_error_px", "error_3d_mm"):
        assert total(measured["predicted"][name]) == total(measured["hold_first"][name])
    assert total(measured["predicted"]["found"]).mean == 0
    assert total(measured["predicted"]["lost"]).mean == 1
    assert total(measured["hold_first"]["lost"]).mean == 0


def test_evaluation_of_a_run(debug_run: Path, run: LoadedRun) -> None:
    result = evaluate_prediction(debug_run, windows=3, denoise_steps=1, keep=1)
    assert json.loads((debug_run / "evaluation.json").read_text()) == result
    held_out = held_out_windows(run)
    trained_on = {episode.name for episode in read_episodes(run.config.data.root)} - {window.episode.name for window in held_out.windows}
    assert len(trained_on) == 3
    assert result["episodes"] == sorted({window.episode.name for window in held_out.windows})
    assert not trained_on & set(result["episodes"])
    assert result["num_windows"] == len(result["windows"]) == min(3, len(held_out))
    assert list(result["measures"]) == ["predicted", "hold_first", "constant_velocity", "nearest", "codec"]
    for source in ("predicted", "hold_first", "nearest", "codec"):
        measures = result["measures"][source]
        assert measures["rgb_psnr_db"]["mean"] == pytest.approx(metrics.psnr_db(measures["rgb_squared_error"]["mean"]), abs=0.01)
        assert len(measures["peak_error_px"]["per_view"]) == len(measures["rgb_psnr_db"]["per_view"]) == 3
        assert 0 <= measures["peak_error_px"]["median"] <= measures["peak_error_px"]["p95"]
        assert measures["within_2_px"]["mean"] <= measures["within_4_px"]["mean"] <= measures["within_8_px"]["mean"]
        assert measures["error_3d_mm"]["per_view"] == []
        for name, statistics in measures.items():
            for told in (statistics, *statistics["per_view"]):
                assert len(told["per_frame"]) == 5 and told["per_frame"][0] is None, f"{name}: the given frame is measured"
        told = measures["peak_error_px"]
        assert told["count"] == sum(view["count"] for view in told["per_view"])
        weighted = sum(view["count"] * view["mean"] for view in told["per_view"]) / told["count"]
        assert told["mean"] == pytest.approx(weighted, abs=1e-3)
        assert all(view["median"] <= view["p95"] for view in told["per_view"])
    assert "rgb_psnr_db" not in result["measures"]["constant_velocity"]
    steps = result["measures"]["hold_first"]["error_3d_mm"]["per_frame"][1:]
    assert steps == sorted(steps) and steps[0] > 0, "the ball goes straight on, so holding is off by more and more"
    assert result["nearest_windows"] == result["num_windows"]
    stored = load_prediction(debug_run / result["windows"][0]["pictures"])
    assert stored["true_rgb"].shape == stored["predicted_rgb"].shape == stored["true_heat"].shape == (3, 5, 64, 64, 3)
    assert str(stored["prompt"]) == "move the ball"
    assert stored["predicted_point_m"].shape == (5, 3)

    again = evaluate_prediction(run, windows=3, denoise_steps=1, codec_from=result, output=debug_run / "again.json")
    assert again["measures"] == result["measures"]
    other = evaluate_prediction(
        run, windows=1, denoise_steps=1, codec_from={**result, "codec_key": "of other windows"}, output=debug_run / "other.json"
    )
    assert other["codec_key"] != "of other windows"
    assert other["measures"]["codec"]["peak_error_px"]["count"] == 3 * 4

    assert read_evaluation(debug_run / "evaluation.json") == result
    shown = io.StringIO()
    Console(file=shown, width=100).print(render(result))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    for words in ("constant velocity", "hold first", "heatmaps without a peak, share", "left", "front", "3-D, mm", "does not see"):
        assert any(words in line for line in lines), f"{words!r} is cut or missing"
    assert not any(line.rstrip("│ ").endswith("…") for line in lines)


def test_a_view_that_does_not_see_the_point_says_nothing_about_disagreement(run: LoadedRun, sample: Sample) -> None:
    """A peak where nothing is to be seen is wrong, but not a contradiction of views."""
    visible = sample.visible.copy()
    visible[0] = False
    uv_px = sample.uv_px.copy()
    uv_px[0] += 20
    hidden = dataclasses.replace(sample, visible=visible)
    disagreement = measured_of(run, hidden, perfect(hidden, uv_px=uv_px))["predicted"]["view_disagreement_px"]
    assert disagreement[0].count == 0
    assert total(disagreement).count == visible[:, 1:].sum() and total(disagreement).mean < 1e-3
    assert total(measured_of(run, sample, perfect(sample, uv_px=uv_px))["predicted"]["view_disagreement_px"]).mean > 1


def test_a_window_without_a_demonstration_has_no_nearest_and_the_table_says_so(run: LoadedRun, sample: Sample, debug_run: Path) -> None:
    held_out = held_out_windows(run)
    nearest = NearestDemonstration(WindowDataset(read_episodes(run.config.data.root), run.config.data, 3, "train", run.config.seed), 1)
    for instruction, expected in ((sample.instruction, True), ("dance", False)):
        told = dataclasses.replace(sample, instruction=instruction)
        assert ("nearest" in answers_of(run, told, perfect(told), held_out.windows[0], nearest)) is expected
    result = read_evaluation(debug_run / "evaluation.json")
    shown = io.StringIO()
    Console(file=shown, width=100).print(render(result | {"num_windows": 9}))
    assert f"is at hand for {result['nearest_windows']} of 9 windows" in " ".join(shown.getvalue().split())


def test_a_foreign_data_set_is_held_out_whole(run: LoadedRun, tiny_demonstrations: Path, tmp_path: Path) -> None:
    assert len(held_out_windows(run, tiny_demonstrations)) == len(held_out_windows(run))
    others = write_demonstrations(tmp_path / "others", first=50)
    assert {window.episode.name for window in held_out_windows(run, others).windows} == {f"ball/{number:06d}" for number in range(4)}


def test_what_was_trained_on_is_not_held_out_in_another_folder(run: LoadedRun, tiny_demonstrations: Path, tmp_path: Path) -> None:
    link = tmp_path / "copy"
    link.mkdir()
    for part in tiny_demonstrations.iterdir():
        (link / part.name).symlink_to(part)
    with pytest.raises(MvwanError, match=r"was trained on 3 of its 4 demonstrations. Leave --dataset out"):
        held_out_windows(run, link)


def test_another_data_set_is_seen_in_the_views_of_the_run(run: LoadedRun, tmp_path: Path) -> None:
    others = write_demonstrations(tmp_path / "others", first=50, reverse_views=True)
    windows = held_out_windows(run, others)
    assert [camera.name for camera in windows.cameras(0)] == ["left", "right", "front"]
    gone = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, root=str(tmp_path / "gone")))
    windows = held_out_windows(dataclasses.replace(run, config=gone), others)
    assert [camera.name for camera in windows.cameras(0)] == ["left", "right", "front"], "the checkpoint says so"


def test_views_in_another_order_than_in_training_are_refused(run: LoadedRun, sample: Sample) -> None:
    assert run.view_names == ("left", "right", "front") and run.fps == 5, "every other of 10 frames"
    with pytest.raises(MvwanError, match="views front, right, left: the run was trained on left, right, front, and tells views apart by"):
        predict_sample(run, dataclasses.replace(sample, rgb=sample.rgb[::-1], cameras=sample.cameras[::-1]), 1)
    named = [dataclasses.replace(camera, name=f"own_{camera.name}") for camera in sample.cameras[::-1]]
    assert len(predict_sample(run, dataclasses.replace(sample, cameras=tuple(named)), 1).cameras) == 3, "of others nothing is known"


def test_no_held_out_windows_is_an_error(run: LoadedRun) -> None:
    config = run.config.to_dict()
    config["data"]["validation_share"] = 0.0
    everything = dataclasses.replace(run, config=Config(**config))
    with pytest.raises(MvwanError, match="no held-out windows"):
        held_out_windows(everything)


def test_sample_window_writes_a_folder(debug_run: Path, tmp_path: Path) -> None:
    written = sample_window(debug_run, tmp_path / "out", denoise_steps=1)
    assert {"trajectory.json", "left.rgb.mp4", "left.heat.mp4", "sheet.png"} <= {path.name for path in written}
    with pytest.raises(MvwanError, match="held-out windows, 0 to 0"):
        sample_window(debug_run, tmp_path / "more", window=5)
    assert not (tmp_path / "more").exists()


def test_a_file_that_is_no_prediction_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(MvwanError, match="not a stored prediction"):
        load_prediction(tmp_path / "x.npz")
