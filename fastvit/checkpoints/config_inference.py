"""Configs of timm and npz checkpoints, which record none, and rejection of models that `fastvit` does not support."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ViTConfig

from fastvit.checkpoints.configuration import format_value
from fastvit.checkpoints.names import CLASSIFIER, EMBEDDINGS, POOLER, QKV_BIAS, Format, Sizes, contains_any
from fastvit.errors import InputError

# Settings that the timm and npz formats do not record, because they are built into the code that reads them. flax's
# LayerNorm and timm's Vision Transformers use 1e-6. Google's own configs on the hub have 1e-12, ViTConfig's default,
# which comes from BERT; the weights were not trained with it. flax's gelu is the tanh approximation, timm's is exact.
LAYER_NORM_EPS = 1e-6
HIDDEN_ACT = {"timm": "gelu", "npz": "gelu_pytorch_tanh"}
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")


def reject_unsupported_parts(
    names: Mapping[str, Any], fmt: Format, unsupported: Mapping[str, str], source: Path
) -> None:
    """Raises InputError if a name matches a pattern of `unsupported` (-> feature) or the class token is missing."""
    for pattern, meaning in unsupported.items():
        for name in names:
            if re.search(pattern, name):
                raise InputError(f"{source}: {name}: {meaning}: not supported by this model")
    cls_token = getattr(EMBEDDINGS[2], fmt)
    if contains_any(names, EMBEDDINGS[:1], fmt) and cls_token not in names:
        raise InputError(f"{source}: tensor {cls_token} is missing: models without a class token are not supported")


def detect_optional_parts(
    tensors: dict[str, Tensor], fmt: Format, source: Path
) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Returns which optional parts a timm or npz checkpoint has, and its tensors without an unsupported head."""
    parts = {
        "qkv_bias": contains_any(tensors, QKV_BIAS, fmt),
        "pooler": contains_any(tensors, POOLER, fmt),
        "classifier": contains_any(tensors, CLASSIFIER, fmt),
    }
    if parts["pooler"] and parts["classifier"]:
        # The input of the pretraining head is the pooler's output; transformers' classifier reads the class token.
        head = [getattr(row, fmt) for row in CLASSIFIER]
        warnings.warn(
            f"{source}: dropped {' and '.join(head)}: transformers has no classifier after a pooler", stacklevel=2
        )
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
        parts["classifier"] = False
    return parts, tensors


def infer_config(
    sizes: Sizes, fmt: Format, depth: int, qkv_bias: bool, labels: list[str] | None, source: Path
) -> ViTConfig:
    """Infers the config of a timm or npz checkpoint from the sizes of its tensors."""
    grid = math.isqrt(sizes["N"] - 1)
    if grid == 0 or grid**2 != sizes["N"] - 1:
        name = getattr(EMBEDDINGS[3], fmt)
        raise InputError(f"{source}: tensor {name}: expected 1 + a square number of positions, found {sizes['N']}")
    options: dict[str, Any] = {}
    if sizes["h"] == sizes["w"]:
        # The decoder of masked image modelling predicts whole patches.
        options.update(patch_size=sizes["h"], image_size=grid * sizes["h"], encoder_stride=sizes["h"])
    else:
        options.update(patch_size=[sizes["h"], sizes["w"]], image_size=[grid * sizes["h"], grid * sizes["w"]])
    if "O" in sizes:
        options["pooler_output_size"] = sizes["O"]
    if "L" in sizes:
        labels = labels or [f"LABEL_{label}" for label in range(sizes["L"])]
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    return ViTConfig(
        hidden_size=sizes["D"],
        num_hidden_layers=depth,
        num_attention_heads=sizes["H"],
        intermediate_size=sizes["F"],
        hidden_act=HIDDEN_ACT[fmt],
        layer_norm_eps=LAYER_NORM_EPS,
        num_channels=sizes["C"],
        qkv_bias=qkv_bias,
        **options,
    )


def check_writable_config(config: ViTConfig, to: Format) -> None:
    """Raises InputError for activations that a format cannot record; warns about another gelu or layer_norm_eps."""
    if config.hidden_act not in GELUS:
        raise InputError(
            f"config.hidden_act: expected {HIDDEN_ACT[to]!r} for {to}, got {format_value(config.hidden_act)}"
        )
    if config.pooler_act != "tanh":
        raise InputError(f"config.pooler_act: expected 'tanh' for {to}, got {format_value(config.pooler_act)}")
    recorded = {"layer_norm_eps": LAYER_NORM_EPS, "hidden_act": HIDDEN_ACT[to]}
    # gelu_new and gelu_pytorch_tanh are the same function.
    given = {"layer_norm_eps": config.layer_norm_eps, "hidden_act": config.hidden_act.replace("_new", "_pytorch_tanh")}
    for option, value in given.items():
        if value != recorded[option]:
            warnings.warn(
                f"config.{option}: {value} cannot be recorded: {to} models use {recorded[option]}", stacklevel=2
            )
