"""Pictures come back from mp4 exact to the frame, nearly unchanged, and a damaged file is named."""

import pickle

import av
import numpy as np
import pytest

from mvwan.data.episode import VideoFrames, VideoWriter, count_frames, count_values, read_frames, summarise, summarise_pictures
from mvwan.errors import MvwanError


def clip(num_frames, height=32, width=48):
    """[F H W 3] uint8: smooth colours with the frame's number as six black and white bars, so that frames cannot be mistaken."""
    rows, columns = np.mgrid[0:height, 0:width]
    pictures = np.empty((num_frames, height, width, 3), np.uint8)
    for frame in range(num_frames):
        pictures[frame] = np.stack([rows * 4 + frame, columns * 3, 200 - rows * 2 - columns], axis=-1).clip(0, 255)
        for bit in range(6):
            pictures[frame, :8, bit * 8 : bit * 8 + 8] = 255 * (frame >> bit & 1)
    return pictures


def number_of(picture):
    return sum(int(picture[2:6, bit * 8 + 2 : bit * 8 + 6].mean() > 128) << bit for bit in range(6))


def write(path, pictures, fps=40):
    with VideoWriter(path, fps, *pictures.shape[1:3]) as writer:
        writer.add(pictures[:7])
        writer.add(pictures[7:])
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", clip(60))


@pytest.mark.parametrize("frames", [[0], [59], list(range(60)), [41, 3, 3, 58, 0], [5, 30, 31, 59]])
def test_frames_come_back_exact_in_the_order_asked(video, frames):
    pictures = read_frames(video, 40, frames)
    assert [number_of(picture) for picture in pictures] == frames
    error = np.square(pictures.astype(float) - clip(60)[frames]).mean()
    assert 10 * np.log10(255**2 / error) > 38


@pytest.mark.parametrize("fps", [7, 30, 80])
def test_every_frame_rate_is_exact(tmp_path, fps):
    video = write(tmp_path / "clip.mp4", clip(40), fps)
    assert [number_of(picture) for picture in read_frames(video, fps, [39, 17, 1])] == [39, 17, 1]


def test_same_pictures_give_the_same_bytes(tmp_path, video):
    assert write(tmp_path / "again.mp4", clip(60)).read_bytes() == video.read_bytes()


def test_frames_are_counted(video):
    assert count_frames(video) == 60


def test_a_frame_past_the_end_is_named(video):
    with pytest.raises(MvwanError, match=r"clip\.mp4: frame 60 is not in the video"):
        read_frames(video, 40, [58, 60])


@pytest.mark.parametrize("kept", [0, 40, 3000])
def test_a_truncated_file_is_named(tmp_path, video, kept):
    broken = tmp_path / "cut.mp4"
    broken.write_bytes(video.read_bytes()[:kept])
    for read in (count_frames, lambda path: read_frames(path, 40, [0])):
        with pytest.raises(MvwanError, match=r"cut\.mp4: cannot be decoded"):
            read(broken)


def test_a_file_with_its_index_in_front_is_counted_by_what_is_really_there(tmp_path, video):
    whole = tmp_path / "front.mp4"
    with av.open(str(video)) as source, av.open(str(whole), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert count_frames(whole) == 60
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert count_frames(whole) < 50


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MvwanError, match=r"none\.mp4: no such file"):
        count_frames(tmp_path / "none.mp4")


def test_views_of_an_episode_are_stacked_and_the_reader_crosses_processes(tmp_path, video):
    other = write(tmp_path / "other.mp4", clip(60)[::-1])
    reader = VideoFrames(name="task/1", paths=(video, other), first_frames=(10, 0), num_frames=20, fps=40.0)
    pictures = pickle.loads(pickle.dumps(reader))(range(4, 7))  # noqa: S301 - our own bytes
    assert pictures.shape == (2, 3, 32, 48, 3)
    assert [number_of(picture) for picture in pictures[0]] == [14, 15, 16]
    assert [number_of(picture) for picture in pictures[1]] == [55, 54, 53]
    with pytest.raises(AssertionError, match="20 frames"):
        reader([20])
    other.unlink()
    with pytest.raises(MvwanError, match=r"episode task/1: .*other\.mp4: no such file"):
        reader([0])


def test_summary_numbers_agree_with_numpy():
    values = np.random.default_rng(0).normal(size=(500, 3))
    numbers = summarise(values)
    assert numbers["count"] == [500]
    np.testing.assert_allclose(numbers["std"], values.std(axis=0))
    np.testing.assert_allclose(numbers["q90"], np.quantile(values, 0.9, axis=0))
    assert summarise(np.array([True, False, True, True]))["mean"] == [0.75]


def test_summary_of_pictures_agrees_with_numpy():
    pictures = np.random.default_rng(1).integers(3, 200, (5, 16, 24, 3), dtype=np.uint8)
    numbers = summarise_pictures(count_values(pictures[:2]) + count_values(pictures[2:]), 5)
    flat = pictures.reshape(-1, 3) / 255.0
    for name, value in {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}.items():
        np.testing.assert_allclose(np.array(numbers[name]), value.reshape(3, 1, 1), err_msg=name)
    np.testing.assert_allclose(np.ravel(numbers["q50"]), np.quantile(flat, 0.5, axis=0, method="inverted_cdf"))
