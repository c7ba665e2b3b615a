"""fastvit: a Vision Transformer that is a drop-in replacement for the ViT classes of `transformers`.

Names are imported on first use, so that `import fastvit` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from transformers import ViTConfig

    from fastvit.adapters.swap import optimize, restore
    from fastvit.checkpoints.convert import convert
    from fastvit.errors import InputError
    from fastvit.models.attention_interface import register_attention
    from fastvit.models.auto import register, unregister
    from fastvit.models.features import Features
    from fastvit.models.heads import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
    from fastvit.models.pretrained import ViTPreTrainedModel
    from fastvit.models.quantization import quantize
    from fastvit.ops import backend
    from fastvit.serve.predictor import Prediction, Predictor

_MODULES = {
    "Features": "fastvit.models.features",
    "InputError": "fastvit.errors",
    "Prediction": "fastvit.serve.predictor",
    "Predictor": "fastvit.serve.predictor",
    "ViTConfig": "transformers",
    "ViTForImageClassification": "fastvit.models.heads",
    "ViTForMaskedImageModeling": "fastvit.models.heads",
    "ViTModel": "fastvit.models.heads",
    "ViTPreTrainedModel": "fastvit.models.pretrained",
    "backend": "fastvit.ops",
    "convert": "fastvit.checkpoints.convert",
    "optimize": "fastvit.adapters.swap",
    "quantize": "fastvit.models.quantization",
    "register": "fastvit.models.auto",
    "register_attention": "fastvit.models.attention_interface",
    "restore": "fastvit.adapters.swap",
    "unregister": "fastvit.models.auto",
}

__all__ = [
    "Features",
    "InputError",
    "Prediction",
    "Predictor",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
    "ViTModel",
    "ViTPreTrainedModel",
    "backend",
    "convert",
    "optimize",
    "quantize",
    "register",
    "register_attention",
    "restore",
    "unregister",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'fastvit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
