"""Trains the shipped tiny transformer further, alone: single-view videos of a dataset's cameras, their heatmaps, and made-up heatmaps.

    python scripts/refine_tiny_wan.py runs/tracking/demonstrations --latents runs/tracking/latents

A multi-view model can say where a spot goes only as well as its base knows how spots look in latents while they move, and the heatmaps
of recordings cover few of all places and speeds. VAE, tokenizer and text encoder stay as they are, so that cached latents stay valid.
Resumable, seeded, logged into --work; a run that ends by --minutes stops where the machine's speed put it. At the end the transformer
of --folder is replaced and its quality.json says what was done, with numbers of before and after on held-out episodes.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_tiny_wan import say
from diffusers import WanTransformer3DModel
from tiny_wan_quality import measure_transformer
from tiny_wan_transformer import loss_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvwan import flow, heatmaps
from mvwan.config import Config, FlowConfig
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.files import read_json, remove_directory, whole_directory, whole_file, write_json
from mvwan.latent_cache import build_cache
from mvwan.model.latents import LatentCodec
from mvwan.model.wan import TINY_FOLDER, in_float32_island, load_transformer
from mvwan.precision import has_fast_bfloat16
from mvwan.presets import config_from_preset

CLIP = {"num_frames": 13, "frame_interval": 2, "past_end": 20, "window_stride": 6}
"""As long and as fast as in the first training of the base."""
BATCH = {"rgb": 14, "heat": 10, "made_up": 8}
"""Videos of each kind per step."""
WARMUP = 100
EMA = 0.998
EMPTY_PROMPT_SHARE = 0.1
ENCODED_AT_ONCE = 8
LONGEST_STEP_PX = 14.0
MEASURED_VIDEOS = 36


def main(arguments: list[str]) -> int:
    """Exit code."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    config = config_from_preset("tiny-pretrain", {"data": {"root": str(options.dataset), **CLIP}})
    codec = LatentCodec.load(str(options.folder), config.data.text_tokens)
    say(f"refine: {options.made_up} made-up heatmaps")
    made_up = _made_up_latents(codec, options.made_up, config, options.seed, options.work / "made_up.pt")
    data = _videos(codec, config, options.latents, "train") | {"made_up": made_up}
    say(f"refine: {len(data['rgb'])} videos, as many heatmaps, {len(made_up)} made-up ones")
    done = _train(data, options)
    _replace(options, config, codec, done)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="demonstrations; the episodes that the preset tiny-pretrain holds out are held out")
    parser.add_argument("--latents", type=Path, required=True, help="a latent cache; missing windows are encoded")
    parser.add_argument("--work", type=Path, default=Path("runs/refine"), help="checkpoint and log (default %(default)s)")
    parser.add_argument("--folder", type=Path, default=TINY_FOLDER, help="the diffusers folder (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6000, help="end of the schedule (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=31, help="or after so long, if that is earlier (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--made-up", type=int, default=4000, help="made-up heatmap videos (default %(default)s)")
    return parser.parse_args(arguments)


def _videos(codec: LatentCodec, config: Config, latents: Path, split: Any) -> dict[str, torch.Tensor]:
    """`rgb` and `heat` [N C f h w] float16 of every view of every window, and the prompts `text` [N L D] of both."""
    windows = WindowDataset(episodes_of(config.data), config.data, config.model.views, split, config.seed)
    cache = build_cache(windows, codec, latents, config.data.heatmap_sigma_px)
    parts: dict[str, list[torch.Tensor]] = {"rgb": [], "heat": [], "text": []}
    for start in range(0, len(cache), 256):
        batch = cache.batch(range(start, min(start + 256, len(cache))))
        views = batch.rgb.shape[1]
        parts["rgb"].append(batch.rgb.flatten(0, 1).half())
        parts["heat"].append(batch.heat.flatten(0, 1).half())
        parts["text"].append(batch.text.repeat_interleave(views, dim=0).half())
    return {name: torch.cat(part) for name, part in parts.items()}


def _made_up_latents(codec: LatentCodec, count: int, config: Config, seed: int, path: Path) -> torch.Tensor:
    """[count C f h w] float16: spots on paths that nobody recorded; kept at `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    height, width, frames = config.data.height_px, config.data.width_px, config.data.num_frames
    rng = np.random.default_rng([seed, 77])
    parts = []
    for start in range(0, count, ENCODED_AT_ONCE):
        uv = np.stack([_path(rng, frames, height, width) for _ in range(min(ENCODED_AT_ONCE, count - start))])
        heat = heatmaps.render(uv, np.ones(uv.shape[:2], bool), height, width, config.data.heatmap_sigma_px)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bfloat16()):
            parts.append(codec.encode_video(heatmaps.colour(heat)).half())
    with whole_file(path) as temporary:
        torch.save(torch.cat(parts), temporary)
    return torch.cat(parts)


def _path(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """[frames 2] px inside the picture: some part of a bent way from here to there, slow or fast, or standing still."""
    start, end = rng.uniform(0, 1, (2, 2)) * (width, height)
    reach = rng.uniform(0, LONGEST_STEP_PX) * (frames - 1) * (rng.random() > 0.1)
    end = start + (end - start) * min(1.0, reach / max(1e-6, float(np.linalg.norm(end - start))))
    bend = rng.normal(0, 0.2) * np.array([start[1] - end[1], end[0] - start[0]])
    first, last = np.sort(rng.uniform(-0.5, 1.5, 2))
    share = np.clip((np.linspace(0, 1, frames) - first) / max(last - first, 0.2), 0, 1)
    share = share**2 * (3 - 2 * share) if rng.random() < 0.5 else share
    uv = start + share[:, None] * (end - start) + (4 * share * (1 - share))[:, None] * bend
    return np.clip(uv, 0, (width, height))


def _train(data: dict[str, torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """What was done; the weights and their average lie in `refine.pt`, which is resumed from when there."""
    path, log = options.work / "refine.pt", options.work / "refine.jsonl"
    transformer = load_transformer(str(options.folder), torch.float32).eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    step, seconds, losses = 0, 0.0, dict.fromkeys(BATCH, 0.0)
    if path.exists():
        stored = torch.load(path, weights_only=True)
        transformer.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        average, step, seconds = stored["average"], stored["step"], stored["seconds"]
        say(f"refine: continue at step {step}, {seconds / 60:.1f} min")
    last = time.monotonic()
    while (progress := max(step / options.steps, seconds / 60 / options.minutes)) < 1:
        rate = options.learning_rate * min(1.0, (step + 1) / WARMUP) * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([options.seed, 78, step])
        total = torch.zeros(())
        clean, text = _batch(data, rng)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bfloat16()), sdpa_kernel(SDPBackend.MATH):
            names = [f"{place}" for place in range(len(clean))]
            sigma = flow.draw_sigma(options.seed, step, names, FlowConfig())
            noise = flow.draw_noise(options.seed, step, names, clean.shape[1:])
            errors = loss_of(transformer, clean, noise, sigma, text, per_sample=True).split(list(BATCH.values()))
        for kind, error in zip(BATCH, errors, strict=True):
            losses[kind] += float(error.detach().mean()) / 50
            total = total + error.sum() / len(clean)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        assert torch.isfinite(norm), f"refine: step {step}: gradient not finite"
        optimizer.step()
        step += 1
        with torch.no_grad():
            for name, value in transformer.named_parameters():
                average[name].lerp_(value, 1 - min(EMA, (1 + step) / (10 + step)))
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if step % 50 == 0:
            line = {"step": step, "seconds": round(seconds), **{kind: round(loss, 4) for kind, loss in losses.items()}}
            say(f"refine: {json.dumps(line)}")
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            losses = dict.fromkeys(BATCH, 0.0)
        if step % 500 == 0:
            _save(path, transformer, optimizer, average, step, seconds)
    _save(path, transformer, optimizer, average, step, seconds)
    videos = {"rgb": len(data["rgb"]), "heat": len(data["heat"]), "made_up": len(data["made_up"])}
    done = {"steps": step, "minutes": round(seconds / 60, 1), "learning_rate": options.learning_rate, "seed": options.seed}
    return {**done, "per_step": BATCH, "videos": videos}


def _batch(data: dict[str, torch.Tensor], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean [B C f h w], text [B L D]) float32; made-up heatmaps have the prompt of any video, and some videos an empty one."""
    places = {kind: torch.from_numpy(rng.integers(0, len(data[kind]), count)) for kind, count in BATCH.items()}
    clean = torch.cat([data[kind][chosen] for kind, chosen in places.items()]).float()
    prompted = [*places["rgb"], *places["heat"], *rng.integers(0, len(data["text"]), BATCH["made_up"])]
    text = torch.stack([data["text"][int(place)] for place in prompted]).float()
    return clean, text * torch.from_numpy(rng.random(len(text)) >= EMPTY_PROMPT_SHARE)[:, None, None]


def _save(
    path: Path,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    step: int,
    seconds: float,
) -> None:
    state = {"model": transformer.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step, "seconds": seconds}
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def _replace(options: argparse.Namespace, config: Config, codec: LatentCodec, done: dict[str, Any]) -> None:
    """Nothing; the folder has the averaged transformer, and its quality.json the numbers."""
    held_out = _videos(codec, config, options.latents, "validation")
    chosen = torch.linspace(0, len(held_out["rgb"]) - 1, MEASURED_VIDEOS).long()
    clean = {kind: held_out[kind][chosen].float() for kind in ("rgb", "heat")}
    text = held_out["text"][chosen].float()
    pictures = {kind: np.concatenate([codec.decode_video(part) for part in latents.split(4)]) for kind, latents in clean.items()}
    before = load_transformer(str(options.folder), torch.float32)
    after: WanTransformer3DModel = load_transformer(str(options.folder), torch.float32)
    after.load_state_dict(torch.load(options.work / "refine.pt", weights_only=True)["average"])
    for name, parameter in after.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if in_float32_island(name) else torch.bfloat16)
    new = options.folder / "transformer.new"
    if new.exists():
        remove_directory(new)
    with whole_directory(new) as temporary:
        after.save_pretrained(temporary)
        for path in temporary.iterdir():
            path.chmod(0o644)
    remove_directory(options.folder / "transformer")
    new.rename(options.folder / "transformer")
    measured: dict[str, Any] = {"held_out_videos": MEASURED_VIDEOS, "pictures": "decoded latents of held-out windows, standard rig"}
    for label, transformer in (("before", before), ("after", load_transformer(str(options.folder), torch.float32))):
        measured[label] = {
            kind: measure_transformer(transformer, codec, clean[kind], text, pictures[kind], options.seed) for kind in ("rgb", "heat")
        }
    quality = options.folder / "quality.json"
    told = read_json(quality)
    for of_kind in told["measured"].values():  # what the earlier transformer predicted
        for name in set(of_kind) & set(measured["after"]["rgb"]):
            del of_kind[name]
    write_json(quality, {**told, "refinement": {"settings": done, "measured": measured}})
    say(f"refine: {json.dumps(measured)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
