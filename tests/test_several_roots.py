"""Several folders as one training set: names, splits, refusals, and a training through the older flags."""

from pathlib import Path

import numpy as np
import pytest

from mvwan import evaluate, sample
from mvwan.config import DataConfig
from mvwan.data.dataset import WindowDataset, kept_out, read_episodes
from mvwan.data_report import inspect
from mvwan.errors import MvwanError
from mvwan.presets import config_from_preset
from mvwan.train import train
from tests.demonstrations import write_demonstrations
from tests.formats import write_mvtrack


@pytest.fixture(scope="module")
def roots(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two datasets whose episodes have the same names."""
    return str(tiny_demonstrations), str(write_demonstrations(tmp_path_factory.mktemp("more") / "balls"))


def test_episodes_bear_the_name_of_their_folder(roots: tuple[str, str]) -> None:
    names = [episode.name for episode in read_episodes(roots)]
    alone = [episode.name for episode in read_episodes(roots[0])]
    assert names == [*(f"ball/{name}" for name in alone), *(f"balls/{name}" for name in alone)]
    assert [episode.name for episode in read_episodes(roots[:1])] == alone, "a list of one is that one"


def test_what_a_dataset_says_of_its_split_holds_and_the_rest_is_drawn(roots: tuple[str, str], tmp_path: Path) -> None:
    episodes = read_episodes(roots[0])[:2]
    tracking = write_mvtrack(tmp_path / "tracking", episodes, splits={"ball0": "train", "ball1": "val"})
    together = read_episodes([roots[0], str(tracking)])
    held = kept_out(together, seed=0, share=0.25)
    drawn = {name for name in held if name.startswith("ball/")}
    assert held - drawn == {"tracking/ball1"} and len(drawn) == 1
    everything = kept_out(together, seed=0, share=1.0)
    assert "tracking/ball0" not in everything and len(everything) == 5


def test_folders_of_the_same_name_and_other_views_are_refused(roots: tuple[str, str], tmp_path: Path) -> None:
    same = str(write_demonstrations(tmp_path / "ball"))
    with pytest.raises(MvwanError, match=r"two folders have the same name"):
        read_episodes([roots[0], same])
    tracking = str(write_mvtrack(tmp_path / "tracking", read_episodes(roots[0])[:2]))
    data = DataConfig(num_frames=5, height_px=64, width_px=64)
    with pytest.raises(MvwanError, match=r"episode tracking/ball0 has no camera 'left'; available: view1, view2, view3"):
        WindowDataset(read_episodes([roots[0], tracking]), data, 3, "train", 0)


def test_a_run_on_two_folders_is_trained_measured_and_inspected(roots: tuple[str, str], tmp_path: Path) -> None:
    data = {"root": list(roots), "heatmap_sigma_px": 2.0, "validation_share": 0.3}
    config = config_from_preset("debug", {"data": data, "train": {"tracker": "none"}})
    train(config, tmp_path / "run")
    run = sample.load_run(tmp_path / "run")
    assert run.config.data.root == roots
    result = evaluate.evaluate_prediction(run, windows=4, denoise_steps=1)
    assert {name.split("/")[0] for name in result["episodes"]} == {"ball", "balls"}
    report, _ = inspect(config)
    assert (report.episodes, report.format) == (8, "LeRobot v3") and report.root == " and ".join(roots)
    moved = config_from_preset("debug", {"data": {**data, "root": [*roots, str(tmp_path / "gone")]}})
    with pytest.raises(MvwanError, match=r"gone'?: no such folder"):
        train(moved, tmp_path / "other")


def test_a_run_on_tracked_objects_starts_from_where_they_are(tiny_demonstrations: Path, tmp_path: Path) -> None:
    root = write_mvtrack(tmp_path / "tracking", read_episodes(tiny_demonstrations)[:3])
    data = {"root": str(root), "heatmap_sigma_px": 2.0}
    train(config_from_preset("debug", {"data": data, "model": {"action_head": "none"}, "train": {"tracker": "none"}}), tmp_path / "run")
    run = sample.load_run(tmp_path / "run")
    window = evaluate.held_out_windows(run).sample(0)
    prediction = evaluate.predict_sample(run, window, denoise_steps=1)
    assert window.visible[:, 0].any() and np.isnan(window.point_m).all()
    for view in np.flatnonzero(window.visible[:, 0]):
        np.testing.assert_allclose(prediction.uv_px[view, 0], window.uv_px[view, 0], atol=0.3)
    assert np.isnan(prediction.point_m).all(), "nobody knows where these cameras stood"
