"""What the tests of `fastvit.optimize` share: small models of every family, and the comparison of their results."""

import contextlib
from functools import partial

import pytest
import torch
import transformers
from test_modeling import randomise, relative_error
from timm_import import import_timm
from torch import nn

import fastvit
from fastvit import ops
from fastvit.ops import block as blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
IMAGES = {**SIZES, "image_size": 28, "patch_size": 14}
MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
YOLOS = {"image_size": [28, 28], "num_detection_tokens": 3}


def build_model(name: str, config: str, options=None, **more):
    return getattr(transformers, name)(getattr(transformers, config)(**{**IMAGES, **(options or {}), **more}))


def build_default_model(name: str):
    return getattr(transformers, name)(getattr(transformers, name).config_class())


def build_timm_model(**options):
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return import_timm().models.vision_transformer.VisionTransformer(**{**sizes, **options})


def build_timm_giant():
    return build_timm_model(
        mlp_layer=import_timm().layers.SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1, mlp_ratio=2.0
    )


TIMM_DINOV2 = {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True, "drop_path_rate": 0.4}
TIMM_SIGLIP = {"class_token": False, "global_pool": "map"}

# name -> (family, number of blocks, constructor)
MODELS = {
    "ViT": ("ViT", 2, partial(build_model, "ViTModel", "ViTConfig", qkv_bias=False)),
    "DeiT": ("DeiT", 2, partial(build_model, "DeiTModel", "DeiTConfig")),
    "ViTMAE": (
        "ViTMAE",
        3,
        partial(
            build_model,
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            MAE,
            decoder_intermediate_size=40,
            norm_pix_loss=True,
        ),
    ),
    "ViTMSN": ("ViTMSN", 2, partial(build_model, "ViTMSNModel", "ViTMSNConfig")),
    "I-JEPA": ("I-JEPA", 2, partial(build_model, "IJepaModel", "IJepaConfig", hidden_act="gelu_new")),
    "DINOv2": (
        "DINOv2",
        2,
        partial(build_model, "Dinov2Model", "Dinov2Config", mlp_ratio=2, drop_path_rate=0.4),
    ),
    "DINOv2 giant": (
        "DINOv2",
        2,
        partial(build_model, "Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    ),
    "DINOv2 with registers": (
        "DINOv2 with registers",
        2,
        partial(build_model, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    ),
    "CLIP": ("CLIP vision", 2, partial(build_model, "CLIPVisionModel", "CLIPVisionConfig")),
    "SigLIP": ("SigLIP vision", 2, partial(build_model, "SiglipVisionModel", "SiglipVisionConfig")),
    "timm": ("timm VisionTransformer", 2, build_timm_model),
    "timm DINOv2": ("timm VisionTransformer", 2, partial(build_timm_model, **TIMM_DINOV2)),
    "timm giant": ("timm VisionTransformer", 2, build_timm_giant),
    "timm SigLIP": ("timm VisionTransformer", 2, partial(build_timm_model, act_layer="gelu_tanh", **TIMM_SIGLIP)),
    "YOLOS": ("YOLOS", 2, partial(build_model, "YolosModel", "YolosConfig", YOLOS)),
    "BEiT": ("BEiT", 2, partial(build_model, "BeitModel", "BeitConfig", use_relative_position_bias=True)),
    "BEiT shared bias": (
        "BEiT",
        2,
        partial(
            build_model,
            "BeitModel",
            "BeitConfig",
            use_shared_relative_position_bias=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.4,
        ),
    ),
    "DINOv3": ("DINOv3 ViT", 2, partial(build_model, "DINOv3ViTModel", "DINOv3ViTConfig")),
    "DINOv3 gated": (
        "DINOv3 ViT",
        2,
        partial(build_model, "DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu"),
    ),
}
# family -> constructor of its default size
DEFAULTS = {
    "ViT": partial(build_default_model, "ViTModel"),
    "DeiT": partial(build_default_model, "DeiTModel"),
    "ViTMAE": partial(build_default_model, "ViTMAEForPreTraining"),
    "ViTMSN": partial(build_default_model, "ViTMSNModel"),
    "I-JEPA": partial(build_default_model, "IJepaModel"),
    "DINOv2": partial(build_default_model, "Dinov2Model"),
    "DINOv2 with registers": partial(build_default_model, "Dinov2WithRegistersModel"),
    "CLIP vision": partial(build_default_model, "CLIPVisionModel"),
    "SigLIP vision": partial(build_default_model, "SiglipVisionModel"),
    "YOLOS": partial(build_default_model, "YolosModel"),
    "BEiT": partial(build_default_model, "BeitModel"),
    "DINOv3 ViT": partial(build_default_model, "DINOv3ViTModel"),
    "timm VisionTransformer": lambda: import_timm().models.vision_transformer.VisionTransformer(),
}


@contextlib.contextmanager
def use_backend(backend: str):
    if backend == "triton" and ops.triton_unavailable_reason():
        pytest.skip("Triton is not installed")
    with fastvit.backend(backend):
        yield


def build(name: str, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][2]().to(DEVICE).train(train)
    randomise(model)
    return model


@contextlib.contextmanager
def freeze_position_bias(model: nn.Module, backend: str):
    """Inside, BEiT's position bias requires no gradient under "triton": the kernel has no gradient of a mask."""
    tables = [p for name, p in model.named_parameters() if "relative_position_bias" in name and backend == "triton"]
    for table in tables:
        table.requires_grad_(False)
    yield
    for table in tables:
        table.requires_grad_(True)


def make_pixels() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def run(model: nn.Module, **options):
    """Return the model's output for `make_pixels()`. The seed fixes MAE's masking and drop path."""
    torch.manual_seed(3)
    return model(make_pixels(), **options)


def get_main_tensor(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.last_hidden_state


def compute_results(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the output and every gradient, by name."""
    output = get_main_tensor(run(model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*named, strict=True)
    gradients = torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        # The gradient of a key bias is only rounding error: softmax is invariant to a shift.
        if tensor is not None and not name.endswith(("key.bias", "k_proj.bias")):
            assert relative_error(found[name], tensor) < 1e-5, name


def measure_largest_differences(found: dict, expected: dict) -> dict[str, float]:
    """Return the largest difference of the output, and of all gradients, relative to the largest value."""
    gradients = [name for name, tensor in expected.items() if name != "output" and tensor is not None]
    parts = {}
    for column, names in (("output", ["output"]), ("gradients", gradients)):
        ours, theirs = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (found, expected))
        parts[column] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return parts


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name] is None if tensor is None else torch.equal(found[name], tensor), name


@contextlib.contextmanager
def forbid_fallback(model: nn.Module):
    """Inside, an optimized block that runs its own forward fails the test."""

    def fail(family, reason):
        raise AssertionError(f"a block of {family} ran its own forward: {reason}")

    assert any(isinstance(module, blocks.FusedModule) for module in model.modules())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "log_fallback", fail)
        yield
