"""A dataset is written whole or not at all, reads back as it was, and every kind of damage is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvwan.cameras import Camera, look_at
from mvwan.data import lerobot_files
from mvwan.data.lerobot import read_lerobot, write_dataset
from mvwan.errors import MvwanError

WRITTEN_BY_LEROBOT = Path(__file__).parent.parent / "golden" / "lerobot-0.4.4"
"""Two episodes of 6 and 4 frames that lerobot 0.4.4 itself wrote with its default AV1 codec; the bars on top count the frames."""
HEIGHT, WIDTH, FPS = 32, 48, 20
CAMERAS = tuple(
    Camera(
        name=name,
        width_px=WIDTH,
        height_px=HEIGHT,
        intrinsics=np.array([[40.5, 0, 24], [0, 40.5, 16], [0, 0, 1]]),
        world_to_camera=look_at(eye, (0, 0, 0)),
    )
    for name, eye in (("left", (-1, 1, 0.7)), ("wrist", (1, 1, 0.3)))
)
LENGTHS = (9, 5, 13)


def numbers(seed, length):
    draw = np.random.default_rng(seed)
    return {
        "rgb": np.repeat(np.repeat(draw.integers(0, 256, (2, length, 4, 6, 3), dtype=np.uint8), 8, axis=2), 8, axis=3),
        "point_m": draw.uniform(-1, 1, (length, 3)),
        "hand_m": draw.uniform(-1, 1, (length, 3)),
        "gripper_open": draw.uniform(0, 1, length).astype(np.float32),
        "action": draw.uniform(-1, 1, (length, 4)).astype(np.float32),
        "success": np.arange(length) >= length - 2,
    }


def open_writer(root):
    return write_dataset(root, cameras=CAMERAS, fps=FPS, action_names=("x", "y", "z", "grip"), robot_type="test")


def write(root):
    with open_writer(root) as writer:
        for seed, length in enumerate(LENGTHS):
            writer.add_episode(name=f"task/{seed:06d}", instruction=f"Do {seed % 2}.", layout_seed=seed, **numbers(seed, length))
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "data")


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def rewrite(path, change):
    """Rewrites a parquet file with `change(list of rows)`."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), path)


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_episodes_come_back_as_they_were(written):
    episodes = read_lerobot(written)
    assert [episode.name for episode in episodes] == ["task/000000", "task/000001", "task/000002"]
    assert [episode.instruction for episode in episodes] == ["Do 0.", "Do 1.", "Do 0."]
    assert len({episode.fingerprint for episode in episodes}) == 3
    for seed, episode in enumerate(episodes):
        given = numbers(seed, LENGTHS[seed])
        assert (episode.fps, episode.point_m.dtype) == (FPS, np.float64)
        np.testing.assert_allclose(episode.point_m, given["point_m"], atol=1e-7)
        np.testing.assert_allclose(episode.extra["hand_m"], given["hand_m"], atol=1e-7)
        np.testing.assert_array_equal(episode.gripper_open, given["gripper_open"])
        np.testing.assert_array_equal(episode.extra["action"], given["action"])
        np.testing.assert_array_equal(episode.extra["success"], given["success"])
        pictures = episode.read_rgb(range(episode.num_frames))
        assert pictures.shape == given["rgb"].shape
        assert np.abs(pictures.astype(int) - given["rgb"]).mean() < 3
        np.testing.assert_array_equal(episode.read_rgb([3, 0]), pictures[:, [3, 0]])


def test_calibration_comes_back_to_the_bit(written):
    for stored, given in zip(read_lerobot(written)[0].cameras, CAMERAS, strict=True):
        assert stored.to_dict() == given.to_dict()
    row = pq.read_table(written / "data/chunk-000/file-000.parquet").to_pylist()[0]
    for camera in CAMERAS:
        np.testing.assert_array_equal(row[f"camera.{camera.name}.world_to_camera"], camera.world_to_camera.ravel().astype(np.float32))
        np.testing.assert_array_equal(row[f"camera.{camera.name}.intrinsics"], camera.intrinsics.ravel().astype(np.float32))


def test_cameras_are_chosen_and_ordered(written):
    both, swapped = read_lerobot(written)[1], read_lerobot(written, ("wrist", "left"))[1]
    assert [camera.name for camera in swapped.cameras] == ["wrist", "left"]
    np.testing.assert_array_equal(swapped.read_rgb([2]), both.read_rgb([2])[::-1])
    assert read_lerobot(written, ["wrist"])[0].read_rgb([0]).shape == (1, 1, HEIGHT, WIDTH, 3)
    assert swapped.fingerprint != both.fingerprint
    with pytest.raises(MvwanError, match=r"no camera 'lift'\. Did you mean 'left'\?"):
        read_lerobot(written, ("lift",))


def test_the_layout_is_lerobots(written):
    info = json.loads((written / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_episodes"], info["total_frames"]) == ("v3.0", FPS, 3, sum(LENGTHS))
    assert info["splits"] == {"train": "0:3"}
    assert (info["total_tasks"], info["data_path"]) == (2, "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")
    assert info["features"]["observation.images.left"]["shape"] == [HEIGHT, WIDTH, 3]
    data = pq.read_table(written / "data/chunk-000/file-000.parquet")
    assert data.column_names == [key for key, feature in info["features"].items() if feature["dtype"] != "video"]
    assert data.schema.field("observation.state").type == pa.list_(pa.float32(), 7)
    assert data.column("index").to_pylist() == list(range(sum(LENGTHS)))
    np.testing.assert_allclose(data.column("timestamp").to_numpy()[:3], [0, 0.05, 0.1], atol=1e-7)
    rows = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "videos/observation.images.wrist"
    assert [row[f"{key}/from_timestamp"] for row in rows] == pytest.approx([0, 9 / FPS, 14 / FPS])
    assert [row[f"{key}/to_timestamp"] for row in rows] == pytest.approx([9 / FPS, 14 / FPS, 27 / FPS])
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 9), (9, 14), (14, 27)]
    tasks = pq.read_table(written / "meta/tasks.parquet")
    assert dict(zip(tasks.column("__index_level_0__").to_pylist(), tasks.column("task_index").to_pylist(), strict=True)) == {
        "Do 0.": 0,
        "Do 1.": 1,
    }
    stats = json.loads((written / "meta/stats.json").read_text())
    actions = np.concatenate([numbers(seed, length)["action"] for seed, length in enumerate(LENGTHS)])
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0), atol=1e-6)
    assert np.shape(stats["observation.images.left"]["mean"]) == (3, 1, 1)
    assert rows[1]["stats/action/count"] == [5]


def test_same_numbers_give_the_same_bytes(written, tmp_path):
    again = write(tmp_path / "again")
    files = [path.relative_to(written) for path in sorted(written.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    for file in files:
        assert (written / file).read_bytes() == (again / file).read_bytes(), file


def test_full_files_are_followed_by_new_ones(tmp_path, monkeypatch, written):
    for name, value in {"VIDEO_FILE_MB": 0, "DATA_FILE_MB": 0, "FILES_PER_CHUNK": 2}.items():
        monkeypatch.setattr(lerobot_files, name, value)
    root = write(tmp_path / "many")
    assert (root / "videos/observation.images.left/chunk-001/file-000.mp4").exists()
    assert (root / "data/chunk-001/file-000.parquet").exists()
    for one, many in zip(read_lerobot(written), read_lerobot(root), strict=True):
        np.testing.assert_array_equal(one.extra["state"], many.extra["state"])
        assert np.abs(one.read_rgb([4]).astype(int) - many.read_rgb([4])).mean() < 3


def test_a_failed_write_leaves_nothing(tmp_path):
    def stop_midway():
        with open_writer(tmp_path / "data") as writer:
            writer.add_episode(name="task/0", instruction="Do.", layout_seed=0, **numbers(0, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_midway()
    with pytest.raises(MvwanError, match="no episode was added"), open_writer(tmp_path / "data"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").write_text("mine")
    for output in (tmp_path / "data", tmp_path / "data/notes.txt"):
        with pytest.raises(MvwanError, match=r"exists already.*choose another output"), open_writer(output):
            pass
    assert (tmp_path / "data/notes.txt").read_text() == "mine"


def test_an_empty_output_folder_is_used(tmp_path):
    (tmp_path / "data").mkdir()
    assert len(read_lerobot(write(tmp_path / "data"))) == len(LENGTHS)


def test_the_fingerprint_follows_the_stored_bytes(copy, written):
    path = copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    state = np.array(table.column("observation.state").to_pylist(), np.float32)
    state[10, 0] += 1e-3
    changed = pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 7)
    pq.write_table(table.set_column(table.column_names.index("observation.state"), table.schema.field("observation.state"), changed), path)
    same = [one.fingerprint == other.fingerprint for one, other in zip(read_lerobot(written), read_lerobot(copy), strict=True)]
    assert same == [True, False, True]


VIDEO = "videos/observation.images.wrist/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / VIDEO).unlink(), r"wrist/chunk-000/file-000\.mp4: no such file"),
        (lambda root: (root / VIDEO).write_bytes((root / VIDEO).read_bytes()[:2000]), r"wrist/.*\.mp4: cannot be decoded"),
        (lambda root: shutil.copy(root.parent / "short.mp4", root / VIDEO), r"episode task/000001: .*wrist/.* holds 9 pictures"),
        (lambda root: (root / DATA).unlink(), r"data/chunk-000/file-000\.parquet: no such file"),
        (lambda root: (root / DATA).write_bytes(b"PAR1"), r"file-000\.parquet: not a whole parquet file"),
        (lambda root: rewrite(root / DATA, lambda rows: rows[:-1]), r"episode task/000002: .*holds 12 of its rows"),
        (lambda root: pq.write_table(pq.read_table(root / DATA).drop_columns("action"), root / DATA), r"lacks the column 'action'"),
        (lambda root: shutil.rmtree(root / "meta/episodes"), r"meta/episodes: lists no episode"),
        (lambda root: (root / "meta/info.json").unlink(), r"not a LeRobot dataset, meta/info\.json is missing"),
        (lambda root: (root / "meta/info.json").write_text("{"), r"info\.json: not a JSON file"),
        (lambda root: (root / "meta/cameras.json").unlink(), r"cameras\.json: no such file. The cameras must be calibrated"),
        (lambda root: edit_json(root / "meta/info.json", lambda info: info.pop("fps")), r"info\.json: lacks 'fps'"),
        (
            lambda root: edit_json(root / "meta/info.json", lambda info: info.update(codebase_version="v2.1")),
            r"codebase_version is v2\.1, only v3",
        ),
        (
            lambda root: edit_json(root / "meta/info.json", lambda info: info["features"]["observation.state"].update(names=None)),
            r"no tool_x_m",
        ),
        (
            lambda root: edit_json(root / "meta/cameras.json", lambda file: file["cameras"][0].update(width_px=64)),
            r"needs video \[32, 64, 3\]",
        ),
    ],
)
def test_damage_is_named(copy, written, damage, message):
    with open_writer(copy.parent / "one") as writer:
        writer.add_episode(name="task/0", instruction="Do.", layout_seed=0, **numbers(0, 9))
    shutil.copy(copy.parent / "one" / VIDEO, copy.parent / "short.mp4")
    damage(copy)
    with pytest.raises(MvwanError, match=message) as caught:
        read_lerobot(copy)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MvwanError, match=r"nowhere: not a LeRobot dataset"):
        read_lerobot(tmp_path / "nowhere")


def test_a_dataset_of_others_without_names_hand_and_gripper_reads(copy):
    rewrite(copy / "meta/episodes/chunk-000/file-000.parquet", lambda rows: [{k: v for k, v in row.items() if k != "name"} for row in rows])
    state = {"names": ["tool_x_m", "tool_y_m", "tool_z_m", "a", "b", "c", "d"]}
    edit_json(copy / "meta/info.json", lambda info: info["features"]["observation.state"].update(state))
    episode = read_lerobot(copy)[1]
    assert episode.name == "copy/000001"
    assert np.isnan(episode.gripper_open).all()
    assert "hand_m" not in episode.extra and "hand_quaternion_wxyz" not in episode.extra


def test_the_hand_s_orientation_is_read_where_the_state_has_it(copy):
    path = copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    place, field = table.column_names.index("observation.state"), table.schema.field("observation.state")
    state = np.array(table.column(place).to_pylist(), np.float32)
    state[:, 3:] = (0.6, 0.0, -0.8, 0.0)
    changed = pa.FixedSizeListArray.from_arrays(pa.array(state.ravel()), 7)
    pq.write_table(table.set_column(place, field, changed), path)
    names = {"names": ["tool_x_m", "tool_y_m", "tool_z_m", "hand_qw", "hand_qx", "hand_qy", "hand_qz"]}
    edit_json(copy / "meta/info.json", lambda info: info["features"]["observation.state"].update(names))
    quaternion = read_lerobot(copy)[1].extra["hand_quaternion_wxyz"]
    np.testing.assert_allclose(quaternion, np.tile([0.6, 0.0, -0.8, 0.0], (len(quaternion), 1)), atol=1e-6)


def test_what_lerobot_itself_wrote_reads_exactly(tmp_path):
    root = shutil.copytree(WRITTEN_BY_LEROBOT, tmp_path / "own")
    with pytest.raises(MvwanError, match="cameras must be calibrated"):
        read_lerobot(root)
    intrinsics = np.array([[60.0, 0, 32], [0, 60, 16], [0, 0, 1]])
    camera = Camera(name="front", width_px=64, height_px=32, intrinsics=intrinsics, world_to_camera=np.eye(4))
    (root / "meta/cameras.json").write_text(json.dumps({"cameras": [camera.to_dict()]}))
    episodes = read_lerobot(root)
    assert [(episode.name, episode.instruction) for episode in episodes] == [("own/000000", "Task 0."), ("own/000001", "Task 1.")]
    for index, (episode, length) in enumerate(zip(episodes, (6, 4), strict=True)):
        frames = np.arange(length)
        expected = np.stack([0.1 * frames, np.full(length, 0.2 * index), np.full(length, 0.3)], axis=1)
        np.testing.assert_allclose(episode.point_m, expected, atol=1e-6)
        np.testing.assert_array_equal(episode.gripper_open, frames % 2)
        np.testing.assert_array_equal(episode.extra["action"], np.stack([frames, np.full(length, index)], axis=1))
        pictures = episode.read_rgb(range(length))[0]
        bits = [[int(picture[4:12, bit * 16 + 4 : bit * 16 + 12].mean() > 128) for bit in range(4)] for picture in pictures]
        assert [sum(on << bit for bit, on in enumerate(row)) for row in bits] == [10 * index + frame for frame in frames]


def test_the_tables_have_the_columns_and_types_of_lerobots_own(written):
    for file in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        theirs, ours = pq.read_schema(WRITTEN_BY_LEROBOT / file), pq.read_schema(written / file)
        for name in theirs.names:
            mine = name.replace("images.front", "images.left")
            assert mine in ours.names, name
            if not name.startswith("stats/") and name not in ("action", "observation.state"):
                assert ours.field(mine).type == theirs.field(name).type, name
    theirs, ours = (json.loads((root / "meta/info.json").read_text()) for root in (WRITTEN_BY_LEROBOT, written))
    assert list(ours) == list(theirs)
    assert set(ours["features"]["observation.images.left"]["info"]) == set(theirs["features"]["observation.images.front"]["info"])
    theirs, ours = (json.loads((root / "meta/stats.json").read_text()) for root in (WRITTEN_BY_LEROBOT, written))
    assert set(theirs["action"]) == set(ours["action"])
    assert np.shape(theirs["observation.images.front"]["q99"]) == np.shape(ours["observation.images.left"]["q99"])


def test_an_episode_that_is_there_twice_is_refused(copy):
    rewrite(copy / "meta/episodes/chunk-000/file-000.parquet", lambda rows: [row | {"name": "task/0"} for row in rows])
    with pytest.raises(MvwanError, match="task/0 is in it twice"):
        read_lerobot(copy)
