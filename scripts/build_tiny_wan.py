"""Builds the tiny Wan that ships with the package: same classes as Wan2.2-TI2V-5B, about 33 MB, trained on Meta-World from nothing.

    python scripts/build_tiny_wan.py                     all stages, continuing what an earlier call left
    python scripts/build_tiny_wan.py export measure      only these, for example while the VAE still trains elsewhere

Stages: record (single-view videos of tasks that evaluation never uses), vae, measure-vae (its held-out numbers, into
vae/quality.json of the work folder), transformer (with the text encoder), export (a diffusers
folder, from whatever is trained by then), measure (held-out numbers, into quality.json of that folder). All draws come from --seed;
a run that ends by --minutes stops where the machine's speed put it, and quality.json says at which step.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import tiny_wan_clips as clips
import tiny_wan_parts as parts
import tiny_wan_quality as quality
import tiny_wan_transformer as transformer_stage
import tiny_wan_vae as vae_stage
import torch

from mvwan.files import read_json, whole_file, write_json
from mvwan.model.latents import LatentCodec
from mvwan.model.wan import TINY_FOLDER

STAGES = ("record", "vae", "measure-vae", "transformer", "export", "measure")


def main(arguments: list[str]) -> int:
    """Exit code."""
    options = _parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for stage in options.stages or STAGES:
        say(f"stage {stage}")
        {"record": _record, "vae": _vae, "measure-vae": _measure_vae, "transformer": _transformer, "export": _export, "measure": _measure}[
            stage
        ](options)
    return 0


def say(line: str) -> None:
    """Nothing; the line is on standard output at once."""
    print(line, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of {', '.join(STAGES)}; default: all, in this order")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-wan"), help="recordings, checkpoints and logs (default %(default)s)")
    parser.add_argument("--output", type=Path, default=TINY_FOLDER, help="the diffusers folder, replaced whole (default: the package's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layouts", type=int, default=18, help="layouts per task; the last two are held out (default %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=12000, help="end of the VAE's schedule (default %(default)s)")
    parser.add_argument(
        "--vae-minutes", type=float, default=62, help="or after so much processor time, if that is earlier (default %(default)s)"
    )
    parser.add_argument("--vae-learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--vae-taught-until",
        type=float,
        default=vae_stage.TAUGHT_UNTIL,
        help="share of the schedule in which the encoder is taught principal components (default %(default)s)",
    )
    parser.add_argument(
        "--vae-single-until", type=float, default=vae_stage.SINGLE_UNTIL, help="share of it on single frames (default %(default)s)"
    )
    parser.add_argument("--transformer-steps", type=int, default=3000)
    parser.add_argument("--transformer-minutes", type=float, default=36)
    parser.add_argument("--transformer-learning-rate", type=float, default=1e-3)
    parser.add_argument("--measure-videos", type=int, default=48, help="of each kind of camera (default %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    if options.layouts <= clips.HELD_OUT_LAYOUTS:
        parser.error(f"--layouts {options.layouts}: at least {clips.HELD_OUT_LAYOUTS + 1} are needed, the last is held out")
    return options


def _videos(options: argparse.Namespace) -> list[clips.Video]:
    videos = clips.load_videos(options.work / "clips")
    if not videos:
        raise SystemExit(f"{options.work / 'clips'}: no recordings yet; run the stage `record` first")
    return videos


def _training_videos(options: argparse.Namespace) -> list[clips.Video]:
    return [video for video in _videos(options) if not video.held_out]


def _record(options: argparse.Namespace) -> None:
    clips.record(options.work / "clips", options.layouts, options.seed, options.threads, say)


def _vae(options: argparse.Namespace) -> None:
    folder = options.work / "vae"
    folder.mkdir(exist_ok=True)
    rate = options.vae_learning_rate
    ends = options.vae_steps, options.vae_minutes
    done = vae_stage.train(_videos(options), folder, *ends, rate, options.seed, say, options.vae_taught_until, options.vae_single_until)
    say(f"vae: {done}")


def _measure_vae(options: argparse.Namespace) -> None:
    statistics = _statistics(options)
    weights, step = vae_stage.trained(options.work / "vae", options.seed)
    vae = parts.new_vae(options.seed, statistics["mean"], statistics["std"])
    vae.load_state_dict(weights.state_dict())
    codec = LatentCodec(vae, None, torch.nn.Identity(), parts.TEXT_TOKENS, digest="")
    held_out = [video for video in _videos(options) if video.held_out]
    kinds = quality.kinds(held_out, options.measure_videos)
    measured = {name: quality.measure_vae(codec, chosen)[1] for name, chosen in kinds.items()}
    done = _record_of(options.work / "vae" / "done.json")
    write_json(options.work / "vae" / "quality.json", {"vae_steps": step, "training": done, "measured": measured})
    say(f"measure-vae: step {step}, {measured}")


def _statistics(options: argparse.Namespace) -> dict[str, Any]:
    """Latent mean and std of the VAE as it is now, computed once per VAE step."""
    vae, step = vae_stage.trained(options.work / "vae", options.seed)
    path = options.work / f"statistics-{step}.json"
    if not path.exists():
        mean, std = vae_stage.latent_statistics(vae, _training_videos(options), options.seed)
        write_json(path, {"mean": mean, "std": std, "vae_step": step})
    return read_json(path)


def _transformer(options: argparse.Namespace) -> None:
    statistics = _statistics(options)
    folder = options.work / f"transformer-{statistics['vae_step']}"
    folder.mkdir(exist_ok=True)
    encoded = folder / "latents.pt"
    if not encoded.exists():
        vae, _ = vae_stage.trained(options.work / "vae", options.seed)
        videos = _training_videos(options)
        data = transformer_stage.encode_videos(vae, videos, statistics["mean"], statistics["std"], say)
        with whole_file(encoded) as temporary:
            torch.save(data, temporary)
    data = torch.load(encoded, weights_only=True)
    rate = options.transformer_learning_rate
    done = transformer_stage.train(data, folder, options.transformer_steps, options.transformer_minutes, rate, options.seed, say)
    write_json(folder / "done.json", {**done, "learning_rate": rate, "windows": len(data["latents"])})
    say(f"transformer: {done}")


def _export(options: argparse.Namespace) -> None:
    statistics = _statistics(options)
    vae_step = statistics["vae_step"]
    weights, _ = vae_stage.trained(options.work / "vae", options.seed)
    vae = parts.new_vae(options.seed, statistics["mean"], statistics["std"])
    vae.load_state_dict(weights.state_dict())
    folder = options.work / f"transformer-{vae_step}"
    text_encoder, transformer, transformer_step = transformer_stage.trained(folder, options.seed)
    settings = {
        "seed": options.seed,
        "size_px": clips.SIZE_PX,
        "num_frames": clips.NUM_FRAMES,
        "flow_shift": parts.SHIFT,
        "tasks": len(clips.TRAINING_TASKS),
        "tasks_never_used": list(clips.EVALUATION_TASKS),
        "layouts_per_task": options.layouts,
        "parameters": {
            name: sum(parameter.numel() for parameter in model.parameters())
            for name, model in (("vae", vae), ("text_encoder", text_encoder), ("transformer", transformer))
        },
        "vae_steps": vae_step,
        "transformer_steps": transformer_step,
        "vae_training": _record_of(options.work / "vae" / "done.json"),
        "transformer_training": _record_of(folder / "done.json"),
    }
    size = parts.export(options.output, vae, text_encoder, transformer, {"settings": settings})
    say(f"export: {options.output}, {size / 1e6:.1f} MB, vae step {vae_step}, transformer step {transformer_step}")


def _record_of(path: Path) -> Any:
    """What a stage wrote down, None before it did."""
    return read_json(path) if path.exists() else None


def _measure(options: argparse.Namespace) -> None:
    held_out = [video for video in _videos(options) if video.held_out]
    measured = quality.measure(str(options.output), held_out, options.measure_videos, options.seed)
    path = options.output / "quality.json"
    write_json(path, {**read_json(path), "measured": measured})
    say(f"measure: {measured}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
