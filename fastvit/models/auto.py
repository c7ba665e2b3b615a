"""Registration of fastvit's classes with the Auto classes of transformers, for checkpoints of model type "vit"."""

from __future__ import annotations

import transformers

from fastvit.models import heads

AUTO_CLASSES = {
    "AutoModel": "ViTModel",
    "AutoModelForImageClassification": "ViTForImageClassification",
    "AutoModelForMaskedImageModeling": "ViTForMaskedImageModeling",
}


def register() -> None:
    """Make the Auto classes of transformers load fastvit's classes for ViT checkpoints, for this process.

    It affects `AutoModel`, `AutoModelForImageClassification`, `AutoModelForMaskedImageModeling` and `pipeline`, but not
    models that are already loaded. `fastvit.unregister()` undoes it. Calling this twice is harmless.
    """
    _register_classes(heads)


def unregister() -> None:
    """Undo `fastvit.register()`: the Auto classes load transformers' own ViT classes again."""
    _register_classes(transformers)


def _register_classes(source: object) -> None:
    for name, model_class in AUTO_CLASSES.items():
        auto_class, model = getattr(transformers, name), getattr(source, model_class)
        auto_class.register(transformers.ViTConfig, model, exist_ok=True)
        if auto_class._model_mapping[transformers.ViTConfig] is not model:
            # Before transformers 5.2x `register` ignores transformers' own configs.
            auto_class._model_mapping._extra_content[transformers.ViTConfig] = model
