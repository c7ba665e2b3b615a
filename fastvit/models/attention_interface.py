"""`attn_implementation="fastvit"`: our attention in transformers' own models.

    fastvit.register_attention()
    model = AutoModel.from_pretrained("facebook/dinov2-base", attn_implementation="fastvit")

transformers keeps two registries: of attention functions, and of functions that make the masks for them. A name that
stands in the first alone would get no mask, and a user's attention mask would be dropped without a word. The masks are
those of its eager attention, zero or the most negative number: some models have blocks that take no attention function
but a mask, and add it to their scores, where a boolean one would be taken for zeros and ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from fastvit import ops
from fastvit.errors import InputError

NAME = "fastvit"

# What models hand to an attention function beside what it computes with: for their other parts, for functions without
# a mask (the mask has the window already), or for the call as a whole. Of any other option we cannot know that leaving
# it out leaves the result right: `softcap` and `s_aux` change the softmax, `indices` say which keys may be seen.
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
    """From now on, in this process, every transformers model that takes an attention function takes "fastvit".

    At load time, `from_pretrained(..., attn_implementation="fastvit")`, or later, `model.set_attn_implementation(...)`.
    May be called twice. fastvit's own models always use it.
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
    """What transformers calls an attention function, by `fastvit.ops.attention`.

    query: [B, H, Nq, D]; key, value: [B, H or fewer, Nk, D]; read by their strides. attention_mask: boolean, or added
    to the scores. Returns the output [B, Nq, H, D], and the probabilities [B, H, Nq, Nk] with output_attentions. Raises
    InputError for an option that is not known to leave the result as it is.
    """
    for option, given in kwargs.items():
        if given is not None and given is not False and option not in IGNORED_OPTIONS:
            raise InputError(
                f"attn_implementation: 'fastvit' has no {option}, which {type(module).__name__} asks for;"
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
    context = ops.attention(query, key, value, scale=scaling, dropout_p=dropout, mask=attention_mask)
    probabilities = None
    if kwargs.get("output_attentions", False):
        probabilities = ops.attention_probabilities(query, key, scale=scaling, mask=attention_mask)
    return context.unflatten(-1, (query.shape[2], -1)), probabilities


def add_bias_to_mask(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask and a position bias, [.., Nq, Nk], as one that is added to the scores."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
