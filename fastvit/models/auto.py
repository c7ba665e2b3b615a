"""transformers' Auto classes, made to load our classes for checkpoints of model type "vit"."""

from __future__ import annotations

import transformers

from fastvit.models import heads

AUTO_CLASSES = {
    "AutoModel": "ViTModel",
    "AutoModelForImageClassification": "ViTForImageClassification",
    "AutoModelForMaskedImageModeling": "ViTForMaskedImageModeling",
}


def register() -> None:
    """From now on, in this process, `AutoModel`, `AutoModelForImageClassification` and
    `AutoModelForMaskedImageModeling`, and `pipeline` through them, load fastvit's classes for every ViT checkpoint.

    Models that exist already stay what they are. `fastvit.unregister()` ends it; either may be called twice.
    """
    _register_classes(heads)


def unregister() -> None:
    """Undo `fastvit.register()`: the Auto classes load transformers' own ViT again."""
    _register_classes(transformers)


def _register_classes(source: object) -> None:
    for name, model_class in AUTO_CLASSES.items():
        auto_class, model = getattr(transformers, name), getattr(source, model_class)
        auto_class.register(transformers.ViTConfig, model, exist_ok=True)
        if auto_class._model_mapping[transformers.ViTConfig] is not model:
            # Before transformers 5.2x `register` passes over transformers' own configs.
            auto_class._model_mapping._extra_content[transformers.ViTConfig] = model
