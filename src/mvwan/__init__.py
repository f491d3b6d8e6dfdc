"""mvwan: Wan2.2-TI2V-5B as a multi-view RGB + heatmap video model, trained on robot demonstrations.

The public Python surface. Each name is imported when it is first used, so `import mvwan` loads neither torch nor diffusers.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvwan.batch import Prediction
    from mvwan.config import Config
    from mvwan.model.surgery import load_model, trainable_table
    from mvwan.sample import predict

__version__ = "0.1.0"

_HOME = {
    "Config": "mvwan.config",
    "Prediction": "mvwan.batch",
    "load_model": "mvwan.model.surgery",
    "predict": "mvwan.sample",
    "trainable_table": "mvwan.model.surgery",
}

# PEFT and diffusers load torchao where it is installed, and all of them then say in every process what nobody here calls is lacking.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["Config", "Prediction", "__version__", "load_model", "predict", "trainable_table"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mvwan' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
