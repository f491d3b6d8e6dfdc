"""`mvwan data view`: a recording that Rerun's own reader opens, with every frame, and points where the cameras see them."""

import io
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rerun.chunk import RrdReader

from mvwan.batch import Episode
from mvwan.data.dataset import read_episodes
from mvwan.errors import MvwanError
from mvwan.rerun_export import write_recording
from mvwan.sim.metaworld import record
from tests.formats import write_mvtrack


def rows_of(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Entity -> column -> the value of each row, chunk by chunk, as Rerun's reader gives them."""
    (store,) = RrdReader(path).recordings()
    found: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for chunk in RrdReader(path).stream(store=store):
        batch = chunk.to_record_batch()
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            plain = column.cast(pa.int64()) if pa.types.is_duration(column.type) else column
            found[chunk.entity_path][name] += plain.to_pylist()
    return found


def picture(blob: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(np.array(blob, np.uint8).ravel()))))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demonstration out of the simulator."""
    folder = tmp_path_factory.mktemp("recorded") / "data"
    record("button-press-topdown-v3", episodes=1, output=folder, seed=3, size_px=64, progress=False)
    return folder


def test_a_recording_holds_every_frame_and_points_where_cameras_see_them(recorded: Path, tmp_path: Path) -> None:
    (episode,) = read_episodes(recorded)
    size = write_recording(episode, tmp_path / "out/demo.rrd", 2.0)
    assert (tmp_path / "out/demo.rrd").stat().st_size == size
    rows, frames = rows_of(tmp_path / "out/demo.rrd"), episode.num_frames
    views = {f"/world/cameras/{camera.name}": camera for camera in episode.cameras}
    own = [f"{place}{part}" for place in views for part in ("", "/rgb", "/heat", "/point")]
    assert set(rows) == {
        "/instruction",
        "/world",
        "/world/point",
        "/world/path",
        "/gripper_open",
        *own,
    }
    assert rows["/instruction"]["TextDocument:text"] == [[episode.instruction]]
    moving = ["/world/point", "/gripper_open", *(name for name in own if name.count("/") == 4)]
    for name in moving:
        assert rows[name]["frame"] == list(range(frames)), name
        np.testing.assert_allclose(np.array(rows[name]["time"]) / 1e9, np.arange(frames) / episode.fps, atol=1e-6)
        assert not {"log_time", "log_tick"} & set(rows[name])
    np.testing.assert_allclose(np.array(rows["/world/point"]["Points3D:positions"]).reshape(-1, 3), episode.point_m, atol=1e-6)
    np.testing.assert_allclose(np.array(rows["/world/path"]["LineStrips3D:strips"]).reshape(-1, 3), episode.point_m, atol=1e-6)
    np.testing.assert_allclose(np.array(rows["/gripper_open"]["Scalars:scalars"]).ravel(), episode.gripper_open)
    rgb = episode.read_rgb([0, frames - 1])
    for view, (place, camera) in enumerate(views.items()):
        lens = np.array(rows[place]["Pinhole:image_from_camera"]).reshape(3, 3).T  # stored column by column
        axes = np.array(rows[place]["Transform3D:mat3x3"]).reshape(3, 3).T
        eye = np.array(rows[place]["Transform3D:translation"]).ravel()
        local = (episode.point_m - eye) @ axes
        uv_px = (local / local[:, 2:]) @ lens.T
        np.testing.assert_allclose(uv_px[:, :2], camera.project(episode.point_m)[0], atol=1e-3)
        shown = np.array(rows[f"{place}/point"]["Points2D:positions"]).reshape(-1, 2)
        np.testing.assert_allclose(shown, uv_px[:, :2], atol=1e-3)
        assert np.array(rows[place]["Pinhole:resolution"]).ravel().tolist() == [64, 64]
        for stored, frame in ((0, 0), (1, frames - 1)):
            kept = picture(rows[f"{place}/rgb"]["EncodedImage:blob"][frame])
            assert np.abs(kept.astype(int) - rgb[view, stored]).mean() < 4, "JPEG"
            heat = picture(rows[f"{place}/heat"]["EncodedImage:blob"][frame])
            row, column = np.unravel_index(heat[..., 3].argmax(), (64, 64))
            assert np.abs(np.array([column, row]) + 0.5 - shown[frame]).max() <= 0.5 + 1e-3
            assert heat[0, 0, 3] == 0, "nothing is drawn where there is no heat"


def test_what_an_episode_does_not_know_is_not_there(tiny_demonstrations: Path, tmp_path: Path) -> None:
    scenes = write_mvtrack(tmp_path / "mvtrack", read_episodes(tiny_demonstrations)[:1])
    (scenes / "ball0/ball0-3/invisible.txt").write_text("0,0,1,1,0,0,0,0,0")
    (episode,) = read_episodes(scenes)
    write_recording(episode, tmp_path / "scene.rrd", 2.0)
    rows = rows_of(tmp_path / "scene.rrd")
    own = {f"/pictures/view{view}/{part}" for view in (1, 2, 3) for part in ("rgb", "heat", "point")}
    assert set(rows) == {"/instruction", *own}
    points = rows["/pictures/view3/point"]["Points2D:positions"]
    assert [len(point) for point in points] == [1, 1, 0, 0, 1, 1, 1, 1, 1]
    assert episode.uv_px is not None
    np.testing.assert_allclose(points[4][0], episode.uv_px[2, 4], atol=1e-4)
    assert picture(rows["/pictures/view3/heat"]["EncodedImage:blob"][2])[..., 3].max() == 0


def test_gaps_and_views_without_perspective(tiny_demonstrations: Path, tmp_path: Path) -> None:
    episode = read_episodes(tiny_demonstrations)[0]
    point_m, opening = episode.point_m.copy(), episode.gripper_open.copy()
    point_m[3], opening[5] = np.nan, np.nan
    flat = replace(episode.cameras[0], kind="orthographic")
    gaps = replace(episode, point_m=point_m, gripper_open=opening, cameras=(flat, *episode.cameras[1:]))
    write_recording(gaps, tmp_path / "gaps.rrd", 2.0)
    rows = rows_of(tmp_path / "gaps.rrd")
    assert "/pictures/left/rgb" in rows and "/world/cameras/right" in rows
    assert [len(point) for point in rows["/world/point"]["Points3D:positions"]] == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert [len(value) for value in rows["/gripper_open"]["Scalars:scalars"]] == [1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert [len(strip[0]) for strip in rows["/world/path"]["LineStrips3D:strips"]] == [8]


def test_it_is_whole_or_not_there(tiny_demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode: Episode = read_episodes(tiny_demonstrations)[0]

    def broken(frames: Any) -> np.ndarray:
        raise MvwanError("a picture cannot be decoded")

    with pytest.raises(MvwanError, match="cannot be decoded"):
        write_recording(replace(episode, read_rgb=broken), tmp_path / "out.rrd", 2.0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MvwanError, match="cannot be written"):
        write_recording(episode, tmp_path / "file/out.rrd", 2.0)
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MvwanError, match=r"rerun-sdk is not installed\. Run `pip install 'mvwan\[view\]'`"):
        write_recording(episode, tmp_path / "out.rrd", 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command(recorded: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mvwan", "data", "view", str(recorded)]
    done = subprocess.run([*words, "--rerun", str(tmp_path / "a.rrd")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "button-press-topdown-v3/000003" in done.stdout and "3 views" in done.stdout
    assert rows_of(tmp_path / "a.rrd")["/world/point"]["frame"]
    asked = ["--episode", "button-press-topdown-v3/000004", "--rerun", str(tmp_path / "b.rrd")]
    done = subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no such episode" in done.stderr and "Did you mean 'button-press-topdown-v3/000003'?" in done.stderr
    assert not (tmp_path / "b.rrd").exists()
