"""Stock transformer -> `MultiViewWan` + a report of what was added, widened and left alone, and back; the loader that everybody calls.

`load_model` is base + surgery + trainable groups + checkpoint, in this order, for training, sampling and tests alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mvwan.checkpoint import Trained, find_checkpoint, load_trained, read_manifest
from mvwan.compatibility import Compatibility, Purpose, check_identity, load_into
from mvwan.config import Config, LoraConfig, TrainableConfig, TrainConfig, config_from_dict, trainable_from_dict
from mvwan.model.multiview_wan import Actions, Fusion, MultiViewWan, ViewCode, initial_values
from mvwan.model.quantized import share_parts, stored_parts
from mvwan.model.trainable import ResolvedGroup, apply, parameters_by_name, resolve_groups, stock_name
from mvwan.model.trainable_table import TrainableTable
from mvwan.model.wan import WanTransformer3DModel, base_digest, in_float32_island, load_transformer, stock_arguments
from mvwan.sharding import is_spread


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What `adapt` did to each tensor of the state."""

    kept: tuple[str, ...]
    """Stock tensors under their own name."""
    widened: dict[str, str]
    """Name -> how it was widened."""
    added: dict[str, str]
    """Name -> where its initial value comes from."""
    stock_parameters: int
    adapted_parameters: int

    def render(self) -> str:
        """A few lines for a person."""
        origins: dict[str, int] = {}
        for origin in self.added.values():
            origins[origin] = origins.get(origin, 0) + 1
        lines = [
            f"{self.stock_parameters:,} parameters -> {self.adapted_parameters:,}",
            f"  left alone: {len(self.kept)} tensors",
            *(f"  widened:    {name} ({how})" for name, how in self.widened.items()),
            *(f"  added:      {count} tensors ({origin})" for origin, count in origins.items()),
        ]
        return "\n".join(lines)


def adapt(
    stock: WanTransformer3DModel,
    views: int = 3,
    fusion: Fusion = "channel",
    action_head: Actions = "none",
    seed: int = 0,
    view_code: ViewCode = "slot",
) -> tuple[MultiViewWan, SurgeryReport]:
    """`MultiViewWan` that equals `stock` on every view's RGB stream, and the report.

    Takes over the tensors of `stock` (which must not be used afterwards). Works on the meta device. `seed` is for the tensors of an
    action head that have no model in stock. Raises `MvwanError` for a base that has no multi-view form.
    """
    before = dict(stock.named_parameters())
    new = initial_values(before, fusion, action_head, seed, view_code)
    with torch.device("meta"):
        model = MultiViewWan(**stock_arguments(stock.config), views=views, fusion=fusion, action_head=action_head, view_code=view_code)
    expected = dict(model.named_parameters())
    state: dict[str, torch.Tensor] = {}
    kept: list[str] = []
    for name in expected:
        if name in new:
            state[name] = new[name][0].to(torch.float32) if in_float32_island(name, MultiViewWan) else new[name][0]
        else:
            state[name] = before[name]
            kept.append(name)
    model.load_state_dict({name: tensor.data for name, tensor in state.items()}, strict=True, assign=True)
    model.rope = stock.rope
    widened = {name: how for name, (_, how) in new.items() if name in before}
    added = {name: how for name, (_, how) in new.items() if name not in before}
    report = SurgeryReport(
        kept=tuple(kept),
        widened=widened,
        added=added,
        stock_parameters=sum(tensor.numel() for tensor in before.values()),
        adapted_parameters=sum(tensor.numel() for tensor in state.values()),
    )
    return model.eval().requires_grad_(False), report


def share_copies(model: MultiViewWan) -> int:
    """Bytes that no longer are in memory twice: frozen weights of view attention that equal those of self-attention share their storage,
    quantised ones too.

    For a model that computes and trains from here on. Whoever writes to a frozen weight in place afterwards changes both; what replaces
    its `.data` (moving, casting, `merge_adapters`, loading a checkpoint) does not.
    """
    frozen = {stock_name(name): held for name, held in parameters_by_name(model).items() if not held.requires_grad and not is_spread(held)}
    saved = 0
    for name, copy in frozen.items():
        original = frozen.get(name.replace(".mvs_attn.", ".attn1."), copy)
        parts = list(zip(stored_parts(copy), stored_parts(original), strict=False))
        is_there_once = copy.is_meta or parts[0][0].data_ptr() == parts[0][1].data_ptr()
        if is_there_once or type(copy) is not type(original) or not all(_is_equal(*pair) for pair in parts):
            continue
        saved += sum(part.nbytes for part, _ in parts)
        if len(parts) > 1:
            share_parts(copy, original)
        else:
            copy.data = original.data
    return saved


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


_OURS = ("views", "fusion", "action_head", "view_code")
"""Arguments of `MultiViewWan` that stock has no word for."""
_ONLY_IN_MULTI_VIEW = re.compile(
    r"(blocks\.\d+\.(mvs_attn|projector|modulation_mvs|camera_code)|head_heatmap|head_action|patch_embedding_heatmap)(\..+|$)"
)


def has_place_in_stock(name: str) -> bool:
    """Whether a stock transformer has a place for the tensor of that name, for `head_rgb` as its only head."""
    return _ONLY_IN_MULTI_VIEW.match(name) is None


def obstacles_to_stock(tensors: Mapping[str, torch.Tensor], fusion: Fusion) -> list[str]:
    """A clause for each thing by which the RGB half depends on what a stock transformer has no place for; none when there is nothing.

    `tensors` are those of a model or of a checkpoint alone: what a checkpoint lacks of these, a base gives as zero.
    """
    obstacles = []
    projectors = [name for name in tensors if re.fullmatch(r"blocks\.\d+\.projector\.(weight|bias)", name)]
    blocks = sorted({int(name.split(".")[1]) for name in projectors if bool(tensors[name].count_nonzero())})
    if blocks:
        listed = ", ".join(str(block) for block in blocks[:8]) + (", …" if len(blocks) > 8 else "")
        obstacles.append(f"group projector: not zero in {len(blocks)} of {len(projectors) // 2} blocks ({listed}), so view attention acts")
    if fusion == "channel" and "patch_embedding.weight" in tensors:
        heat = tensors["patch_embedding.weight"].chunk(2, dim=1)[1]
        if used := int(heat.count_nonzero()):
            obstacles.append(f"group patch_embedding: {used:,} of {heat.numel():,} values in its heat columns not zero, so RGB reads heat")
    return obstacles


def to_stock(model: MultiViewWan, dtype: torch.dtype) -> WanTransformer3DModel:
    """The stock transformer that equals `model` on each view's RGB half: the way back from `adapt`, after adapters are merged.

    `dtype` is for everything outside the float32 islands, since stock Wan computes in one type. Takes over the tensors of `model`
    (which must not be used afterwards).
    """
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    config: Any = model.config
    assert not obstacles_to_stock(state, config.fusion), "ask obstacles_to_stock first"
    if config.fusion == "channel":
        state["patch_embedding.weight"] = state["patch_embedding.weight"].chunk(2, dim=1)[0].clone()
    held = {name.removeprefix("head_rgb."): tensor for name, tensor in state.items() if has_place_in_stock(name)}
    arguments = {name: value for name, value in stock_arguments(config).items() if name not in _OURS}
    with torch.device("meta"):
        stock = WanTransformer3DModel(**arguments)
    typed = {name: tensor.to(torch.float32 if in_float32_island(name) else dtype) for name, tensor in held.items()}
    stock.load_state_dict(typed, strict=True, assign=True)
    stock.rope = model.rope
    return stock.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a loaded model came to be."""

    surgery: SurgeryReport
    table: TrainableTable
    """What trains, and how many of each group."""
    groups: tuple[ResolvedGroup, ...]
    fit: Compatibility | None = None
    """How the checkpoint fits, when there was one."""
    manifest: dict[str, Any] | None = None
    """The checkpoint's manifest."""

    def render(self) -> str:
        """A few lines for a person."""
        lines = [self.surgery.render()]
        if self.fit is not None:
            lines.append(f"checkpoint: {self.fit.outcome}")
            lines += [f"  {line}" for line in self.fit.describe()]
        return "\n".join(lines)


def load_model(
    base: str | Path = "tiny",
    checkpoint: str | Path | None = None,
    views: int = 3,
    fusion: Fusion = "channel",
    unfreeze_modulation_and_norms: bool = False,
    dtype: torch.dtype | None = None,
    *,
    trainable: TrainableConfig | None = None,
    train: TrainConfig | None = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    device: str | torch.device = "cpu",
    random_weights: bool = False,
    seed: int = 0,
    purpose: Purpose = "infer",
    ema: bool = False,
    action_head: Actions = "none",
    view_code: ViewCode = "slot",
) -> tuple[MultiViewWan, LoadReport]:
    """(model, report): base + surgery + trainable groups with LoRA + checkpoint.

    `base` is whatever `describe` takes; `checkpoint` a run's folder, one of its checkpoints, or a safetensors file of the older
    system, whose LoRA rank is read from its shapes and whose alpha equals it unless `lora_alpha` is given. `trainable` None takes
    the checkpoint's own settings. The model is in eval mode; trained tensors are float32, frozen ones `dtype` (None: as stored).
    `purpose` "train" refuses a checkpoint that lacks groups which would train now. A model with `view_code` "camera" takes a checkpoint of
    any number of views. Raises `MvwanError` for everything that does
    not fit; nothing is dropped, invented or guessed.
    """
    trained = None if checkpoint is None else load_trained(checkpoint, ema=ema)
    settings = trainable or (TrainableConfig() if trained is None else _trainable_of(trained))
    rank = lora_rank or (trained.manifest["lora"]["rank"] if trained and trainable is None else None) or settings.lora.rank
    alpha = lora_alpha if lora_alpha is not None else settings.lora.alpha
    settings = replace(settings, lora=replace(settings.lora, rank=rank, alpha=alpha))
    groups = resolve_groups(settings, unfreeze_modulation_and_norms, train, action_head, view_code)

    stock = load_transformer(base, dtype, device, random_weights, seed)
    model, surgery = adapt(stock, views, fusion, action_head, seed, view_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = apply(model, groups, rank=rank, alpha=alpha)
    if trained is None or checkpoint is None:
        return model, LoadReport(surgery=surgery, table=table, groups=groups)

    path = find_checkpoint(checkpoint)
    known_base = trained.manifest["base"].get("digest") is not None
    digest = base_digest(base, random_weights, seed) if known_base else None
    now: dict[str, Any] = {"base": digest, "views": views, "fusion": fusion, "action_head": action_head, "rank": rank}
    if view_code == "camera":  # any number of views, in any order
        del now["views"]
    if purpose != "train changed" or trained.manifest.get("view_code", "slot") != "slot":
        now["view_code"] = view_code
    check_identity(trained.manifest, path, **now)
    fit = load_into(model, trained.tensors, table, purpose, path)
    return model, LoadReport(surgery=surgery, table=table, groups=groups, fit=fit, manifest=trained.manifest)


def load_as_trained(folder: Path, *, base: str | Path | None = None, ema: bool = False) -> tuple[MultiViewWan, Config]:
    """(model, the run's settings) of a checkpoint folder: the model as the run computed with it, on the base that its manifest names, which
    is not quantised here.

    `base` replaces where the base is read from; its content is checked all the same. Raises `MvwanError` as `load_model` does.
    """
    config = config_from_dict(read_manifest(folder)["config"], f"checkpoint {folder}: config")
    model, _ = load_model(
        base or config.base.source,
        checkpoint=folder,
        views=config.model.views,
        fusion=config.model.fusion,
        unfreeze_modulation_and_norms=config.unfreeze_modulation_and_norms,
        dtype=getattr(torch, config.base.dtype),
        trainable=config.trainable,
        train=config.train,
        random_weights=config.base.random_weights,
        seed=config.seed,
        ema=ema,
        action_head=config.model.action_head,
        view_code=config.model.view_code,
    )
    return model, config


def _trainable_of(trained: Trained) -> TrainableConfig:
    saved = trained.manifest["config"].get("trainable")
    if saved is not None:
        return trainable_from_dict(saved, "the checkpoint's manifest")
    lora = trained.manifest["lora"]
    return TrainableConfig(lora=LoraConfig(rank=lora["rank"] or LoraConfig().rank, alpha=lora["alpha"]))


def trainable_table(
    base: str | Path = "wan2.2-ti2v-5b",
    views: int = 3,
    fusion: Fusion = "channel",
    unfreeze_modulation_and_norms: bool = False,
    *,
    trainable: TrainableConfig | None = None,
    train: TrainConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    action_head: Actions = "none",
    view_code: ViewCode = "slot",
) -> TrainableTable:
    """Exact counts of every group, on the meta device: no weights are read, none are needed."""
    settings = trainable or TrainableConfig()
    model, _ = adapt(load_transformer(base, dtype, device="meta"), views, fusion, action_head, view_code=view_code)
    groups = resolve_groups(settings, unfreeze_modulation_and_norms, train, action_head, view_code)
    return apply(model, groups, rank=settings.lora.rank, alpha=settings.lora.alpha)
