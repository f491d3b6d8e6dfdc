"""The files of a prediction hold what it says, through the command a user types; pictures of one's own give the same as a window's."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mvwan.batch import Prediction
from mvwan.cameras import Camera
from mvwan.errors import MvwanError
from mvwan.evaluate import held_out_windows, sample_pictures
from mvwan.heatmaps import peak, render
from mvwan.metrics import hold_first
from mvwan.prediction_files import (
    _LABEL_PX,
    _LINE_PX,
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    Truth,
    read_cameras,
    read_pictures,
    sheet,
    trajectory,
    write_prediction,
)
from mvwan.sample import load_run
from mvwan.trajectory import lift


@pytest.fixture(scope="module")
def window(debug_run: Path):
    return held_out_windows(load_run(debug_run)).sample(0)


@pytest.fixture(scope="module")
def prediction(window) -> Prediction:
    """The first frame held, its point lost in one view of the last frame."""
    views, frames, height, width = window.rgb.shape[:4]
    uv_px = hold_first(window.uv_px, 1)
    visible = np.ones((views, frames), bool)
    visible[0, -1] = False
    heat = render(uv_px, visible, height, width, 2.0)
    found, confidence = peak(heat)
    point_m, residual_px = lift(found, confidence, window.cameras)
    return Prediction(
        rgb=hold_first(window.rgb, 1),
        heat=heat,
        uv_px=found,
        confidence=confidence,
        point_m=point_m,
        residual_px=residual_px,
        gripper_open=np.linspace(0, 1, frames, dtype=np.float32),
        rotation_deg=np.full((frames, 3), np.nan, np.float32),
        cameras=window.cameras,
        prompt="move the ball",
    ).check()


def test_a_folder_holds_a_video_per_view_and_stream_the_path_and_a_sheet(prediction, window, tmp_path) -> None:
    written = write_prediction(prediction, tmp_path / "out", 5.0, Truth(rgb=window.rgb, uv_px=window.uv_px))
    videos = {f"{view}.{stream}.mp4" for view in ("left", "right", "front") for stream in ("rgb", "heat")}
    assert {path.name for path in written} == {"trajectory.json", "sheet.png", *videos}
    for name in videos:
        with av.open(tmp_path / "out" / name) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert (len(frames), frames[0].shape, float(video.streams.video[0].average_rate)) == (5, (64, 64, 3), 5.0)
    with pytest.raises(MvwanError, match="exists already"):
        write_prediction(prediction, tmp_path / "out", 5.0)


def test_the_path_tells_every_frame_in_metres_pixels_and_seconds_and_none_where_nothing_is_known(prediction, window) -> None:
    path = json.loads(json.dumps(trajectory(prediction, 5.0), allow_nan=False))
    assert (path["format_version"], path["prompt"], path["fps"], len(path["frames"])) == (1, "move the ball", 5.0, 5)
    assert [frame["time_s"] for frame in path["frames"]] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    last = path["frames"][-1]
    assert last["point_m"] == pytest.approx(window.point_m[0], abs=0.01)
    assert last["gripper_open"] == 1 and last["rotation_deg"] is None and last["residual_px"] < 0.2
    assert last["views"]["left"] == {"uv_px": None, "confidence": 0.0}
    assert last["views"]["right"]["uv_px"] == pytest.approx(window.uv_px[1, 0], abs=0.1)
    assert all(Camera.from_dict(told).name == camera.name for told, camera in zip(path["cameras"], window.cameras, strict=True))


def test_the_sheet_marks_true_and_predicted_peaks_where_they_are(prediction, window) -> None:
    plain, compared = sheet(prediction, 5.0), sheet(prediction, 5.0, Truth(rgb=window.rgb, uv_px=window.uv_px))
    assert compared.shape[0] > plain.shape[0] and compared.shape[1] == plain.shape[1] > 5 * 192
    # Row 0, column 0 of the table with truth: the given frame of the left view, three times as large, under two lines of words.
    cell = compared[2 * _LINE_PX :, _LABEL_PX:][:192, :192]
    for colour in (PREDICTED_COLOUR, TRUE_COLOUR):
        marked = np.argwhere((np.abs(cell.astype(int) - colour) < 30).all(axis=-1))
        assert marked.mean(axis=0)[::-1] == pytest.approx(3 * window.uv_px[0, 0], abs=3)
        assert len(marked) > 60, "too thin to be seen"


def test_pictures_of_ones_own_give_what_their_window_gives(debug_run: Path, window, tmp_path: Path) -> None:
    paths = []
    for camera, picture in zip(window.cameras, window.rgb[:, 0], strict=True):
        paths.append(tmp_path / f"{camera.name}.png")
        Image.fromarray(picture).save(paths[-1])
    (tmp_path / "cameras.json").write_text(json.dumps([camera.to_dict() for camera in window.cameras]))
    own = [word for path in paths for word in ("--image", str(path))]
    own += ["--cameras", str(tmp_path / "cameras.json"), "--prompt", window.instruction]
    own += ["--gripper-open", "1"]
    told = ["--point", ",".join(str(value) for value in window.point_m[0])]
    outputs = {}
    in_pictures = [word for u, v in window.uv_px[:, 0] for word in ("--point-px", f"{u},{v}")]
    for name, words in (("own", [*own, *told]), ("own_px", [*own, *in_pictures]), ("window", [])):
        command = [sys.executable, "-m", "mvwan", "sample", str(debug_run), "--denoise-steps", "1", "--output", str(tmp_path / name)]
        said = subprocess.run([*command, *words], capture_output=True, text=True, check=True).stdout
        assert str(tmp_path / name / "sheet.png") in said
        outputs[name] = json.loads((tmp_path / name / "trajectory.json").read_text())
    assert outputs["own"]["frames"] == outputs["window"]["frames"]
    for name, view in outputs["own_px"]["frames"][0]["views"].items():
        assert view["uv_px"] == pytest.approx(outputs["window"]["frames"][0]["views"][name]["uv_px"], abs=0.01)
    # A trajectory.json gives its cameras to the next prediction.
    assert [camera.name for camera in read_cameras(tmp_path / "own" / "trajectory.json")] == ["left", "right", "front"]


def test_pictures_of_other_sizes_are_resized_with_their_cameras(prediction, tmp_path: Path) -> None:
    """Each view in a size of its own, with a bright dot where its camera sees one point: the dot stays where the new camera sees it."""
    point_m = prediction.point_m[0]
    paths, recorded_by = [], []
    for camera, (width, height) in zip(prediction.cameras, ((256, 128), (128, 128), (64, 64)), strict=True):
        recorded_by.append(camera.resized(width, height))
        seen, _ = recorded_by[-1].project(point_m)
        heat = render(seen, np.array(True), height, width, 5.0)
        paths.append(tmp_path / f"{camera.name}.png")
        Image.fromarray(np.repeat((255 * heat).astype(np.uint8)[..., None], 3, axis=-1)).save(paths[-1])
    rgb, cameras = read_pictures(paths, recorded_by, 64, 64)
    assert rgb.shape == (3, 64, 64, 3) and {(camera.height_px, camera.width_px) for camera in cameras} == {(64, 64)}
    weight = rgb[..., 0].astype(np.float64)
    rows, columns = np.mgrid[:64, :64] + 0.5
    found = np.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], axis=-1) / weight.sum((1, 2))[:, None]
    assert found == pytest.approx(np.stack([camera.project(point_m)[0] for camera in cameras]), abs=0.3)


def test_places_in_pictures_are_resized_with_them(debug_run: Path, prediction, tmp_path: Path) -> None:
    """Twice as wide and high as the run's; one view does not show the point."""
    recorded_by = [camera.resized(128, 128) for camera in prediction.cameras]
    (tmp_path / "cameras.json").write_text(json.dumps([camera.to_dict() for camera in recorded_by]))
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    own = {"point_px": [[40.0, 60.0], None, [100.0, 20.0]], "fps": 5.0, "denoise_steps": 1}
    sample_pictures(debug_run, tmp_path / "out", [tmp_path / "a.png"] * 3, tmp_path / "cameras.json", "go", **own)
    first = json.loads((tmp_path / "out" / "trajectory.json").read_text())["frames"][0]["views"]
    assert first["right"]["uv_px"] is None
    assert first["left"]["uv_px"] == pytest.approx([20, 30], abs=0.1) and first["front"]["uv_px"] == pytest.approx([50, 10], abs=0.1)


def test_what_is_in_the_way_is_said_before_anything_is_loaded(prediction, tmp_path: Path) -> None:
    (tmp_path / "cameras.json").write_text(json.dumps([camera.to_dict() for camera in prediction.cameras]))
    with pytest.raises(MvwanError, match="exists already"):
        sample_pictures(tmp_path / "no-run", tmp_path, [], tmp_path / "cameras.json", "go")


@pytest.mark.parametrize(("name", "message"), [("../escaped", "files are named after cameras; use letters"), ("right", "two cameras")])
def test_a_cameras_name_never_leads_out_of_the_folder(prediction, tmp_path, name, message) -> None:
    cameras = (dataclasses.replace(prediction.cameras[0], name=name), *prediction.cameras[1:])
    with pytest.raises(MvwanError, match=message):
        write_prediction(dataclasses.replace(prediction, cameras=cameras), tmp_path / "inner" / "out", 5.0)
    assert not list(tmp_path.rglob("*.mp4"))


def test_pictures_and_cameras_that_do_not_fit_are_refused(debug_run: Path, prediction, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 64)).save(tmp_path / "b.png")
    (tmp_path / "cameras.json").write_text('{"views": []}')
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    camera = prediction.cameras[0]
    for names, message in (
        (["notes.txt"], r"notes\.txt: not a picture"),
        (["cut.png"], r"cut\.png: not a picture"),
        (["b.png"], r"b\.png: 32x64 px, its camera 'left' is 64x64 px"),
        (["a.png", "a.png"], "given 2 times for 1 cameras"),
    ):
        with pytest.raises(MvwanError, match=message):
            read_pictures([tmp_path / name for name in names], [camera], 64, 64)
    with pytest.raises(MvwanError, match="needed is a list of cameras"):
        read_cameras(tmp_path / "cameras.json")
    (tmp_path / "half.json").write_text(json.dumps([{"name": "left"}]))
    with pytest.raises(MvwanError, match=r"half\.json: camera left: missing fields"):
        read_cameras(tmp_path / "half.json")
    (tmp_path / "two.json").write_text(json.dumps([camera.to_dict() for camera in prediction.cameras[:2]]))
    three = tmp_path / "three.json"
    three.write_text(json.dumps([camera.to_dict() for camera in prediction.cameras]))
    for images, prompt, message in ((2, "go", "2 cameras; the run was trained on 3 views"), (2, " ", "--prompt is empty")):
        with pytest.raises(MvwanError, match=message):
            sample_pictures(debug_run, tmp_path / "out", [tmp_path / "a.png"] * images, tmp_path / "two.json", prompt)
    with pytest.raises(MvwanError, match="--point-px is given 2 times for 3 pictures"):
        sample_pictures(debug_run, tmp_path / "out", [tmp_path / "a.png"] * 3, three, "go", point_px=[None, [1, 2]])
    its = ["--image", "a.png", "--cameras", "c.json", "--prompt", "go"]
    for words, message in (
        (["--image", str(tmp_path / "a.png")], "need --cameras and --prompt"),
        (["--prompt", "go"], "give them with --image"),
        (["--fps", "5"], "--fps belongs to pictures of your own"),
        (["--image", str(tmp_path / "a.png"), "--window", "3"], "leave them out beside --image"),
        (["--point-px", "3,4"], "--point-px belongs to pictures of your own"),
        ([*its, "--point", "1,2"], "three numbers in metres"),
        ([*its, "--point-px", "1,2,3"], "two numbers in pixels"),
        ([*its, "--point-px", "1,nan"], "two numbers in pixels"),
        ([*its, "--point-px", "1,2", "--point", "1,2,3"], "give one of them"),
    ):
        command = [sys.executable, "-m", "mvwan", "sample", str(debug_run), "--output", str(tmp_path / "out"), *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 2 and message in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()
