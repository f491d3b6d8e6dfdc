"""Every setting, checked before a file or a device is touched; to and from YAML and dicts. Imports no torch.

Field values may come from a preset, a YAML file and `--set section.field=value`, in this order. An unknown field, a wrong
type or a value out of range is one `MvwanError` that names the field and what is allowed.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mvwan.errors import MvwanError, nearest
from mvwan.files import read_text
from mvwan.shapes import check_num_frames, check_picture_size

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_LARGEST_SETTINGS, _LARGEST_NUMBER = 100_000, 2**53


def _positive(field: str, value: float, minimum: float = 0, *, allow_minimum: bool = False) -> None:
    if value < minimum or (value == minimum and not allow_minimum):
        bound = "at least" if allow_minimum else "more than"
        raise MvwanError(f"{field}={_shown(value)}: must be {bound} {minimum}. Set {field}.")
    if value > _LARGEST_NUMBER:
        raise MvwanError(f"{field}={_shown(value)}: must be at most {_LARGEST_NUMBER}. Set {field}.")


def _share(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise MvwanError(f"{field}={value}: must be between 0 and 1. Set {field}.")


Quantize = Literal["none", "int8", "fp8", "nf4"]
Attention = Literal["auto", "math", "native", "cudnn", "flash", "flash3", "sage", "flex", "xformers"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BaseConfig:
    """The stock Wan that is adapted."""

    source: str = "tiny"
    """`tiny`, `wan2.2-ti2v-5b`, a diffusers folder, a hub id, or Wan-native safetensors (a file, or a folder of shards)."""
    codec: str | None = None
    """Where the VAE and the text encoder come from, when `source` has none beside its transformer; None: `source`."""
    random_weights: bool = False
    """Draw the weights instead of loading them: for checks at true size without a download."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that frozen tensors outside the float32 islands are held in; auto: bfloat16 where the machine is fast with it. Trained ones
    are float32."""
    quantize: Quantize = "none"
    """What frozen weights of the blocks are stored in, each widened for its product alone (torchao). int8 and fp8 take half of bfloat16's
    memory, nf4 a quarter; all of them round."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The multi-view extension."""

    views: int = 3
    """Cameras seen together."""
    fusion: Literal["channel", "view"] = "channel"
    """RGB and heatmap share tokens (`channel`), or are streams of their own in view attention (`view`)."""
    action_head: Literal["none", "gripper", "gripper_rotation"] = "none"
    """Small head on the network's last features: the gripper's opening per frame, or that and how the hand turned since frame 0."""
    view_code: Literal["slot", "camera", "both"] = "slot"
    """How view attention tells views apart: by their place in the order, by where each token's ray lies in space, or by both. With
    `camera` a trained model takes other cameras, other numbers of them and any order."""
    attention: Attention = "auto"
    """Kernel that training attends with; auto: torch's own choice, and on CPUs product, softmax, product. Predictions take their own."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _positive("model.views", self.views)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraConfig:
    """Low-rank adapters on the linear layers of every block."""

    rank: int = 32
    """Width of each adapter."""
    alpha: float | None = None
    """Scale is alpha / rank; None means alpha = rank."""
    self_attention: bool = True
    """q, k, v, o of self-attention."""
    cross_attention: bool = True
    """q, k, v, o of cross-attention."""
    ffn: bool = True
    """Both linear layers of the feed-forward network."""
    view_attention: bool = True
    """q, k, v, o of view attention: the group `lora_mvs`."""

    def __post_init__(self) -> None:
        _positive("trainable.lora.rank", self.rank)
        if self.alpha is not None:
            _positive("trainable.lora.alpha", self.alpha)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GroupConfig:
    """Overrides of one named parameter group, or a new group when `pattern` is given. None keeps the default."""

    pattern: str | None = None
    """Regular expression that must match the whole name of a parameter; only for groups of your own."""
    mode: Literal["frozen", "full", "lora"] | None = None
    """What happens to the group: stays as it is, trains whole, or trains through low-rank adapters."""
    learning_rate: float | None = None
    """None: `train.learning_rate`."""
    weight_decay: float | None = None
    """None: `train.weight_decay`, and 0 for norms, tables and biases."""
    warmup_steps: int | None = None
    """None: `train.warmup_steps`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainableConfig:
    """What trains."""

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    groups: dict[str, GroupConfig] = dataclasses.field(default_factory=dict[str, GroupConfig])
    """Group name -> overrides; a name that is not built in needs a `pattern` and comes before the built-in groups."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AugmentConfig:
    """Changes of pixels, cameras and labels together, drawn once per window."""

    variants: int = 0
    """Augmented copies of each training window in the latent cache, beside the plain one."""
    crop_share: float = 0.1
    """Largest share of each side that a random crop removes before resizing back."""
    translation_m: float = 0.05
    """Largest shift of the world frame along each axis: moves cameras and points together."""
    rotation_deg: tuple[float, float, float] = (5.0, 5.0, 10.0)
    """Largest rotation of the world frame about x, y, z."""
    colour_noise: float = 0.02
    """Standard deviation of the noise on the colour of each point of a cloud, colours being 0..1; pictures of cameras have none."""

    def __post_init__(self) -> None:
        _positive("data.augment.variants", self.variants, allow_minimum=True)
        if not 0 <= self.crop_share < 0.5:
            raise MvwanError(f"data.augment.crop_share={self.crop_share}: must be at least 0 and under 0.5. Set data.augment.crop_share.")
        _positive("data.augment.translation_m", self.translation_m, allow_minimum=True)
        _share("data.augment.colour_noise", self.colour_noise)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrailConfig:
    """How point clouds of the trail format become pictures; other formats have no clouds."""

    scene_bounds_m: tuple[float, float, float, float, float, float] = (-0.5, -0.5, -0.1, 0.5, 0.5, 0.9)
    """x0, y0, z0, x1, y1, z1 of the scene in the robot's frame; points outside are cut off, and the views show the cube around it."""
    size_px: int = 256
    """Side of the virtual views."""
    radius_px: int = 1
    """Points are squares of 2 * radius_px + 1 px."""
    merged: bool = True
    """Every view shows the clouds of all sensors; else `top` shows the first sensor's, `front` the second's, `side` the third's."""
    first: int = 1
    """Number of the first demonstration of each task that is read."""
    last: int | None = None
    """Number of the last one; None: all."""

    def __post_init__(self) -> None:
        low, high = self.scene_bounds_m[:3], self.scene_bounds_m[3:]
        if not all(start < end for start, end in zip(low, high, strict=True)):
            raise MvwanError(
                f"data.trail.scene_bounds_m={list(self.scene_bounds_m)}: needs x0, y0, z0, x1, y1, z1 in metres, each end above its start. "
                "Set data.trail.scene_bounds_m."
            )
        for name, least in (("size_px", 1), ("radius_px", 0), ("first", 0)):
            _positive(f"data.trail.{name}", getattr(self, name), least, allow_minimum=True)
        if self.last is not None and self.last < self.first:
            raise MvwanError(f"data.trail.last={self.last}: must be at least data.trail.first={self.first}. Set data.trail.last.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Demonstrations, windows, heatmaps and the latent cache."""

    root: str | tuple[str, ...] = ""
    """Folder of the dataset; or a list of folders with the same views, whose episodes then bear the folder's name too."""
    cameras: tuple[str, ...] | None = None
    """Names of the cameras to use, in order; None: all of the dataset, in its order."""
    num_frames: int = 25
    """Pictures per window, 4*k + 1."""
    frame_interval: int = 1
    """Recorded frames from one picture of a window to the next."""
    window_stride: int = 4
    """Recorded frames from the start of one window to the start of the next."""
    past_end: int = 0
    """Recorded frames by which a window may run past the end of its episode, where all then stands still: so that a model also learns
    what to do at the end, and that it is over."""
    height_px: int = 256
    """Height that pictures are resized to, a multiple of 32."""
    width_px: int = 256
    """Width that pictures are resized to, a multiple of 32."""
    heatmap_sigma_px: float = 1.5
    """Standard deviation of the Gaussian at the projected point."""
    validation_share: float = 0.2
    """Share of the episodes that is held out (at least one, when there are two or more)."""
    text_tokens: int = 512
    """Length that prompts are padded to."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """A damaged episode or picture stops the run, or the episode or window is left out of it and named in its `skipped.json`."""
    cache: str | None = None
    """Folder of the latent cache; None: `latents` in the run's output folder."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    trail: TrailConfig = dataclasses.field(default_factory=TrailConfig)

    def __post_init__(self) -> None:
        check_num_frames(self.num_frames)
        check_picture_size(self.height_px, self.width_px)
        for name in ("frame_interval", "window_stride", "heatmap_sigma_px", "text_tokens"):
            _positive(f"data.{name}", getattr(self, name))
        _positive("data.past_end", self.past_end, allow_minimum=True)
        _share("data.validation_share", self.validation_share)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FlowConfig:
    """Noise levels. sigma = 1 is noise, 0 is data."""

    shift: float = 5.0
    """Warp towards noise: sigma' = shift * sigma / (1 + (shift - 1) * sigma)."""
    sigma_min: float = 0.0
    """Lowest sigma drawn in training, before the shift; a prediction goes from there to 0 in one step."""
    sigma_max: float = 1.0
    """Highest sigma drawn in training, before the shift."""

    def __post_init__(self) -> None:
        _positive("flow.shift", self.shift)
        _share("flow.sigma_min", self.sigma_min)
        _share("flow.sigma_max", self.sigma_max)
        if self.sigma_min >= self.sigma_max:
            raise MvwanError(f"flow.sigma_min={self.sigma_min}: must be below flow.sigma_max={self.sigma_max}. Set flow.sigma_min.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """The loop. A step is one optimizer update."""

    steps: int = 1000
    """Optimizer updates of the whole run."""
    batch_size: int = 1
    """Windows per process and micro-batch."""
    gradient_accumulation: int = 4
    """Micro-batches per step."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adamw keeps two moments per trained number; adafactor a row and a column of squares per matrix and no first moment, so next to no
    memory, at the same learning rates."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    rgb_weight: float = 0.5
    """w in w * rgb + (1 - w) * heat."""
    heat_reader_weight: float = 0.0
    """w in heat + w * (squared error of the heat that a linear layer reads from the latents): above 0 that layer is fitted before the
    first step, and predictions read their heat with it instead of the VAE."""
    action_weight: float = 0.1
    """w in w * (gripper + rotation), which `model.action_head` adds to the loss."""
    precision: Annotated[Literal["auto", "bf16", "no"], BeforeValidator(lambda value: "no" if value is False else value)] = "auto"
    """Autocast of the products; auto: bf16 where the machine is fast with it, else no. A slow machine then widens each frozen bfloat16
    weight for its product alone, so that a base held in bfloat16 takes half the memory of one in float32 and hardly more time."""
    compile: bool = False
    """Each block through `torch.compile`: faster steps after a minute of compiling, equal but for rounding."""
    condition_frames: int = 1
    """Latent frames that are given clean: timestep 0, out of the loss. At least 1, which predictions start from."""
    ema_decay: float = 0.0
    """Exponential moving average of the trained tensors; 0 is off."""
    movement_step: int = 3
    """Step after which the movement proof runs, 2 or more; it stops the run when a trainable group stood still or a frozen tensor moved."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest held-out loss beside the newest ones."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in memory, while training goes on."""
    evaluate_every: int = 100
    """Steps between held-out losses; 0 is never."""
    evaluate_windows: int = 16
    """Held-out windows per evaluation, at fixed sigma and noise."""
    log_every: int = 1
    """Steps between log lines."""
    tracker: Literal["tensorboard", "swanlab", "wandb", "trackio", "none"] = "tensorboard"
    num_workers: int = 0
    """Processes that load cached latents."""
    from_checkpoint: str | None = None
    """Start from the trained tensors of this checkpoint (pretraining -> fine-tuning); optimizer and step start anew."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "learning_rate", "action_weight", "save_every", "log_every"):
            _positive(f"train.{name}", getattr(self, name))
        for name in (
            "weight_decay",
            "heat_reader_weight",
            "max_gradient_norm",
            "warmup_steps",
            "keep_last",
            "evaluate_every",
            "evaluate_windows",
            "num_workers",
        ):
            _positive(f"train.{name}", getattr(self, name), allow_minimum=True)
        _positive("train.condition_frames", self.condition_frames, 1, allow_minimum=True)
        _positive("train.movement_step", self.movement_step, 2, allow_minimum=True)
        _share("train.rgb_weight", self.rgb_weight)
        for name, decay in (("ema_decay", self.ema_decay), *(("adam_betas", beta) for beta in self.adam_betas)):
            if not 0 <= decay < 1:
                raise MvwanError(f"train.{name}={getattr(self, name)}: {decay} must be at least 0 and under 1. Set train.{name}.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Every setting of a run."""

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    unfreeze_modulation_and_norms: bool = False
    """Train the AdaLN modulation tables and view attention's norm_q / norm_k as well: the groups `modulation` and `mvs_norms`."""
    trainable: TrainableConfig = dataclasses.field(default_factory=TrainableConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = 0
    """Seed of new weights, data order, sigma, noise and augmentation."""

    def __post_init__(self) -> None:
        _positive("seed", self.seed, allow_minimum=True)
        latent_frames = (self.data.num_frames - 1) // 4 + 1
        if self.train.condition_frames >= latent_frames:
            raise MvwanError(
                f"train.condition_frames={self.train.condition_frames}: data.num_frames={self.data.num_frames} has {latent_frames} "
                f"latent frames and at least one must be predicted. Set train.condition_frames below {latent_frames}."
            )
        if self.base.quantize == "nf4" and self.train.compile:
            raise MvwanError(
                "base.quantize=nf4: torch.compile cannot read torchao's 4-bit weights. Set train.compile=false, or base.quantize to int8 "
                "or fp8."
            )
        if self.data.cameras is not None and len(self.data.cameras) != self.model.views:
            raise MvwanError(
                f"data.cameras names {len(self.data.cameras)} cameras, model.views={self.model.views}. Set one to match the other."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON or YAML."""
        return cast("dict[str, Any]", TypeAdapter(Config).dump_python(self, mode="json"))


def field_names(section: Any = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields, for messages and `--help`."""
    names: list[str] = []
    for field in dataclasses.fields(section):
        kind = field.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            names += field_names(kind, f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def config_from_dict(values: Mapping[str, Any], where: str = "config") -> Config:
    """A checked `Config`. `where` (a file name, a preset) starts the message of the `MvwanError` for a bad field."""
    return _checked(Config, values, where)


def trainable_from_dict(values: Mapping[str, Any], where: str = "config") -> TrainableConfig:
    """A checked `TrainableConfig`, for example the one that a checkpoint remembers."""
    return _checked(TrainableConfig, values, where)


def _checked(section: type[Any], values: Mapping[str, Any], where: str) -> Any:
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        raise MvwanError(_one_sentence(error, where)) from None


def _one_sentence(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, MvwanError):
        return f"{where}: {cause}"
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: no field {name!r}.{nearest(name, field_names())} `mvwan train --dry-run` prints all fields."
    return f"{where}: {name}={_shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}. Set {name}."


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the overrides laid over it, section by section."""
    merged = dict(base)
    for override in overrides:
        for name, value in override.items():
            old = merged.get(name)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[name] = merge(cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value)) if both else value
    return merged


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. `MvwanError` when the file is missing, is not YAML, or is no mapping."""
    if not os.path.exists(path):
        raise MvwanError(f"{path}: no such configuration file")
    try:
        values = _yaml_value(read_text(path))
    except _NotYamlError as error:
        raise MvwanError(f"{path}: not a YAML file of settings ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise MvwanError(f"{path}: a mapping of sections is needed, got {type(values).__name__}")
    return cast("dict[str, Any]", values)


class _NotYamlError(ValueError):
    """Why a text is no settings."""


class _SettingsLoader(yaml.SafeLoader):
    """Plain YAML. Aliases, of which a few lines can make gigabytes, and names given twice are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # pyright: ignore[reportUnknownMemberType]
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.YAMLError(f"{Counter(names).most_common(1)[0][0]!r} is there twice")
        return node


def _yaml_value(text: str) -> Any:
    if len(text) > _LARGEST_SETTINGS:
        raise _NotYamlError(f"{len(text):,} characters; settings have at most {_LARGEST_SETTINGS:,}")
    try:
        return yaml.load(text, _SettingsLoader)
    except Exception as error:  # noqa: BLE001 - PyYAML raises nearly anything for a value that belies its tag
        raise _NotYamlError((str(error).splitlines() or [type(error).__name__])[0]) from None


def _shown(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a whole number of too many digits, a list too deep
        return f"a {type(value).__name__} too large to show"


def parse_overrides(settings: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """`["train.steps=10", ...]` as nested dicts; values are read as YAML. `option` is what messages say that they came by."""
    nested: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise MvwanError(f"{option} {setting}: needs the form section.field=value, for example {option} train.steps=100")
        try:
            value = _yaml_value(text)
        except _NotYamlError as error:
            raise MvwanError(f"{option} {setting}: {text!r} is not a YAML value ({error})") from None
        section = value
        for part in reversed(name.split(".")):
            section = {part: section}
        nested = merge(nested, section)
    return nested


def dump_yaml(config: Config) -> str:
    """The config as YAML text that `config_from_dict(yaml.safe_load(text))` reads back equal."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
