"""Damaged episodes and pictures stop a run, or are left out of it: the same ones always, named with their reasons."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvwan.baselines import NearestDemonstration
from mvwan.compatibility import check_skipped
from mvwan.config import Config, config_from_dict, merge
from mvwan.data import lerobot_files
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.data.lerobot import read_lerobot
from mvwan.data_report import check_pictures, inspect
from mvwan.errors import MvwanError
from mvwan.evaluate import evaluate_prediction
from mvwan.evaluation_table import _remarks
from mvwan.latent_cache import LatentCache, build_cache, is_complete
from mvwan.model.latents import LatentCodec
from mvwan.report import _left_out
from mvwan.run_record import RunRecord
from mvwan.train import train
from tests.demonstrations import write_demonstrations
from tests.formats import write_mvtrack
from tests.kill_and_resume import small_run


@pytest.fixture(scope="module")
def scenes(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mvtrack(tmp_path_factory.mktemp("scenes") / "data", list(read_lerobot(tiny_demonstrations)))


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> Path:
    return damage(Path(shutil.copytree(scenes, tmp_path / "data")))


def damage(root: Path) -> Path:
    """Of four scenes of nine frames one has lost its labels, another a picture, frame 6 of the second view: no byte of it is right."""
    (root / "ball3/ball3-1/groundtruth.txt").write_text("not,a,box,\n")
    picture = root / "ball1/ball1-2/img/7.jpg"
    picture.write_bytes(b"\0" * picture.stat().st_size)
    return root


def config_of(root: Path, *more: dict[str, Any]) -> Config:
    values = {
        "base": {"source": "tiny"},
        "trainable": {"lora": {"rank": 4}},
        "data": {"root": str(root), "num_frames": 5, "window_stride": 1, "height_px": 64, "width_px": 64, "text_tokens": 32},
        "train": {"steps": 3, "save_every": 1, "batch_size": 1, "gradient_accumulation": 2, "movement_step": 2, "evaluate_windows": 2},
    }
    return config_from_dict(merge(values, {"data": {"on_corrupt": "skip"}, "train": {"tracker": "none"}}, *more))


def windows_of(root: Path, split: Any = "train", **more: Any) -> WindowDataset:
    data = config_of(root, {"data": more}).data
    return WindowDataset(read_episodes(root, on_corrupt=data.on_corrupt), data, 3, split, seed=0)


# ── episodes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("spoil", [_cut, Path.unlink])
@pytest.mark.parametrize("file", ["videos/observation.images.right/chunk-000/file-001.mp4", "data/chunk-000/file-001.parquet"])
def test_of_a_lerobot_dataset_only_the_episodes_on_a_damaged_file_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, spoil: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(lerobot_files, "VIDEO_FILE_MB", 0)  # a file for each episode
    monkeypatch.setattr(lerobot_files, "DATA_FILE_MB", 0)
    root = write_demonstrations(tmp_path / "ball")
    whole = {episode.name: episode.fingerprint for episode in read_episodes(root)}
    spoil(root / file)
    with pytest.raises(MvwanError, match=Path(file).name):
        read_episodes(root)
    episodes = read_episodes(root, on_corrupt="skip")
    del whole["ball/000001"]
    assert {episode.name: episode.fingerprint for episode in episodes} == whole
    ((name, reason),) = ((damage.name, damage.reason) for damage in episodes.left_out)
    assert name == "ball/000001" and Path(file).name in reason
    (root / "meta/info.json").unlink()
    with pytest.raises(MvwanError, match="no dataset that mvwan understands"):
        read_episodes(root, on_corrupt="skip")


def test_a_scene_without_its_labels_is_left_out_and_none_left_is_an_error(damaged: Path) -> None:
    with pytest.raises(MvwanError, match=r"groundtruth.txt: entry 1"):
        read_episodes(damaged)
    episodes = read_episodes(damaged, on_corrupt="skip")
    assert [episode.name for episode in episodes] == ["ball0", "ball1", "ball2"]
    assert [damage.name for damage in episodes.left_out] == ["ball3"]
    for path in damaged.rglob("groundtruth.txt"):
        path.write_text("")
    with pytest.raises(MvwanError, match=r"all 4 episodes are damaged. The first: .*ball0.*groundtruth.txt"):
        read_episodes(damaged, on_corrupt="skip")


def test_inspection_tells_them_and_the_check_finds_every_damaged_frame(damaged: Path) -> None:
    report, _ = inspect(config_of(damaged, {"data": {"on_corrupt": "stop"}}))
    assert (report.episodes, [episode.name for episode in report.damaged]) == (3, ["ball3"])
    assert "1 episodes are damaged" in report.missing[-1]
    assert report.lines()[-1].startswith("damaged: ball3: ")
    found = check_pictures(config_of(damaged), progress=False)
    assert [(frame.episode, frame.frame) for frame in found] == [("ball1", 6)]
    assert "7.jpg" in found[0].reason


# ── windows ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec.load("tiny", 32)


def test_windows_with_a_damaged_picture_are_left_out_for_good(
    damaged: Path, scenes: Path, codec: LatentCodec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = tmp_path / "latents", windows_of(damaged, validation_share=0.0)
    cache = build_cache(whole, codec, folder, 2.0, progress=False)
    assert [damage.name for damage in cache.skipped] == ["ball1@2#0", "ball1@3#0", "ball1@4#0"]
    assert all("frame 6" in damage.reason for damage in cache.skipped)
    assert (len(whole), len(cache), cache.encoded) == (15, 12, 12)
    names = [cache.dataset.sample_id(index) for index in range(12)]
    assert list(cache.batch(range(12)).sample_ids) == names
    assert [name for name in names if name.startswith("ball1")] == ["ball1@0#0", "ball1@1#0"]
    assert is_complete(folder, whole, codec.digest, 2.0)
    with pytest.raises(MvwanError, match=r"episode ball1, frame 6: .*7.jpg cannot be decoded"):
        build_cache(windows_of(scenes_like(damaged, scenes), validation_share=0.0, on_corrupt="stop"), codec, folder, 2.0, progress=False)

    shutil.copyfile(scenes / "ball1/ball1-2/img/7.jpg", damaged / "ball1/ball1-2/img/7.jpg")  # of the same size: nothing else changed
    again = build_cache(whole, codec, folder, 2.0, progress=False)
    assert again.encoded == 0 and again.skipped == cache.skipped, "a run that goes on must meet the same windows"
    stopping = windows_of(scenes_like(damaged, scenes), validation_share=0.0, on_corrupt="stop")
    assert build_cache(stopping, codec, folder, 2.0, progress=False).encoded == 3
    assert LatentCache.open(folder, whole, codec.digest, 2.0).skipped == cache.skipped


def scenes_like(damaged: Path, scenes: Path) -> Path:
    """`damaged` without the scene that has lost its labels, at which a reader that stops would stop."""
    shutil.rmtree(damaged / "ball3", ignore_errors=True)
    return damaged


def test_all_windows_damaged_is_an_error(damaged: Path, codec: LatentCodec, tmp_path: Path) -> None:
    for picture in damaged.rglob("img/5.jpg"):  # the only frame that all windows have
        picture.write_bytes(b"no picture")
    with pytest.raises(MvwanError, match=r"all 15 windows of a split are damaged. The first: episode ball0, frame 4"):
        build_cache(windows_of(damaged, validation_share=0.0), codec, tmp_path / "latents", 2.0, progress=False)


def test_the_nearest_demonstration_is_one_that_can_be_read(damaged: Path) -> None:
    training = windows_of(damaged, validation_share=0.0)
    nearest = NearestDemonstration(training, 1)
    sample = training.sample(training.windows.episode_of.tolist().index(1))  # ball1@0, which can be read
    answer = nearest.answer(sample)
    assert answer is not None and answer.rgb is not None
    assert (answer.rgb[:, 0] == sample.rgb[:, 0]).all() and not np.isfinite(answer.point_m).any(), "labels in pictures only"
    known = np.isfinite(sample.uv_px[:, :2]).all(axis=(1, 2))
    assert known.any() and np.isfinite(answer.uv_px[known, 1]).all() and (answer.uv_px[known, 0] == sample.uv_px[known, 0]).all()
    places, thumbnails, _ = nearest._of(sample.instruction)
    assert len(places) == len(thumbnails) == 15
    for index in range(len(training)):
        assert (training.readable_sample(index) is None) == (training.sample_id(index)[:7] in ("ball1@2", "ball1@3", "ball1@4"))


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in history if line["kind"] == "train"]


def test_a_run_goes_without_them_says_so_and_goes_on_alike(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"base": small_run(tmp_path)["base"], "data": {"cache": str(tmp_path / "latents")}}
    config = config_of(damaged, own)
    whole = train(config, tmp_path / "whole")
    said = capsys.readouterr().err
    skipped = json.loads((tmp_path / "whole" / "skipped.json").read_text())
    assert [damage["name"] for damage in skipped["episodes"]] == ["ball3"]
    assert [damage["name"] for damage in skipped["windows"]] == ["ball1@2#0", "ball1@3#0", "ball1@4#0"]
    assert "1 episodes and 3 windows left out as damaged. The first: " in said and "groundtruth.txt" in said
    assert (tmp_path / "whole" / "first_batch.png").is_file()

    train(config_of(damaged, own, {"train": {"steps": 2}}), tmp_path / "parts")
    resumed = train(config, tmp_path / "parts", resume=True)
    assert losses(resumed.history) == losses(whole.history)
    page = _left_out([RunRecord(label="off", folder=tmp_path / "whole")])
    assert "1 episodes and 3 windows were damaged and left out" in page and "ball1@3#0" in page

    others = list(read_lerobot(write_demonstrations(tmp_path / "others", first=10)))
    elsewhere = damage(write_mvtrack(tmp_path / "elsewhere", others))
    result = evaluate_prediction(tmp_path / "whole", dataset=elsewhere, windows=20, denoise_steps=1, output=tmp_path / "evaluation.json")
    assert (result["num_windows"], result["damaged_windows"], len(result["windows"])) == (12, 3, 12)
    assert "3 windows are damaged and left out" in " ".join(_remarks(result))
    for picture in elsewhere.rglob("img/5.jpg"):
        picture.write_bytes(b"no picture")
    with pytest.raises(MvwanError, match="none of the 15 held-out windows can be read"):
        evaluate_prediction(tmp_path / "whole", dataset=elsewhere, windows=20, denoise_steps=1, output=tmp_path / "evaluation.json")

    next((tmp_path / "latents" / "skipped").iterdir()).unlink()
    shutil.copyfile(damaged / "ball1/ball1-2/img/6.jpg", damaged / "ball1/ball1-2/img/7.jpg")
    with pytest.raises(MvwanError):  # another size, another fingerprint: either way it is not the same run
        train(config_of(damaged, own, {"train": {"steps": 4}}), tmp_path / "parts", resume=True)
    with pytest.raises(MvwanError, match=r"without 1 damaged windows, now it is 2; b differ"):
        check_skipped({"data": {"skipped": ["a"]}}, {"data": {"skipped": ["a", "b"]}}, "here")
    check_skipped({"data": {}}, {"data": {"skipped": []}}, "a manifest of an older version")
