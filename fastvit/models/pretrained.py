"""What the models share: initialisation, loading with every tensor accounted for, saving, feature extraction."""

from __future__ import annotations

import copy
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

register_attention()  # transformers checks the names that `attn_implementation` may have

# The names of a block's tensors in transformers 5, in memory -> those on the hub, which are ours. What it saves has the
# hub's; its state dicts, and folders saved with save_original_format=False, have its own.
TRANSFORMERS_NAMES = {
    r"\blayers\.(\d+)\.layernorm_": r"encoder.layer.\1.layernorm_",
    r"\blayers\.(\d+)\.attention\.q_proj\.": r"encoder.layer.\1.attention.attention.query.",
    r"\blayers\.(\d+)\.attention\.k_proj\.": r"encoder.layer.\1.attention.attention.key.",
    r"\blayers\.(\d+)\.attention\.v_proj\.": r"encoder.layer.\1.attention.attention.value.",
    r"\blayers\.(\d+)\.attention\.o_proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"\blayers\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"\blayers\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}

# What belongs to a head and not to the backbone: a checkpoint of one head may be loaded into a model with another.
HEAD_PREFIXES = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")


class ViTPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, loading, saving."""

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
        return True  # "eager" and "sdpa" are read at every call; transformers would guess from this file's text

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
        """Load a checkpoint: a hub id or a folder. Arguments are those of `transformers.PreTrainedModel`.

        Position embeddings are resampled when `image_size` (as an argument or in `config`) is not the checkpoint's.
        Every tensor is accounted for: raises InputError if the checkpoint is not a ViT, lacks a tensor of the backbone
        or holds one that the model does not know. Heads may differ; transformers reports which were not loaded.
        A config.json that does not describe its weights, or leads to other files or to code, and a file of weights that
        is damaged or would run code, raise InputError before memory is taken (`fastvit.checkpoints.inspection`).
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
            if kwargs.get("weights_only", True):  # who sets it to False trusts the checkpoint
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
        # transformers would turn the renames that it applied back on saving: ours stay, we save the hub's names.
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

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Make the model take pictures of `image_size` from now on; its position embeddings are resampled in place."""
        embeddings = self.base_model.embeddings
        old_grid, new_grid = (
            embeddings.patch_embeddings.compute_grid(make_pair(size)) for size in (self.config.image_size, image_size)
        )
        self.config.image_size = image_size
        if old_grid != new_grid:
            resampled = resample_position_embeddings(embeddings.position_embeddings.detach(), old_grid, new_grid)
            embeddings.position_embeddings = nn.Parameter(resampled.contiguous())

    def forward_features(
        self, pixel_values: Tensor | Sequence[Tensor], *, class_token_only: bool = False, **kwargs: Any
    ) -> Features:
        """The tokens after the final LayerNorm: `Features` with cls_token, patch_tokens, patch_map and mean.

        pixel_values: as `ViTModel` takes them, in any size: position embeddings are interpolated. class_token_only: for
        the cls_token alone, a block's work less. kwargs: other arguments of `ViTModel`.
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
        """What some blocks give, as DINOv2's method of this name: patch tokens [B, P, D] for each block asked for.

        n: so many blocks, the last ones, or the rising indices of blocks; blocks after the last asked for are not
        computed. reshape: maps [B, D, rows, columns] instead. return_class_token: pairs of these and the class token
        [B, D]. norm: after the final LayerNorm. pixel_values: as in `forward_features`; of a list, lists of [P, D] or
        [D, rows, columns], and class tokens [B, D].
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


# The arguments of `from_pretrained` that say where a checkpoint lies.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
