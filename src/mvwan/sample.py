"""Prompt + first pictures + cameras -> `Prediction`: what the robot's cameras will see and where the tracked point will go.

Euler steps from noise to video around given latent frames that stay clean, then decode, peaks, and the lift to 3-D. The same
network, codec and noise convention as training; a run's folder alone is enough. What the gripper and the hand do is read from the last
network call, which sees the least noise. Knows no data set, no metric and no robot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from mvwan import flow, heatmaps
from mvwan.actions import read_out
from mvwan.batch import Prediction, camera_rays
from mvwan.cameras import Camera
from mvwan.checkpoint import find_checkpoint, read_heat_reader, read_manifest
from mvwan.config import Attention, Config
from mvwan.errors import MvwanError
from mvwan.heat_reader import HeatReader
from mvwan.model import surgery
from mvwan.model.attention import check_attention
from mvwan.model.context_parallel import TokenSplit
from mvwan.model.latents import LatentCodec
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.quantized import quantize_frozen
from mvwan.precision import default_device, has_fast_bfloat16
from mvwan.shapes import check_picture_size, latent_size, num_frames_of, num_latent_frames, num_tokens
from mvwan.trajectory import lift

HeatFrom = Literal["auto", "vae"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedRun:
    """A trained model with what prediction needs beside it."""

    model: MultiViewWan
    codec: LatentCodec
    config: Config
    """Settings of the training run."""
    checkpoint: Path
    step: int
    reader: HeatReader | None = None
    """Reads heat from latents in place of the VAE; None: the VAE decodes it."""
    view_names: tuple[str, ...] | None = None
    """Names of the cameras of training, in order; None where its checkpoint does not say."""
    fps: float | None = None
    """Frames per second of a window; None where its checkpoint does not say."""


def load_run(
    path: str | Path,
    device: str | torch.device | None = None,
    ema: bool = False,
    attention: Attention = "auto",
    split: TokenSplit | None = None,
    heat_from: HeatFrom = "auto",
) -> LoadedRun:
    """The newest checkpoint of the run in folder `path` (or the checkpoint folder itself), ready to predict on `device`.

    None is the accelerator, or the processor where there is none; the text encoder, which reads one prompt, stays on the processor.
    Where `device` is slow with bfloat16 products are in float32, and `config` says so. `attention` is the kernel that attends, whatever
    training used; the frozen weights are stored in as few bits as in training. With `split` several processes, each of which calls this
    and then `predict` with the same arguments, compute one prediction together. `heat_from` says what makes heat of latents: the run's heat
    reader where it has one (`auto`), or the `vae`.

    Raises `MvwanError` when there is none, when it is damaged, when base, VAE or text encoder are not those it was trained on, or when this
    machine lacks what `attention` or the run's `base.quantize` needs.
    """
    folder = find_checkpoint(path)
    if folder.is_file():
        raise MvwanError(
            f"checkpoint {path}: a file of the older system does not know its base, views and pictures. Give a run's folder, or load "
            "it with mvwan.load_model(base, checkpoint=...) and give the model, codec and config to mvwan.predict."
        )
    model, config = surgery.load_as_trained(folder, ema=ema)
    device = torch.device(device or default_device())
    fast = has_fast_bfloat16(device)
    half = fast and (config.train.precision != "no" or config.base.dtype == "bfloat16")
    check_attention(attention, device, half=half, trains=False, is_split=split is not None)
    if split is not None:
        tokens = num_tokens(1, *latent_size(config.data.height_px, config.data.width_px))
        split.check(cast("Any", model.config).num_attention_heads, tokens)
    model.attend_with(attention, split)
    manifest = read_manifest(folder)
    held = {name for group in manifest["groups"].values() for name in group["names"]}
    quantize_frozen(model, config.base.quantize, keep=held)
    torch.nn.Module.to(model, device)
    if not fast:
        config = replace(config, train=replace(config.train, precision="no"))
    codec = LatentCodec.load(config.base.codec or config.base.source, config.data.text_tokens)
    if manifest.get("codec") not in (None, codec.digest):
        raise MvwanError(
            f"checkpoint {folder}: was trained with another VAE, text encoder or tokenizer than those of "
            f"{config.base.codec or config.base.source}. Put them back, or predict with the run's own base."
        )
    codec.vae.to(device)
    found = None if heat_from == "vae" else read_heat_reader(folder)
    reader = None if found is None else HeatReader(**found).to(device)
    names = manifest.get("view_names")
    return LoadedRun(
        model=model,
        codec=codec,
        config=config,
        checkpoint=folder,
        step=manifest["step"],
        reader=reader,
        view_names=None if names is None else tuple(names),
        fps=manifest.get("fps"),
    )


def predict(
    run_or_model: str | Path | LoadedRun | MultiViewWan,
    images: np.ndarray,
    prompt: str,
    cameras: Sequence[Camera],
    steps: int = 5,
    seed: int = 0,
    *,
    point_m: np.ndarray | None = None,
    point_px: np.ndarray | None = None,
    gripper_open: float | np.ndarray | None = None,
    num_frames: int | None = None,
    heat_only: bool = False,
    codec: LatentCodec | None = None,
    config: Config | None = None,
    reader: HeatReader | None = None,
) -> Prediction:
    """What happens after `images`, over `num_frames` pictures per view (None: as many as in training), in `steps` Euler steps.

    images [V H W 3] uint8, one first picture per camera ([V F H W 3] for runs with several given frames). `cameras` belong to
    pictures of this size. point_m [3] (or [F 3]), metres, is where the tracked point is now: the robot knows its tool point. Or
    point_px [V 2] (or [V F 2]), where each view shows it, NaN where one does not. Without either the first heatmap is blank, as in
    training when no camera sees the point. gripper_open (or [F]), 0..1, is how far the gripper is open now: a model with an action
    head repeats it in the given frames, and says its own without it; no other model reads it.
    `heat_only` leaves the pictures undecoded, which saves half of the time: `rgb` then ends with the given ones. A bare model needs
    `codec`, `config` where its training differed from the defaults, and `reader` where it had a heat reader, or its heat comes through
    the VAE. Same seed, same prediction. Raises `MvwanError` for pictures that do not fit.
    """
    run = load_run(run_or_model) if isinstance(run_or_model, (str, Path)) else run_or_model
    if isinstance(run, LoadedRun):
        model, codec, config, reader = run.model, codec or run.codec, config or run.config, reader or run.reader
        _check_size(images, config)
    else:
        model, config = run, config or Config()
        if codec is None:
            raise MvwanError("predict: a bare model needs codec=LatentCodec.load(base, text_tokens); or give a run's folder")
    condition_frames = config.train.condition_frames
    num_frames = config.data.num_frames if num_frames is None else num_frames
    latent_frames = num_latent_frames(num_frames)
    given = _given_pictures(images, cameras, num_frames_of(condition_frames))
    if model.view_code == "slot" and isinstance(run, LoadedRun) and len(given) != config.model.views:
        raise MvwanError(
            f"{len(given)} views; the run was trained on {config.model.views}, told apart by their order. Give as many, in its order; only "
            "a run with model.view_code=camera takes others."
        )
    if model.view_code != "camera" and isinstance(run, LoadedRun):
        _check_order([camera.name for camera in cameras], run.view_names)
    uv_px, visible = _where_it_is(given, cameras, point_m, point_px)
    heat = heatmaps.render(uv_px, visible, given.shape[2], given.shape[3], config.data.heatmap_sigma_px)
    # RGB and heat go through the codec as one batch of 2V videos; the network wants them side by side on channels.
    clean = codec.encode_video(np.concatenate([given, heatmaps.colour(heat)]))
    rgb_latents, heat_latents = clean.chunk(2)
    latents, logits = denoise(
        model,
        torch.cat([rgb_latents, heat_latents], dim=1)[None],
        codec.encode_text([prompt]),
        latent_frames,
        denoise_steps=steps,
        seed=seed,
        shift=config.flow.shift,
        sigma_min=config.flow.sigma_min,
        precision=config.train.precision,
        rays=None if model.view_code == "slot" else camera_rays(cameras, *clean.shape[-2:])[None],
        view_names=[camera.name for camera in cameras] if model.view_code == "camera" else None,
    )
    rgb_latents, heat_latents = latents[0].chunk(2, dim=1)
    decoded, found_heat = videos_of(None if heat_only else rgb_latents, heat_latents, codec, reader)
    actions = _actions(logits, num_frames, given.shape[1], gripper_open)
    return _prediction(given if decoded is None else decoded, found_heat, given, heat, cameras, prompt, *actions)


def videos_of(
    rgb: torch.Tensor | None, heat: torch.Tensor, codec: LatentCodec, reader: HeatReader | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """(pictures [V F H W 3] uint8, heat [V F H W] in 0..1) of latents [V C f h w]; no pictures for no RGB latents.

    Heat comes from `reader`, whose first picture, which is a given one, is blank; or through the VAE, where that is None.
    """
    asked = [latents for latents in (rgb, heat if reader is None else None) if latents is not None]
    decoded = np.split(codec.decode_video(torch.cat(asked)), len(asked)) if asked else []
    pictures = None if rgb is None else decoded[0]
    if reader is None:
        return pictures, heatmaps.uncolour(decoded[-1])
    return pictures, np.pad(reader.pictures(heat), ((0, 0), (1, 0), (0, 0), (0, 0)))


@torch.inference_mode()
def denoise(
    model: MultiViewWan,
    given: torch.Tensor,
    text: torch.Tensor,
    latent_frames: int,
    *,
    denoise_steps: int,
    seed: int,
    shift: float,
    sigma_min: float = 0.0,
    precision: Literal["auto", "bf16", "no"] = "auto",
    sample_ids: Sequence[str] | None = None,
    rays: torch.Tensor | None = None,
    view_names: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(latents, logits): [B V 2C f h w] float32 whose first frames are `given` [B V 2C g h w] to the bit, the rest made from noise.

    The logits [B F A] are what an action head says in the last network call, at the lowest sigma; None without one. The noise is a
    pure function of (seed, sample id), or with `view_names` that of each view one of (seed, sample id, its name), so that it goes where
    its view goes; ids default to `0`, `1`, … . `rays` are those that the model's `forward` takes. One network call per step, none below
    `sigma_min` (before the shift).
    """
    if denoise_steps < 1:
        raise MvwanError(f"steps={denoise_steps}: at least one Euler step is needed. Five are enough for most runs.")
    batch, views, channels, condition_frames, height, width = given.shape
    if condition_frames >= latent_frames:
        raise MvwanError(f"num_frames={num_frames_of(latent_frames)}: all of it is given; ask for more pictures than are given")
    device = next(model.parameters()).device
    if precision == "auto":
        precision = "bf16" if has_fast_bfloat16(device) else "no"
    ids = sample_ids or [str(index) for index in range(batch)]
    of_view = (channels, latent_frames, height, width)
    if view_names is None:
        noise = flow.draw_noise(seed, 0, ids, (views, *of_view))
    else:
        noise = flow.draw_noise(seed, 0, [f"{one}/{name}" for one in ids for name in view_names], of_view).unflatten(0, (batch, views))
    latents = torch.cat([given.float().cpu(), noise[:, :, :, condition_frames:]], dim=3).to(device)
    text, rays = text.to(device), None if rays is None else rays.to(device)
    sigmas = flow.euler_sigmas(denoise_steps, shift, sigma_min).tolist()
    predicted, logits = slice(condition_frames, None), None
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        for sigma, next_sigma in pairwise(sigmas):
            timestep = flow.timestep(torch.full((batch,), sigma, device=device))
            if next_sigma == 0 and model.head_action is not None:
                velocity, logits = model(latents, timestep, text, condition_frames, return_action=True, rays=rays)
            else:
                velocity = model(latents, timestep, text, condition_frames, rays=rays)
            latents[:, :, :, predicted] = flow.euler_step(
                latents[:, :, :, predicted], velocity[:, :, :, predicted].float(), sigma, next_sigma
            )
    return latents, logits


def _check_size(images: np.ndarray, config: Config) -> None:
    size = tuple(images.shape[-3:-1])
    trained = (config.data.height_px, config.data.width_px)
    if size != trained:
        raise MvwanError(
            f"images are {size[0]}x{size[1]} px, the run was trained on {trained[0]}x{trained[1]}; resize pictures and cameras together "
            "(mvwan.data.transforms)"
        )


def _check_order(names: Sequence[str], trained: Sequence[str] | None) -> None:
    if trained is not None and sorted(names) == sorted(trained) and list(names) != list(trained):
        raise MvwanError(
            f"views {', '.join(names)}: the run was trained on {', '.join(trained)}, and tells views apart by their order. Give pictures "
            "and cameras in that one."
        )


def _given_pictures(images: np.ndarray, cameras: Sequence[Camera], num_given: int) -> np.ndarray:
    """The given pictures as [V F H W 3], checked."""
    given = images[:, None] if images.ndim == 4 else images
    if given.ndim != 5 or given.shape[-1] != 3 or given.dtype != np.uint8:
        raise MvwanError(f"images are {images.shape} {images.dtype}; needed are [V H W 3] uint8, one first picture per camera")
    check_picture_size(*given.shape[2:4], field="images")
    if given.shape[1] != num_given:
        raise MvwanError(f"images hold {given.shape[1]} pictures per view; this run is given {num_given}")
    if len(cameras) != len(given):
        raise MvwanError(f"{len(given)} images and {len(cameras)} cameras; give one first picture per camera, in the same order")
    for camera in cameras:
        if (camera.height_px, camera.width_px) != given.shape[2:4]:
            raise MvwanError(
                f"camera {camera.name!r} is {camera.height_px}x{camera.width_px} px, the pictures are {given.shape[2]}x{given.shape[3]}; "
                "resize cameras with their pictures"
            )
    return given


def _where_it_is(
    given: np.ndarray, cameras: Sequence[Camera], point_m: np.ndarray | None, point_px: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(uv_px [V F 2], visible [V F]) of the tracked point in the given pictures."""
    views, frames, height, width = given.shape[:4]
    if point_px is not None:
        if point_m is not None:
            raise MvwanError("point_m and point_px both say where the point is; give one of them")
        uv = np.asarray(point_px, np.float64)
        uv = uv[:, None] if uv.ndim == 2 else uv
        if uv.shape != (views, frames, 2):
            raise MvwanError(
                f"point_px is {np.shape(point_px)}; needed is one place in px per view and given picture, ({views}, {frames}, 2)"
            )
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(uv), np.all((uv >= 0) & (uv < (width, height)), axis=-1)
    points = np.full((frames, 3), np.nan) if point_m is None else np.atleast_2d(np.asarray(point_m, np.float64))
    if points.shape != (frames, 3):
        raise MvwanError(f"point_m is {points.shape}; needed is one point in metres per given picture, ({frames}, 3)")
    uv = np.zeros((views, frames, 2))
    visible = np.zeros((views, frames), bool)
    known = np.isfinite(points).all(axis=-1)
    for view, camera in enumerate(cameras):
        uv[view, known], depth = camera.project(points[known])
        visible[view, known] = camera.inside(uv[view, known], depth)
    return uv, visible


def _actions(
    logits: torch.Tensor | None, num_frames: int, num_given: int, measured: float | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(gripper_open [F], rotation_deg [F 3]) of logits [1 F A], NaN without; in the given frames what was measured, where it was."""
    if logits is None:
        return np.full(num_frames, np.nan, np.float32), np.full((num_frames, 3), np.nan, np.float32)
    known = np.full(num_given, np.nan) if measured is None else np.atleast_1d(np.asarray(measured, np.float64))
    if known.shape != (num_given,) or ((known < 0) | (known > 1)).any():
        raise MvwanError(f"gripper_open={measured}: needed is one opening in 0..1 per given picture, of which there are {num_given}")
    gripper_open, rotation_deg = (values[0] for values in read_out(logits))
    gripper_open[:num_given] = np.where(np.isfinite(known), known, gripper_open[:num_given])
    return gripper_open, rotation_deg


def _prediction(
    rgb: np.ndarray,
    heat: np.ndarray,
    given: np.ndarray,
    given_heat: np.ndarray,
    cameras: Sequence[Camera],
    prompt: str,
    gripper_open: np.ndarray,
    rotation_deg: np.ndarray,
) -> Prediction:
    """The record of videos rgb [V F H W 3] and heat [V F H W]; the given pictures are put back as they came."""
    rgb, heat = rgb.copy(), heat.copy()
    rgb[:, : given.shape[1]], heat[:, : given.shape[1]] = given, given_heat
    uv_px, confidence = heatmaps.peak(heat)
    point_m, residual_px = lift(uv_px, confidence, cameras, heat)
    return Prediction(
        rgb=rgb,
        heat=heat,
        uv_px=uv_px,
        confidence=confidence,
        point_m=point_m,
        residual_px=residual_px,
        gripper_open=gripper_open,
        rotation_deg=rotation_deg,
        cameras=tuple(cameras),
        prompt=prompt,
    ).check()
