"""Loads a classifier of any family that `fastvit.optimize` knows, and finds what fine-tuning needs in it.

A checkpoint of model type "vit" is our own model. Of the other families, transformers' classifier is loaded where it
pools the tokens as requested; else the backbone, inside our `BackboneForImageClassification`. Both are computed by our
operations (`optimize`), accept uint8 images, and are saved for the classes that transformers would load.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastvit.adapters.swap import load_adapters, optimize
from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.folding import fold_tensors
from fastvit.checkpoints.inspection import MAX_PACKED_WEIGHTS, find_weight_files, read_config, read_headers
from fastvit.checkpoints.tensors import read_tensors
from fastvit.errors import InputError
from fastvit.models.backbone import (
    CLS,
    FAMILIES,
    MEAN,
    BackboneConfig,
    BackboneForImageClassification,
    Family,
    accept_uint8,
    build_backbone,
    choose_pool,
    get_backbone_class,
    get_backbone_options,
    get_family,
    get_vision_config,
    parse_backbone_config,
    set_image_size,
)
from fastvit.models.heads import ViTForImageClassification, ViTModel
from fastvit.models.loading import explain_load_errors, hide_progress_bar, load_config, load_pretrained
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.ops.block import get_qualified_name

# What belongs to no backbone: heads, text towers, masks of pre-training, buffers that older versions saved.
HEADS = re.compile(
    r"(^|\.)(\w*classifier|pooler|head|lm_head|decoder|text_model|text_projection|visual_projection|logit_scale"
    r"|logit_bias|mask_token|position_ids|relative_position_index)(\.|$)"
)
# Names of a config's dropout probabilities: of the hidden states, of the attention weights.
DROPOUTS = {
    "--hidden-dropout": ("hidden_dropout_prob",),
    "--attention-dropout": ("attention_probs_dropout_prob", "attention_dropout"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_classifier(model: str) -> Any:
    """Load a classifier of any family from a hub id or folder.

    Raises:
        InputError: it cannot be loaded, or is of no family that is known.
    """
    stored = explain_load_errors(model, lambda: read_config(model))
    if stored.get("model_type") == "vit":
        return load_pretrained(model)

    def load() -> Any:
        config = parse_backbone_config(stored, model)
        check_weights(model, config)
        if isinstance(config, BackboneConfig):
            return load_from(BackboneForImageClassification, model, config)
        family = get_family(stored, model)
        if family.classifier is None or stored["model_type"] == "vit_mae":
            raise InputError(f"{model}: expected a classifier, found a {family.name} without one; fine-tune it first")
        return load_from(getattr(transformers, family.classifier), model, config, allow_new_head=False)

    return finish(explain_load_errors(model, load))


def build_classifier(
    model: str,
    labels: Mapping[str, Any],
    *,
    pool: str | None = None,
    image_size: int | Sequence[int] | None = None,
    default_image_size: int | Sequence[int] | None = None,
    drop_path: float = 0.0,
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> Any:
    """Load the backbone of a checkpoint of any family, with a classifier to be trained.

    Args:
        model: hub id or folder.
        labels: settings of the config: id2label, label2id, problem_type.
        pool: "cls", "mean" or "cls+mean"; the family's default if None.
        image_size: height and width of the images, or one number for both.
        default_image_size: in place of None; the config's if it is None as well.
        drop_path: probability of skipping the last block.
        hidden_dropout: dropout probability of the hidden states.
        attention_dropout: dropout probability of the attention weights.

    Raises:
        InputError: the checkpoint cannot be loaded, or its family lacks an option.
    """
    stored = explain_load_errors(model, lambda: read_config(model))

    def build() -> Any:
        config = parse_backbone_config(stored, model)
        vision = get_vision_config(config)
        family = FAMILIES[vision.model_type]
        chosen = choose_pool(family, pool)
        if isinstance(config, BackboneConfig):
            chosen = pool or config.pool
        check_weights(model, config)
        set_regularization(family, vision, drop_path, hidden_dropout, attention_dropout)
        size = make_pair(image_size or default_image_size or vision.image_size)
        if image_size is not None:
            check_image_size(image_size, vision.patch_size)
        if vision.model_type in ("vit", "vit_mae") and not isinstance(config, BackboneConfig):
            return build_plain(model, stored, chosen, labels, size, drop_path, (hidden_dropout, attention_dropout))
        loaded = load_parts(model, config, family, chosen, labels)
        return resize_images(loaded, size)

    built = explain_load_errors(model, build)
    if isinstance(built, ViTForImageClassification):
        return built
    freeze_unused(built)
    return finish(built)


def finish(model: Any) -> Any:
    """Let our operations compute the blocks, and accept uint8 images."""
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            # transformers caches BEiT's indices for the process. Made in inference mode, they would prevent training.
            module.generate_relative_position_index(module.window_size)
    if isinstance(model, transformers.CLIPForImageClassification):
        model.get_input_embeddings = model.vision_model.get_input_embeddings  # FSDP asks for it; its own raises
    optimize(model)
    return accept_uint8(model)


def load_parts(model: str, config: Any, family: Family, pool: str, labels: Mapping[str, Any]) -> Any:
    """transformers' classifier, if it has this pool, or the backbone in our classifier."""
    vision = get_vision_config(config)
    if isinstance(config, BackboneConfig):
        if pool != config.pool:
            raise InputError(f"--pool: expected {config.pool}, with which {model} was trained, got {pool}")
        config.update(dict(labels))
        return load_from(BackboneForImageClassification, model, config)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # SigLIP's pooling head, which no pool here reads
    if hasattr(vision, "use_mean_pooling"):
        vision.use_mean_pooling = pool == MEAN  # BEiT: where the final norm is
    if family.classifier is not None and pool in family.classifier_pools:
        classifier_class = getattr(transformers, family.classifier)
        if classifier_class.config_class is type(config):
            config.update(dict(labels))
            return load_from(classifier_class, model, config)
        # A vision tower by itself: CLIP's and SigLIP's classifiers have the config of both towers.
        classifier = classifier_class(classifier_class.config_class(vision_config=vision.to_dict(), **labels))
        classifier.vision_model = load_backbone(model, vision)
        return classifier
    return wrap(load_backbone(model, vision), pool, labels)


def load_backbone(model: str, vision: Any) -> Any:
    return load_from(getattr(transformers, get_backbone_class(vision)), model, vision, **get_backbone_options(vision))


def wrap(backbone: Any, pool: str, labels: Mapping[str, Any]) -> BackboneForImageClassification:
    """Put a loaded backbone into our classifier, whose linear layer is new."""
    classifier = BackboneForImageClassification(BackboneConfig(backbone_config=backbone.config, pool=pool, **labels))
    classifier.backbone = backbone
    return classifier


def build_plain(
    model: str,
    stored: Mapping[str, Any],
    pool: str,
    labels: Mapping[str, Any],
    image_size: tuple[int, int],
    drop_path: float,
    dropouts: tuple[float, float],
) -> Any:
    """A ViT, or what computes one (ViTMAE), as our own model: the whole classifier for the class token."""
    if stored["model_type"] == "vit":
        config = load_config(model)
    else:
        tensors: dict[str, Tensor] = {}
        for path in find_weight_files(model, None, None, {}):
            tensors.update(read_tensors(path))
        config, state_dict = fold_tensors(Path(model), stored, tensors)
    config.update({"drop_path_rate": drop_path, "hidden_dropout_prob": dropouts[0]})
    config.attention_probs_dropout_prob = dropouts[1]
    if stored["model_type"] == "vit":
        backbone = ViTModel.from_pretrained(
            model, config=set_image_size(config, image_size), add_pooling_layer=False
        )  # fmt: skip
        return wrap(backbone, pool, labels)
    if pool != CLS:
        backbone = ViTModel(config, add_pooling_layer=False)
        backbone.load_state_dict(state_dict)
        backbone.resize_position_embeddings(image_size)
        return wrap(backbone, pool, labels)
    config.update(dict(labels))
    classifier = ViTForImageClassification(config)
    classifier.vit.load_state_dict(state_dict)
    classifier.resize_position_embeddings(image_size)
    return classifier


def load_from(model_class: Any, model: str, config: Any, *, allow_new_head: bool = True, **options: Any) -> Any:
    """Load weights with every tensor accounted for: only heads may be missing, left over or of other shapes.

    Raises:
        InputError: the names of the tensors, or their shapes.
    """
    with hide_progress_bar():
        loaded, info = model_class.from_pretrained(
            model, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    is_head = HEADS.search if allow_new_head else re.compile(r"(^|\.)mask_token$").search
    # BEiT's final norm is in the pooler, or not, depending on the pool.
    is_head_norm = re.compile(r"^(beit\.)?layernorm\.").match if "Beit" in model_class.__name__ else lambda name: None
    for key, found, expected in sorted(info["mismatched_keys"]):
        if not is_head(key):
            raise InputError(f"{model}: {key}: expected shape {list(expected)}, found {list(found)}")
    for kind, is_accepted in (("missing_keys", is_head), ("unexpected_keys", HEADS.search)):
        names = sorted(name for name in info[kind] if not is_accepted(name) and not is_head_norm(name))
        if names:
            raise InputError(f"{model}: {len(names)} {kind.replace('_', ' ')}: {', '.join(names[:8])}")
    return loaded


def check_weights(model: str, config: Any) -> None:
    """Check before any memory is allocated that the files hold as many weights as the config describes.

    Raises:
        InputError: the config describes a larger model.
    """
    held = sum(
        math.prod(header.shape)
        for path in find_weight_files(model, None, None, {})
        for header in read_headers(path).values()
    )
    with torch.device("meta"):
        vision = get_vision_config(config)
        if vision.model_type == "vit_mae":
            return  # `fold_tensors` checks every tensor
        described = sum(parameter.numel() for parameter in build_backbone(vision).parameters())
    if held and described > MAX_PACKED_WEIGHTS * held:
        raise InputError(f"{model}: config.json describes a model of {described:,} weights, its files hold {held:,}")


def has_own_names(model: Any) -> bool:
    """Whether the tensors of a model have other names in memory than in the files that it saves."""
    return isinstance(model, PreTrainedModel) and not isinstance(model, ViTPreTrainedModel)


def load_weights(model: Any, folder: str | Path) -> None:
    """Load the weights that a model of the same class and config has saved, whatever their names in the file."""
    config = copy.deepcopy(model.config)
    loaded = load_from(type(model), str(folder), config, allow_new_head=False, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def set_regularization(
    family: Family, vision: Any, drop_path: float, hidden_dropout: float, attention_dropout: float
) -> None:
    """Set drop path and dropout in the config of a backbone.

    Raises:
        InputError: the family has none of the kind.
    """
    is_ours = vision.model_type in ("vit", "vit_mae")
    if hasattr(vision, "drop_path_rate") or is_ours:
        vision.drop_path_rate = drop_path
    elif drop_path:
        raise InputError(f"--drop-path: expected 0 for {family.name}, whose blocks have no drop path, got {drop_path}")
    for flag, value in (("--hidden-dropout", hidden_dropout), ("--attention-dropout", attention_dropout)):
        name = next((name for name in DROPOUTS[flag] if hasattr(vision, name)), None)
        if name is not None:
            setattr(vision, name, value)
        elif value:
            raise InputError(f"{flag}: expected 0 for {family.name}, whose blocks have no such dropout, got {value}")


def check_image_size(image_size: int | Sequence[int], patch_size: Any) -> None:
    """Raise InputError if the height or the width of images is no multiple of the patch's."""
    patch = make_pair(patch_size)
    if any(side % part for side, part in zip(make_pair(image_size), patch, strict=True)):
        raise InputError(f"--image-size: expected a multiple of the patch size {patch}, got {image_size}")


def resize_images(model: Any, image_size: tuple[int, int]) -> Any:
    """The model for images of (height, width), with its position embeddings interpolated as the model itself does.

    DINOv2 and DINOv3 compute images that are not square from the embeddings of square ones, at every call.

    Raises:
        InputError: it has position embeddings of another kind, or computes square images only.
    """
    vision = get_vision_config(model.config)
    is_square = image_size[0] == image_size[1]
    if make_pair(vision.image_size) == image_size or (not is_square and "dino" in vision.model_type):
        return model
    # The size of CLIP and SigLIP is one number; BEiT's relative positions are interpolated as those of a square.
    if not is_square and vision.model_type in ("beit", "clip_vision_model", "siglip_vision_model"):
        name = FAMILIES[vision.model_type].name
        raise InputError(f"--image-size: expected a square for {name}, got {image_size} (height, width)")
    resized = type(model)(set_image_size(model.config, image_size))
    state_dict = model.state_dict()
    expected = resized.state_dict()
    for name, tensor in state_dict.items():
        if name in expected and tensor.shape != expected[name].shape:
            state_dict[name] = resize_parameter(model, name, image_size)
    resized.load_state_dict(state_dict)
    resized.name_or_path = model.name_or_path
    return resized


@torch.no_grad()
def resize_parameter(model: Any, name: str, image_size: tuple[int, int]) -> Tensor:
    parent, _, parameter = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    if parameter == "relative_position_bias_table":  # [(2 rows - 1) * (2 columns - 1) + 3, heads], BEiT
        (rows, columns), table = module.window_size, module.relative_position_bias_table
        patch_size = make_pair(get_vision_config(model.config).patch_size)
        grid = [2 * (side // patch) - 1 for side, patch in zip(image_size, patch_size, strict=True)]
        distances = table[:-3].T.reshape(1, -1, 2 * rows - 1, 2 * columns - 1)
        distances = nn.functional.interpolate(distances, size=grid, mode="bilinear")
        return torch.cat([distances.flatten(2)[0].T, table[-3:]])
    if parameter == "position_embeddings":
        embeddings = module
    elif name.endswith("position_embedding.weight"):
        embeddings = model.get_submodule(parent.rpartition(".")[0])
    else:
        raise InputError(f"--image-size: {name} depends on it, and cannot be interpolated")
    # Only the number of tokens and their size are read.
    hidden = torch.empty(1, 2, get_vision_config(model.config).hidden_size)
    resized = embeddings.interpolate_pos_encoding(hidden, *image_size)
    return resized[0] if name.endswith("position_embedding.weight") else resized


def freeze_unused(model: nn.Module) -> None:
    """Exclude parameters from training that the logits do not depend on.

    Distributed training waits for a gradient of every parameter.
    """
    for name, parameter in model.named_parameters():
        is_unused_norm = ".post_layernorm." in name and isinstance(model, transformers.CLIPForImageClassification)
        if is_unused_norm or name.endswith(".mask_token"):
            parameter.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a model by name, in the order of computation; also of an optimized or sharded one."""
    adapters = load_adapters()
    return {
        name: module
        for name, module in model.named_modules()
        if any(get_qualified_name(kind) in adapters for kind in type(module).__mro__)
    }


def get_block_class_name(model: nn.Module) -> str:
    """The class name of the blocks, which FSDP shards one by one."""
    return type(next(iter(find_blocks(model).values()))).__name__


def compute_depths(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter from the top: 0 for the head and the final norm, 1 for the last block, and one more
    than there are blocks for everything that is computed before them."""
    blocks = list(find_blocks(model))
    depths, depth = {}, len(blocks) + 1
    for name, _ in model.named_parameters():
        for index, block in enumerate(blocks):
            if name.startswith(f"{block}."):
                depths[name] = depth = len(blocks) - index
                break
        else:
            depths[name] = depth if depth > len(blocks) else 0
    return depths


def find_lora_targets(model: nn.Module) -> list[str]:
    """The names of the layers of query and value, relative to the modules that have them."""
    layer = next(iter(find_blocks(model).values()))
    adapters = load_adapters()
    adapter = next(
        adapters[name] for kind in type(layer).__mro__ if (name := get_qualified_name(kind)) in adapters
    )  # fmt: skip
    query, _, value = adapter.read_block(layer).qkv
    names = {id(module): name for name, module in layer.named_modules()}
    return [names[id(module)].rpartition(".")[2] for module in (query, value)]
