"""Recipes: the defaults of `fastvit finetune` that depend on the model. An option that is given takes precedence."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from fastvit.checkpoints.inspection import read_config
from fastvit.errors import InputError
from fastvit.models.loading import explain_load_errors
from fastvit.train.build import REMEDY
from fastvit.train.options import DEFAULT_MODEL, FinetuneOptions
from fastvit.train.run_folder import read_run_options

PLAIN: dict[str, Any] = {
    "epochs": 4.0,
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "warmup": 0.0,
    "scheduler": "linear",
    "layer_decay": 1.0,
}
GENTLE = {**PLAIN, "weight_decay": 0.05, "warmup": 0.1, "scheduler": "cosine"}
# AdamW's betas (0.9, 0.999) and the clipping of gradients at a norm of 1 are Trainer's, and the same for all.
RECIPES: dict[str, dict[str, Any]] = {
    # For models trained on labels. With these settings an in21k ViT-B reaches 99 % on beans.
    "plain": PLAIN,
    # Measured in docs/recipes.md.
    "dinov2": {**GENTLE, "epochs": 5.0, "learning_rate": 1e-4, "layer_decay": 0.75},
    # He et al. 2021, arXiv:2111.06377: 2e-3 for 1024 images and 0.65, in the published code for ViT-B.
    "mae": {**GENTLE, "epochs": 5.0, "learning_rate": 2.5e-4, "layer_decay": 0.65},
    # Dong et al. 2022, arXiv:2212.06138: 6e-4 for 2048 images and 0.6, in the published code for ViT-B.
    "clip": {**GENTLE, "epochs": 5.0, "learning_rate": 5e-5, "layer_decay": 0.6},
}
# Learning rates are for so many images per step, and grow with the square root of their number, as suits AdamW
# (Malladi et al. 2022, arXiv:2205.10287). That of the plain recipe is fixed.
IMAGES_PER_STEP = 16
FAMILY_RECIPES = {
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn"), "dinov2"),
    **dict.fromkeys(("vit_mae", "beit", "ijepa"), "mae"),
    **dict.fromkeys(("clip", "clip_vision_model", "siglip", "siglip_vision_model"), "clip"),
}


def resolve_recipe(options: FinetuneOptions) -> FinetuneOptions:
    """Fill in the options that the recipe sets and that were not given.

    Without --recipe it is that of the model's family. A run that is resumed keeps the values in its `config.yaml`;
    runs of versions without recipes are plain.

    Raises:
        InputError: the model's config.json or the run's `config.yaml` cannot be read, or names no recipe.
    """
    folder = Path(options.output_dir)
    before = (read_run_options(folder) or read_run_options(folder / "fold-1")) if options.resume else {}
    recipe: Any = options.recipe or (before.get("recipe", "plain") if before else choose_recipe(options))
    if recipe not in RECIPES:
        raise InputError(f"--recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    values = compute_defaults(recipe, options)
    if options.recipe is None:
        values |= {name: before[name] for name in PLAIN.keys() & before.keys()}
    missing = {name: value for name, value in values.items() if getattr(options, name) is None}
    return dataclasses.replace(options, recipe=recipe, **missing)


def compute_defaults(recipe: str, options: FinetuneOptions) -> dict[str, Any]:
    """The values of a recipe, for the images per step of `options`."""
    values = dict(RECIPES[recipe])
    if recipe != "plain":
        images = options.batch_size * options.gradient_accumulation * int(os.environ.get("WORLD_SIZE", "1"))
        values["learning_rate"] = float(f"{values['learning_rate'] * math.sqrt(images / IMAGES_PER_STEP):.2g}")
    return values


def choose_recipe(options: FinetuneOptions) -> str:
    """The recipe of the model's family."""
    if options.from_scratch is not None or options.model == DEFAULT_MODEL:
        return "plain"
    stored = explain_load_errors(options.model, lambda: read_config(options.model), REMEDY)
    backbone = stored.get("backbone_config")  # of a classifier that fine-tuning has written
    model_type = (backbone if isinstance(backbone, dict) else stored).get("model_type")
    return FAMILY_RECIPES.get(str(model_type), "plain")


def describe_recipe(options: FinetuneOptions) -> str:
    """One line with the recipe and the values of its options."""
    values = ", ".join(f"{option.replace('_', ' ')} {getattr(options, option)}" for option in PLAIN)
    return f"recipe {options.recipe}: {values}"
