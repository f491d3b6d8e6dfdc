"""Pixels and prompts -> latents and embeddings, and back. The sole owner of the VAE's latent statistics.

Everybody else sees latents of about unit size per channel, (z - mean) / std, and zero-padded prompts. VAE and text encoder are frozen
and in eval mode whatever `.train()` anybody calls on what holds a codec. Knows no heatmap, no window and no cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from mvwan.errors import MvwanError
from mvwan.files import sha256_file, sha256_json
from mvwan.model.wan import codec_files, load_text_encoder, load_vae
from mvwan.shapes import check_num_frames, check_picture_size


def codec_digest(source: str | Path, text_tokens: int) -> str:
    """64 hex digits over the files of VAE, text encoder and tokenizer, and the prompt length: what latents and embeddings depend on."""
    return sha256_json([{f"{part}/{path.name}": sha256_file(path) for part, path in codec_files(source)}, text_tokens])


class LatentCodec:
    """VAE and text encoder of a base, with one normalisation for all."""

    def __init__(self, vae: Any, tokenizer: Any, text_encoder: Any, text_tokens: int, digest: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.text_tokens = text_tokens
        self.digest = digest
        """Of `codec_digest`: part of the key of everything encoded."""
        self._mean = torch.tensor(vae.config.latents_mean)[:, None, None, None]
        self._std = torch.tensor(vae.config.latents_std)[:, None, None, None]

    @classmethod
    def load(cls, source: str | Path, text_tokens: int, device: str | torch.device = "cpu") -> "LatentCodec":
        """The codec of base `source`: the VAE in float32, the text encoder as stored. Raises `MvwanError` when the base has none."""
        digest = codec_digest(source, text_tokens)
        tokenizer, text_encoder = load_text_encoder(source)
        vae: Any = load_vae(source)
        return cls(vae.to(device), tokenizer, text_encoder.to(device), text_tokens, digest)

    @torch.no_grad()
    def encode_video(self, rgb: np.ndarray) -> torch.Tensor:
        """[N C f h w] float32 on the CPU: normalised posterior means of rgb [N F H W 3] uint8.

        Raises `MvwanError` unless F is 4*k + 1 and H, W are multiples of 32.
        """
        assert rgb.ndim == 5 and rgb.dtype == np.uint8, f"encode_video: {rgb.shape} {rgb.dtype}, needs [N F H W 3] uint8"
        check_num_frames(rgb.shape[1])
        check_picture_size(rgb.shape[2], rgb.shape[3])
        pictures = rearrange(torch.from_numpy(np.ascontiguousarray(rgb)), "N F H W C -> N C F H W")
        pictures = pictures.to(self.vae.device, torch.float32) / 127.5 - 1
        latents = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist.mode()
        return ((latents.float().cpu() - self._mean) / self._std).contiguous()

    @torch.no_grad()
    def decode_video(self, latents: torch.Tensor) -> np.ndarray:
        """[N F H W 3] uint8 of normalised latents [N C f h w]: the inverse of `encode_video`, as far as the VAE is one."""
        raw = latents.detach().float().cpu() * self._std + self._mean
        pictures = self.vae.decode(raw.to(self.vae.device, self.vae.dtype)).sample.float().cpu()
        values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return np.ascontiguousarray(rearrange(values, "N C F H W -> N F H W C").numpy())

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """[N L D] float32 on the CPU, zero after each prompt's own tokens. Raises `MvwanError` for a prompt longer than `text_tokens`."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.text_tokens, truncation=False, return_tensors="pt")
        ids, mask = tokens.input_ids, tokens.attention_mask
        if ids.shape[1] > self.text_tokens:
            longest = max(prompts, key=len)
            raise MvwanError(
                f"prompt {longest[:60]!r}: {ids.shape[1]} tokens, data.text_tokens={self.text_tokens}. Raise data.text_tokens."
            )
        device = self.text_encoder.device
        self.text_encoder.eval()  # somebody may have called train() on it since: its dropout would make every call differ
        embedded = self.text_encoder(ids.to(device), mask.to(device)).last_hidden_state.float().cpu()
        return torch.where(mask[..., None].bool(), embedded, torch.zeros(()))
