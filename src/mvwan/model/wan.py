"""Stock parts of Wan2.2-TI2V (transformer, VAE, text encoder), and where a base lies. The only door to diffusers and transformers.

A base is `tiny` (ships with the package), `wan2.2-ti2v-5b` (a hub id with a built-in config), a diffusers folder, a hub id, or
Wan-native safetensors: one file, or a folder of shards. Knows nothing of views, heatmaps or training.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from einops import rearrange
from torch import nn

from mvwan.errors import MvwanError, nearest
from mvwan.files import read_json, sha256_file, sha256_json
from mvwan.model.native_names import is_native, to_ours
from mvwan.tensors import TensorFile

__all__ = [
    "TINY_FOLDER",
    "AttentionBackendName",
    "AutoencoderKLWan",
    "BaseDescription",
    "ContextParallelConfig",
    "FP32LayerNorm",
    "ParallelConfig",
    "WanAttention",
    "WanAttnProcessor",
    "WanTransformer3DModel",
    "WanTransformerBlock",
    "attention_backend",
    "base_digest",
    "codec_files",
    "describe",
    "in_float32_island",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "register_to_config",
    "stock_arguments",
]

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny-wan"
HUB_IDS = {"wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers"}
CONFIG_5B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
_KNOWN = ("tiny", *HUB_IDS)
_LARGEST = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim"), 2**16),
    "ffn_dim": 2**18,
    "num_layers": 512,
    "rope_max_seq_len": 2**13,
    "image_dim": 2**16,
    "added_kv_proj_dim": 2**16,
    "pos_embed_seq_len": 2**16,
}
"""Beyond these a config is damaged, and building what it asks for would take for ever or all the memory."""
_LARGE = 1 << 30
"""Bytes of weights, which take seconds to load."""
_WEIGHT_TYPES = ("float32", "bfloat16", "float16", "float64")
_NATIVE_FIELDS = ("dim", "num_heads", "ffn_dim", "num_layers", "in_dim", "out_dim", "freq_dim")


@dataclass(frozen=True, kw_only=True)
class BaseDescription:
    """What a base is and where its files lie."""

    id: str
    """The source as given."""
    kind: str
    """`diffusers`, `native`, or `hub` (not on this disk yet)."""
    transformer_config: dict[str, Any]
    """Arguments of `WanTransformer3DModel`."""
    files: tuple[Path, ...] = ()
    """Safetensors of the transformer; empty for a hub id that is not downloaded."""
    folder: Path | None = None
    """The diffusers pipeline folder, when there is one: holds `vae`, `text_encoder`, `tokenizer`."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Header metadata of a Wan-native file, for example `lora_rank`."""


def describe(source: str | Path) -> BaseDescription:
    """What `source` is, from names and headers alone. Raises `MvwanError` when it is no base or its config cannot be found."""
    source = str(source)
    if source == "tiny":
        return _describe_folder(TINY_FOLDER, source)
    if source in HUB_IDS:
        return BaseDescription(id=source, kind="hub", transformer_config=dict(CONFIG_5B))
    path = Path(source)
    if os.path.isdir(path):
        return _describe_folder(path, source)
    if os.path.isfile(path):
        return _describe_file(path, source)
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise MvwanError(
            f"base {source}: no such file or folder.{nearest(source, _KNOWN)} Give {', '.join(_KNOWN)}, a diffusers folder, "
            f"a hub id, or Wan-native safetensors."
        )
    return _describe_hub(source)


def _describe_folder(folder: Path, source: str) -> BaseDescription:
    for inner, pipeline in ((folder / "transformer", folder), (folder, None)):
        config_file = inner / "config.json"
        if config_file.is_file():
            config = _object(read_json(config_file), config_file, source)
            files = tuple(_shards(inner, source))
            if config.get("_class_name") == "WanTransformer3DModel":
                arguments = _checked_arguments(stock_arguments(config), source)
                return BaseDescription(id=source, kind="diffusers", transformer_config=arguments, files=files, folder=pipeline)
            if all(name in config for name in _NATIVE_FIELDS):
                return BaseDescription(id=source, kind="native", transformer_config=_from_native(config, files, source), files=files)
            raise MvwanError(
                f"base {source}: {config_file} describes {config.get('_class_name', 'no class')}, "
                "needs WanTransformer3DModel or a Wan-native config"
            )
    raise MvwanError(
        f"base {source}: holds neither transformer/config.json nor config.json; give a diffusers folder or Wan-native safetensors"
    )


def stock_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a stock transformer in its stored config, which holds class name and version beside them."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _shards(folder: Path, source: str) -> Iterator[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = _object(_object(read_json(indexes[0]), indexes[0], source).get("weight_map"), indexes[0], source)
        names = sorted({str(name) for name in weight_map.values()})
        found = [folder / Path(name).name for name in names]
    else:
        found = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        raise MvwanError(f"base {source}: {', '.join(missing) or 'no safetensors file'} missing in {folder}")
    yield from found


def _describe_file(path: Path, source: str) -> BaseDescription:
    metadata = _header(path, source)[1]
    beside = path.parent / "config.json"
    if "config" in metadata:
        try:
            config = json.loads(metadata["config"])
        except (ValueError, RecursionError):
            raise MvwanError(f"base {source}: the `config` in the file's metadata is not JSON") from None
    elif beside.is_file():
        config = read_json(beside)
    else:
        raise MvwanError(f"base {source}: no `config` in the file's metadata and no config.json beside it; put one there")
    if _object(config, path, source).get("_class_name") == "WanTransformer3DModel":
        arguments = _checked_arguments(stock_arguments(config), source)
        return BaseDescription(id=source, kind="diffusers", transformer_config=arguments, files=(path,), metadata=metadata)
    return BaseDescription(
        id=source, kind="native", transformer_config=_from_native(config, (path,), source), files=(path,), metadata=metadata
    )


def _describe_hub(source: str) -> BaseDescription:
    try:
        config: dict[str, Any] = WanTransformer3DModel.load_config(source, subfolder="transformer")  # pyright: ignore[reportAssignmentType]
    except (OSError, ValueError) as error:
        raise MvwanError(
            f"base {source}: neither a folder here nor a hub repository that can be reached ({type(error).__name__})"
        ) from None
    return BaseDescription(id=source, kind="hub", transformer_config=stock_arguments(config))


def _from_native(config: Mapping[str, Any], files: tuple[Path, ...], source: str) -> dict[str, Any]:
    missing = [name for name in _NATIVE_FIELDS if name not in config]
    if missing:
        raise MvwanError(f"base {source}: its config lacks {', '.join(missing)}")
    text_dim = config.get("text_dim")
    if text_dim is None:  # the release leaves it out; the file itself knows
        shapes = {name: shape for file in files for name, shape in _header(file, source)[0].items()}
        text_dim = (shapes.get("text_embedding.0.weight", (0, 4096)) or (None,))[-1]
    for name in ("dim", "num_heads"):
        if type(config[name]) is not int or config[name] < 1:
            raise MvwanError(f"base {source}: its config has {name}={str(config[name])[:80]!r}, needs a whole number of at least 1")
    arguments = {
        "patch_size": config.get("patch_size", (1, 2, 2)),
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": text_dim,
        "freq_dim": config["freq_dim"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": config.get("cross_attn_norm", True),
        "qk_norm": "rms_norm_across_heads",
        "eps": config.get("eps", 1e-6),
    }
    return _checked_arguments(arguments, source)


def _object(value: Any, path: Path, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MvwanError(f"base {source}: {path} holds {type(value).__name__} where an object is needed")
    return value


def _checked_arguments(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The arguments of `WanTransformer3DModel`, of the right kind and of a size that can be: nothing is made from others."""
    known = inspect.signature(WanTransformer3DModel.__init__).parameters
    checked: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in known or name == "self":
            raise MvwanError(f"base {source}: its config has {name!r}, which is none of stock Wan's.{nearest(name, known)}")
        usable, words = True, ""
        if name in _LARGEST:
            usable, words = type(value) is int and 1 <= value <= _LARGEST[name], f"a whole number from 1 to {_LARGEST[name]}"
            usable = usable or (value is None and known[name].default is None)
        elif name == "patch_size":
            usable = isinstance(value, list | tuple) and len(value) == 3 and all(type(size) is int and 1 <= size <= 16 for size in value)
            value, words = tuple(value) if usable else value, "three whole numbers from 1 to 16"
        elif name == "eps":
            usable, words = type(value) in (int, float) and 0 < value < 1, "a number between 0 and 1"
        elif name == "cross_attn_norm":
            usable, words = isinstance(value, bool), "true or false"
        elif name == "qk_norm":
            usable, words = value in ("rms_norm_across_heads",), "'rms_norm_across_heads'"
        if not usable:
            raise MvwanError(f"base {source}: its config has {name}={str(value)[:80]!r}, needs {words}")
        checked[name] = value
    return checked


def _header(path: Path, source: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        file = TensorFile(path)
    except MvwanError as error:
        raise MvwanError(f"base {source}: {error}") from None
    for name, dtype in file.dtypes.items():
        if dtype not in _WEIGHT_TYPES:
            raise MvwanError(f"base {source}: {path}: {name} is {dtype}, weights are {', '.join(_WEIGHT_TYPES)}")
    return file.shapes, file.metadata


def in_float32_island(name: str, model_class: type[WanTransformer3DModel] = WanTransformer3DModel) -> bool:
    """Whether parameter `name` stays float32 whatever the model's dtype: the rule on `model_class`, by part of the dotted name."""
    return any(part in (model_class._keep_in_fp32_modules or ()) for part in name.split("."))


def load_transformer(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    random_weights: bool = False,
    seed: int = 0,
) -> WanTransformer3DModel:
    """The stock transformer of a base, every tensor accounted for, in eval mode and frozen.

    `dtype` None keeps the stored one; the float32 islands of stock Wan stay float32 whatever it is. `device` "meta" needs no
    weights. Raises `MvwanError` listing tensors that are missing, unknown or of another shape.
    """
    description = describe(source)
    if str(device) == "meta" or random_weights:
        with torch.device(device), torch.random.fork_rng(devices=[]), _blocks_narrowed_as_built(dtype or torch.float32):
            torch.manual_seed(seed)
            model = WanTransformer3DModel(**description.transformer_config)
        _narrow(model, dtype or torch.float32)
    else:
        with torch.device("meta"):
            model = WanTransformer3DModel(**description.transformer_config)
        state = _read_state(description, {name: tuple(value.shape) for name, value in model.state_dict().items()}, dtype)
        model.load_state_dict(state, strict=True, assign=True)
        # Its tables are computed, not stored, and the meta device holds no numbers.
        config: Any = model.config
        model.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def _narrow(module: nn.Module, dtype: torch.dtype, prefix: str = "") -> None:
    for name, parameter in module.named_parameters(prefix):
        parameter.data = parameter.data.to(torch.float32 if in_float32_island(name) else dtype)


@contextmanager
def _blocks_narrowed_as_built(dtype: torch.dtype) -> Iterator[None]:
    """Within it, each part of a block takes its type as soon as its weights are drawn: a float32 model would be twice the memory."""

    def narrow(parent: nn.Module, name: str, part: nn.Module | None) -> None:
        if isinstance(parent, WanTransformerBlock) and part is not None:
            _narrow(part, dtype, name)

    hook = nn.modules.module.register_module_module_registration_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _read_state(
    description: BaseDescription, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    files = description.files or _download(description.id)
    where: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        header = _header(path, description.id)[0]
        ours = to_ours(header) if description.kind == "native" or is_native(header) else {name: name for name in header}
        for name, shape in header.items():
            if ours[name] in where:
                raise MvwanError(f"base {description.id}: {ours[name]} is both in {where[ours[name]][0].name} and in {path.name}")
            where[ours[name]] = (path, name)
            shapes[ours[name]] = shape
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in expected]
    problems += [
        f"{name} is {list(shape)}, needs {list(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise MvwanError(f"base {description.id}: the weights do not fit its config: {'; '.join(problems[:4])}{more}")
    state: dict[str, torch.Tensor] = {}
    opened = {path: TensorFile(path) for path in files}
    for name, (path, stored) in where.items():
        tensor = opened[path][stored]
        state[name] = tensor.to(torch.float32 if in_float32_island(name) else dtype or tensor.dtype)
    return state


def _download(source: str) -> tuple[Path, ...]:
    return tuple(_shards(_download_folder(source, "transformer"), source))


def _download_folder(source: str, part: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    repository = HUB_IDS.get(source, source)
    try:
        return Path(snapshot_download(repository, allow_patterns=[f"{part}/*"])) / part
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MvwanError(
            f"base {source}: {repository} could not be downloaded ({type(error).__name__}). Download it where there is a network "
            "and give its folder, or set base.random_weights=true for a check without weights."
        ) from None


def base_digest(source: str | Path, random_weights: bool = False, seed: int = 0) -> str:
    """`sha256:…` of the transformer's weight files, or of config and seed when the weights are random."""
    description = describe(source)
    if random_weights:
        return f"random:{sha256_json([description.transformer_config, seed])}"
    combined = hashlib.sha256()
    for path in description.files or _download(description.id):
        state = path.stat()
        combined.update(_file_digest(path, state.st_size, state.st_mtime_ns))
    return f"sha256:{combined.hexdigest()}"


@lru_cache(maxsize=64)
def _file_digest(path: Path, _size: int, _mtime_ns: int) -> bytes:
    """The hash of a file, computed once per process while its size and time stay: a resume of the 5B asks for it three times."""
    return bytes.fromhex(sha256_file(path).removeprefix("sha256:"))


def _part(source: str | Path, part: str) -> Path:
    """The folder of the VAE, text encoder or tokenizer that belongs to a base, or that lies in a folder without a transformer."""
    if str(source) not in _KNOWN and os.path.isdir(Path(source) / part):
        return Path(source) / part
    description = describe(source)
    if description.kind == "hub":
        return _download_folder(description.id, part)
    if description.folder is None or not (description.folder / part).is_dir():
        raise MvwanError(
            f"base {description.id}: has no {part} folder beside the transformer. Set base.codec to a diffusers folder or hub id "
            "that holds vae, text_encoder and tokenizer."
        )
    return description.folder / part


def codec_files(source: str | Path) -> list[tuple[str, Path]]:
    """(part, file) of everything that makes up the VAE, text encoder and tokenizer of a base."""
    parts = ("vae", "text_encoder", "tokenizer")
    return [(part, path) for part in parts for path in sorted(_part(source, part).iterdir()) if path.is_file()]


def load_vae(source: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The base's video VAE, frozen and in eval mode: stock numbers, at a third of the work where it looks at no earlier frame."""
    try:
        vae = AutoencoderKLWan.from_pretrained(_part(source, "vae"), torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise MvwanError(f"base {source}: its VAE cannot be loaded ({str(error).splitlines()[0]})") from None
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and _sees_one_frame(module):
            module.__class__ = _PlaneConv
    return vae.eval().requires_grad_(False)


class _PlaneConv(WanCausalConv3d):
    """A causal convolution in which the weights of earlier frames are zero, as in six of the tiny base's: each frame by itself."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        planes = rearrange(x, "B C F H W -> (B F) C H W")
        top, left = int(self._padding[2]), int(self._padding[0])
        found = nn.functional.conv2d(planes, self.weight[:, :, -1], self.bias, padding=(top, left))
        return rearrange(found, "(B F) C H W -> B C F H W", F=x.shape[2])


def _sees_one_frame(conv: WanCausalConv3d) -> bool:
    slices = conv.kernel_size[0]
    # `_padding` of a causal convolution: left, right, top, bottom, frames before, frames after
    as_long = conv.stride == (1, 1, 1) and conv._padding[4] == slices - 1
    return slices > 1 and as_long and not bool(conv.weight[:, :, :-1].count_nonzero())


def load_text_encoder(source: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(tokenizer, UMT5 encoder) of the base, the encoder frozen and in eval mode; `dtype` None keeps the stored one."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    try:
        tokenizer, folder = AutoTokenizer.from_pretrained(_part(source, "tokenizer")), _part(source, "text_encoder")
        with _bar_for_large(folder):
            encoder = UMT5EncoderModel.from_pretrained(folder, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise MvwanError(f"base {source}: its text encoder cannot be loaded ({str(error).splitlines()[0]})") from None
    return tokenizer, encoder.eval().requires_grad_(False)


@contextmanager
def _bar_for_large(folder: Path) -> Generator[None]:
    """Without the bar that transformers draws for the weights in a folder, unless they are so large that a user would wait for them."""
    from transformers.utils import logging

    is_large = sum(path.stat().st_size for path in folder.iterdir()) >= _LARGE
    if is_large or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
