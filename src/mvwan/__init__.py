"""mvwan: Wan2.2-TI2V-5B as a multi-view RGB + heatmap video model, trained on robot demonstrations.

The public Python surface. Each name is imported when it is first used, so `import mvwan` loads neither torch nor diffusers.
"""

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

__all__ = ["Config", "Prediction", "__version__", "load_model", "predict", "trainable_table"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mvwan' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
