"""The base class of the models: initialisation, strict loading, saving, feature extraction."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig
from transformers import initialization as init

from fastvit.checkpoints.configuration import format_value, make_pair
from fastvit.checkpoints.inspection import check_checkpoint, read_config
from fastvit.errors import InputError
from fastvit.models.attention_interface import register_attention
from fastvit.models.features import Features, resolve_block_indices
from fastvit.models.vit import ViTAttention, ViTEmbeddings, ViTLayer, resample_position_embeddings
from fastvit.ops.block import Fp8Linear

register_attention()  # transformers rejects values of `attn_implementation` that are not registered

# Names of a block's tensors in transformers 5, in memory -> the names on the hub, which are ours. transformers 5 saves
# the hub's names, but its state dicts, and folders saved with save_original_format=False, have the names in memory.
TRANSFORMERS_NAMES = {
    r"\blayers\.(\d+)\.layernorm_": r"encoder.layer.\1.layernorm_",
    r"\blayers\.(\d+)\.attention\.q_proj\.": r"encoder.layer.\1.attention.attention.query.",
    r"\blayers\.(\d+)\.attention\.k_proj\.": r"encoder.layer.\1.attention.attention.key.",
    r"\blayers\.(\d+)\.attention\.v_proj\.": r"encoder.layer.\1.attention.attention.value.",
    r"\blayers\.(\d+)\.attention\.o_proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"\blayers\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"\blayers\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}

# Tensors of a head, not of the backbone: a checkpoint may be loaded into a model with another head.
HEAD_PREFIXES = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")


class ViTPreTrainedModel(PreTrainedModel):
    """Base class of the models: initialisation, loading, saving and feature extraction."""

    config_class = ViTConfig
    config: ViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]  # noqa: RUF012 (what transformers expects)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": ViTAttention}  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the forward reads the config at every call; transformers would guess from this file's source

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint and account for every tensor of the backbone.

        Position embeddings are resampled if `image_size` (as an argument or in `config`) differs from the checkpoint's.
        The head may differ; transformers logs which of its tensors were newly initialised.

        Args:
            pretrained_model_name_or_path: hub id or folder.
            *model_args: passed to the model's constructor.
            config: a config that replaces the checkpoint's.
            **kwargs: as for `transformers.PreTrainedModel.from_pretrained`.

        Returns:
            The model in evaluation mode, or (model, loading info) with `output_loading_info=True`.

        Raises:
            InputError: if the checkpoint is not a ViT, lacks a tensor of the backbone or holds an unknown one. Also,
                before memory is allocated, if config.json does not describe the weights or refers to other files or to
                code, or if a weights file is damaged or would run code (`fastvit.checkpoints.inspection`).
        """
        return_info = kwargs.pop("output_loading_info", False)
        image_size = None
        if pretrained_model_name_or_path is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            stored = read_config(pretrained_model_name_or_path, **hub)
            if stored.get("model_type") != "vit":
                raise InputError(
                    f"{pretrained_model_name_or_path}: expected a checkpoint of model type 'vit',"
                    f" found {format_value(stored.get('model_type'))}"
                )
            if kwargs.get("weights_only", True):  # weights_only=False means that the user trusts the checkpoint
                files = {name: kwargs[name] for name in ("use_safetensors", "variant") if name in kwargs}
                renames = {**TRANSFORMERS_NAMES, **(kwargs.get("key_mapping") or {})}
                check_checkpoint(pretrained_model_name_or_path, stored, renames, **files, **hub)
            stored_size = stored.get("image_size", ViTConfig().image_size)
            if isinstance(config, ViTConfig):
                image_size, config = config.image_size, copy.deepcopy(config)
                config.image_size = stored_size
            else:
                image_size = kwargs.pop("image_size", stored_size)

        kwargs["key_mapping"] = {**TRANSFORMERS_NAMES, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        # transformers would undo the renames on saving: remove ours from its list, so that we save the hub's names.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not TRANSFORMERS_NAMES.keys() & set(conversion.source_patterns)
        ]
        for kind in ("missing_keys", "unexpected_keys"):
            backbone = sorted(key for key in info[kind] if not key.removeprefix("vit.").startswith(HEAD_PREFIXES))
            if backbone:
                names = ", ".join(backbone[:8])
                raise InputError(f"{pretrained_model_name_or_path}: {len(backbone)} {kind.replace('_', ' ')}: {names}")
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save a folder that `from_pretrained` loads; see `transformers.PreTrainedModel.save_pretrained`.

        Raises:
            InputError: if the model was quantised by `fastvit.quantize`, whose tensors have no place in this format.
        """
        if kind := find_quantized_kind(self):
            raise InputError(
                f"model: cannot save a model quantised to {kind} in this format; save it before fastvit.quantize and"
                f" quantise it after from_pretrained, or torch.save(model.state_dict(), FILE)"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Set the model's image size, an int or (height, width), and resample its position embeddings to it."""
        embeddings = self.base_model.embeddings
        old_grid, new_grid = (
            embeddings.patch_embeddings.compute_grid(make_pair(size)) for size in (self.config.image_size, image_size)
        )
        height, width = make_pair(image_size)
        self.config.image_size = height if height == width else [height, width]
        if old_grid != new_grid:
            resampled = resample_position_embeddings(embeddings.position_embeddings.detach(), old_grid, new_grid)
            embeddings.position_embeddings = nn.Parameter(resampled.contiguous())

    def forward_features(
        self, pixel_values: Tensor | Sequence[Tensor], *, class_token_only: bool = False, **kwargs: Any
    ) -> Features:
        """Compute the tokens after the final LayerNorm.

        Args:
            pixel_values: as for `ViTModel.forward`, of any size: position embeddings are interpolated.
            class_token_only: return only the class token, which saves most of the last block.
            **kwargs: other arguments of `ViTModel.forward`.

        Returns:
            `Features` with `cls_token`, `patch_tokens`, `patch_map` and `mean`.
        """
        outputs = self.base_model(
            pixel_values, interpolate_pos_encoding=True, class_token_only=class_token_only, return_dict=True, **kwargs
        )
        return Features(outputs.last_hidden_state, self.base_model.embeddings.get_grid(pixel_values))

    def get_intermediate_layers(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return the outputs of some blocks, with the interface of DINOv2's method of the same name.

        Args:
            pixel_values: as for `forward_features`.
            n: the number of last blocks, or increasing block indices. Later blocks are not computed.
            reshape: return maps [B, D, rows, columns] instead of patch tokens [B, P, D].
            return_class_token: return pairs of patch tokens and class token [B, D].
            norm: apply the final LayerNorm.

        Returns:
            One entry per block: patch tokens [B, P, D], or as the arguments select. For a list of images, patch tokens
            are lists of [P, D] or [D, rows, columns].

        Raises:
            InputError: if `n` is out of range.
        """
        model = self.base_model
        blocks = resolve_block_indices(n, len(model.encoder.layer))
        depths = [index + 1 for index in blocks]
        outputs = model(
            pixel_values,
            interpolate_pos_encoding=True,
            output_hidden_states=depths,
            num_blocks=depths[-1],
            return_dict=True,
        )
        grid = model.embeddings.get_grid(pixel_values)
        layers = []
        for depth in depths:
            tokens = outputs.hidden_states[depth]
            if norm and depth == depths[-1]:
                tokens = outputs.last_hidden_state
            elif norm:
                tokens = model.layernorm(tokens) if isinstance(tokens, Tensor) else [*map(model.layernorm, tokens)]
            features = Features(tokens, grid)
            patches = features.patch_map if reshape else features.patch_tokens
            layers.append((patches, features.cls_token) if return_class_token else patches)
        return tuple(layers)


def find_quantized_kind(model: nn.Module) -> str | None:
    """Return the kind that `fastvit.quantize` quantised the model to, or None.

    Models that transformers quantised, in `from_pretrained`, it also saves.
    """
    if any(type(module) is Fp8Linear for module in model.modules()):
        return "fp8"
    is_int8 = any(type(parameter).__module__.startswith("torchao.") for parameter in model.parameters())
    return "int8" if is_int8 and getattr(model, "hf_quantizer", None) is None else None


# The arguments of `from_pretrained` that locate a checkpoint.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
