#!/usr/bin/env python
"""Training by the flags of the older multi-view system: each sets a field of mvwan's config, or is refused with its reason.

    accelerate launch scripts/heatmap_train_mv.py --base tiny --heatmap_data_root DATASET --output_path RUN --num_epochs 1
    python scripts/heatmap_train_mv.py --base wan2.2-ti2v-5b --dry_run --unfreeze_modulation_and_norms

Covers its robot training and its MVTrack pretraining. Defaults are those of the older parser, except where these cannot run
(`--wan_type`, `--sequence_length`, `--lora_base_model`: what its launch scripts passed). Knows flags only: the training is
`mvwan.train`, which `mvwan train` calls as well.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mvwan.config import Config, config_from_dict, merge, parse_overrides
from mvwan.errors import MvwanError, PreemptedError
from mvwan.presets import PRESETS, preset

# Flag: (type, default of the older parser, field of the config it sets).
MAPPED: dict[str, tuple[type, Any, str]] = {
    "learning_rate": (float, 1e-4, "train.learning_rate"),
    "weight_decay": (float, 0.0, "train.weight_decay"),
    "max_grad_norm": (float, 1.0, "train.max_gradient_norm"),
    "warmup_steps": (int, 0, "train.warmup_steps"),
    "train_batch_size": (int, 1, "train.batch_size"),
    "gradient_accumulation_steps": (int, 1, "train.gradient_accumulation"),
    "dataset_num_workers": (int, 0, "train.num_workers"),
    "logging_steps": (int, 10, "train.log_every"),
    "rgb_loss_weight": (float, 0.5, "train.rgb_weight"),
    "lora_rank": (int, 32, "trainable.lora.rank"),
    "height": (int, 256, "data.height_px"),
    "width": (int, 256, "data.width_px"),
    "step_interval": (int, 1, "data.frame_interval"),
    "num_views": (int, 3, "model.views"),
}

REFUSED: dict[str, str] = {
    "use_different_projection": "the virtual views of point clouds are top, front and side; choose among them with --set data.cameras",
    "transform_augmentation_xyz": "it is a share of trail's scene bounds; shifts are metres here: --set data.augment.translation_m=0.05",
    "model_id_with_origin_paths": "it names pickled files; name the diffusers repository: --base Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "swanlab_api_key": "keys do not belong on command lines, where every user of the machine reads them; run `swanlab login`",
    "swanlab_project": "runs are named by their output folder",
    "swanlab_experiment": "runs are named by their output folder",
}
_REFUSED_SWITCHES = ("use_different_projection",)

# Flags whose only possible value is how mvwan always works: flag -> (accepted values, why no other).
ALWAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "colormap_name": (("jet",), "heatmaps are coloured with JET, since prediction inverts it"),
    "dataloader_pin_memory": (("false",), "cached latents are small and are not pinned"),
    "remove_prefix_in_ckpt": (("", "pipe.dit."), "tensors in checkpoints carry no prefix"),
}
_INPUTS = {"input_image", "input_image_rgb", "input_video_rgb"}
_LAYERS = {"attention": {"q", "k", "v", "o"}, "ffn": {"ffn.0", "ffn.2"}}
_FULL_GROUPS = ("modulation", "mvs_norms", "backbone_norms", "biases", "text_embedding", "time_embedding", "all")
_CHANNEL, _HISTORY = "5B_TI2V_RGB_HEATMAP_MV", "5B_TI2V_RGB_HEATMAP_MV_HISTORY"
_DEBUG_STEPS = 10


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MvwanError(f"{message}. --help lists the flags.")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the older system's two training scripts, and mvwan's own in a group of their own."""
    parser = _Parser(
        usage="heatmap_train_mv.py [flags]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    data.add_argument("--heatmap_data_root", nargs="+", help="folders of robot demonstrations (trail, or LeRobot v3 with cameras)")
    data.add_argument(
        "--mvtrack_data_root", "--mvtrack_root", help="folder of multi-view tracking clips (MVTrack, or LeRobot v3 with cameras)"
    )
    data.add_argument("--sequence_length", type=int, help="future frames per window (default: 24; 12 with --mvtrack_data_root)")
    data.add_argument("--num_frames", type=int, help="frames per window with the given ones; must agree with --sequence_length")
    data.add_argument(
        "--num_history_frames", type=int, default=1, help="1, or 1+4N given frames with the wan_type ..._HISTORY (default: 1)"
    )
    data.add_argument("--heatmap_sigma", type=float, help="px (default: 1.5; 5 with --mvtrack_data_root)")
    data.add_argument("--min_trail_length", "--min_sequence_length", type=int, help="accepted up to the length of a window")
    data.add_argument("--trail_start", type=int, default=1, help="number of the first trail of each task (default: 1)")
    data.add_argument("--trail_end", type=int, help="number of the last trail of each task (default: all)")
    data.add_argument("--scene_bounds", help="x0,y0,z0,x1,y1,z1 of trail's scene in the robot's frame, metres")
    data.add_argument("--use_merged_pointcloud", action="store_true", help="every view shows the clouds of all of trail's sensors")
    data.add_argument("--dataset_repeat", type=int, default=1, help="passes over the windows per epoch (default: 1)")
    data.add_argument("--disable_augmentation", action="store_true", help="train on the plain windows alone")
    data.add_argument("--transform_augmentation_rpy", default="0.0,0.0,20.0", help="degrees about x, y, z (default: 0.0,0.0,20.0)")
    model = parser.add_argument_group("model")
    model.add_argument("--wan_type", default=_CHANNEL, help=f"{_CHANNEL} or {_HISTORY}")
    model.add_argument("--model_paths", default="", help="JSON list of the transformer's safetensors, all in one folder; or use --base")
    model.add_argument("--unfreeze_modulation_and_norms", action="store_true", help="train AdaLN modulation and mvs_attn norm_q/norm_k too")
    model.add_argument("--trainable_models", default="", help="'' or 'dit': every weight of the transformer, with --lora_base_model ''")
    model.add_argument("--lora_base_model", default="dit", help="'dit' (default), or '' for no adapters")
    model.add_argument("--lora_target_modules", default="q,k,v,o,ffn.0,ffn.2", help="q,k,v,o and/or ffn.0,ffn.2")
    model.add_argument("--lora_checkpoint", default="", help="start from these trained tensors")
    model.add_argument("--use_gradient_checkpointing", action="store_true")
    model.add_argument("--use_dual_head", action="store_true", help="always so: RGB and heatmap have heads of their own")
    model.add_argument("--extra_inputs", default="", help=f"always so: {','.join(sorted(_INPUTS))}")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--output_path", help="folder of the run")
    loop.add_argument("--num_epochs", type=int, default=5, help="(default: 5)")
    loop.add_argument("--save_steps", type=int, help="steps between checkpoints; 0 means by --save_epochs_interval (default: 500)")
    loop.add_argument("--save_epochs_interval", type=int, help="epochs between checkpoints; 0 is every epoch")
    loop.add_argument(
        "--min_timestep_boundary", type=float, default=0.0, help="share of the schedule where draws begin, noise first (default: 0)"
    )
    loop.add_argument("--max_timestep_boundary", type=float, default=1.0, help="where they end (default: 1)")
    loop.add_argument("--find_unused_parameters", action="store_true", help="always so: every trained tensor takes part in every step")
    loop.add_argument("--debug_mode", action="store_true", help=f"at most {_DEBUG_STEPS} steps, no tracker")
    loop.add_argument("--enable_swanlab", action="store_true", help="log to SwanLab in place of TensorBoard")
    for flag, (kind, default, field) in MAPPED.items():
        parser.add_argument(f"--{flag}", type=kind, default=default, help=f"{field} (default: {default})")
    for flag, (values, why) in ALWAYS.items():
        parser.add_argument(f"--{flag}", default=values[0], help=f"always so: {why}")
    for flag, why in REFUSED.items():
        text = f"refused: {why}"
        if flag in _REFUSED_SWITCHES:
            parser.add_argument(f"--{flag}", help=text, action="store_true")
        else:
            parser.add_argument(f"--{flag}", help=text, default="")
    own = parser.add_argument_group("of mvwan")
    own.add_argument("--base", help="tiny, wan2.2-ti2v-5b (default), a diffusers folder or hub id, Wan-native safetensors")
    own.add_argument("--dry_run", action="store_true", help="print what would train, from shapes alone, and stop")
    own.add_argument("--check", action="store_true", help="check flags, settings, dataset, groups and checkpoints, and stop")
    own.add_argument("--max_steps", type=int, help="stop after so many optimizer steps")
    own.add_argument("--augmentation_variants", type=int, help="augmented copies of each window in the latent cache (default: 4)")
    own.add_argument("--resume", action="store_true", help="continue the run in --output_path")
    own.add_argument(
        "--accept_trainable_change", action="store_true", help="go on although the checkpoint was trained with the switch set otherwise"
    )
    own.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of the config, last word over all flags")
    return parser


def _refuse(flag: str, value: object, why: str) -> NoReturn:
    raise MvwanError(f"--{flag} {value}".rstrip() + f": {why}. Leave the flag out.")


def check_refused(args: argparse.Namespace) -> None:
    """Nothing, or `MvwanError` naming the first flag that asks for what mvwan does not do, and why."""
    for flag, why in REFUSED.items():
        value = getattr(args, flag)
        if value:
            _refuse(flag, "" if value is True or flag == "swanlab_api_key" else value, why)
    for flag, (accepted, why) in ALWAYS.items():
        if getattr(args, flag).lower() not in accepted:
            _refuse(flag, getattr(args, flag), why)
    unknown = set(filter(None, args.extra_inputs.split(","))) - _INPUTS
    if unknown:
        _refuse(
            "extra_inputs", args.extra_inputs, f"no input is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(_INPUTS))}"
        )


def base_of(args: argparse.Namespace) -> str:
    """What `base.source` is set to: `--base`, or the file or folder that `--model_paths` names."""
    if not args.model_paths:
        return args.base or "wan2.2-ti2v-5b"
    if args.base:
        raise MvwanError(f"--model_paths and --base {args.base}: both name the base. Leave one out.")
    try:
        listed = json.loads(args.model_paths)
    except json.JSONDecodeError as error:
        raise MvwanError(f"--model_paths {args.model_paths!r}: not JSON ({error}). Give a list of files, or use --base.") from None
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        raise MvwanError(f"--model_paths {args.model_paths!r}: a list of files is needed. Use --base for anything else.")
    paths = [Path(str(path)) for entry in listed for path in (entry if isinstance(entry, list) else [entry])]
    pickled = [str(path) for path in paths if path.suffix != ".safetensors"]
    if pickled:
        _refuse(
            "model_paths",
            pickled[0],
            "pickled weights can run code; VAE and text encoder come from a diffusers folder: --base FOLDER",
        )
    folders = {path.parent for path in paths}
    if len(folders) != 1:
        raise MvwanError(f"--model_paths: the files lie in {len(folders)} folders; the shards of one transformer must lie in one.")
    return str(paths[0] if len(paths) == 1 else folders.pop())


def _trainable(args: argparse.Namespace) -> dict[str, Any]:
    if args.trainable_models not in ("", "dit"):
        _refuse("trainable_models", args.trainable_models, "only the transformer trains; the rest runs once, for the latent cache")
    if args.lora_base_model not in ("", "dit"):
        _refuse("lora_base_model", args.lora_base_model, "adapters go on the transformer alone: 'dit', or '' for none")
    if args.trainable_models and args.lora_base_model:
        raise MvwanError("--trainable_models dit trains the very weights that --lora_base_model dit adapts. Set --lora_base_model ''.")
    targets = set(args.lora_target_modules.split(","))
    has = {name: layers <= targets for name, layers in _LAYERS.items()}
    if targets != {layer for name, layers in _LAYERS.items() if has[name] for layer in layers}:
        why = "q,k,v,o go together and ffn.0,ffn.2 go together; for fewer layers define a group with a pattern in YAML for `mvwan train`"
        _refuse("lora_target_modules", args.lora_target_modules, why)
    attention, ffn = (has["attention"], has["ffn"]) if args.lora_base_model else (False, False)
    lora = {"self_attention": attention, "cross_attention": attention, "view_attention": attention, "ffn": ffn}
    groups = {name: {"mode": "full"} for name in _FULL_GROUPS} if args.trainable_models else {}
    return {"lora": lora, "groups": groups}


def _frames(args: argparse.Namespace) -> tuple[int, int]:
    """(frames per window, latent frames that are given)."""
    history = args.num_history_frames
    if args.wan_type not in (_CHANNEL, _HISTORY):
        _refuse("wan_type", args.wan_type, f"mvwan is the multi-view RGB + heatmap model: {_CHANNEL}, or {_HISTORY} with more given frames")
    if (args.wan_type == _HISTORY) != (history > 1):
        raise MvwanError(f"--num_history_frames {history} with --wan_type {args.wan_type}: 1 goes with {_CHANNEL}, more with {_HISTORY}.")
    if history < 1 or (history - 1) % 4:
        raise MvwanError(f"--num_history_frames {history}: the VAE takes 1 + 4N given frames. Set 1, 5 or 9.")
    future = args.sequence_length
    if future is None:
        future = args.num_frames - history if args.num_frames is not None else 12 if args.mvtrack_data_root else 24
    if args.num_frames not in (None, future + history):
        raise MvwanError(
            f"--num_frames {args.num_frames}: --sequence_length {future} counts future frames, so with {history} given there are "
            f"{future + history}. Set --num_frames {future + history}, or leave it out."
        )
    return future + history, (history - 1) // 4 + 1


def _augment(args: argparse.Namespace) -> dict[str, Any]:
    if args.disable_augmentation and args.augmentation_variants:
        raise MvwanError(f"--disable_augmentation with --augmentation_variants {args.augmentation_variants}: leave one out.")
    try:
        degrees = [float(part) for part in args.transform_augmentation_rpy.split(",")]
    except ValueError:
        degrees = []
    if len(degrees) != 3:
        raise MvwanError(f"--transform_augmentation_rpy {args.transform_augmentation_rpy}: needs three numbers, in degrees: 5.0,5.0,10.0.")
    variants = 4 if args.augmentation_variants is None else args.augmentation_variants
    return {"variants": 0 if args.disable_augmentation else variants, "rotation_deg": degrees}


def _trail(args: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {"first": args.trail_start, "last": args.trail_end, "merged": args.use_merged_pointcloud}
    if args.scene_bounds:
        try:
            values["scene_bounds_m"] = [float(part) for part in args.scene_bounds.split(",")]
        except ValueError:
            raise MvwanError(f"--scene_bounds {args.scene_bounds}: needs six numbers in metres, x0,y0,z0,x1,y1,z1.") from None
    return values


def data_root(args: argparse.Namespace) -> str | tuple[str, ...]:
    """The dataset's folder or folders, or `MvwanError`."""
    robot = args.heatmap_data_root or []
    if bool(robot) + bool(args.mvtrack_data_root) != 1:
        given = [*robot, *([args.mvtrack_data_root] if args.mvtrack_data_root else [])]
        raise MvwanError(
            f"{len(given)} dataset folders given{': ' if given else ''}{', '.join(given)}; needed is either --heatmap_data_root with one "
            "or more folders, or --mvtrack_data_root."
        )
    return (robot[0] if len(robot) == 1 else tuple(robot)) if robot else args.mvtrack_data_root


def config_of(args: argparse.Namespace) -> Config:
    """The checked config that the flags stand for; steps and checkpoints are set by `with_schedule`."""
    check_refused(args)
    base = base_of(args)
    num_frames, condition_frames = _frames(args)
    span = (num_frames - 1) * args.step_interval + 1
    if args.min_trail_length is not None and args.min_trail_length > span:
        flag = "min_sequence_length" if args.mvtrack_data_root else "min_trail_length"
        _refuse(flag, args.min_trail_length, f"every episode that holds a window of {span} frames is trained on")
    sigma_px = args.heatmap_sigma if args.heatmap_sigma is not None else 5.0 if args.mvtrack_data_root else 1.5
    values: dict[str, Any] = {
        "base": {"source": base},
        "model": {"gradient_checkpointing": args.use_gradient_checkpointing},
        "unfreeze_modulation_and_norms": args.unfreeze_modulation_and_norms,
        "trainable": _trainable(args),
        "data": {"num_frames": num_frames, "heatmap_sigma_px": sigma_px, "augment": _augment(args), "trail": _trail(args)},
        # The schedule runs from noise to data, sigma from 1 to 0.
        "flow": {"sigma_min": 1 - args.max_timestep_boundary, "sigma_max": 1 - args.min_timestep_boundary},
        "train": {
            "condition_frames": condition_frames,
            "from_checkpoint": args.lora_checkpoint or None,
            "keep_last": 0,
            "schedule": "constant",
        },
    }
    if args.enable_swanlab:
        values["train"]["tracker"] = "swanlab"
    if args.debug_mode:
        values["train"]["tracker"] = "none"
    if not args.dry_run:
        values["data"]["root"] = data_root(args)
    mapped = parse_overrides(f"{field}={getattr(args, flag)!r}" for flag, (_, _, field) in MAPPED.items())
    start = preset(base) if base in PRESETS else {}
    return config_from_dict(merge(start, mapped, values, parse_overrides(args.set)), "the flags")


def with_schedule(args: argparse.Namespace, config: Config, num_windows: int, processes: int) -> Config:
    """`config` with epochs turned into steps: an epoch is as many samples as there are windows, times `--dataset_repeat`, over all
    processes.

    With augmented variants in the cache, those samples come from all variants alike.
    """
    for flag, minimum in (("num_epochs", 1), ("dataset_repeat", 1), ("save_steps", 0), ("save_epochs_interval", 0), ("max_steps", 1)):
        value = getattr(args, flag)
        if value is not None and value < minimum:
            raise MvwanError(f"--{flag} {value}: must be at least {minimum}.")
    per_step = config.train.batch_size * config.train.gradient_accumulation * processes
    per_epoch = math.ceil(num_windows * args.dataset_repeat / per_step)
    steps = min(args.num_epochs * per_epoch, args.max_steps or sys.maxsize, _DEBUG_STEPS if args.debug_mode else sys.maxsize)
    if args.save_steps and args.save_epochs_interval:
        raise MvwanError(f"--save_steps {args.save_steps} with --save_epochs_interval {args.save_epochs_interval}: leave one out.")
    by_epoch = args.save_steps == 0 or args.save_epochs_interval is not None
    save_every = per_epoch * max(1, args.save_epochs_interval or 0) if by_epoch else args.save_steps or 500
    # The movement proof runs inside even the shortest run that can hold it.
    movement_step = max(2, min(config.train.movement_step, steps))
    schedule = {"steps": steps, "save_every": save_every, "movement_step": movement_step}
    return config_from_dict(merge(config.to_dict(), {"train": schedule}, parse_overrides(args.set)), "the flags")


def run(arguments: Sequence[str] | None = None) -> None:
    """Parses, then trains or prints what would. `MvwanError` for anything that cannot be done as asked."""
    args = make_parser().parse_args(arguments)
    config = config_of(args)
    if args.dry_run:
        from mvwan.training_module import HeatmapWanTrainingModule

        HeatmapWanTrainingModule(config=config, device="meta")
        return
    if not args.output_path:
        raise MvwanError("--output_path is missing: the folder of the run. Set --output_path.")
    from mvwan.train_check import check_groups, check_resumed, check_start, check_windows, checkpoint_to_resume

    windows = check_windows(config).training
    config = with_schedule(args, config, len(windows), int(os.environ.get("WORLD_SIZE", "1")))
    if args.check:
        found = checkpoint_to_resume(args.output_path, args.resume)
        check_groups(config)
        if found is not None:
            check_resumed(config, found, windows, args.accept_trainable_change)
        check_start(config, found, args.accept_trainable_change)
        return
    from mvwan.train import train

    train(config, Path(args.output_path), resume=args.resume, accept_trainable_change=args.accept_trainable_change)


def main() -> None:
    """`run` with the house's exit codes: a user's mistake is one sentence on stderr and 2, a training that SIGTERM stopped is 75."""
    try:
        run()
    except MvwanError as error:
        print(f"heatmap_train_mv.py: {error}", file=sys.stderr)
        sys.exit(2)
    except PreemptedError as stop:
        print(f"heatmap_train_mv.py: {stop}", file=sys.stderr)
        sys.exit(PreemptedError.EXIT_CODE)


if __name__ == "__main__":
    main()
