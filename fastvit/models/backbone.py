"""Classifiers on the backbones of other families: which families there are, how their tokens are pooled, and a
classifier for the pools that transformers has no class for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from fastvit import ops
from fastvit.checkpoints.configuration import SIZE_LIMITS, check_size, check_stored, format_error, format_value
from fastvit.errors import InputError
from fastvit.models.heads import ViTModel, check_labels

CLS, MEAN, CLS_MEAN = "cls", "mean", "cls+mean"
WRAPPER_TYPE = "fastvit-classifier"  # the model type of `BackboneForImageClassification`

HALF = ([0.5] * 3, [0.5] * 3)
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
OPENAI = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


class Family(NamedTuple):
    """A family of backbones, by the names of its classes in transformers.

    Attributes:
        backbone: class of the model without a head.
        classifier: class with a classifier, if there is one, for the pools in `classifier_pools`.
        final_norm: norm of the backbone that its last hidden state has not passed, if any.
        has_fixed_size: whether the model only accepts images of `config.image_size`.
        normalization: mean and standard deviation of its pre-training, for checkpoints without an image processor.
    """

    name: str
    default_pool: str
    backbone: str
    classifier: str | None = None
    classifier_pools: tuple[str, ...] = ()
    has_class_token: bool = True
    final_norm: str | None = None
    has_fixed_size: bool = True
    normalization: tuple[list[float], list[float]] = HALF


CLIP = Family(
    "CLIP",
    MEAN,
    "CLIPVisionModel",
    "CLIPForImageClassification",
    (MEAN,),
    final_norm="post_layernorm",
    normalization=OPENAI,
)
SIGLIP = Family(
    "SigLIP", MEAN, "SiglipVisionModel", "SiglipForImageClassification", (MEAN,), has_class_token=False
)  # fmt: skip
# model type -> family. ViT and ViTMAE are computed by our own ViT.
FAMILIES = {
    "vit": Family("ViT", CLS, "ViTModel", "ViTForImageClassification", (CLS,)),
    "deit": Family("DeiT", CLS, "DeiTModel", "DeiTForImageClassification", (CLS,), normalization=IMAGENET),
    "beit": Family("BEiT", MEAN, "BeitModel", "BeitForImageClassification", (MEAN, CLS), has_fixed_size=False),
    "dinov2": Family(
        "DINOv2",
        CLS_MEAN,
        "Dinov2Model",
        "Dinov2ForImageClassification",
        (CLS_MEAN,),
        has_fixed_size=False,
        normalization=IMAGENET,
    ),
    "dinov2_with_registers": Family(
        "DINOv2 with registers",
        CLS_MEAN,
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        (CLS_MEAN,),
        has_fixed_size=False,
        normalization=IMAGENET,
    ),
    "dinov3_vit": Family("DINOv3 ViT", CLS_MEAN, "DINOv3ViTModel", has_fixed_size=False, normalization=IMAGENET),
    "vit_mae": Family("ViTMAE", MEAN, "ViTModel", "ViTForImageClassification", (CLS,), normalization=IMAGENET),
    "vit_msn": Family("ViTMSN", CLS, "ViTMSNModel", "ViTMSNForImageClassification", (CLS,), normalization=IMAGENET),
    "ijepa": Family(
        "I-JEPA",
        MEAN,
        "IJepaModel",
        "IJepaForImageClassification",
        (MEAN,),
        has_class_token=False,
        normalization=IMAGENET,
    ),
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
}

# Models that look like a supported family -> why they are not.
REFUSED = {
    "siglip2": ": SigLIP2 for images of variable size (NaFlex) is not supported; checkpoints of one size are 'siglip'",
    "yolos": ": YOLOS is trained for detection, and its tokens are those of boxes",
}


def get_family(stored: Mapping[str, Any], where: str) -> Family:
    """The family of a checkpoint by its config.json.

    Raises:
        InputError: another model; the message lists the families.
    """
    model_type = stored.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if "architecture" in stored or model_type == "timm_wrapper":
        raise InputError(f"{where}: a timm checkpoint; convert it first: fastvit convert {where} FOLDER")
    names = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
    reason = REFUSED.get(model_type, "") if isinstance(model_type, str) else ""
    raise InputError(f"{where}: expected a checkpoint of {names}; found model type {format_value(model_type)}{reason}")


def choose_pool(family: Family, pool: str | None) -> str:
    """The pool to classify by: the family's default if `pool` is None.

    Raises:
        InputError: the family has no class token.
    """
    if pool is not None and pool != MEAN and not family.has_class_token:
        raise InputError(f"--pool: expected mean for {family.name}, which has no class token, got {pool}")
    return pool or family.default_pool


def get_vision_config(config: Any) -> Any:
    """The config with the sizes of the backbone: `config` itself, or the part of it that describes the images."""
    for name in ("backbone_config", "vision_config"):
        if isinstance(nested := getattr(config, name, None), PreTrainedConfig):
            return nested
    return config


def describe_model(config: Any) -> str:
    """The kind of a model, with an article: "A DINOv2 model"."""
    model_type = get_vision_config(config).model_type
    if model_type == "vit":
        return "A Vision Transformer"
    return f"{'An' if model_type == 'ijepa' else 'A'} {FAMILIES[model_type].name} model"


def count_prefix_tokens(config: Any) -> int:
    """Number of tokens before those of the patches: class token, distillation token, registers."""
    vision = get_vision_config(config)
    family = FAMILIES.get(vision.model_type)
    if family is not None and not family.has_class_token:
        return 0
    return 1 + (vision.model_type == "deit") + (getattr(vision, "num_register_tokens", None) or 0)


def parse_backbone_config(stored: Mapping[str, Any], model: str) -> Any:
    """The config that the content of a config.json describes, after a check of everything that has a size.

    Args:
        stored: the content.
        model: hub id or folder of the checkpoint.

    Raises:
        InputError: a key leads away from the checkpoint, or a value has another type or range.
    """
    config_class: Any = BackboneConfig
    where = f"{model}: config.json"
    if stored.get("model_type") != WRAPPER_TYPE:
        get_family(stored, model)
        config_class = type(AutoConfig.for_model(stored["model_type"]))
    check_stored(stored, where, config_class)
    for name in ("backbone_config", "vision_config", "text_config"):
        nested = stored.get(name)
        if isinstance(nested, Mapping):
            if name == "backbone_config":
                get_family(nested, f"{where}: {name}")
            nested_class = type(AutoConfig.for_model(nested["model_type"])) if "model_type" in nested else config_class
            check_stored(nested, f"{where}: {name}", nested_class)
        elif nested is not None or (name == "backbone_config" and config_class is BackboneConfig):
            raise InputError(f"{where}: {name}: expected an object, got {format_value(nested)}")
    try:
        config = config_class.from_dict(dict(stored))
    except Exception as error:  # the config's own validation has no common error class
        raise InputError(f"{where}: not a valid config: {format_error(error)}") from error
    vision = get_vision_config(config)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
        check_size(name, getattr(vision, name, None), SIZE_LIMITS[name], where)
    if vision.num_channels != 3:
        raise InputError(f"{where}: num_channels: expected 3, for RGB, got {format_value(vision.num_channels)}")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# uint8 images
# ---------------------------------------------------------------------------------------------------------------------


def accept_uint8(model: Any) -> Any:
    """Let a model accept uint8 images `[B, H, W, 3]`, normalised by `config.image_mean` and `config.image_std`."""
    if not accepts_uint8(model):
        model.register_forward_pre_hook(normalize_images, with_kwargs=True)
    return model


def accepts_uint8(model: nn.Module) -> bool:
    return normalize_images in model._forward_pre_hooks.values()


def normalize_images(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """Forward pre-hook: uint8 pixels become floating `[B, 3, H, W]` of the model's dtype."""
    kwargs = dict(kwargs)
    if kwargs.get("labels") is None:
        # Trainer passes it for the model's own loss; transformers would pass it on to every attention.
        kwargs.pop("num_items_in_batch", None)
    pixels = args[0] if args else kwargs.get("pixel_values")
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
        if pixels.shape[1] != 3:
            pixels = pixels.permute(0, 3, 1, 2)
        mean, std = (getattr(model.config, name, None) or [0.5] * 3 for name in ("image_mean", "image_std"))
        pixels = ops.normalize_pixels(pixels, tuple(mean), tuple(std), model.dtype)
        if args:
            args = (pixels, *args[1:])
        else:
            kwargs["pixel_values"] = pixels
    return args, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------------------------------


class BackboneConfig(PreTrainedConfig):
    """Config of `BackboneForImageClassification`.

    Attributes:
        backbone_config: config of the backbone, of a family in `FAMILIES`.
        pool: "cls", "mean" or "cls+mean".
    """

    model_type = WRAPPER_TYPE
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (what transformers expects)

    backbone_config: Any = None
    pool: str = CLS

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.backbone_config, Mapping):
            stored = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(stored.pop("model_type"), **stored)
        if self.pool not in (CLS, MEAN, CLS_MEAN):
            raise InputError(f"config.pool: expected cls, mean or cls+mean, got {format_value(self.pool)}")
        super().__post_init__(**kwargs)


class BackboneForImageClassification(PreTrainedModel):
    """A backbone with a linear classifier on the class token, on the mean of the patch tokens, or on both."""

    config_class = BackboneConfig
    config: BackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = build_backbone(config.backbone_config)
        self.family = FAMILIES[config.backbone_config.model_type]
        features = config.backbone_config.hidden_size * (2 if config.pool == CLS_MEAN else 1)
        self.classifier = nn.Linear(features, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # that of the backbone; transformers would guess from this file's text

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: normalised, `[B, 3, H, W]`.
            labels: class indices, int64 `[B]`.
            kwargs: arguments of the backbone.

        Returns:
            logits `[B, num_labels]`, and the loss if labels are given.
        """
        outputs = self.backbone(pixel_values, **kwargs, return_dict=True)
        tokens = outputs.last_hidden_state
        if self.family.final_norm is not None:
            tokens = getattr(self.backbone, self.family.final_norm)(tokens)
        prefix = count_prefix_tokens(self.config)
        logits = self.classifier(pool_tokens(tokens, self.config.pool, prefix))
        loss = None
        if labels is not None:
            check_labels(labels, logits, self.config.problem_type, kwargs.get("ignore_index", -100))
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def pool_tokens(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """Tokens `[B, N, D]`, of which the first `prefix` are no patches, to features `[B, D]`, `[B, 2 D]` for cls+mean."""
    parts = []
    if pool in (CLS, CLS_MEAN):
        parts.append(tokens[:, 0])
    if pool in (MEAN, CLS_MEAN):
        parts.append(tokens[:, prefix:].mean(dim=1))
    return torch.cat(parts, dim=-1)


def build_backbone(config: Any) -> Any:
    """The model without a head, with random weights. A ViT is ours."""
    backbone_class = ViTModel if config.model_type == "vit" else getattr(transformers, get_backbone_class(config))
    return backbone_class(config, **get_backbone_options(config))


def get_backbone_class(config: Any) -> str:
    return FAMILIES[config.model_type].backbone


def get_backbone_options(config: Any) -> dict[str, Any]:
    """Arguments of the class of a backbone, so that it has no pooler, whose parameters would stay unused."""
    has_pooler = config.model_type in ("vit", "deit", "beit", "ijepa")
    return {"add_pooling_layer": False} if has_pooler else {}


def set_image_size(config: Any, image_size: tuple[int, int]) -> Any:
    """A copy of a config for images of another (height, width)."""
    config = copy.deepcopy(config)
    get_vision_config(config).image_size = image_size[0] if image_size[0] == image_size[1] else list(image_size)
    return config
