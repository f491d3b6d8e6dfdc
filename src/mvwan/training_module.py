"""`HeatmapWanTrainingModule`: base + surgery + trainable groups + checkpoint as one module, and Batch -> squared errors.

What is frozen stays in eval mode whatever `.train()` says. Holds neither VAE nor text encoder: batches are encoded already. Knows
no optimizer, no process group and no file of a run.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mvwan import flow
from mvwan.actions import action_losses
from mvwan.batch import Batch
from mvwan.compatibility import Compatibility, check_identity
from mvwan.config import BaseConfig, Config, LoraConfig, ModelConfig, TrainableConfig
from mvwan.errors import MvwanError
from mvwan.heat_reader import HeatReader
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.quantized import quantize_frozen
from mvwan.model.surgery import LoadReport, load_model
from mvwan.model.trainable import parameters_by_name
from mvwan.model.trainable_table import modulation_banner, multiview_banner
from mvwan.precision import settle


class HeatmapWanTrainingModule(nn.Module):
    """The adapted model and what trains in it.

    Settings come from the keywords, or all of them from `config`. `checkpoint` (a run, a checkpoint folder, a file of the older
    system) gives the trained tensors to start from; one that lacks groups which train now is refused, unless
    `accept_trainable_change`: these then start from the base. `device` "meta" counts without weights. `reader` adds
    `train.heat_reader_weight` times the error of what it reads to the heat's; without one that is the error of the latents alone. Raises
    `MvwanError` for settings that do not fit the base, and for a checkpoint that must not be trained on.
    """

    def __init__(
        self,
        base: str | Path = "tiny",
        *,
        views: int = 3,
        fusion: Literal["channel", "view"] = "channel",
        lora_rank: int = 32,
        lora_alpha: float | None = None,
        unfreeze_modulation_and_norms: bool = False,
        config: Config | None = None,
        checkpoint: str | Path | None = None,
        accept_trainable_change: bool = False,
        device: str | torch.device = "cpu",
        print_banners: bool = True,
        reader: HeatReader | None = None,
    ) -> None:
        super().__init__()
        keywords = (str(base), views, fusion, lora_rank, lora_alpha, unfreeze_modulation_and_norms)
        if config is None:
            config = Config(
                base=BaseConfig(source=str(base)),
                model=ModelConfig(views=views, fusion=fusion),
                trainable=TrainableConfig(lora=LoraConfig(rank=lora_rank, alpha=lora_alpha)),
                unfreeze_modulation_and_norms=unfreeze_modulation_and_norms,
            )
        elif keywords != ("tiny", 3, "channel", 32, None, False):
            raise MvwanError(
                "HeatmapWanTrainingModule takes its settings from `config` or from the other keywords, not from both. Remove one."
            )
        self.config = settle(config, None if str(device) == "meta" else device)
        self.print_banners = print_banners and int(os.environ.get("RANK", "0")) == 0
        self.model, self.report = self._load(checkpoint, accept_trainable_change, device)
        self.table, self.groups = self.report.table, self.report.groups
        self.model.attend_with(config.model.attention)
        if config.model.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.reader = reader
        self.train()
        if self.print_banners:
            print(modulation_banner(self.table) + multiview_banner(self.table))

    def _load(
        self, checkpoint: str | Path | None, accept_trainable_change: bool, device: str | torch.device
    ) -> tuple[MultiViewWan, LoadReport]:
        base, model = self.config.base, self.config.model
        loaded, report = load_model(
            base.source,
            checkpoint=checkpoint,
            views=model.views,
            fusion=model.fusion,
            unfreeze_modulation_and_norms=self.config.unfreeze_modulation_and_norms,
            dtype=getattr(torch, base.dtype),
            trainable=self.config.trainable,
            train=self.config.train,
            device=device,
            random_weights=base.random_weights,
            seed=self.config.seed,
            purpose="train changed" if accept_trainable_change else "train",
            action_head=model.action_head,
            view_code=model.view_code,
        )
        if checkpoint is not None and report.manifest is not None:
            lora = self.config.trainable.lora
            check_identity(report.manifest, checkpoint, alpha=float(lora.rank if lora.alpha is None else lora.alpha))
        return loaded, report

    @property
    def fit(self) -> Compatibility | None:
        """How `checkpoint` fits, or None without one."""
        return self.report.fit

    def _unfreeze_modulation(self) -> int:
        """The number of AdaLN tables that train (0 with the switch off), after printing the notice about them."""
        print(modulation_banner(self.table))
        row = self.table.row("modulation")
        return row.tensors if row is not None and row.trainable else 0

    def _unfreeze_mv_modules(self) -> int:
        """The number of multi-view tensors that train, after printing the notice about them."""
        print(multiview_banner(self.table))
        rows = (self.table.row(name) for name in ("projector", "modulation_mvs", "lora_mvs", "mvs_norms"))
        return sum(row.tensors for row in rows if row is not None and row.trainable)

    def train(self, mode: bool = True) -> "HeatmapWanTrainingModule":
        """Itself; train mode reaches only parts that hold a trained parameter, so no dropout of a frozen part ever acts."""
        super().train(mode)
        for part in self.modules():
            part.training = mode and any(parameter.requires_grad for parameter in part.parameters())
        return self

    def quantize_frozen(self) -> None:
        """Nothing; frozen weights are held as `base.quantize` says, but for those that a checkpoint holds. Call it before anything moves
        to a GPU, which then never holds them wide.
        """
        narrowed = quantize_frozen(self.model, self.config.base.quantize, keep=self.saved_tensors())
        # Every process has the same base, and DDP cannot send what torchao holds.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, [f"model.{name}" for name in narrowed])

    def compile_blocks(self) -> None:
        """Nothing; when a block first runs, `torch.compile` makes kernels of it. Blocks are alike: one compilation serves them all."""
        for block in self.model.blocks:
            block.compile()

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold, by parameter name: the trained tensors, and frozen ones that `checkpoint` brought along."""
        parameters = parameters_by_name(self.model)
        brought = (name for names in (self.fit.extra if self.fit else {}).values() for name in names)
        return {name: parameters[name].detach() for name in (*self.table.trainable_names, *brought)}

    def saved_groups(self) -> dict[str, dict[str, Any]]:
        """{group: {"mode", "names"}} of `saved_tensors`."""
        groups = {row.name: {"mode": row.mode, "names": list(row.names)} for row in self.table.trainable_rows}
        return groups | {group: {"mode": "frozen", "names": list(names)} for group, names in (self.fit.extra if self.fit else {}).items()}

    def _read_error(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        reader, weight = self.reader, self.config.train.heat_reader_weight
        # The velocity is as far off as the clean latents that it stands for, with the other sign.
        return None if reader is None else lambda difference: weight * reader.squared_error(difference)

    def forward(self, batch: Batch, seed: int, step: int, sigma: torch.Tensor | None = None) -> flow.StreamSums:
        """Squared errors per stream and sample, and the cross entropy of the action head where there is one.

        Sigma and noise are those of (seed, step, sample id); `sigma` [B] replaces the former.
        """
        condition_frames = self.config.train.condition_frames
        clean = batch.latents
        noise = flow.draw_noise(seed, step, batch.sample_ids, clean.shape[1:]).to(clean.device)
        if sigma is None:
            sigma = flow.draw_sigma(seed, step, batch.sample_ids, self.config.flow)
        sigma_bf = flow.sigma_per_frame(sigma.to(clean.device), clean.shape[3], condition_frames)
        noisy = flow.add_noise(clean, noise, sigma_bf)
        target = flow.velocity_target(clean, noise)
        if self.config.model.action_head == "none":
            velocity = self.model(noisy, flow.timestep(sigma_bf), batch.text, condition_frames, rays=batch.rays)
            return flow.stream_losses(velocity, target, batch.heat_valid, condition_frames, self._read_error())
        velocity, logits = self.model(noisy, flow.timestep(sigma_bf), batch.text, condition_frames, return_action=True, rays=batch.rays)
        sums = flow.stream_losses(velocity, target, batch.heat_valid, condition_frames, self._read_error())
        return replace(sums, **action_losses(logits, batch.gripper_open, batch.rotation_deg, condition_frames))
