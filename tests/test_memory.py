"""What a training step of ViT-B at batch 256 keeps for backward, counted without computing anything."""

import importlib.util

import pytest
import torch
import transformers
from timm_import import import_timm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ViTConfig

import fastvit
from fastvit import ops

CONFIG = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def saved_bytes(model: nn.Module, batch_size: int) -> int:
    """Bytes that autograd keeps beside parameters and pixels, each memory counted once. Tensors have only shapes."""
    model = model.to(torch.bfloat16).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        pixels = torch.empty(batch_size, 3, 224, 224, dtype=torch.bfloat16)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), pixels)}
        kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors too, so that no address is used twice

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixels)
    return sum(size for size, _ in kept.values())


def models():
    yield "transformers", transformers.ViTForImageClassification(ViTConfig(**CONFIG, attn_implementation="sdpa"))
    if importlib.util.find_spec("timm"):
        yield "timm", import_timm().models.vision_transformer.VisionTransformer(num_classes=2)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_training_keeps_at_most_three_quarters_of_what_others_keep(backend):
    if backend == "triton" and ops.triton_unavailable_reason():
        pytest.skip("Triton is not installed")
    rivals = {name: saved_bytes(model, 256) for name, model in models()}
    with fastvit.backend(backend):
        ours = saved_bytes(fastvit.ViTForImageClassification(ViTConfig(**CONFIG)), 256)
    assert ours <= 0.75 * min(rivals.values()), (ours, rivals)


def test_a_block_keeps_ten_values_of_its_width_for_a_token():
    """Two residuals, query, key, value, context, and the pre-activation of four: 2 + 3 + 1 + 4."""
    if ops.triton_unavailable_reason():
        pytest.skip("Triton is not installed")
    sizes = {}
    for layers in (2, 3):
        with fastvit.backend("triton"):
            model = fastvit.ViTForImageClassification(ViTConfig(**{**CONFIG, "num_hidden_layers": layers}))
            sizes[layers] = saved_bytes(model, 4)
    values = 4 * 197 * 768  # of one block: all tokens' hidden states
    assert 10 * 2 * values <= sizes[3] - sizes[2] <= 10.1 * 2 * values + CONFIG["hidden_size"] ** 2 * 3 * 2
