"""A saved checkpoint on the two-block base of the golden files, its values a function of seed 3: for the tests that read one."""

from pathlib import Path
from typing import Any

import torch

from mvwan.checkpoint import save_checkpoint
from mvwan.config import config_from_dict
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
    lora, tensors = config.trainable.lora, module.saved_tensors()
    trained = {name: tensor for name, tensor in tensors.items() if parameters[name].requires_grad}
    manifest = {
        "base": {"id": config.base.source, "digest": base_digest(config.base.source)},
        "views": config.model.views,
        "fusion": config.model.fusion,
        "lora": {"rank": lora.rank, "alpha": float(lora.rank if lora.alpha is None else lora.alpha)},
        "unfreeze_modulation_and_norms": config.unfreeze_modulation_and_norms,
        "groups": module.saved_groups(),
        "config": config.to_dict(),
    }
    moments = {f"{moment}/{name}": torch.full_like(tensor, 0.5) for name, tensor in trained.items() for moment in ("exp_avg", "exp_avg_sq")}
    average = {name: tensor * 0.9 for name, tensor in tensors.items()} if ema else None
    save_checkpoint(output, step, tensors, manifest, moments, {"schedule": "constant"}, ema=average)
    return module
