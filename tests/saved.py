"""Modules on the two-block base of the golden files and checkpoints of them, values a function of seed 3: for tests that read one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mvwan.checkpoint import save_checkpoint
from mvwan.config import BaseConfig, Config, GroupConfig, LoraConfig, TrainableConfig, config_from_dict
from mvwan.model.trainable import parameters_by_name
from mvwan.model.wan import base_digest
from mvwan.training_module import HeatmapWanTrainingModule

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "base.safetensors"


def save_run(
    output: Path,
    *,
    still: tuple[str, ...] = (),
    ema: bool = False,
    load: Path | None = None,
    step: int = 4,
    shake: float = 0.1,
    **sections: Any,
) -> HeatmapWanTrainingModule:
    """The module of which a checkpoint then lies in the run's folder `output`: every trained tensor moved but those of the groups `still`.

    `sections` are settings by section, laid over rank 4 and the golden base in float32; `load` is a checkpoint to start from.
    """
    values: dict[str, Any] = {"base": {"source": str(BASE), "dtype": "float32"}, "trainable": {"lora": {"rank": 4}}} | sections
    config = config_from_dict(values)
    module = HeatmapWanTrainingModule(config=config, checkpoint=load, print_banners=False)
    parameters, generator = parameters_by_name(module.model), torch.Generator().manual_seed(3)
    for row in module.table.trainable_rows:
        for name in row.names if row.name not in still else ():
            parameters[name].data += shake * torch.randn(parameters[name].shape, generator=generator)
    tensors = module.saved_tensors()
    trained = {name: tensor for name, tensor in tensors.items() if parameters[name].requires_grad}
    moments = {f"{moment}/{name}": torch.full_like(tensor, 0.5) for name, tensor in trained.items() for moment in ("exp_avg", "exp_avg_sq")}
    average = {name: tensor * 0.9 for name, tensor in tensors.items()} if ema else None
    updates = {row.name: step for row in module.table.trainable_rows}
    save_checkpoint(output, step, tensors, manifest_of(module), moments, {"updates": updates}, ema=average)
    return module


def manifest_of(module: HeatmapWanTrainingModule) -> dict[str, Any]:
    config, lora = module.config, module.config.trainable.lora
    return {
        "base": {"id": config.base.source, "digest": base_digest(config.base.source)},
        "views": config.model.views,
        "fusion": config.model.fusion,
        "action_head": config.model.action_head,
        "lora": {"rank": lora.rank, "alpha": float(lora.rank if lora.alpha is None else lora.alpha)},
        "unfreeze_modulation_and_norms": config.unfreeze_modulation_and_norms,
        "groups": module.saved_groups(),
        "data": {"fingerprint": "d"},
        "items_per_step": 4,
        "config": config.to_dict(),
    }


def make_module(switch: bool = False, load: Path | None = None, groups: dict[str, GroupConfig] | None = None) -> HeatmapWanTrainingModule:
    """On the golden base in float32, rank 4."""
    config = Config(
        base=BaseConfig(source=str(BASE), dtype="float32"),
        trainable=TrainableConfig(lora=LoraConfig(rank=4), groups=groups or {}),
        unfreeze_modulation_and_norms=switch,
    )
    return HeatmapWanTrainingModule(config=config, checkpoint=load, print_banners=False)


def shake(module: HeatmapWanTrainingModule) -> None:
    """Moves every trained tensor, each by a size of its own."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in parameters_by_name(module.model).items():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * (0.1 + 0.01 * (len(name) % 7))


def save(
    module: HeatmapWanTrainingModule, output: Path, step: int = 4, loss: float | None = None, windows: int | None = None, **more: Any
) -> Path:
    """The new checkpoint folder, with one moment per tensor; `windows` is what `train.evaluate_windows` was."""
    tensors = module.saved_tensors()
    moments = {f"exp_avg/{name}": torch.full_like(tensor, 0.5) for name, tensor in tensors.items()}
    manifest = manifest_of(module) | {"held_out_loss": loss}
    if windows is not None:
        manifest["config"]["train"]["evaluate_windows"] = windows
    return save_checkpoint(output, step, tensors, manifest, moments, {"updates": {"lora": step}}, **more)


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
