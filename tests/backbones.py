"""Small checkpoints of every family of backbones, with random weights, as transformers saves them."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
IMAGES = {"image_size": 32, "patch_size": 8}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CROP = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
RESIZE = {"size": {"height": 32, "width": 32}}


class Case(NamedTuple):
    """A checkpoint, and the result of fine-tuning it with its usual pool.

    Attributes:
        model: class of the checkpoint.
        options: of its config.
        processor: preprocessor_config.json.
        pool: the family's default.
        result: class of transformers that loads the result; "" if it has none.
        model_type: of the result.
        prefix: number of tokens before the patches.
    """

    model: str
    options: dict
    processor: dict
    pool: str
    result: str
    model_type: str
    prefix: int = 1


BIT = {"image_processor_type": "BitImageProcessor", **CROP, **IMAGENET}
VIT = {"image_processor_type": "ViTImageProcessor", **RESIZE}
CLIP = {"image_processor_type": "CLIPImageProcessor", **CROP}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", **RESIZE}
TEXT = {"text_config": {**SIZES, "num_hidden_layers": 1, "vocab_size": 50}}
CASES = {
    "ViT": Case("ViTModel", {}, VIT, "cls", "ViTForImageClassification", "vit"),
    "DeiT": Case(
        "DeiTModel", {}, {"image_processor_type": "DeiTImageProcessor", **CROP, **IMAGENET}, "cls",
        "DeiTForImageClassification", "deit", 2,
    ),
    "BEiT": Case(
        "BeitForMaskedImageModeling", {"use_relative_position_bias": True},
        {"image_processor_type": "BeitImageProcessor", **RESIZE, "do_center_crop": False}, "mean",
        "BeitForImageClassification", "beit",
    ),
    "BEiT shared": Case(
        "BeitModel", {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
        {"image_processor_type": "BeitFeatureExtractor", **RESIZE}, "mean", "BeitForImageClassification", "beit",
    ),
    "DINOv2": Case("Dinov2Model", {"mlp_ratio": 2}, BIT, "cls+mean", "Dinov2ForImageClassification", "dinov2"),
    "DINOv2 giant": Case(
        "Dinov2ForImageClassification", {"use_swiglu_ffn": True, "mlp_ratio": 2}, BIT, "cls+mean",
        "Dinov2ForImageClassification", "dinov2",
    ),
    "DINOv2 with registers": Case(
        "Dinov2WithRegistersModel", {"mlp_ratio": 2}, BIT, "cls+mean", "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers", 5,
    ),
    "DINOv3 ViT": Case(
        "DINOv3ViTModel", {"num_register_tokens": 4},
        {"image_processor_type": "DINOv3ViTImageProcessorFast", **RESIZE}, "cls+mean", "", "fastvit-classifier", 5,
    ),
    "ViTMAE": Case("ViTMAEForPreTraining", {}, VIT, "mean", "", "fastvit-classifier"),
    "ViTMSN": Case("ViTMSNModel", {}, VIT, "cls", "ViTMSNForImageClassification", "vit_msn"),
    "I-JEPA": Case("IJepaModel", {}, VIT, "mean", "IJepaForImageClassification", "ijepa", 0),
    "CLIP": Case("CLIPModel", {}, CLIP, "mean", "CLIPForImageClassification", "clip"),
    "CLIP vision": Case("CLIPVisionModel", {}, CLIP, "mean", "CLIPForImageClassification", "clip"),
    "SigLIP": Case("SiglipModel", {}, SIGLIP, "mean", "SiglipForImageClassification", "siglip", 0),
    "SigLIP vision": Case("SiglipVisionModel", {}, SIGLIP, "mean", "SiglipForImageClassification", "siglip", 0),
}  # fmt: skip


def build_checkpoint(name: str) -> transformers.PreTrainedModel:
    """The model of a case, with weights that make every part of it matter."""
    case = CASES[name]
    model_class = getattr(transformers, case.model)
    options = {**SIZES, **IMAGES, **case.options}
    if name in ("CLIP", "SigLIP"):
        options = {"vision_config": options, **TEXT}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def build_backbone(name: str, images: int = 1, patches: int = 36) -> tuple[torch.nn.Module, dict]:
    """The backbone of a case as transformers computes it, and arguments with which it computes images of any size."""
    backbone, options = build_checkpoint(name), {"interpolate_pos_encoding": True}
    if name in ("BEiT", "DINOv2", "DINOv2 giant", "DINOv2 with registers", "DINOv3 ViT"):
        options = {}  # they accept every size
    for attribute in ("beit", "dinov2", "vision_model", "vit"):
        backbone = getattr(backbone, attribute, backbone)
    if name == "ViTMAE":  # no masks, and patches in their order
        backbone.config.mask_ratio = 0.0
        options["noise"] = torch.arange(float(patches)).expand(images, -1)
    if name.startswith("BEiT"):  # by the mean, the norm is in the pooler
        backbone.layernorm = torch.nn.Identity()
    return backbone, options


def save_checkpoint(name: str, folder: Path) -> Path:
    build_checkpoint(name).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CASES[name].processor))
    return folder
