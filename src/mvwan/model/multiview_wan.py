"""The network: stock Wan with view attention in every block, an RGB and a heatmap stream, a head for each, and maybe one for actions.

Read it top to bottom: block, heads, model with `forward`, and `initial_values`, the one place where new tensors get theirs.
For V views every block adds, between self-attention and cross-attention,

    x = x + gate_mvs * projector(mvs_attn(norm_mvs(x) * (1 + scale_mvs) + shift_mvs [+ camera_code(rays)]))

where `mvs_attn` sees all tokens of all streams within one latent frame. It tells views apart by `view_code`: "slot" puts the stream's
index in the time slot of the RoPE; "camera" adds what a linear layer makes of each token's ray in space, and leaves all views of a
modality in the same slot, so that their order says nothing; "both" does both.
The projector starts at zero, so an adapted model equals stock Wan on every view alone until it is trained.
Source: multi-view attention as in SynCamMaster and ReCamMaster (view attention after self-attention, zero projector) on Wan2.2-TI2V.
Knows nothing of files, LoRA, noise or losses.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import einops
import torch
from einops import rearrange
from torch import nn

from mvwan.actions import ACTION_HEADS
from mvwan.config import Attention
from mvwan.errors import MvwanError
from mvwan.model.attention import NamedAttention
from mvwan.model.context_parallel import TokenSplit
from mvwan.model.wan import FP32LayerNorm, WanAttention, WanTransformer3DModel, WanTransformerBlock, register_to_config
from mvwan.precision import WideningLinear, has_fast_bfloat16, product
from mvwan.shapes import FRAMES_PER_LATENT, LATENT_CHANNELS

Fusion = Literal["channel", "view"]
ViewCode = Literal["slot", "camera", "both"]
Actions = Literal["none", "gripper", "gripper_rotation"]
ACTION_WIDTH = 64
"""Numbers that the action head keeps of a token, and of a latent frame."""


def for_streams(table: torch.Tensor, streams: int) -> tuple[torch.Tensor, ...]:
    """The k rows of a modulation table [B f k D], each [B S f 1 D], for x [B S f n D].

    Expanded over streams here, so that gradients are summed over tokens first: a sum over tokens and streams at once, whose order in
    memory is broken by frames, takes a CPU twelve times as long.
    """
    return rearrange(table, "B f k D -> k B 1 f 1 D").expand(-1, -1, streams, -1, -1, -1).unbind(0)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift in float32. x [B S f n D] normalised; shift, scale [B S f 1 D]."""
    return x * (1 + scale) + shift


class QueryKeyNorm(nn.RMSNorm):
    """RMSNorm in the wider type of weight and input, handed on in that of its input: float32 when the norm trains, as stock otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return nn.functional.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).type_as(x)


class MultiViewWanBlock(WanTransformerBlock):
    """A stock block with view attention. Time modulation comes per latent frame and is broadcast over its tokens and streams."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, qk_norm: str, cross_attn_norm: bool, eps: float, knows_cameras: bool = False
    ) -> None:
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.norm_mvs = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.mvs_attn = WanAttention(dim=dim, heads=num_heads, dim_head=dim // num_heads, eps=eps)
        for attention in (self.attn1, self.attn2, self.mvs_attn):
            attention.norm_q, attention.norm_k = QueryKeyNorm(dim, eps=eps), QueryKeyNorm(dim, eps=eps)
            attention.set_processor(NamedAttention())  # pyright: ignore[reportArgumentType]
        self.projector = nn.Linear(dim, dim)
        self.modulation_mvs = nn.Parameter(torch.zeros(1, 3, dim))
        self.camera_code = nn.Linear(6, dim, bias=False) if knows_cameras else None

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor,
        rope_frames: tuple[torch.Tensor, torch.Tensor],
        rope_streams: tuple[torch.Tensor, torch.Tensor],
        rays: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x after the block, [B S f n D].

        x [B S f n D], S streams; text [B L D], shared by the streams of a sample; time [B f 6 D], one vector per latent frame;
        rope_frames over (f n), rope_streams over (S n), each (cos, sin); rays [B S n 6] float32, for a block with a camera code.
        """
        streams, frames, tokens = x.shape[1:4]
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = for_streams(self.scale_shift_table + time.float(), streams)
        shift_mvs, scale_mvs, gate_mvs = for_streams(self.modulation_mvs + time[:, :, :3].float(), streams)

        # Within each view: all frames.
        y = modulate(self.norm1(x.float()), shift, scale).type_as(x)
        y = self.attn1(rearrange(y, "B S f n D -> (B S) (f n) D"), None, None, rope_frames)
        x = (x.float() + rearrange(y, "(B S) (f n) D -> B S f n D", S=streams, f=frames) * gate).type_as(x)

        # Within each latent frame: all views.
        y = modulate(self.norm_mvs(x.float()), shift_mvs, scale_mvs)
        if self.camera_code is not None and rays is not None:
            with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round a ray to a fifth of a degree
                y = y + self.camera_code(rays)[:, :, None]
        y = y.type_as(x)
        y = self.mvs_attn(rearrange(y, "B S f n D -> (B f) (S n) D"), None, None, rope_streams)
        y = self.projector(y)
        x = (x.float() + rearrange(y, "(B f) (S n) D -> B S f n D", f=frames, S=streams) * gate_mvs).type_as(x)

        # The prompt: each token looks by itself, so the streams of a sample share keys and values.
        y = self.norm2(x.float()).type_as(x)
        y = self.attn2(rearrange(y, "B S f n D -> B (S f n) D"), text, None, None)
        x = x + rearrange(y, "B (S f n) D -> B S f n D", S=streams, f=frames, n=tokens).type_as(x)

        y = modulate(self.norm3(x.float()), shift_ffn, scale_ffn).type_as(x)
        return (x.float() + self.ffn(y).float() * gate_ffn).type_as(x)


class StreamHead(nn.Module):
    """Tokens of one stream -> velocity patches, with the stream's own time modulation."""

    def __init__(self, dim: int, patch_values: int, eps: float) -> None:
        super().__init__()
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, patch_values)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[B V f n (patch C)] from x [B V f n D] and time [B f D]."""
        shift, scale = for_streams(self.scale_shift_table + rearrange(time, "B f D -> B f 1 D").float(), x.shape[1])
        return self.proj_out(modulate(self.norm_out(x.float()), shift, scale).type_as(x))


class ActionHead(nn.Module):
    """Tokens of all streams -> logits of each frame. What a token says is weighed by how much it has to say of its latent frame."""

    def __init__(self, dim: int, logits: int, eps: float) -> None:
        super().__init__()
        self.norm_out = FP32LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))
        self.proj_in = nn.Linear(dim, ACTION_WIDTH)
        self.pool = nn.Linear(ACTION_WIDTH, 1, bias=False)
        self.hidden = nn.Linear(ACTION_WIDTH, ACTION_WIDTH)
        self.proj_out = nn.Linear(ACTION_WIDTH, FRAMES_PER_LATENT * logits)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """[B F A] float32 from x [B S f n D] and time [B f D]; F = 4 (f - 1) + 1, since latent frame 0 holds one frame."""
        shift, scale = for_streams(self.scale_shift_table + rearrange(time, "B f D -> B f 1 D").float(), x.shape[1])
        y = modulate(self.norm_out(x.float()), shift, scale).type_as(x)
        y = rearrange(nn.functional.gelu(self.proj_in(y)), "B S f n K -> B f (S n) K")
        y = (self.pool(y).float().softmax(dim=2) * y.float()).sum(dim=2).type_as(y)
        logits = self.proj_out(nn.functional.gelu(self.hidden(y)))
        return rearrange(logits, "B f (k A) -> B (f k) A", k=FRAMES_PER_LATENT)[:, FRAMES_PER_LATENT - 1 :].float()


class MultiViewWan(WanTransformer3DModel):
    """Wan2.2-TI2V for V views with an RGB and a heatmap stream.

    fusion "channel": both latents share tokens (2C channels into one patch embedding). fusion "view": they are 2V streams of view
    attention, each modality with its own patch embedding. Either way there are two heads, and input and output are
    [B V 2C f h w], RGB channels first. `action_head` other than "none" adds a third, which reads the same tokens as these.
    """

    # Numerics, decided here for every new tensor. `modulation_mvs` and the heads' `scale_shift_table` are added to time embeddings in
    # float32 like the stock tables; `norm_mvs`, `norm_out` and `camera_code` compute in float32 like stock norms. `mvs_attn` (norm_q,
    # norm_k included), `projector`, `proj_out` and both patch embeddings follow the model's dtype, as their stock originals do; so do the
    # action head's products, while it weighs tokens in float32.
    _keep_in_fp32_modules = [  # noqa: RUF012
        *(WanTransformer3DModel._keep_in_fp32_modules or []), "norm_mvs", "modulation_mvs", "norm_out", "camera_code"
    ]  # fmt: skip
    _no_split_modules = ["MultiViewWanBlock"]  # noqa: RUF012
    _repeated_blocks = ["MultiViewWanBlock"]  # noqa: RUF012
    _cp_plan = None  # stock context parallelism splits the token axis that view attention needs whole

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = LATENT_CHANNELS,
        out_channels: int = LATENT_CHANNELS,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        views: int = 3,
        fusion: Fusion = "channel",
        action_head: Actions = "none",
        view_code: ViewCode = "slot",
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None or pos_embed_seq_len is not None:
            raise MvwanError("the base takes image embeddings (Wan2.1 image-to-video); mvwan adapts Wan2.2-TI2V, which has none")
        if in_channels != out_channels:
            raise MvwanError(
                f"the base has {in_channels} input and {out_channels} output channels; mvwan adapts bases where both are equal"
            )
        if patch_size[0] != 1:
            raise MvwanError(f"the base has patch size {tuple(patch_size)}; mvwan needs one token row per latent frame, so 1 in time")
        super().__init__(
            patch_size, num_attention_heads, attention_head_dim, in_channels, out_channels, text_dim, freq_dim, ffn_dim, num_layers=0,
            cross_attn_norm=cross_attn_norm, qk_norm=qk_norm, eps=eps, rope_max_seq_len=rope_max_seq_len,
        )  # fmt: skip
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            MultiViewWanBlock(dim, ffn_dim, num_attention_heads, qk_norm or "none", cross_attn_norm, eps, view_code != "slot")
            for _ in range(num_layers)
        )
        patch = (patch_size[0], patch_size[1], patch_size[2])
        if fusion == "channel":
            self.patch_embedding = nn.Conv3d(2 * in_channels, dim, kernel_size=patch, stride=patch)
        else:
            self.patch_embedding_heatmap = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)
        del self.norm_out, self.proj_out, self.scale_shift_table
        self._patch, self._fusion, self._channels, self._text_dim = patch, fusion, in_channels, text_dim
        self.view_code: ViewCode = view_code
        self._split: TokenSplit | None = None
        self.head_rgb = StreamHead(dim, out_channels * math.prod(patch_size), eps)
        self.head_heatmap = StreamHead(dim, out_channels * math.prod(patch_size), eps)
        self.head_action = None if action_head == "none" else ActionHead(dim, ACTION_HEADS[action_head], eps)
        for part in self.modules():
            if type(part) is nn.Linear:
                part.__class__ = WideningLinear

    def attend_with(self, name: Attention, split: TokenSplit | None = None) -> None:
        """Nothing; all three attentions of every block then use the back end of that name. Ask `check_attention` whether it can run.

        With `split` each process then computes its share of the tokens, without gradients, and all get the whole answer.
        """
        self._split = split
        for part in self.modules():
            if isinstance(part, WanAttention):
                part.set_processor(NamedAttention(name, split))  # pyright: ignore[reportArgumentType]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type that the frozen weights are held in, whatever type the trained tensors have. Products are in it where it is fast."""
        block: Any = self.blocks[0]
        return block.attn1.to_k.weight.dtype

    def forward(  # type: ignore[override]
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        condition_frames: int = 1,
        return_action: bool = False,
        rays: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity (noise - clean), [B V 2C f h w] in the dtype of `latents`; with `return_action` (velocity, logits [B F A] of `actions`).

        latents [B V 2C f h w], RGB channels first, the given latent frames clean. timestep [B] in 0..1000: the first
        `condition_frames` latent frames get 0 in its place; or [B f], taken as it is. text [B L D] or [1 L D], text-encoder output,
        zero after each prompt. rays [B V 6 h w] or [1 V 6 h w], `Camera.rays` of the latents' cells: needed by a model with a camera
        code, refused by one without. Raises `MvwanError` for shapes that do not fit, and for `return_action` without an action head.
        """
        if return_action and self.head_action is None:
            raise MvwanError('return_action: this model has no action head. Load it with action_head="gripper" or "gripper_rotation".')
        self._check(latents, timestep, text, condition_frames, rays)
        if timestep.ndim == 1:
            given = torch.arange(latents.shape[3], device=latents.device) < condition_frames
            timestep = torch.where(given, timestep.new_zeros(()), timestep[:, None])
        device = latents.device.type
        is_fast = self.compute_dtype == torch.float16 or (self.compute_dtype == torch.bfloat16 and has_fast_bfloat16(latents.device))
        mixed = is_fast and not torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=self.compute_dtype) if mixed else contextlib.nullcontext():
            velocity, action = self._answer(latents, timestep, text.expand(len(latents), -1, -1), return_action, rays)
        return (velocity, action) if return_action else velocity

    def _answer(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_action: bool, rays: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, views, _, frames, height, width = latents.shape
        x = self._embed(latents)
        streams = x.shape[1]
        rope_frames = self.rope(latents.new_empty(()).expand(1, 1, frames, height, width))
        rope_streams = self._rope_streams(streams, views, latents)
        time, time_six = self._embed_time(timestep)
        if rays is not None:
            rays = self._rays_of_tokens(rays.expand(batch, -1, -1, -1, -1).to(x.device), streams // views)
        text = self.condition_embedder.text_embedder(text if torch.is_autocast_enabled(text.device.type) else text.type_as(x))

        if self._split is not None:
            x, rays, rope_frames, rope_streams = _share(self._split, x, rays, rope_frames, rope_streams)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._recompute(block, x, text, time_six, rope_frames, rope_streams, rays)
            else:
                x = block(x, text, time_six, rope_frames, rope_streams, rays)

        if self._split is not None:
            x = self._split.whole(x, dim=3)
        rgb, heat = (x, x) if self._fusion == "channel" else x.split(views, dim=1)
        _, p, q = self._patch
        patches = torch.stack([self.head_rgb(rgb, time), self.head_heatmap(heat, time)])
        # A head's rows are ordered (patch position, channel): the channel comes last.
        velocity = rearrange(
            patches, "m B V f (h w) (p q C) -> B V (m C) f (h p) (w q)", B=batch, h=height // p, w=width // q, p=p, q=q
        ).to(latents.dtype)  # fmt: skip
        return velocity, self.head_action(x, time) if return_action and self.head_action is not None else None

    def _recompute(self, block: nn.Module, *arguments: Any) -> torch.Tensor:
        assert self._gradient_checkpointing_func is not None  # set by enable_gradient_checkpointing()
        return self._gradient_checkpointing_func(block, *arguments)

    def _rope_streams(self, streams: int, views: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) over (S n): a time slot per stream, or per modality where only cameras tell views apart."""
        height, width = latents.shape[4:]
        if self.view_code != "camera":
            return self.rope(latents.new_empty(()).expand(1, 1, streams, height, width))
        modalities = streams // views
        cos, sin = self.rope(latents.new_empty(()).expand(1, 1, modalities, height, width))

        def for_each_view(part: torch.Tensor) -> torch.Tensor:
            return einops.repeat(part, "o (m n) k d -> o (m V n) k d", m=modalities, V=views)

        return for_each_view(cos), for_each_view(sin)

    def _rays_of_tokens(self, rays: torch.Tensor, modalities: int) -> torch.Tensor:
        """[B S n 6] of rays [B V 6 h w]: the mean over the cells of each patch, the same for all streams of a view."""
        _, p, q = self._patch
        of_tokens = einops.reduce(rays.float(), "B V k (h p) (w q) -> B V (h w) k", "mean", p=p, q=q)
        return of_tokens.repeat(1, modalities, 1, 1)

    def _embed(self, latents: torch.Tensor) -> torch.Tensor:
        """[B S f n D] tokens of [B V 2C f h w] latents: S = V for fusion "channel", 2V (all RGB, then all heat) for "view"."""
        autocast = torch.is_autocast_enabled(latents.device.type)
        _, p, q = self._patch

        def tokens(pictures: torch.Tensor, embedding: nn.Conv3d) -> torch.Tensor:
            # The stride is the kernel, so the convolution is one matrix product per patch. That also keeps training clear of oneDNN's
            # bfloat16 gradients of convolutions, which hang on processors with AMX (seen with torch 2.13 on a Wan VAE).
            patches = rearrange(pictures, "B V C f (h p) (w q) -> B V f (h w) (C p q)", p=p, q=q)
            weight, bias = embedding.weight.flatten(1), embedding.bias
            return product(patches if autocast else patches.to(torch.promote_types(weight.dtype, torch.float32)), weight, bias)

        if self._fusion == "channel":
            return tokens(latents, self.patch_embedding)
        rgb, heat = latents.chunk(2, dim=2)
        return torch.cat([tokens(rgb, self.patch_embedding), tokens(heat, self.patch_embedding_heatmap)], dim=1)

    def _embed_time(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([B f D], [B f 6 D]) of timestep [B f]: once per latent frame; outside autocast, since bfloat16 tells timesteps poorly apart."""
        embedder = self.condition_embedder
        autocast = torch.is_autocast_enabled(timestep.device.type)
        with torch.autocast(timestep.device.type, enabled=False):
            waves = embedder.timesteps_proj(timestep.flatten().float())
            time = embedder.time_embedder(waves.to(embedder.time_embedder.linear_1.weight.dtype))
            time = time.to(embedder.time_proj.weight.dtype) if autocast else time
            time_six = embedder.time_proj(embedder.act_fn(time))
        frames = timestep.shape[1]
        return rearrange(time, "(B f) D -> B f D", f=frames), rearrange(time_six, "(B f) (k D) -> B f k D", f=frames, k=6)

    def _check(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, condition_frames: int, rays: torch.Tensor | None
    ) -> None:
        channels = 2 * self._channels
        if latents.ndim != 6 or latents.shape[2] != channels:
            raise MvwanError(f"latents are {list(latents.shape)}; needed are [B, V, {channels}, f, h, w], RGB channels first")
        batch, views, _, frames, height, width = latents.shape
        _, p, q = self._patch
        if (rays is None) != (self.view_code == "slot"):
            raise MvwanError(
                f"rays: a model with view_code={self.view_code!r} needs {'none' if rays is not None else 'those of its cameras'}"
            )
        if rays is not None and tuple(rays.shape) not in ((batch, views, 6, height, width), (1, views, 6, height, width)):
            raise MvwanError(f"rays are {list(rays.shape)}; needed are [{batch}, {views}, 6, {height}, {width}], a ray per latent cell")
        if height % p or width % q:
            raise MvwanError(f"latents are {height} x {width}; each side must be a multiple of the patch {p} x {q}")
        if tuple(timestep.shape) not in ((batch,), (batch, frames)):
            raise MvwanError(f"timestep is {list(timestep.shape)}; needed is [{batch}] or [{batch}, {frames}]")
        if text.ndim != 3 or text.shape[0] not in (1, batch) or text.shape[2] != self._text_dim:
            raise MvwanError(f"text is {list(text.shape)}; needed is [{batch}, L, {self._text_dim}] or [1, L, {self._text_dim}]")
        if not 0 <= condition_frames < frames:
            raise MvwanError(f"condition_frames={condition_frames} of {frames} latent frames; at least one must be left to predict")


def _share(split: TokenSplit, x: torch.Tensor, rays: torch.Tensor | None, *ropes: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
    """(x, rays, ropes) of this process: its share of the n tokens of x [B S f n D] and rays [B S n 6], and of those of each table."""
    tokens = x.shape[3]

    def of_table(part: torch.Tensor) -> torch.Tensor:
        return split.part(part.unflatten(1, (-1, tokens)), dim=2).flatten(1, 2)

    shared = [(of_table(cos), of_table(sin)) for cos, sin in ropes]
    return split.part(x, dim=3), None if rays is None else split.part(rays, dim=2), *shared


def initial_values(
    stock: Mapping[str, torch.Tensor], fusion: Fusion, action_head: Actions = "none", seed: int = 0, view_code: ViewCode = "slot"
) -> dict[str, tuple[torch.Tensor, str]]:
    """New or widened tensor's name -> (value, where it comes from), from the tensors of a stock transformer.

    Every name of a `MultiViewWan` state that is not in the result is stock's own tensor of that name. Nothing shares storage
    with `stock`. `seed` is that of the action head's inner layers, which nothing in stock resembles.
    """
    values: dict[str, tuple[torch.Tensor, str]] = {}
    weight = stock["patch_embedding.weight"]
    if fusion == "channel":
        values["patch_embedding.weight"] = (
            torch.cat([weight, torch.zeros_like(weight)], dim=1),
            "stock for RGB channels, zero for heat channels",
        )
    else:
        for part in ("weight", "bias"):
            values[f"patch_embedding_heatmap.{part}"] = (stock[f"patch_embedding.{part}"].clone(), "copy of patch_embedding")
    for head in ("head_rgb", "head_heatmap"):
        for name in ("proj_out.weight", "proj_out.bias", "scale_shift_table"):
            values[f"{head}.{name}"] = (stock[name].clone(), "copy of the stock head")
    for name, tensor in stock.items():
        if ".attn1." in name:
            values[name.replace(".attn1.", ".mvs_attn.")] = (tensor.clone(), "copy of self-attention")
        if name.startswith("blocks.") and name.endswith(".scale_shift_table"):
            block = name.removesuffix("scale_shift_table")
            values[f"{block}modulation_mvs"] = (tensor[:, :3].clone(), "first three rows of modulation")
            like = stock[f"{block}attn1.to_out.0.weight"]
            values[f"{block}projector.weight"] = (torch.zeros_like(like), "zero")
            values[f"{block}projector.bias"] = (like.new_zeros(len(like)), "zero")
            if view_code != "slot":
                values[f"{block}camera_code.weight"] = (like.new_zeros(len(like), 6), "zero")
    return values if action_head == "none" else values | _action_values(stock, ACTION_HEADS[action_head], seed)


def _action_values(stock: Mapping[str, torch.Tensor], logits: int, seed: int) -> dict[str, tuple[torch.Tensor, str]]:
    """The action head's part of `initial_values`: it starts by saying the same of every frame, from a plain mean over tokens."""
    like, generator = stock["proj_out.weight"], torch.Generator().manual_seed(seed)
    values = {"head_action.scale_shift_table": (stock["scale_shift_table"].clone(), "copy of the stock head")}
    shapes = {"proj_in": (ACTION_WIDTH, like.shape[1]), "hidden": (ACTION_WIDTH, ACTION_WIDTH)}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        values[f"head_action.{name}.weight"] = (drawn.to(like.device, like.dtype), "drawn from the seed")
    zeros = {"proj_in.bias": (ACTION_WIDTH,), "hidden.bias": (ACTION_WIDTH,), "pool.weight": (1, ACTION_WIDTH)}
    rows = FRAMES_PER_LATENT * logits
    for name, shape in (zeros | {"proj_out.weight": (rows, ACTION_WIDTH), "proj_out.bias": (rows,)}).items():
        values[f"head_action.{name}"] = (like.new_zeros(shape), "zero")
    return values
