"""`attn_implementation="fastvit"`: fastvit's attention in transformers' own models.

    fastvit.register_attention()
    model = AutoModel.from_pretrained("facebook/dinov2-base", attn_implementation="fastvit")

transformers has two registries: one of attention functions and one of functions that build their masks. A name that is
only in the first gets no mask: the user's attention mask would be dropped silently. We register the masks of eager
attention, which hold zero or the most negative number. Some models have blocks that ignore the attention function but
add the mask to their scores; a boolean mask would be added there as zeros and ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from fastvit import ops
from fastvit.errors import InputError
from fastvit.ops.varlen import attend_with_maps

NAME = "fastvit"

# Options that models pass to an attention function but that do not change its result: they are meant for other parts of
# the model, for functions without a mask (the mask already includes the window), or for the call as a whole. Any other
# option may change the result, so it is an error: `softcap` and `s_aux` change the softmax, `indices` selects keys.
IGNORED_OPTIONS = (
    "cache_position",
    "deterministic",
    "interpolate_pos_encoding",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
)


def register_attention() -> None:
    """Register "fastvit" as an attention implementation of transformers, for this process.

    Select it with `from_pretrained(..., attn_implementation="fastvit")` or `model.set_attn_implementation("fastvit")`.
    Calling this twice is harmless. fastvit's own models need no registration.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, eager_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with `fastvit.ops.attention`, behind transformers' interface of an attention function.

    Args:
        module: the attention module of the model, read for `is_causal`.
        query: [B, H, Nq, D]. No copy is made of non-contiguous inputs.
        key: [B, Hk, Nk, D], where Hk divides H (grouped heads).
        value: [B, Hk, Nk, D].
        attention_mask: boolean, or added to the scores; broadcastable to [B, H, Nq, Nk].
        dropout: probability of dropping an attention probability.
        scaling: factor of the scores; None for 1 / sqrt(D).
        is_causal: apply a causal mask if `attention_mask` is None; None for the module's own setting.
        position_bias: added to the scores, broadcastable to [B, H, Nq, Nk].
        **kwargs: other options of the model; `output_attentions` requests the probabilities.

    Returns:
        The output [B, Nq, H, D] and, with output_attentions, the probabilities [B, H, Nq, Nk], else None.

    Raises:
        InputError: for an option that might change the result.
    """
    for option, given in kwargs.items():
        if given is not None and given is not False and option not in IGNORED_OPTIONS:
            raise InputError(
                f"attn_implementation: 'fastvit' does not support {option}, which {type(module).__name__} passes;"
                ' "sdpa" or "eager" may'
            )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if position_bias is not None:
        attention_mask = add_bias_to_mask(attention_mask, position_bias)

    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    probabilities, has_maps = None, kwargs.get("output_attentions", False)
    if has_maps and torch.is_grad_enabled():  # maps that are not used for the output would have no gradients
        context, probabilities = attend_with_maps(query, key, value, attention_mask, scale=scaling, dropout_p=dropout)
    else:
        context = ops.attention(query, key, value, scale=scaling, dropout_p=dropout, mask=attention_mask)
        if has_maps:
            probabilities = ops.attention_probabilities(query, key, scale=scaling, mask=attention_mask)
    return context.unflatten(-1, (query.shape[2], -1)), probabilities


def add_bias_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Combine a mask and a position bias, both [..., Nq, Nk], into one tensor that is added to the scores."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
