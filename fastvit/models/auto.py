"""Registration of fastvit's classes with the Auto classes of transformers, for checkpoints of model type "vit"."""

from __future__ import annotations

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastvit.models import backbone, heads
from fastvit.models.backbone import BackboneConfig

AUTO_CLASSES = {
    "AutoModel": "ViTModel",
    "AutoModelForImageClassification": "ViTForImageClassification",
    "AutoModelForMaskedImageModeling": "ViTForMaskedImageModeling",
}


def register() -> None:
    """Make the Auto classes of transformers load fastvit's classes for ViT checkpoints, for this process.

    It affects `AutoModel`, `AutoModelForImageClassification`, `AutoModelForMaskedImageModeling` and `pipeline`, but not
    models that are already loaded. They also load fine-tuned models of other families whose classifier transformers
    has no class for. `fastvit.unregister()` undoes it. Calling this twice is harmless.
    """
    _register_classes(heads)
    transformers.AutoConfig.register(backbone.WRAPPER_TYPE, BackboneConfig, exist_ok=True)
    transformers.AutoModelForImageClassification.register(
        BackboneConfig, backbone.BackboneForImageClassification, exist_ok=True
    )


def unregister() -> None:
    """Undo `fastvit.register()`: the Auto classes load transformers' own ViT classes again."""
    _register_classes(transformers)
    CONFIG_MAPPING._extra_content.pop(backbone.WRAPPER_TYPE, None)
    transformers.AutoModelForImageClassification._model_mapping._extra_content.pop(BackboneConfig, None)


def _register_classes(source: object) -> None:
    for name, model_class in AUTO_CLASSES.items():
        auto_class, model = getattr(transformers, name), getattr(source, model_class)
        auto_class.register(transformers.ViTConfig, model, exist_ok=True)
        if auto_class._model_mapping[transformers.ViTConfig] is not model:
            # Before transformers 5.2x `register` ignores transformers' own configs.
            auto_class._model_mapping._extra_content[transformers.ViTConfig] = model
