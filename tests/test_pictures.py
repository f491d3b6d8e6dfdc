"""Pictures keep their pixels; videos decode to as many frames as went in."""

import io

import av
import numpy as np
from PIL import Image

from mvwan import pictures


def test_grid_places_every_frame_and_gap() -> None:
    frames = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 4, 5, 3), np.uint8)
    picture = pictures.grid(frames, gap_px=2, background=255)
    assert picture.shape == (2 * 4 + 2, 3 * 5 + 2 * 2, 3)
    assert (picture[6:10, 14:19] == 5).all() and (picture[:4, 7:12] == 1).all()
    assert (picture[4:6] == 255).all() and (picture[:, 5:7] == 255).all()
    assert np.array_equal(pictures.strip(frames[0], gap_px=0)[:, 5:10], frames[0, 1])


def test_marks_land_where_asked_and_leave_the_original() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    marked = pictures.mark_points(picture, np.array([[10.0, 20.0], [np.nan, 3.0]]), (255, 0, 0), radius_px=2)
    rows, columns = np.nonzero(marked[..., 0])
    assert picture.max() == 0 and abs(rows.mean() - 20) < 1 and abs(columns.mean() - 10) < 1
    crossed = pictures.mark_points(picture, np.array([[10.0, 20.0]]), (0, 255, 0), radius_px=2, cross=True)
    assert tuple(crossed[20, 10]) == (0, 255, 0)
    drawn = pictures.draw_path(picture, np.array([[2.0, 5.0], [np.nan, np.nan], [28.0, 5.0]]), (0, 0, 255))
    assert (drawn[5, 4:26, 2] == 255).all()


def test_png_is_lossless_and_webp_is_close() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pictures.png(picture)))), picture)
    smooth = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 24, 0).repeat(3, 2)
    decoded = np.asarray(Image.open(io.BytesIO(pictures.webp(smooth))).convert("RGB")).astype(int)
    assert np.abs(decoded - smooth).mean() < 3
    assert pictures.enlarge(picture, 2).shape == (48, 80, 3)


def test_mp4_holds_every_frame() -> None:
    frames = np.repeat(np.array([0, 128, 255], np.uint8)[:, None, None, None], 32, 1).repeat(48, 2).repeat(3, 3)
    data = pictures.mp4(frames, fps=2.5)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert stream.codec_context.name == "h264" and float(stream.average_rate) == 2.5
    assert [round(float(frame.mean()) / 128) for frame in decoded] == [0, 1, 2]
    assert pictures.data_uri(b"abc", "video/mp4") == "data:video/mp4;base64,YWJj"


def test_columns_shown_keep_both_ends() -> None:
    assert list(pictures.columns_shown(13)) == [0, 2, 4, 6, 8, 10, 12]
    assert list(pictures.columns_shown(5)) == [0, 1, 2, 3, 4]
    shown = list(pictures.columns_shown(25))
    assert shown[0] == 0 and shown[-1] == 24 and len(shown) == 7
