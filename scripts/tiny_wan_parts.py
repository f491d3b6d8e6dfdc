"""The tiny Wan's parts: sizes, construction from a seed, and the diffusers folder they are written to.

The classes are those of Wan2.2-TI2V-5B. Knows no data and no training. The text encoder reads bytes, so nothing is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from mvwan.files import remove_directory, whole_directory, write_json
from mvwan.model.wan import in_float32_island
from mvwan.shapes import FRAMES_PER_LATENT, LATENT_CHANNELS, PATCH_SIZE, PIXELS_PER_LATENT

SHIFT = 5.0
TEXT_TOKENS = 64
_VAE_PATCH = 4
VAE_SIZES: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": 128,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 0,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 3 * _VAE_PATCH**2,
    "out_channels": 3 * _VAE_PATCH**2,
    "patch_size": _VAE_PATCH,
    "scale_factor_spatial": PIXELS_PER_LATENT,
    "scale_factor_temporal": FRAMES_PER_LATENT,
}
"""Two levels above the latents and patches of 4 px, where the 5B's VAE has three and 2 px: the same compression at a third of the work."""
TEXT_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 4,
    "num_heads": 4,
    "dropout_rate": 0.1,
}
TRANSFORMER_SIZES: dict[str, Any] = {
    "patch_size": PATCH_SIZE,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_SIZES["d_model"],
    "freq_dim": 128,
    "ffn_dim": 1024,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
_FIRST_LOG_VARIANCE = -6.0


def new_vae(seed: int, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """An untrained VAE; latents start nearly without noise. `mean` and `std` [48] are the latent statistics of its config."""
    torch.manual_seed(seed)
    statistics: dict[str, Any] = {"latents_mean": mean or [0.0] * LATENT_CHANNELS, "latents_std": std or [1.0] * LATENT_CHANNELS}
    vae = AutoencoderKLWan(**VAE_SIZES, **statistics)
    with torch.no_grad():
        bias = vae.quant_conv.bias
        assert bias is not None
        bias[LATENT_CHANNELS:] = _FIRST_LOG_VARIANCE
    return vae


def posterior(vae: AutoencoderKLWan, pictures: torch.Tensor) -> Any:
    """The VAE's Gaussian over latents (`mean`, `std`, `var`, `logvar`) of pictures [B 3 F H W] in -1..1."""
    encoded: Any = vae.encode(pictures)
    return encoded.latent_dist


def new_text_encoder(seed: int) -> UMT5EncoderModel:
    """An untrained text encoder."""
    torch.manual_seed(seed)
    return UMT5EncoderModel(UMT5Config(**TEXT_SIZES))


def new_transformer(seed: int) -> WanTransformer3DModel:
    """An untrained stock transformer."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(**TRANSFORMER_SIZES)


def export(
    folder: Path,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    quality: Mapping[str, Any],
) -> int:
    """Bytes written: a diffusers pipeline folder in bfloat16, islands in float32, `quality.json` beside it. Replaces `folder` whole."""
    for model in (vae, text_encoder):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if in_float32_island(name) else torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    tokenizer: Any = ByT5Tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
        expand_timesteps=True,
    )
    new = folder.with_name(f"{folder.name}.new")
    if new.exists():
        remove_directory(new)
    with whole_directory(new) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / "quality.json", dict(quality))
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        remove_directory(folder)
    new.rename(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
