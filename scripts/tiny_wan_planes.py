"""The VAE of `AutoencoderKLWan` over whole clips through two-dimensional convolutions: same parameters, same numbers, faster training.

A clip is a batch of planes [B*F C H W]: a causal convolution over time is a plane convolution over the channels of a frame and of the
two before it, side by side. Where a clip has one frame, or a layer is told to look at no other frame, only the last temporal slice of
its weight takes part: a third of the work. Knows no data, no loss and no schedule. Only for configs with `is_residual`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from einops import rearrange
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Planes:
    """The frames of B clips, one after the other: `data` [B*F C H W]."""

    data: torch.Tensor
    frames: int
    """F."""
    latent_width: int
    """What the width of the planes is, or will become, as latents."""

    def with_data(self, data: torch.Tensor) -> "Planes":
        """The same frames with other channels or another size."""
        return replace(self, data=data)

    def with_frames(self, clips: torch.Tensor) -> "Planes":
        """Other frames [B F C H W] of the same clips."""
        return replace(self, data=_last(clips.flatten(0, 1)), frames=clips.shape[1])

    def clips(self) -> torch.Tensor:
        """[B F C H W]."""
        return self.data.unflatten(0, (-1, self.frames))


class PlaneVae:
    """Encoder and decoder of one VAE, computed in `dtype`; gradients reach the VAE's own parameters.

    `flat`: layers on planes larger than the latents look at no other frame, apart from those that change the frame rate: time is mixed
    where planes are small. Equal to the VAE as it is only while their older temporal slices are zero, as `flatten` makes them.
    """

    def __init__(self, vae: AutoencoderKLWan, dtype: torch.dtype = torch.float32, flat: bool = False) -> None:
        self.vae: Any = vae
        self.dtype = dtype
        self.flat = flat
        assert vae.config["is_residual"] and not vae.config["attn_scales"]
        self._scale = vae.config["scale_factor_spatial"]
        modes = [block.upsampler.mode for block in self.vae.decoder.up_blocks if block.upsampler is not None]
        self._last_timed = len(modes) - 1 - modes[::-1].index("upsample3d")

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, logvar) [B C f h w] float32 of the Gaussian over latents of pictures [B 3 F H W] in -1..1."""
        encoder, side = self.vae.encoder, self.vae.config.patch_size
        patches = rearrange(pictures, "B c F (h r) (w q) -> (B F) (c q r) h w", r=side, q=side)
        x = Planes(data=_last(patches.to(self.dtype)), frames=pictures.shape[2], latent_width=pictures.shape[-1] // self._scale)
        x = self._convolve(encoder.conv_in, x)
        for block in encoder.down_blocks:
            x = self._down(block, x)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        x = self._convolve(self.vae.quant_conv, x)
        mean, log_variance = rearrange(x.data.float(), "(B f) c h w -> B c f h w", f=x.frames).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """[B 3 F H W] float32, not clamped, of raw latents [B C f h w]; with `kept` [B k], only these frames of each clip.

        `kept` needs `flat`: once time is done, large planes do not see one another, and those that no loss looks at need not be made.
        """
        assert kept is None or self.flat
        decoder, side = self.vae.decoder, self.vae.config.patch_size
        planes = rearrange(latents, "B c f h w -> (B f) c h w")
        x = Planes(data=_last(planes.to(self.dtype)), frames=latents.shape[2], latent_width=latents.shape[-1])
        x = self._convolve(decoder.conv_in, self._convolve(self.vae.post_quant_conv, x))
        x = self._middle(decoder.mid_block, x)
        for number, block in enumerate(decoder.up_blocks):
            x = self._up(block, x, kept if number == self._last_timed else None)
        x = self._head(decoder, x)
        return rearrange(x.data.float(), "(B F) (c q r) h w -> B c F (h r) (w q)", F=x.frames, r=side, q=side)

    def _convolve(self, layer: Any, x: Planes) -> Planes:
        """A causal convolution without stride, or one over planes alone."""
        weight, data = layer.weight, x.data
        if weight.ndim == 5:
            across = weight.shape[2]
            if across == 1 or x.frames == 1 or (self.flat and data.shape[-1] > x.latent_width):
                weight = weight[:, :, -1]
            else:
                data = _with_past(x, across - 1)
                weight = rearrange(weight, "O I t h w -> O (t I) h w")
        padding = weight.shape[-1] // 2
        return x.with_data(functional.conv2d(data, self._cast(weight), self._cast(layer.bias), padding=padding))

    def _cast(self, parameter: torch.Tensor) -> torch.Tensor:
        parameter = parameter.to(self.dtype)
        return _last(parameter) if parameter.ndim == 4 else parameter

    def _head(self, module: Any, x: Planes) -> Planes:
        return self._convolve(module.conv_out, x.with_data(self._activate(module.norm_out, x.data)))

    def _activate(self, norm: Any, data: torch.Tensor) -> torch.Tensor:
        """SiLU of the normalised channels."""
        return normalise_and_activate(data, norm.gamma.flatten())

    def _residual(self, block: Any, x: Planes) -> Planes:
        shortcut = self._convolve(block.conv_shortcut, x) if isinstance(block.conv_shortcut, WanCausalConv3d) else x
        y = self._convolve(block.conv1, x.with_data(self._activate(block.norm1, x.data)))
        y = self._convolve(block.conv2, y.with_data(self._activate(block.norm2, y.data)))
        return x.with_data(shortcut.data + y.data)

    def _middle(self, block: Any, x: Planes) -> Planes:
        x = self._residual(block.resnets[0], x)
        for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(residual, self._attend(attention, x))
        return x

    def _attend(self, block: Any, x: Planes) -> Planes:
        height = x.data.shape[2]
        normal = functional.normalize(x.data.float(), dim=1) * block.norm.scale * block.norm.gamma.flatten()[:, None, None]
        mixed = self._convolve(block.to_qkv, x.with_data(_last(normal.to(self.dtype)))).data
        query, key, value = rearrange(mixed, "n (k c) h w -> k n 1 (h w) c", k=3).contiguous().unbind(0)
        answer = functional.scaled_dot_product_attention(query, key, value)
        answer = rearrange(answer, "n 1 (h w) c -> n c h w", h=height)
        return x.with_data(x.data + self._convolve(block.proj, x.with_data(_last(answer))).data)

    def _down(self, block: Any, x: Planes) -> Planes:
        y = x
        for residual in block.resnets:
            y = self._residual(residual, y)
        if block.downsampler is not None:
            layer = block.downsampler.resample[1]
            padded = functional.pad(y.data, (0, 1, 0, 1))
            y = y.with_data(functional.conv2d(padded, self._cast(layer.weight), self._cast(layer.bias), stride=2))
            if block.downsampler.mode == "downsample3d":
                y = self._half_rate(block.downsampler.time_conv, y)
        short = _average_down(block.avg_shortcut, x)
        return y.with_data(y.data + short)

    def _half_rate(self, layer: Any, x: Planes) -> Planes:
        """The first frame as it is, then one for each two: a convolution over the two and the one before."""
        if x.frames == 1:
            return x
        clips = x.clips()
        three = torch.cat([clips[:, 0:-2:2], clips[:, 1:-1:2], clips[:, 2::2]], 2)
        frames = three.shape[1]
        weight = rearrange(layer.weight, "O I t h w -> O (t I) h w")
        y = functional.conv2d(_last(three.flatten(0, 1)), self._cast(weight), self._cast(layer.bias))
        return x.with_frames(torch.cat([clips[:, :1], y.unflatten(0, (-1, frames))], 1))

    def _up(self, block: Any, x: Planes, kept: torch.Tensor | None) -> Planes:
        y = x
        for residual in block.resnets:
            y = self._residual(residual, y)
        if block.upsampler is None:
            return y
        if block.upsampler.mode == "upsample3d":
            y = self._double_rate(block.upsampler.time_conv, y)
        large = self._enlarge(block.upsampler.resample[1], _frames(y, kept))
        short = _frames(_duplicate_up_time(block.avg_shortcut, x), kept)
        return large.with_data(large.data + _duplicate_up_space(block.avg_shortcut, short))

    def _enlarge(self, layer: Any, x: Planes) -> Planes:
        """The 3x3 convolution of planes twice as large, each pixel four times: four 2x2 convolutions of the planes as they are."""
        weight, padded = layer.weight, functional.pad(x.data, (1, 1, 1, 1))
        height, width = x.data.shape[-2:]
        quarters = []
        for down in range(2):
            rows = _folded(weight, 2, down)
            for right in range(2):
                part = padded[:, :, down : down + height + 1, right : right + width + 1]
                quarters.append(functional.conv2d(part, self._cast(_folded(rows, 3, right)), self._cast(layer.bias)))
        parts = torch.stack(quarters).unflatten(0, (2, 2))
        return x.with_data(_last(rearrange(parts, "r q n c h w -> n c (h r) (w q)")))

    def _double_rate(self, layer: Any, x: Planes) -> Planes:
        """The first frame as it is, then two for each: a causal convolution that does not see the first."""
        if x.frames == 1:
            return x
        clips = x.clips()
        later = x.with_frames(clips[:, 1:])
        weight = rearrange(layer.weight, "O I t h w -> O (t I) h w")
        y = functional.conv2d(_with_past(later, 2), self._cast(weight), self._cast(layer.bias))
        y = rearrange(y, "(B F) (k c) h w -> B (F k) c h w", F=later.frames, k=2)
        return x.with_frames(torch.cat([clips[:, :1], y], 1))


@torch.no_grad()
def flatten(vae: AutoencoderKLWan) -> None:
    """Nothing; the new VAE now looks at one frame at a time, and a clip at rest is the same whatever a layer does to the frame rate."""
    layers: list[Any] = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]
    for layer in layers:
        if layer.kernel_size[0] == 3:
            weight = layer.weight
            weight[:, :, :2] = 0
            if layer.kernel_size[1] == 1:
                weight[:, :, 2, :, :] = torch.eye(weight.shape[1]).repeat(len(weight) // weight.shape[1], 1)[..., None, None]
                torch.nn.init.zeros_(layer.bias)
            else:
                weight[:, :, 2] *= 3**0.5


def _last(planes: torch.Tensor) -> torch.Tensor:
    """The same planes with channels last in memory."""
    return planes.contiguous(memory_format=torch.channels_last)


def _with_past(x: Planes, past: int) -> torch.Tensor:
    """[B*F (past+1)*C H W]: beside each frame the `past` frames before it, oldest first, zero before the first."""
    clips = x.clips()
    shifted = []
    for back in range(past, -1, -1):
        kept = clips[:, : max(0, x.frames - back)]
        shifted.append(torch.cat([torch.zeros_like(clips[:, : min(back, x.frames)]), kept], 1))
    return _last(torch.cat(shifted, 2).flatten(0, 1))


def _average_down(shortcut: Any, x: Planes) -> torch.Tensor:
    """What `AvgDown3D` gives: space and time to channels, groups of channels averaged; zeros before the first frame."""
    time, side = shortcut.factor_t, shortcut.factor_s
    clips = x.clips()
    missing = -x.frames % time
    if missing:
        clips = torch.cat([torch.zeros_like(clips[:, :missing]), clips], 1)
    kept = shortcut.group_size
    if kept == shortcut.factor:
        slower = rearrange(clips, "B (F t) c h w -> B F t c h w", t=time).mean(2).flatten(0, 1)
        return functional.avg_pool2d(_last(slower), side)
    spread = rearrange(clips, "B (F t) c (h r) (w q) -> (B F) h w (c t r q)", t=time, r=side, q=side)
    return rearrange(spread, "n h w (o g) -> n o h w g", g=kept).mean(-1)


def _folded(weight: torch.Tensor, axis: int, odd: int) -> torch.Tensor:
    """The kernel, 3 along `axis`, as pixels of one parity of a doubled picture see the picture itself: 2 along `axis`."""
    first, second, third = weight.unbind(axis)
    return torch.stack([first + second, third] if odd else [first, second + third], axis)


def _frames(x: Planes, kept: torch.Tensor | None) -> Planes:
    """Only the frames `kept` [B k] of each clip; all when None."""
    if kept is None:
        return x
    return x.with_frames(x.clips()[torch.arange(len(kept))[:, None], kept])


def _duplicate_up_time(shortcut: Any, x: Planes) -> Planes:
    """The first half of `DupUp3D`: channels repeated, then to time; the first frame only once."""
    time = shortcut.factor_t
    if shortcut.repeats == shortcut.factor:
        return x.with_frames(x.clips().repeat_interleave(time, 1)[:, time - 1 :])
    repeated = x.data.repeat_interleave(shortcut.repeats, 1)
    clips = rearrange(repeated, "(B F) (c t s) h w -> B (F t) (c s) h w", F=x.frames, t=time, s=shortcut.factor_s**2)
    return x.with_frames(clips[:, time - 1 :])


def _duplicate_up_space(shortcut: Any, x: Planes) -> torch.Tensor:
    """The second half: channels to space."""
    side = shortcut.factor_s
    if shortcut.repeats == shortcut.factor:
        return functional.interpolate(x.data, scale_factor=float(side), mode="nearest")
    return _last(rearrange(x.data, "n (c r q) h w -> n c (h r) (w q)", r=side, q=side))


class _NormaliseAndActivate(torch.autograd.Function):
    """Root-mean-square normalisation over channels, scale, SiLU: one pass each way instead of a dozen."""

    @staticmethod
    def forward(context: Any, data: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        rows = data.permute(0, 2, 3, 1)
        rms = rows.float().square().mean(-1, keepdim=True).clamp_min(1e-24).rsqrt()
        context.save_for_backward(data, gamma, rms)
        scaled = rows * rms.to(data.dtype) * gamma.to(data.dtype)
        return functional.silu(scaled, inplace=True).permute(0, 3, 1, 2)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        data, gamma, rms = context.saved_tensors
        normal = data.permute(0, 2, 3, 1) * rms.to(data.dtype)
        scaled = normal * gamma.to(data.dtype)
        inner = torch.ops.aten.silu_backward(gradients[0].permute(0, 2, 3, 1), scaled)
        of_gamma = torch.mul(inner, normal).flatten(0, 2).sum(0, dtype=torch.float32)
        inner = inner * gamma.to(data.dtype)
        along = torch.mul(inner, normal).mean(-1, keepdim=True, dtype=torch.float32).to(data.dtype)
        return (inner.sub_(normal.mul_(along)).mul_(rms.to(data.dtype))).permute(0, 3, 1, 2), of_gamma


def normalise_and_activate(data: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """SiLU of planes [n C H W], each pixel divided by the root mean square of its channels, times gamma [C]."""
    result = _NormaliseAndActivate.apply(data, gamma)
    assert isinstance(result, torch.Tensor)
    return result
