"""A list of images of different sizes computes the same outputs, losses and gradients as each image alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_modeling import randomise, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig

import fastvit
from fastvit import ops
from fastvit.ops import reference, varlen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(ops.triton_unavailable_reason() is not None, reason="Triton is not installed")
CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "num_labels": 5,
    "image_size": 32,
    "patch_size": 8,
}
# The config's size twice but not adjacent, one patch, wide, high, and sizes that are no multiple of the patch size.
SIZES = [(32, 32), (16, 40), (8, 8), (37, 21), (32, 32), (9, 60)]
# Without a GPU, kernels are interpreted: the smallest sizes that show a difference.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_SIZES = [(24, 32), (8, 17), (16, 16)]
LABELS = torch.tensor([0, 1, 2, 3, 4, 1], device=DEVICE)


def build_small(model_class, **config) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(ViTConfig(**{**CONFIG, **config})).to(DEVICE)
    randomise(model)
    return model


def make_images(sizes=SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator).to(DEVICE) for size in sizes]


def compute_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("key.bias"):  # zero in exact arithmetic (softmax is invariant to a shift): rounding error
            assert found[name].abs().max() < 1e-5
        else:
            assert relative_error(found[name], gradient) < tolerance, name


def run_alone(model: nn.Module, image: Tensor, **options):
    return model(image[None], interpolate_pos_encoding=True, **options)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_classifier_and_every_gradient_equal_each_image_alone(attn_implementation):
    model = build_small(fastvit.ViTForImageClassification, attn_implementation=attn_implementation)
    outputs = model(make_images(), labels=LABELS)
    logits = torch.cat([run_alone(model, image).logits for image in make_images()])
    loss = F.cross_entropy(logits, LABELS)
    assert relative_error(outputs.logits, logits) < 1e-5
    assert relative_error(outputs.loss, loss) < 1e-5
    assert_same_gradients(compute_gradients(model, outputs.loss), compute_gradients(model, loss))


@needs_triton
def test_packed_kernels_equal_each_image_alone():
    """Outputs and gradients of the packed kernels against plain PyTorch on one image after the other."""
    model, given = build_small(fastvit.ViTForImageClassification, **TINY), make_images(TINY_SIZES)
    with fastvit.backend("triton"):
        found = model(given, labels=LABELS[:3])
        found_gradients = compute_gradients(model, found.loss)
    with fastvit.backend("reference"):
        logits = torch.cat([run_alone(model, image).logits for image in given])
    assert relative_error(found.logits, logits) < 1e-5
    assert_same_gradients(found_gradients, compute_gradients(model, F.cross_entropy(logits, LABELS[:3])))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_backbone_returns_the_tokens_of_each_image(attn_implementation):
    model = build_small(fastvit.ViTModel, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        outputs = model(make_images(), output_hidden_states=True, output_attentions=True)
        plain = model(make_images())
        class_tokens = model(make_images(), class_token_only=True)
        for index, image in enumerate(make_images()):
            expected = run_alone(model, image, output_hidden_states=True, output_attentions=True)
            for found in (outputs, plain):
                assert found.last_hidden_state[index].shape == expected.last_hidden_state[0].shape
                assert relative_error(found.last_hidden_state[index], expected.last_hidden_state[0]) < 1e-5
                assert relative_error(found.pooler_output[index], expected.pooler_output[0]) < 1e-5
            assert relative_error(class_tokens.last_hidden_state[index], expected.last_hidden_state[0, :1]) < 1e-5
            assert relative_error(class_tokens.pooler_output[index], expected.pooler_output[0]) < 1e-5
            for field in ("hidden_states", "attentions"):
                assert len(outputs[field]) == len(expected[field])
                for found, states in zip(outputs[field], expected[field], strict=True):
                    assert found[index].shape == states[0].shape
                    assert relative_error(found[index], states[0]) < 1e-5
    assert plain.hidden_states is None and plain.attentions is None


def test_hidden_states_by_index_are_lists_too():
    model = build_small(fastvit.ViTModel).eval()
    every = model(make_images(), output_hidden_states=True).hidden_states
    some = model(make_images(), output_hidden_states=[1, -1]).hidden_states
    assert [states is None for states in some] == [True, False, True, False]
    for found, expected in zip(some[1] + some[3], every[1] + every[3], strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_reach_every_output_of_the_backbone():
    model = build_small(fastvit.ViTModel)
    outputs = model(make_images(), output_hidden_states=[2])
    found = sum(own.square().mean() for own in (*outputs.last_hidden_state, *outputs.hidden_states[2]))
    expected = 0
    for index, image in enumerate(make_images()):
        own = run_alone(model, image, output_hidden_states=[2])
        expected += own.last_hidden_state.square().mean() + own.hidden_states[2].square().mean()
        expected += own.pooler_output[0, index]
        found += outputs.pooler_output[index, index]
    assert_same_gradients(compute_gradients(model, found), compute_gradients(model, expected))


def test_last_block_computes_only_class_tokens(monkeypatch):
    model = build_small(fastvit.ViTForImageClassification)
    whole = model(make_images(), labels=LABELS, output_hidden_states=True)
    seen, operation = [], ops.add_layer_norm_feed_forward
    monkeypatch.setattr(
        ops, "add_layer_norm_feed_forward", lambda x, *rest: seen.append(x.shape) or operation(x, *rest)
    )
    short = model(make_images(), labels=LABELS)
    assert len(seen) == CONFIG["num_hidden_layers"] and seen[-1] == (len(SIZES), 1, CONFIG["hidden_size"])
    assert relative_error(short.logits, whole.logits) < 1e-5
    assert_same_gradients(compute_gradients(model, short.loss), compute_gradients(model, whole.loss))


def test_rectangular_patches_equal_each_image_alone():
    model = build_small(fastvit.ViTForImageClassification, patch_size=[8, 4], image_size=[24, 16]).eval()
    sizes = [(24, 16), (16, 24), (8, 4), (31, 19)]
    expected = torch.cat([run_alone(model, image).logits for image in make_images(sizes)])
    assert relative_error(model(make_images(sizes)).logits, expected) < 1e-5


def test_layout_and_dtype_may_differ_between_images():
    model = build_small(fastvit.ViTForImageClassification).eval()
    raw = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8, device=DEVICE)
    floating = (raw / 255 - 0.5) / 0.5
    as_read = raw.permute(1, 2, 0).contiguous()
    given = [raw, as_read, floating, floating.permute(1, 2, 0), raw[:, :16]]
    expected = torch.cat([run_alone(model, floating).logits, run_alone(model, floating[:, :16]).logits])
    assert relative_error(model(given).logits, expected[[0, 0, 0, 0, 1]]) < 1e-5


@pytest.mark.parametrize("count", [1, 4])
def test_images_of_one_size_are_stacked(count, monkeypatch):
    monkeypatch.setattr(varlen, "pack", lambda *arguments: pytest.fail("images of one size were packed"))
    model = build_small(fastvit.ViTModel).eval()
    batch = torch.stack(make_images([(24, 40)] * count))
    found = model(tuple(batch), output_hidden_states=True, output_attentions=True)
    expected = model(batch, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
    assert torch.equal(torch.stack(found.last_hidden_state), expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    for field in ("hidden_states", "attentions"):
        for states, own in zip(found[field], expected[field], strict=True):
            assert isinstance(states, list) and torch.equal(torch.stack(states), own)


def test_list_of_images_of_the_configs_size_equals_the_batch():
    model = build_small(fastvit.ViTForImageClassification).eval()
    batch = torch.stack(make_images([(32, 32)] * 3))
    assert torch.equal(model(list(batch)).logits, model(batch).logits)


def test_dropout_acts_in_training_only():
    for option in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model = build_small(fastvit.ViTForImageClassification, **{option: 0.5})
        torch.manual_seed(0)
        assert relative_error(model(make_images()).logits, model(make_images()).logits) > 1e-3, option
        model.eval()
        assert torch.equal(model(make_images()).logits, model(make_images()).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method's name changes from transformers 5.2x on
def test_gradient_checkpointing_computes_the_same_gradients(use_reentrant):
    model = build_small(fastvit.ViTForImageClassification).train()
    expected = compute_gradients(model, model(make_images(), labels=LABELS).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad()
    model(make_images(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_autocast_is_as_accurate_as_each_image_alone():
    model = build_small(fastvit.ViTForImageClassification).eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()([image.double() for image in make_images()]).logits
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = model(make_images()).logits
            expected = torch.cat([run_alone(model, image).logits for image in make_images()])
    assert found.dtype == expected.dtype
    assert relative_error(found, exact) <= 1.25 * relative_error(expected, exact)


def test_compiled_model_accepts_lists():
    model, given = build_small(fastvit.ViTForImageClassification, **TINY), make_images(TINY_SIZES[1:])
    compiled = torch.compile(model, backend="aot_eager")
    expected = compute_gradients(model, model(given, labels=LABELS[:2]).loss)
    assert_same_gradients(compute_gradients(model, compiled(given, labels=LABELS[:2]).loss), expected)


@needs_triton
def test_kernels_compile_as_one_graph():
    model, given = build_small(fastvit.ViTForImageClassification, **TINY).eval(), make_images(TINY_SIZES[1:])
    with fastvit.backend("triton"), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(given).logits, model(given).logits)


def test_hooks_receive_the_packed_sequence():
    model = build_small(fastvit.ViTForImageClassification).eval()
    expected = model(make_images()).logits
    tokens = sum(1 + height // 8 * (width // 8) for height, width in SIZES)
    for name in ("attention.attention", "layernorm_after", "intermediate.dense", "output"):
        seen = []
        module = model.get_submodule(f"vit.encoder.layer.1.{name}")
        hook = module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape[:2]))
        assert relative_error(model(make_images()).logits, expected) < 1e-5
        hook.remove()
        assert seen == [(1, tokens)], name


def test_wrapped_projections_are_called_as_modules():
    from peft import LoraConfig, get_peft_model

    model = build_small(fastvit.ViTForImageClassification)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["query", "value", "dense", "projection"], r=4))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = wrapped(make_images()).logits
    expected = torch.cat([run_alone(wrapped, image).logits for image in make_images()])
    assert relative_error(found, expected) < 1e-5


def test_fp8_model_accepts_lists():
    model = build_small(fastvit.ViTForImageClassification).bfloat16()
    given = [image.bfloat16() for image in make_images()]
    with fastvit.backend("reference"), torch.no_grad():
        fastvit.quantize(model, "fp8")
        for options in ({}, {"output_attentions": True}):
            found = model(given, **options)
            expected = [run_alone(model, image, **options) for image in given]
            assert relative_error(found.logits, torch.cat([own.logits for own in expected])) < 1e-2
        for index, own in enumerate(expected):
            for maps, other in zip(found.attentions, own.attentions, strict=True):
                assert relative_error(maps[index], other[0]) < 1e-2


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_scores_between_images_are_computed():
    """Memory grows with the number of tokens of all images, and quadratically only with those of one image."""
    model = build_small(fastvit.ViTForImageClassification)
    sizes = [(64, 64), (64, 56), (56, 64)] * 6
    tokens = sum(1 + height * width // 64 for height, width in sizes)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with fastvit.backend("reference"), LargestTensor() as largest:
            model(make_images(sizes), labels=LABELS.repeat(3)).loss.backward()
        assert largest.elements <= tokens * 3 * CONFIG["hidden_size"] < tokens**2


def test_attention_is_one_operation_for_all_images(monkeypatch):
    """With kernels, a block has as many launches for a list as for a batch."""
    calls = []

    def attention(query, key, value, *, cu_seqlens, max_seqlen, **options):
        calls.append((query.shape[0], cu_seqlens.tolist(), max_seqlen))
        return reference.attention(query, key, value, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **options)

    monkeypatch.setattr(ops, "attention", attention)
    with fastvit.backend("reference"):
        build_small(fastvit.ViTModel)(make_images())
    assert calls == [(64, [0, 17, 28, 30, 39, 56, 64], 17)] * CONFIG["num_hidden_layers"]


def test_return_dict_false_returns_tuples():
    model = build_small(fastvit.ViTForImageClassification).eval()
    (logits,) = model(make_images(), return_dict=False)
    assert torch.equal(logits, model(make_images()).logits)
    tokens, pooled = (
        model.vit(make_images(), return_dict=False),
        build_small(fastvit.ViTModel)(make_images(), return_dict=False)[1],
    )
    assert len(tokens[0]) == len(SIZES) and pooled.shape == (len(SIZES), CONFIG["hidden_size"])


def test_class_tokens_without_any_block_equal_each_image_alone():
    model = build_small(fastvit.ViTModel).eval()
    found = model(make_images(), class_token_only=True, num_blocks=0).last_hidden_state
    for own, image in zip(found, make_images(), strict=True):
        expected = run_alone(model, image, class_token_only=True, num_blocks=0).last_hidden_state
        torch.testing.assert_close(own, expected[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "pixel_values: expected images, got an empty list"),
        (np.zeros((1, 3, 8, 8)), "pixel_values: expected a tensor or a list of tensors, got ndarray"),
        ([torch.zeros(3, 8, 8), "leaf.jpg"], r"pixel_values\[1\]: expected a tensor, got str"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)],
            r"pixel_values\[1\]: expected \[3, height, width\] or \[height, width, 3\].*got \[1, 3, 8, 8\]",
        ),
        ([torch.zeros(4, 8, 8)], r"pixel_values\[0\]: expected \[3, height, width\].*got \[4, 8, 8\]"),
        ([torch.zeros(3, 8, 8, dtype=torch.long)], r"pixel_values\[0\]: expected floating or uint8 pixels"),
        ([torch.zeros(3, 8, 7)], r"pixel_values\[0\]: expected room for one patch of \(8, 8\), got \(8, 7\)"),
    ],
)
def test_wrong_lists_raise_an_error_that_describes_them(given, message):
    model = build_small(fastvit.ViTForImageClassification).cpu()
    with pytest.raises(fastvit.InputError, match=message):
        model(given)


def test_batch_smaller_than_a_patch_is_an_error():
    with pytest.raises(
        fastvit.InputError, match=r"pixel_values: expected room for one patch of \(8, 8\), got \(7, 8\)"
    ):
        build_small(fastvit.ViTModel).cpu()(torch.zeros(1, 3, 7, 8), interpolate_pos_encoding=True)


def test_masks_with_a_list_of_images_are_an_error():
    given = [torch.zeros(3, 8, 8), torch.zeros(3, 16, 8)]
    with pytest.raises(fastvit.InputError, match="pixel_values: expected a tensor, got list"):
        build_small(fastvit.ViTForMaskedImageModeling, encoder_stride=8).cpu()(given)
    model = build_small(fastvit.ViTModel).cpu()
    with pytest.raises(fastvit.InputError, match="bool_masked_pos: expected None with a list of images"):
        model(given, bool_masked_pos=torch.ones(2, 1))
    with pytest.raises(fastvit.InputError, match="attention_mask: expected None with a list of images"):
        model(given, attention_mask=torch.ones(2, 3))
