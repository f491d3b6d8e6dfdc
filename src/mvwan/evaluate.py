"""A run's predictions on held-out windows, measured beside baselines and beside the codec alone.

`predicted` is the run; `hold_first`, `constant_velocity` and `nearest` (training demonstration) need no training; `codec` is the truth
encoded and brought back as predictions are, which no run on this base can beat by much. Given frames never count. Knows no page and no
training.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from mvwan import baselines, heatmaps, metrics
from mvwan.baselines import Answer, NearestDemonstration
from mvwan.batch import Episode, Prediction, Sample
from mvwan.cameras import Camera
from mvwan.config import Attention, DataConfig
from mvwan.data.dataset import Window, WindowDataset, episodes_of, heat_video, kept_out, roots_of
from mvwan.data.windows import spread
from mvwan.errors import MvwanError
from mvwan.evaluation_table import FORMAT_VERSION, PCK_PX, SOURCES
from mvwan.files import sha256_json, whole_file, write_json
from mvwan.metrics import Tally
from mvwan.model.context_parallel import TokenSplit
from mvwan.prediction_files import Truth, check_place, read_cameras, read_pictures, write_prediction
from mvwan.sample import HeatFrom, LoadedRun, load_run, predict, videos_of
from mvwan.tensors import digest
from mvwan.trajectory import lift

PCK_SHARE = 0.05
"""A peak is found when it lies within this share of the picture's height."""

Tallies = dict[str, dict[str, tuple[Tally, ...]]]
"""Source -> measure -> one tally per view, or a single one for what all views give together."""


def seen_by(run: LoadedRun, cameras: Sequence[str] | None) -> LoadedRun:
    """The run as it stands before `cameras` of its data in place of those of training; None: itself.

    Raises `MvwanError` for another number of them, unless its model tells views apart by camera alone.
    """
    if cameras is None:
        return run
    model, data = run.config.model, run.config.data
    if len(cameras) != model.views and model.view_code != "camera":
        raise MvwanError(
            f"--cameras {','.join(cameras)}: {len(cameras)} views; the run was trained on {model.views} with model.view_code="
            f"{model.view_code}. Give as many; only model.view_code=camera takes others."
        )
    config = replace(run.config, data=replace(data, cameras=tuple(cameras)), model=replace(model, views=len(cameras)))
    return replace(run, config=config)


def held_out_windows(run: LoadedRun, dataset: str | Path | None = None) -> WindowDataset:
    """The windows that the run never trained on, of its own data set or of the whole of another one at `dataset`, in the run's views.

    Raises `MvwanError` when there is none, or when demonstrations at `dataset` were trained on, as far as those are still there.
    """
    data = run.config.data
    episodes = episodes_of(data, dataset)
    is_own = dataset is None or [Path(dataset).resolve()] == [Path(root).resolve() for root in roots_of(data.root)]
    if not is_own:
        data = all_held_out(data, run.config.seed, str(dataset), episodes, run.view_names)
    windows = WindowDataset(episodes, data, run.config.model.views, "validation", run.config.seed)
    if not len(windows):
        raise MvwanError(
            f"{' and '.join(roots_of(dataset or data.root))}: no held-out windows. Set data.validation_share above 0, or give --dataset."
        )
    return windows


def all_held_out(
    data: DataConfig, seed: int, dataset: str, episodes: Sequence[Episode], view_names: Sequence[str] | None = None
) -> DataConfig:
    """`data`, the settings of a training with `seed`, but for another data set, all of whose `episodes` are held out.

    Its views come in the order of the demonstrations that were trained on, or of `view_names` where those are gone. Raises `MvwanError`
    when some of `episodes` are among those; where they are gone, nobody can tell.
    """
    if all(Path(root).is_dir() for root in roots_of(data.root)):
        own = episodes_of(data)
        kept = kept_out(own, seed, data.validation_share)
        trained = {episode.demonstrated for episode in own if episode.name not in kept}
        if twice := sum(episode.demonstrated in trained for episode in episodes):
            raise MvwanError(
                f"{dataset}: the run was trained on {twice} of its {len(episodes)} demonstrations. Leave --dataset out to measure on "
                "those that the run held out, or record others with another --seed."
            )
        view_names = [camera.name for camera in own[0].cameras]
    whole = replace(data, validation_share=1.0)
    is_same_rig = view_names is not None and sorted(view_names) == sorted(camera.name for camera in episodes[0].cameras)
    return replace(whole, cameras=tuple(view_names or ())) if data.cameras is None and is_same_rig else whole


def predict_sample(run: LoadedRun, sample: Sample, denoise_steps: int = 5, seed: int = 0) -> Prediction:
    """What the run predicts after the window's given pictures, over the window's length."""
    given = metrics.num_given_frames(run.config.train.condition_frames)
    point_m, in_pictures = sample.point_m[:given], np.where(sample.visible[..., None], sample.uv_px, np.nan)[:, :given]
    is_known = bool(np.isfinite(point_m).any())  # else it is labelled in pictures, or not at all
    return predict(
        run,
        sample.rgb[:, :given],
        sample.instruction,
        sample.cameras,
        steps=denoise_steps,
        seed=seed,
        point_m=point_m if is_known else None,
        point_px=None if is_known else in_pictures,
        gripper_open=sample.gripper_open[:given],
        num_frames=sample.rgb.shape[1],
    )


def evaluate_prediction(
    run: str | Path | LoadedRun,
    *,
    dataset: str | Path | None = None,
    cameras: Sequence[str] | None = None,
    windows: int = 16,
    denoise_steps: int = 5,
    seed: int = 0,
    output: str | Path | None = None,
    keep: int = 0,
    codec_from: Mapping[str, Any] | None = None,
    heat_from: HeatFrom = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Measures as plain dicts, also written to `output` (None: `evaluation.json` in the run's folder, with the names of `cameras` in it).

    Where `dataset` is given, its folder's name is in the file's name too. `cameras` names those to look through, as in `seen_by`. At most
    `windows` held-out windows, spread evenly. `keep` of them, spread evenly too, are stored as `predictions/NN.npz` beside the JSON, for
    pictures. `codec_from` is an earlier result: its codec column is taken over when codec and windows are the same. `heat_from` is that
    of `load_run`. `progress` shows a bar on stderr.
    """
    started = time.monotonic()
    loaded = seen_by(run if isinstance(run, LoadedRun) else load_run(run, heat_from=heat_from), cameras)
    held_out = held_out_windows(loaded, dataset)
    chosen = spread(len(held_out), windows)
    kept = {chosen[place] for place in spread(len(chosen), keep)}
    name = "_".join(["evaluation", *([] if dataset is None else [Path(dataset).resolve().name]), *(cameras or ())]) + ".json"
    target = Path(output) if output is not None else loaded.checkpoint.parents[1] / name
    reader = None if loaded.reader is None else digest(loaded.reader.tensors)
    codec_key = sha256_json([loaded.codec.digest, reader, loaded.config.data.heatmap_sigma_px, *map(held_out.sample_fingerprint, chosen)])
    known_codec = codec_from["measures"]["codec"] if codec_from is not None and codec_from["codec_key"] == codec_key else None
    nearest = _nearest(loaded)
    tallies: Tallies = {source: {} for source in SOURCES}
    rows: list[dict[str, Any]] = []
    episodes: set[str] = set()
    given = loaded.config.train.condition_frames
    for index in track(chosen, "predicting", console=Console(stderr=True), transient=True, disable=not progress):
        if (sample := held_out.readable_sample(index)) is None:
            continue
        prediction = predict_sample(loaded, sample, denoise_steps, seed)
        answers = answers_of(loaded, sample, prediction, held_out.windows[index], nearest)
        measured = measure_window(loaded, sample, prediction, answers)
        if known_codec is None:
            measured["codec"] = measure_answer(sample, _through_codec(loaded, sample), answers["hold_first"], given)
        _add(tallies, measured)
        rows.append(_window_row(sample, measured))
        episodes.add(held_out.windows[index].episode.name)
        if index in kept:
            name = f"predictions/{sum('pictures' in row for row in rows):02d}.npz"
            save_prediction(target.parent / name, sample, prediction, loaded.config.data.heatmap_sigma_px)
            rows[-1]["pictures"] = name
    if not rows:
        raise MvwanError(f"data.on_corrupt=skip: none of the {len(chosen)} held-out windows can be read. Give another --dataset.")
    result = {
        "format_version": FORMAT_VERSION,
        "checkpoint": str(loaded.checkpoint),
        "dataset": list(roots_of(str(dataset) if dataset is not None else loaded.config.data.root)),
        "step": loaded.step,
        "unfreeze_modulation_and_norms": loaded.config.unfreeze_modulation_and_norms,
        "denoise_steps": denoise_steps,
        "heat_from": "vae" if loaded.reader is None else "reader",
        "seed": seed,
        "num_windows": len(rows),
        "damaged_windows": len(chosen) - len(rows),
        "held_out_windows": len(held_out),
        "nearest_windows": sum("nearest_error_3d_mm" in row for row in rows),
        "episodes": sorted(episodes),
        "views": [camera.name for camera in held_out.cameras(chosen[0])],
        "num_frames": loaded.config.data.num_frames,
        "given_frames": metrics.num_given_frames(loaded.config.train.condition_frames),
        "size_px": [loaded.config.data.height_px, loaded.config.data.width_px],
        "found_within_px": PCK_SHARE * loaded.config.data.height_px,
        "codec_key": codec_key,
        "within_px": list(PCK_PX),
        "measures": {source: _summary(measures, loaded.config.data.num_frames) for source, measures in tallies.items() if measures}
        | ({"codec": known_codec} if known_codec else {}),
        "windows": rows,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(target, result)
    return result


def _nearest(run: LoadedRun) -> NearestDemonstration | None:
    """The baseline that replays, None where the run's own demonstrations are gone."""
    data = run.config.data
    if not all(Path(root).is_dir() for root in roots_of(data.root)):
        return None
    training = WindowDataset(episodes_of(data), data, run.config.model.views, "train", run.config.seed)
    return NearestDemonstration(training, metrics.num_given_frames(run.config.train.condition_frames))


def answers_of(
    run: LoadedRun, sample: Sample, prediction: Prediction, window: Window, nearest: NearestDemonstration | None
) -> dict[str, Answer]:
    """Source -> what it says about the window: the run and those baselines that have an answer."""
    given = metrics.num_given_frames(run.config.train.condition_frames)
    predicted = Answer(rgb=prediction.rgb, uv_px=_seen(prediction.uv_px, prediction.confidence), point_m=prediction.point_m)
    answers = {
        "predicted": predicted,
        "hold_first": baselines.hold_first(sample, given),
        "constant_velocity": baselines.constant_velocity(sample, window, given),
        "nearest": None if nearest is None else nearest.answer(sample),
    }
    return {source: answer for source, answer in answers.items() if answer is not None}


def measure_window(run: LoadedRun, sample: Sample, prediction: Prediction, answers: Mapping[str, Answer]) -> Tallies:
    """The tallies of one window for each of the answers, and how far the views that see the point disagree in the prediction."""
    given = run.config.train.condition_frames
    measured = {source: measure_answer(sample, answer, answers["hold_first"], given) for source, answer in answers.items()}
    seen = np.where(sample.visible, prediction.confidence, 0)
    measured["predicted"]["view_disagreement_px"] = metrics.view_disagreement_px(prediction.uv_px, seen, sample.cameras, given)
    return measured


def _seen(uv_px: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Peaks [V F 2], NaN where a heatmap has none."""
    return np.where(confidence[..., None] > 0, uv_px, np.nan)


def filled(values: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`values` with the held ones where they are missing: who finds no peak stays where it was, so losing it cannot look good."""
    return np.where(np.isfinite(values), values, held)


def measure_answer(sample: Sample, answer: Answer, held: Answer, given: int) -> dict[str, tuple[Tally, ...]]:
    """Measure -> its tallies for one answer; `given` latent frames do not count. What it does not say is taken from `held`."""
    within = {f"within_{px}_px": metrics.pck(answer.uv_px, sample.uv_px, sample.visible, px, given) for px in PCK_PX}
    measured = {
        "peak_error_px": metrics.peak_error_px(filled(answer.uv_px, held.uv_px), sample.uv_px, sample.visible, given),
        "found": metrics.pck(answer.uv_px, sample.uv_px, sample.visible, PCK_SHARE * sample.rgb.shape[2], given),
        **within,
        "lost": metrics.lost_share(answer.uv_px, sample.visible, given),
        "error_3d_mm": (metrics.error_3d_mm(filled(answer.point_m, held.point_m), sample.point_m, given),),
    }
    if answer.rgb is not None:
        measured["rgb_squared_error"] = metrics.squared_error(answer.rgb, sample.rgb, given)
        measured["rgb_ssim"] = metrics.ssim(answer.rgb, sample.rgb, given)
    return measured


def _through_codec(run: LoadedRun, sample: Sample) -> Answer:
    """The true videos after encoding, and decoding or reading as predictions are."""
    heat = heat_video(sample, run.config.data.heatmap_sigma_px)
    latents = run.codec.encode_video(np.concatenate([sample.rgb, heat]))
    rgb_latents, heat_latents = latents.chunk(2)
    rgb, seen = videos_of(rgb_latents, heat_latents, run.codec, run.reader)
    assert rgb is not None
    uv_px, confidence = heatmaps.peak(seen)
    return Answer(rgb=rgb, uv_px=_seen(uv_px, confidence), point_m=lift(uv_px, confidence, sample.cameras, seen)[0])


def _add(tallies: Tallies, measured: Tallies) -> None:
    for source, measures in measured.items():
        for name, views in measures.items():
            old = tallies[source].get(name, (Tally(),) * len(views))
            tallies[source][name] = tuple(a + b for a, b in zip(old, views, strict=True))


def _number(value: float, digits: int = 4) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


_IN_DETAIL = ("peak_error_px", "error_3d_mm", "view_disagreement_px")
_OF_ALL_VIEWS = ("error_3d_mm",)


def _summary(measures: Mapping[str, Sequence[Tally]], num_frames: int) -> dict[str, Any]:
    """Measure -> its statistics over all views, and `per_view` the same of each."""
    summary: dict[str, Any] = {}
    for name, views in measures.items():
        told = [_statistics(name, tally, num_frames) for tally in (sum(views, Tally()), *views)]
        summary[name] = told[0] | {"per_view": [] if name in _OF_ALL_VIEWS else told[1:]}
        if name == "rgb_squared_error":
            of_all, *of_views = map(_decibels, told)
            summary["rgb_psnr_db"] = of_all | {"per_view": of_views}
    return summary


def _statistics(name: str, tally: Tally, num_frames: int) -> dict[str, Any]:
    """`mean`, `count`, `lost`, for errors `median` and `p95`, and the mean `per_frame`, None where a frame is given or has no value."""
    detail = {"median": _number(tally.quantile(0.5)), "p95": _number(tally.quantile(0.95))} if name in _IN_DETAIL else {}
    per_frame = [_number(tally.at(frame).mean) for frame in range(num_frames)]
    return {"mean": _number(tally.mean), "count": tally.count, "lost": tally.lost, **detail, "per_frame": per_frame}


def _decibels(told: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of a squared error as peak signal-to-noise ratios; None where pictures are equal or there are none."""

    def decibels(error: float | None) -> float | None:
        return None if error is None else _number(metrics.psnr_db(error))

    return {**told, "mean": decibels(told["mean"]), "per_frame": [decibels(error) for error in told["per_frame"]]}


def _window_row(sample: Sample, measured: Tallies) -> dict[str, Any]:
    row: dict[str, Any] = {"sample_id": sample.sample_id}
    for source in (name for name in SOURCES if name in measured and name != "codec"):
        for name in ("peak_error_px", "error_3d_mm"):
            row[f"{source}_{name}"] = _number(sum(measured[source][name], Tally()).mean)
    return row


def save_prediction(path: Path, sample: Sample, prediction: Prediction, sigma_px: float) -> None:
    """Writes true and predicted pictures, peaks and points of one window to `path` (.npz); `load_prediction` reads them."""
    arrays = {
        "sample_id": np.array(sample.sample_id),
        "prompt": np.array(prediction.prompt),
        "views": np.array([camera.name for camera in sample.cameras]),
        "true_rgb": sample.rgb,
        "predicted_rgb": prediction.rgb,
        "true_heat": heat_video(sample, sigma_px),
        "predicted_heat": heatmaps.colour(prediction.heat),
        "true_uv_px": np.where(sample.visible[..., None], sample.uv_px, np.nan),
        "predicted_uv_px": np.where(prediction.confidence[..., None] > 0, prediction.uv_px, np.nan),
        "true_point_m": sample.point_m,
        "predicted_point_m": prediction.point_m,
    }
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_prediction(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of `save_prediction` by name. Raises `MvwanError` when the file is not one."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        raise MvwanError(f"{path}: not a stored prediction ({error})") from None


def sample_window(
    run: str | Path,
    output: str | Path,
    *,
    dataset: str | Path | None = None,
    window: int = 0,
    denoise_steps: int = 5,
    seed: int = 0,
    attention: Attention = "auto",
    heat_from: HeatFrom = "auto",
    split: TokenSplit | None = None,
    device: str | torch.device | None = None,
) -> list[Path]:
    """The files written to the new folder `output`: prediction of held-out window number `window`, as pictures, videos and numbers.

    With `split` several processes make it together, and the first one writes.
    """
    loaded = load_run(run, device, attention=attention, split=split, heat_from=heat_from)
    held_out = held_out_windows(loaded, dataset)
    if window >= len(held_out):
        raise MvwanError(f"--window {window}: there are {len(held_out)} held-out windows, 0 to {len(held_out) - 1}")
    sample = held_out.sample(window)
    check_place(output, sample.cameras)
    prediction = predict_sample(loaded, sample, denoise_steps, seed)
    fps = held_out.windows[window].episode.fps / loaded.config.data.frame_interval
    truth = Truth(rgb=sample.rgb, uv_px=np.where(sample.visible[..., None], sample.uv_px, np.nan))
    return write_prediction(prediction, output, fps, truth) if split is None or split.rank == 0 else []


def sample_pictures(
    run: str | Path,
    output: str | Path,
    images: Sequence[Path],
    cameras: Path,
    prompt: str,
    *,
    point_m: Sequence[float] | None = None,
    point_px: Sequence[Sequence[float] | None] | None = None,
    gripper_open: float | None = None,
    fps: float | None = None,
    denoise_steps: int = 5,
    seed: int = 0,
    attention: Attention = "auto",
    heat_from: HeatFrom = "auto",
    split: TokenSplit | None = None,
    device: str | torch.device | None = None,
) -> list[Path]:
    """The files written to the new folder `output`: what happens after the picture files `images`, one per camera of the JSON file.

    Pictures of any size, each that of its camera; both are brought to the run's size, as demonstrations are in training. Where the
    tracked point is now is known in metres (`point_m`), or in each of the pictures (`point_px`, None where one does not show it).
    `fps`: predicted frames per second, which times are counted by; None: as in the demonstrations that the run was trained on, which
    must be there where its checkpoint does not say. `split` as in `sample_window`.
    """
    if not prompt.strip():
        raise MvwanError("--prompt is empty. Say what the robot shall do.")
    recorded_by = read_cameras(cameras)
    check_place(output, recorded_by)
    loaded = load_run(run, device, attention=attention, split=split, heat_from=heat_from)
    data, views = loaded.config.data, loaded.config.model.views
    if len(recorded_by) != views and loaded.config.model.view_code != "camera":
        raise MvwanError(
            f"--cameras {cameras}: {len(recorded_by)} cameras; the run was trained on {views} views. Give as many, in its order."
        )
    if (given := metrics.num_given_frames(loaded.config.train.condition_frames)) != 1:
        raise MvwanError(f"--image gives one picture per view, this run needs {given}. Call mvwan.predict with images [V {given} H W 3].")
    if point_px is not None and len(point_px) != len(images):
        raise MvwanError(f"--point-px is given {len(point_px)} times for {len(images)} pictures. Give one place per picture, or none.")
    pictures, seen_by = read_pictures(images, recorded_by, data.height_px, data.width_px)
    fps = loaded.fps if fps is None else fps
    if fps is None:
        if gone := [root for root in roots_of(data.root) if not Path(root).is_dir()]:
            raise MvwanError(f"{gone[0]}: the run's demonstrations are gone, so its frame rate is not known. Give --fps.")
        fps = episodes_of(data)[0].fps / data.frame_interval
    prediction = predict(
        loaded,
        pictures,
        prompt,
        seen_by,
        steps=denoise_steps,
        seed=seed,
        point_m=None if point_m is None else np.array(point_m, np.float64),
        point_px=None if point_px is None else np.array([_resized(*view) for view in zip(point_px, recorded_by, seen_by, strict=True)]),
        gripper_open=gripper_open,
    )
    return write_prediction(prediction, output, fps) if split is None or split.rank == 0 else []


def _resized(uv_px: Sequence[float] | None, old: Camera, new: Camera) -> np.ndarray:
    """[2] the place in the picture of the camera `new`, which is that of `old` in another size; NaN for None."""
    scale = np.array([new.width_px / old.width_px, new.height_px / old.height_px])
    return np.full(2, np.nan) if uv_px is None else np.array(uv_px, np.float64) * scale
