"""The models: the backbone, and the backbone with a classification or a masked-image-modelling head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import ViTConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.utils.generic import can_return_tuple

from fastvit.checkpoints.configuration import make_pair
from fastvit.errors import InputError
from fastvit.models import fused
from fastvit.models.pretrained import TRANSFORMERS_NAMES, ViTPreTrainedModel
from fastvit.models.vit import (
    LayerNorm,
    ViTEmbeddings,
    ViTEncoder,
    ViTPatchEmbeddings,
    ViTPooler,
    to_float_channels_first,
)
from fastvit.ops import varlen
from fastvit.ops.varlen import Mask, Packing


class ViTModel(ViTPreTrainedModel):
    """The backbone: returns the tokens after the final LayerNorm and the pooled class token.

    Args:
        config: the model's configuration.
        add_pooling_layer: add the pooler of the in21k checkpoints.
        use_mask_token: add the mask token that masked image modelling needs.
    """

    def __init__(self, config: ViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = ViTEncoder(config)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()
        fused.attach(self)

    def get_input_embeddings(self) -> ViTPatchEmbeddings:
        return self.embeddings.patch_embeddings

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Called by `load_state_dict`: also accepts a state dict of transformers 5, whose names it replaces."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}layers.")]:
            renamed = name
            for pattern, replacement in TRANSFORMERS_NAMES.items():
                renamed = re.sub(pattern, replacement, renamed)
            state_dict[renamed] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        class_token_only: bool = False,
        num_blocks: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch of images.

        Args:
            pixel_values: [B, C, H, W] or [B, H, W, C], floating-point and normalised, or uint8, which the model
                normalises by config.image_mean and config.image_std. Or a list of B images of any sizes, [C, H, W] or
                [H, W, C]; their position embeddings are interpolated, and each image is computed as it would be alone.
            bool_masked_pos: [B, P], true where the mask token replaces a patch. Not for a list.
            interpolate_pos_encoding: accept images whose size differs from config.image_size.
            attention_mask: [B, N], true (1) for tokens that may be attended to, or broadcastable to [B, heads, N, N],
                boolean or added to the scores. Not for a list.
            output_attentions: return the attention maps of every block, [B, heads, N, N].
            output_hidden_states: return the tokens before the first block and after every block, [B, N, D], all before
                the final LayerNorm. An index or a list of indices selects some; the others are None.
            class_token_only: return only the class token, [B, 1, D]. The last block then computes only that token, with
                the same result, unless attentions or hidden states are requested.
            num_blocks: stop after this many blocks; the final LayerNorm and the pooler still run.
            **kwargs: accepted for compatibility with transformers; `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` [B, N, D], `pooler_output` [B, pooler_output_size] or None, and `hidden_states` and
            `attentions` as requested. For a list of images every tensor [B, ...] except `pooler_output` and a lone
            class token is a list of B tensors without that dimension.

        Raises:
            InputError: if an argument has a wrong type, shape or dtype, or does not fit the config.
        """
        if pixel_values is None:
            raise InputError("pixel_values: expected images, got None")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask: Mask = attention_mask
        is_list = not isinstance(pixel_values, Tensor)
        if is_list:
            if attention_mask is not None:
                raise InputError("attention_mask: expected None with a list of images, which are not padded")
            if bool_masked_pos is not None:
                raise InputError("bool_masked_pos: expected None with a list of images; stack those of one size")
            if not isinstance(pixel_values, list | tuple):
                given = type(pixel_values).__name__
                raise InputError(f"pixel_values: expected a tensor or a list of tensors, got {given}")
            if not pixel_values:
                raise InputError("pixel_values: expected images, got an empty list")
            pixel_values, mask = varlen.stack_or_pack(pixel_values, self.embeddings.get_grid(pixel_values))
        elif attention_mask is not None:
            mask = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask
            mask = mask if mask.is_floating_point() else mask.bool()

        if isinstance(mask, Packing):
            embeddings = varlen.embed_images(self.embeddings, list(pixel_values))
        else:
            embeddings = self.embeddings(pixel_values, bool_masked_pos, is_list or bool(interpolate_pos_encoding))
        encoded = self.encoder(embeddings, mask, output_attentions, output_hidden_states, class_token_only, num_blocks)
        hidden_states = self.layernorm(encoded.last_hidden_state)
        pooler_output = None
        if self.pooler is not None:
            is_packed = isinstance(mask, Packing) and not class_token_only
            pooler_output = self.pooler(varlen.select_class_tokens(hidden_states, mask) if is_packed else hidden_states)
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pooler_output,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return split_outputs(outputs, mask, class_token_only) if is_list else outputs


def split_outputs(
    outputs: BaseModelOutputWithPooling, mask: Mask, class_token_only: bool
) -> BaseModelOutputWithPooling:
    """Split the outputs for a list of images: each tensor becomes a list of [N, D] or [heads, N, N]."""

    def split(states: Any) -> Any:
        return varlen.split_images(states, mask) if isinstance(states, Tensor) else states

    if not class_token_only:
        outputs.last_hidden_state = split(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(split(states) for states in outputs.hidden_states)
    if outputs.attentions is not None:
        outputs.attentions = tuple(split(maps) for maps in outputs.attentions)
    return outputs


class ViTForImageClassification(ViTPreTrainedModel):
    """logits = LN(z_L)[class token] W + b: a linear classifier on the class token of the backbone."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify a batch of images.

        Args:
            pixel_values: as for `ViTModel.forward`, as are the arguments not listed here.
            labels: class indices int64 [B] for cross-entropy, or float targets [B, num_labels]: for binary
                cross-entropy (multi-label) or, if config.problem_type is "regression" or num_labels is 1, for the mean
                squared error.
            **kwargs: options of the loss, such as `ignore_index`.

        Returns:
            `logits` [B, num_labels], `loss` if labels were passed, and `hidden_states` and `attentions` as requested.

        Raises:
            InputError: if an argument has a wrong type, shape or dtype, or does not fit the config.
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            class_token_only=True,
            return_dict=True,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            check_labels(labels, logits, self.config.problem_type, kwargs.get("ignore_index", -100))
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def check_labels(labels: Any, logits: Tensor, problem_type: str | None, ignore_index: int) -> None:
    """Raise InputError unless the loss of `problem_type` accepts these labels for logits [B, num_labels].

    The range of class indices is checked only on a CPU: on a GPU the check would synchronise with the device.
    """
    batch, num_labels = logits.shape
    if not isinstance(labels, Tensor):
        raise InputError(f"labels: expected a tensor, got {type(labels).__name__}")
    if problem_type is None:
        is_index = labels.dtype in (torch.long, torch.int)
        problem_type = "regression" if num_labels == 1 else "single_label_classification" if is_index else "multi_label"
    if problem_type != "single_label_classification":
        expected = [batch] if num_labels == 1 else [batch, num_labels]
        if labels.numel() != logits.numel() or (num_labels > 1 and labels.shape != logits.shape):
            raise InputError(f"labels: expected {expected} for {problem_type}, got {list(labels.shape)} {labels.dtype}")
        return
    if labels.numel() != batch or labels.dtype != torch.long:
        raise InputError(
            f"labels: expected int64 class indices [{batch}], got {list(labels.shape)} {labels.dtype};"
            " for several labels per image, set config.problem_type = 'multi_label_classification'"
        )
    if labels.is_cpu and not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor):
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)]
        if wrong.numel():
            raise InputError(f"labels: expected class indices from 0 to {num_labels - 1}, got {wrong[0].item()}")


class ViTForMaskedImageModeling(ViTPreTrainedModel):
    """SimMIM: a linear decoder predicts the pixels of masked patches.

    Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv:2111.09886.
    """

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        """Reconstruct a batch of images.

        Args:
            pixel_values: as for `ViTModel.forward`, as are the arguments not listed here, but not a list.
            bool_masked_pos: [B, P], true where a patch is masked. The loss is the mean absolute error over the masked
                pixels of all images.

        Returns:
            `reconstruction` [B, C, H, W] in whole patches, `loss` if `bool_masked_pos` was passed, and `hidden_states`
            and `attentions` as requested.

        Raises:
            InputError: if an argument has a wrong type, shape or dtype, or does not fit the config.
        """
        if not isinstance(pixel_values, Tensor):
            raise InputError(f"pixel_values: expected a tensor, got {type(pixel_values).__name__}")
        patch_size = make_pair(self.config.patch_size)
        if bool_masked_pos is not None and patch_size != make_pair(self.config.encoder_stride):
            raise InputError(
                "config.encoder_stride: expected the patch size, so that the reconstruction has the image's size;"
                f" got encoder_stride {self.config.encoder_stride} and patch_size {self.config.patch_size}"
            )
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        rows, columns = self.vit.embeddings.get_grid(pixel_values)
        patches = outputs.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
        reconstruction = self.decoder(patches)  # [B, C, H, W], cropped to whole patches
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, rows, columns).to(reconstruction.dtype)
            mask = mask.repeat_interleave(patch_size[0], 2).repeat_interleave(patch_size[1], 3)  # [B, 1, H, W]
            target = to_float_channels_first(pixel_values, self.config, reconstruction.dtype)
            target = target[:, :, : mask.shape[2], : mask.shape[3]]
            error = F.l1_loss(target, reconstruction, reduction="none") * mask
            loss = error.sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
