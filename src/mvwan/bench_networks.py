"""The networks that a benchmark compares, as steps to be timed: ours, the same written with stock parts, and stock Wan on views alone.

Steps are real: forward, backward and AdamW on a random batch, or one denoising call. Knows no data, no disk and no table.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, repeat

from mvwan import flow
from mvwan.batch import Batch
from mvwan.config import Config, config_from_dict, merge
from mvwan.errors import MvwanError
from mvwan.model.adapters import exchange_layers
from mvwan.model.multiview_wan import MultiViewWan, MultiViewWanBlock, StreamHead, modulate
from mvwan.model.surgery import load_model
from mvwan.model.trainable import apply, optimizer_groups, resolve_groups
from mvwan.model.wan import CONFIG_5B, WanTransformer3DModel, load_transformer
from mvwan.precision import settle
from mvwan.presets import preset
from mvwan.shapes import LATENT_CHANNELS, PATCH_SIZE, num_frames_of, num_tokens
from mvwan.training_module import HeatmapWanTrainingModule

SizeName = Literal["tiny", "middle", "block-5b"]
Step = Callable[[int], object]
"""One step; the number makes its noise another one."""
_STOCK_GROUPS = ("lora", "all")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The batch that every arm works on."""

    batch: int = 2
    views: int = 3
    latent_frames: int = 3
    latent_height: int = 8
    latent_width: int = 8
    text_tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise MvwanError(f"{name}={value}: must be at least 1. Set {_option(name)}.")
        if self.latent_frames < 2:
            raise MvwanError("latent_frames=1: the first one is given, so nothing would be predicted. Set --latent-frames 2 or more.")
        for name in ("latent_height", "latent_width"):
            if getattr(self, name) % PATCH_SIZE[1]:
                raise MvwanError(f"{name}={getattr(self, name)}: must be a multiple of {PATCH_SIZE[1]}. Set {_option(name)}.")


def _option(name: str) -> str:
    return "--latent-side" if name in ("latent_height", "latent_width") else f"--{name.replace('_', '-')}"


_TINY = Sizes()
_LARGER = Sizes(batch=1, latent_frames=7, latent_height=16, latent_width=16, text_tokens=512)
DEFAULT_SIZES: dict[SizeName, Sizes] = {"tiny": _TINY, "middle": replace(_LARGER, text_tokens=128), "block-5b": _LARGER}
_SHAPES: dict[SizeName, dict[str, Any]] = {
    "middle": {"num_attention_heads": 6, "ffn_dim": 3584, "num_layers": 6},
    "block-5b": {"num_layers": 1},
}


@contextmanager
def base_of(size: SizeName) -> Iterator[str]:
    """The source of a base of that size: the tiny Wan, or random weights in a folder that is gone afterwards."""
    if size == "tiny":
        yield "tiny"
        return
    with tempfile.TemporaryDirectory() as folder:
        WanTransformer3DModel(**CONFIG_5B | _SHAPES[size]).save_pretrained(Path(folder) / "transformer")
        yield folder


def config_for(size: SizeName, base: str, views: int, **settings: Any) -> Config:
    """Settings of a run of that size: those of the preset it stands for, on `base`; `settings` are laid over them.

    In what the processor multiplies best: all is measured there, also where there is a GPU.
    """
    start = preset("tiny" if size == "tiny" else "wan2.2-ti2v-5b")
    laid = {"base": {"source": base, "dtype": "auto"}, "model": {"views": views, "gradient_checkpointing": False}}
    return settle(config_from_dict(merge(start, merge(laid, {"train": {"precision": "auto"}}), settings), "bench"), "cpu")


# ── the same network with stock parts ─────────────────────────────────────────────────────────────────────────────────────────────


class StockStyleBlock(MultiViewWanBlock):
    """The block as it is written with stock parts: pictures one by one, a time vector per token, torch's own choice of attention."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor, ropes: tuple[Any, Any], streams: int, frames: int
    ) -> torch.Tensor:
        """x after the block, [P T D]: P pictures of T tokens; text [P L D]; time [P T 6 D]; ropes over frames and over streams."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.scale_shift_table[:, None] + time.float()).unbind(2)
        shift_mvs, scale_mvs, gate_mvs = (self.modulation_mvs[:, None] + time[:, :, :3].float()).unbind(2)
        y = self.attn1(modulate(self.norm1(x.float()), shift, scale).type_as(x), None, None, ropes[0])
        x = (x.float() + y * gate).type_as(x)
        y = modulate(self.norm_mvs(x.float()), shift_mvs, scale_mvs).type_as(x)
        y = self.mvs_attn(rearrange(y, "(B S) (f n) D -> (B f) (S n) D", S=streams, f=frames), None, None, ropes[1])
        y = rearrange(self.projector(y), "(B f) (S n) D -> (B S) (f n) D", S=streams, f=frames)
        x = (x.float() + y * gate_mvs).type_as(x)
        x = x + self.attn2(self.norm2(x.float()).type_as(x), text, None, None).type_as(x)
        y = modulate(self.norm3(x.float()), shift_ffn, scale_ffn).type_as(x)
        return (x.float() + self.ffn(y).float() * gate_ffn).type_as(x)


class StockStyleWan(MultiViewWan):
    """`MultiViewWan` as it is written with stock parts: the same tensors, the same answer but for rounding."""

    def _answer(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_action: bool, rays: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert rays is None, "the comparison has no cameras as input"
        batch, views, _, frames, height, width = latents.shape
        x = self._embed(latents)
        streams, tokens = x.shape[1], x.shape[3]
        ropes = (self.rope(latents.new_empty(()).expand(1, 1, frames, height, width)), self._rope_streams(streams, views, latents))
        time, time_six = self._embed_time(repeat(timestep, "B f -> (B S) (f n)", S=streams, n=tokens))
        text = repeat(text, "B L D -> (B S) L D", S=streams)
        text = self.condition_embedder.text_embedder(text if torch.is_autocast_enabled(text.device.type) else text.type_as(x))
        x = rearrange(x, "B S f n D -> (B S) (f n) D")
        for block in self.blocks:
            x = block(x, text, time_six, ropes, streams, frames)

        def said_by(head: StreamHead, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            shift, scale = (head.scale_shift_table[:, None] + time[:, :, None].float()).unbind(2)
            return head.proj_out(modulate(head.norm_out(x.float()), shift, scale).type_as(x))

        def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if streams == views:
                return tensor, tensor
            return tuple(rearrange(tensor, "(B m V) ... -> m (B V) ...", m=2, V=views))

        heads = (self.head_rgb, self.head_heatmap)
        patches = torch.stack([said_by(head, *part) for head, *part in zip(heads, parts(x), parts(time), strict=True)])
        _, p, q = self._patch
        velocity = rearrange(
            patches, "m (B V) (f h w) (p q C) -> B V (m C) f (h p) (w q)", B=batch, f=frames, h=height // p, w=width // q, p=p, q=q
        ).to(latents.dtype)  # fmt: skip
        if not return_action or self.head_action is None:
            return velocity, None
        x = rearrange(x, "(B S) (f n) D -> B S f n D", S=streams, f=frames)
        return velocity, self.head_action(x, rearrange(time, "(B S) (f n) D -> B S f n D", S=streams, f=frames)[:, 0, :, 0])


def in_stock_style(model: MultiViewWan) -> MultiViewWan:
    """The same model, which from now on computes as `StockStyleWan`, with PEFT's layers and diffusers' attention."""
    exchange_layers(model, ours=False)
    model.attend_with("native")
    model.__class__ = StockStyleWan
    for block in model.blocks:
        block.__class__ = StockStyleBlock
    return model


# ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_batch(config: Config, sizes: Sizes, text_dim: int, seed: int) -> Batch:
    """A batch of noise in the shapes of `sizes`; where the model has an action head, the gripper is open in it."""
    shape = (sizes.batch, sizes.views, LATENT_CHANNELS, sizes.latent_frames, sizes.latent_height, sizes.latent_width)
    generator, frames = torch.Generator().manual_seed(seed), num_frames_of(sizes.latent_frames)
    has_gripper = config.model.action_head != "none"
    return Batch(
        sample_ids=tuple(f"bench@{index}" for index in range(sizes.batch)),
        rgb=torch.randn(shape, generator=generator),
        heat=torch.randn(shape, generator=generator),
        text=torch.randn(sizes.batch, sizes.text_tokens, text_dim, generator=generator),
        heat_valid=torch.ones(sizes.batch, sizes.views, sizes.latent_frames, dtype=torch.bool),
        gripper_open=torch.full((sizes.batch, frames), 1.0 if has_gripper else torch.nan),
        rotation_deg=torch.full((sizes.batch, frames, 3), torch.nan),
    ).check()


def autocast(config: Config) -> torch.autocast:
    """What the trainer computes products under."""
    return torch.autocast("cpu", torch.bfloat16, config.train.precision == "bf16")


def training_step(module: HeatmapWanTrainingModule, sizes: Sizes, seed: int) -> Step:
    """A training step of `module`: forward, backward, AdamW."""
    config = module.config
    optimizer = torch.optim.AdamW(optimizer_groups(module.model, module.groups), fused=True)
    batch = random_batch(config, sizes, module.model.config["text_dim"], seed)

    def step(number: int) -> None:
        with autocast(config):
            sums = module(batch, seed, number)
        counts = sums.rgb_count.sum(), sums.heat_count.sum(), config.train.rgb_weight, sums.gripper_count.sum()
        _update(optimizer, flow.total_loss(sums, *counts, action_weight=config.train.action_weight))

    return step


def stock_training_step(config: Config, sizes: Sizes, seed: int) -> tuple[Step, int]:
    """(training step of stock Wan with the same LoRA on the same views one by one, parameters that train)."""
    base = config.base
    model = load_transformer(base.source, getattr(torch, base.dtype))
    groups = [group for group in resolve_groups(config.trainable) if group.name in _STOCK_GROUPS]
    table = apply(model, groups, rank=config.trainable.lora.rank)
    exchange_layers(model, ours=False)
    optimizer = torch.optim.AdamW(optimizer_groups(model, groups), fused=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = sizes.batch * sizes.views
    shape = (pictures, 1, LATENT_CHANNELS, sizes.latent_frames, sizes.latent_height, sizes.latent_width)
    clean, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    text = torch.randn(sizes.batch, sizes.text_tokens, model.config["text_dim"], generator=generator)
    text = text.repeat_interleave(sizes.views, dim=0)
    per_frame = num_tokens(1, sizes.latent_height, sizes.latent_width)

    def step(number: int) -> None:
        ids = [f"bench@{index}" for index in range(pictures)]
        sigma_bf = flow.sigma_per_frame(flow.draw_sigma(seed, number, ids, config.flow), sizes.latent_frames, 1)
        timestep = flow.timestep(sigma_bf).repeat_interleave(per_frame, dim=1)
        with autocast(config):
            velocity = model(flow.add_noise(clean, noise, sigma_bf)[:, 0], timestep, text, return_dict=False)[0]
        _update(optimizer, (velocity.float() - flow.velocity_target(clean, noise)[:, 0])[:, :, 1:].square().mean())

    return step, table.trainable_parameters


def denoising_step(model: MultiViewWan, config: Config, sizes: Sizes, seed: int) -> Callable[[int], torch.Tensor]:
    """One network call of a prediction; it gives the velocity [B V 2C f h w]."""
    batch = random_batch(config, sizes, model.config["text_dim"], seed)
    timestep = torch.full((sizes.batch,), 900.0)

    @torch.inference_mode()
    def step(number: int) -> torch.Tensor:
        with autocast(config):
            return model(batch.latents, timestep - number, batch.text)  # pyright: ignore[reportReturnType]

    return step


def untrained(config: Config) -> MultiViewWan:
    """The model of a run at step 0, for predictions."""
    model, _ = load_model(
        config.base.source,
        views=config.model.views,
        fusion=config.model.fusion,
        dtype=getattr(torch, config.base.dtype),
        trainable=config.trainable,
        action_head=config.model.action_head,
    )
    return model


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
