"""Trained weights on photographs: a DINOv2-small against float64, other libraries and other precisions.

`make real-weights` fetches the weights. Random weights have neither outlier channels nor attention that means anything.
"""

import importlib.util
from functools import partial

import numpy as np
import pytest
import torch
from accuracy import assert_no_worse_than, poison_memory
from safetensors.torch import load_file
from transformers import Dinov2Model, ViTImageProcessorPil, ViTModel

import fastvit
from fastvit.ops import reference

pytest.importorskip("triton")
from operations import check, use_variants
from real_weights import FOLDER, GRAPH
from trained import (
    CLASSES,
    EPS,
    MEAN,
    STD,
    compute_block,
    compute_features,
    find_skip_reason,
    fit_probe,
    fold_layer_scale,
    list_photographs,
    load_dinov2,
    load_vit,
    normalize,
    predict_by_neighbours,
    predict_by_probe,
    read_photographs,
    relative_error,
    set_precision,
)

from fastvit.kernels import quantize
from fastvit.kernels.attention import attention
from fastvit.kernels.feed_forward import feed_forward
from fastvit.kernels.gelu import bias_gelu
from fastvit.kernels.layer_norm import add_layer_norm, layer_norm
from fastvit.kernels.layer_norm_linear import layer_norm_linear

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(find_skip_reason() is not None, reason=find_skip_reason() or ""),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
BLOCKS = pytest.mark.parametrize("block", [0, 6, 11])
ROWS = 24  # tokens of an image, few because the kernels are interpreted


@pytest.fixture(scope="module")
def photographs():
    """Two of each class, uint8 [6, 224, 224, 3]."""
    return read_photographs("validation", 2)[0]


@pytest.fixture(scope="module")
def exact(photographs):
    """transformers' Dinov2Model in float64: the hidden states of every block, and after the final LayerNorm."""
    with torch.inference_mode():
        output = load_dinov2().double()(normalize(photographs).double(), output_hidden_states=True)
    return [state.clone() for state in (*output.hidden_states, output.last_hidden_state)]


@pytest.fixture(scope="module")
def blocks(exact):
    """Activations and parameters of three blocks by name, in float64."""
    weights = {name: tensor.double() for name, tensor in fold_layer_scale().items()}
    return {index: compute_block(weights, index, exact[index]) for index in (0, 6, 11)}


# ---------------------------------------------------------------------------------------------------------------------
# The whole model in float32
# ---------------------------------------------------------------------------------------------------------------------


def test_the_checkpoint_loads_with_nothing_missing_or_unexpected():
    _, info = Dinov2Model.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(tensor.numel() for tensor in load_file(FOLDER / "model.safetensors").values()) == 22_056_576


@torch.inference_mode()
@pytest.mark.parametrize("size", [(224, 224), (182, 266), (518, 518)], ids=str)
def test_optimize_and_the_folded_vit_are_as_exact_as_transformers(photographs, size):
    """Position embeddings are interpolated for the first two sizes. MKL computes all float32 matmuls.

    Up to block 10 the errors differ by less than a tenth. The last block amplifies the errors of a few directions,
    whose size in one image is chance, hence twice transformers' error.
    """
    pixels, _ = read_photographs("validation", 1, size)
    pixels = pixels[: 1 if size[0] > 224 else 3]
    floats, model, vit = normalize(pixels), load_dinov2(), load_vit()
    exact = load_dinov2().double()(floats.double()).last_hidden_state
    # Folding rounds weights to float32 once, and so does normalising the pixels.
    assert relative_error(load_vit().double()(pixels, interpolate_pos_encoding=True).last_hidden_state, exact) < 3e-7
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = model(floats).last_hidden_state
        report = fastvit.optimize(model)
        optimized = model(floats).last_hidden_state
        ours = vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert len(report.replaced) == 12 and not report.left
    for name, result in (("optimize", optimized), ("folded ViT", ours)):
        assert_no_worse_than(result, theirs, exact, slack=2, name=name)


@pytest.mark.filterwarnings("ignore:.*does not record mean and std", "ignore:the checkpoint has neither classifier")
@torch.inference_mode()
def test_transformers_loads_the_folded_checkpoint(tmp_path, photographs, exact):
    load_vit().save_pretrained(tmp_path / "vit")
    model, info = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False, output_loading_info=True)
    assert not any(info.values()), info
    result = model.eval()(normalize(photographs), interpolate_pos_encoding=True).last_hidden_state
    assert relative_error(result, exact[-1]) < 4e-6
    fastvit.convert(tmp_path / "vit", tmp_path / "timm.safetensors", to="timm")
    fastvit.convert(tmp_path / "timm.safetensors", tmp_path / "back", to="hf", num_heads=6)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("vit", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_features_are_as_exact_as_those_of_onnx_runtime(photographs, exact):
    """The file's own graph, cut behind the backbone's LayerNorm; its input is [B, 3, 224, 224]."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(GRAPH)
    output = "/backbone/layernorm/Add_1_output_0"
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3  # no warnings about what the decoder leaves behind
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (theirs,) = session.run([output], {"input_image": normalize(photographs).numpy()})
    theirs = torch.from_numpy(theirs)
    assert relative_error(theirs, exact[-1]) < 4e-6  # 32 roundings of float32: our weights are those of the graph
    with torch.inference_mode():
        ours = load_vit()(photographs, interpolate_pos_encoding=True).last_hidden_state
    assert_no_worse_than(ours, theirs, exact[-1], slack=2)  # matmuls by another library


# ---------------------------------------------------------------------------------------------------------------------
# Other precisions
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 0.025), (torch.float16, 0.004)], ids=lambda value: str(value).split(".")[-1]
)
def test_half_precision_is_as_exact_as_transformers(photographs, exact, dtype, limit):
    pixels, exact = photographs[::3], exact[-1][::3]  # float16 is slow on CPUs
    model, vit = load_dinov2().to(dtype), load_vit().to(dtype)
    theirs = model(normalize(pixels).to(dtype)).last_hidden_state
    fastvit.optimize(model)
    optimized = model(normalize(pixels).to(dtype)).last_hidden_state
    ours = vit(pixels, interpolate_pos_encoding=True).last_hidden_state
    for name, result in (("optimize", optimized), ("folded ViT", ours)):
        assert_no_worse_than(result, theirs, exact, slack=1.5, name=name)  # 12 blocks: roundings lead to others
        assert relative_error(result, exact) < limit


@pytest.fixture(scope="module")
def probe():
    """Pixels, labels and float32 features of validation images; and two classifiers of features."""
    train, train_labels = read_photographs("train", 20)
    pixels, labels = read_photographs("validation", 12)
    vit = load_vit()
    known, features = compute_features(vit, train), compute_features(vit, pixels)
    classifiers = (
        partial(predict_by_probe, fit_probe(known, train_labels)),
        partial(predict_by_neighbours, known, train_labels),
    )
    return pixels, labels, features, classifiers


@torch.inference_mode()
def test_predictor_computes_the_probe_from_files(tmp_path, probe):
    """Saved with a head, loaded at 224 pixels: position embeddings are resampled once, images decoded and resized."""
    _, _, features, (predict, _) = probe
    weight, bias = predict.args[0]
    vit = load_vit()
    vit.config.id2label = dict(enumerate(CLASSES))
    model = fastvit.ViTForImageClassification(vit.config)
    model.vit.load_state_dict(vit.state_dict())
    model.classifier = torch.nn.Linear(384, 3)
    model.classifier.weight.data, model.classifier.bias.data = weight[:384].t().float(), bias.float()
    model.save_pretrained(tmp_path)
    small = fastvit.ViTForImageClassification.from_pretrained(tmp_path, image_size=224)
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, resample=3, image_mean=MEAN, image_std=STD)
    with fastvit.Predictor(small, image_processor=processor) as predictor:
        results = predictor(list_photographs("validation", 12)[0][::6])
    expected = model.classifier(features[::6, :384]).softmax(-1)
    np.testing.assert_allclose([result.probabilities for result in results], expected, atol=1e-4)


def test_frozen_features_tell_the_classes_apart(probe):
    _, labels, features, (predict, _) = probe
    assert (predict(features) == labels).double().mean() > 0.65  # a third by chance, 60 training images


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.02), ("fp8", 0.15), ("int8", 0.05)])
def test_accuracy_survives_the_precision(probe, precision, limit):
    if precision == "int8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    pixels, labels, expected, classifiers = probe
    features = compute_features(set_precision(load_vit(), precision), pixels)
    assert relative_error(features, expected) < limit
    for predict in classifiers:
        found, before = predict(features), predict(expected)
        assert (found != before).sum() <= (6 if precision == "fp8" else 3)
        assert abs((found == labels).sum() - (before == labels).sum()) <= (3 if precision == "fp8" else 2)


@BLOCKS
def test_emulated_fp8_is_as_exact_as_an_h100(blocks, block):
    """mmaemu computes the bits of an H100's fp8 tensor cores. Ours adds the same products in float32 on a CPU."""
    mmaemu = pytest.importorskip("mmaemu")
    parts = blocks[block]
    x = reference.quantize_rows(select_rows(parts["normed2"])[0])
    weight = reference.quantize_rows(parts["first"][0][:128])
    exact = (x[0].double() * x[1]) @ (weight[0].double() * weight[1]).t()
    sums = mmaemu.accumulate(x[0], weight[0], use_fast_accum=False, splitk=1)
    theirs = (sums * x[1] * weight[1].t()).to(torch.bfloat16)
    ours = reference.linear_fp8(*x, *weight)
    assert relative_error(sums * x[1] * weight[1].t(), exact) < 2**-10  # its sums have fewer bits than float32
    assert_no_worse_than(theirs, ours, exact)
    assert (ours == theirs).double().mean() > 0.85
    steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    assert (steps[exact.abs() > exact.square().mean().sqrt() / 8] <= 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels on real activations
# ---------------------------------------------------------------------------------------------------------------------


def select_rows(tensor, count=ROWS):
    """The class token, the tokens of largest and of smallest norm, of the first image: [1, count, D]."""
    order = tensor[0, 1:].flatten(1).norm(dim=-1).argsort() + 1
    half = count // 2
    return tensor[:1, torch.cat([torch.zeros(1, dtype=torch.long), order[:half], order[half - count + 1 :]])]


def test_activations_are_those_of_the_model_and_have_outliers(exact, blocks):
    ratios = {}
    for index, parts in blocks.items():
        if index < 11:
            torch.testing.assert_close(parts["out"], exact[index + 1], rtol=1e-6, atol=1e-6)
        for name in ("x", "normed2", "context", "activated"):
            sizes = parts[name].abs()
            ratios[index, name] = (sizes.max() / sizes.median()).item()
    assert ratios[0, "normed2"] > 100  # channels 100 times the median
    assert all(ratio > 8 for ratio in ratios.values()), ratios  # of normal numbers: 7
    channels = blocks[0]["normed2"].abs().amax((0, 1))
    assert channels.max() > 15 * channels.median()
    tokens = exact[10].norm(dim=-1)
    assert tokens.max() > 2 * tokens.median()


@DTYPES
@BLOCKS
def test_layer_norm(blocks, block, dtype):
    parts = blocks[block]
    weight, bias = (tensor.to(dtype) for tensor in parts["norm2"])
    inputs = {"x": select_rows(parts["residual"]).to(dtype), "weight": weight, "bias": bias}
    check(partial(layer_norm, eps=EPS), partial(reference.layer_norm, eps=EPS), inputs)
    order = {"x": select_rows(parts["branch1"]).to(dtype), "residual": select_rows(parts["x"]).to(dtype)}
    check(partial(add_layer_norm, eps=EPS), partial(reference.add_layer_norm, eps=EPS), order | inputs | order)


@DTYPES
@BLOCKS
def test_attention(blocks, block, dtype):
    """All keys of the first image, in the two heads with the largest scores."""
    parts = blocks[block]
    scores = torch.einsum("qhd,khd->hqk", parts["query"][0], parts["key"][0])
    heads = scores.amax((1, 2)).argsort()[-2:]
    inputs = {name: parts[name][:1, :, heads].to(dtype) for name in ("query", "key", "value")}
    inputs = {"x": inputs.pop("query")[:, :48]} | inputs
    check(lambda x, key, value: attention(x, key, value), lambda x, **rest: reference.attention(x, **rest), inputs)


@DTYPES
@BLOCKS
@pytest.mark.parametrize("way", ["separate", "fused"])
def test_layer_norm_linear_and_feed_forward(blocks, block, dtype, way):
    """Gradients of the input alone: those of the weights are PyTorch's own matmuls."""
    parts = blocks[block]
    names = ("norm_weight", "norm_bias", "weight", "bias")
    weights = dict(zip(names, (*parts["norm1"], *parts["joined"]), strict=True))
    inputs = {name: tensor.to(dtype) for name, tensor in ({"x": select_rows(parts["x"])} | weights).items()}
    names = ("weight1", "bias1", "weight2", "bias2")
    layers = dict(zip(names, (*parts["first"], *parts["second"]), strict=True))
    hidden = {name: tensor.to(dtype) for name, tensor in ({"x": select_rows(parts["normed2"])} | layers).items()}
    with use_variants(way):
        theirs = partial(reference.layer_norm_linear, eps=EPS)
        check(partial(layer_norm_linear, eps=EPS), theirs, inputs, grads_for=("x",))
        theirs = partial(reference.feed_forward, activation="gelu")
        check(partial(feed_forward, activation="gelu"), theirs, hidden, grads_for=("x",))


@DTYPES
@BLOCKS
def test_gelu(blocks, block, dtype):
    parts = blocks[block]
    bias = parts["first"][1]
    inputs = {"x": select_rows(parts["pre"] - bias).to(dtype), "bias": bias.to(dtype)}
    check(bias_gelu, reference.bias_gelu, inputs)


@DTYPES
@BLOCKS
def test_rows_in_fp8(blocks, block, dtype):
    parts = blocks[block]
    for name in ("context", "normed2", "activated"):
        x = select_rows(parts[name]).to(dtype)
        with poison_memory():
            ours = quantize.quantize_rows(x)
        for mine, definition in zip(ours, reference.quantize_rows(x), strict=True):
            assert torch.equal(mine.float(), definition.float())
        # Half a step of e4m3: 1/16 of a number, or 1/1024 of the scale for those below the normal numbers.
        error = (ours[0].double() * ours[1] - x.double()).abs()
        assert (error <= torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * ours[1].double()) * (1 + 1e-6)).all()
    norm = [tensor.to(dtype) for tensor in parts["norm2"]]
    x, bias = select_rows(parts["residual"]).to(dtype), parts["first"][1].to(dtype)
    pre = select_rows(parts["pre"]).to(dtype) - bias
    for ours, theirs, exact in (
        (
            quantize.layer_norm_fp8(x, *norm, EPS),
            reference.layer_norm_fp8(x, *norm, EPS),
            reference.layer_norm(x.double(), *(tensor.double() for tensor in norm), EPS),
        ),
        (
            quantize.bias_gelu_fp8(pre, bias),
            reference.bias_gelu_fp8(pre, bias),
            reference.bias_gelu(pre.double(), bias.double()),
        ),
    ):
        assert_no_worse_than(ours[0].double() * ours[1], theirs[0].double() * theirs[1], exact)


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps
# ---------------------------------------------------------------------------------------------------------------------


def test_the_last_block_attends_to_the_leaf():
    """Patches of the leaf are those with more green than the image's median patch; the border is two patches wide."""
    pixels, _ = read_photographs("validation", 4)
    with torch.inference_mode():
        output = load_vit("eager")(pixels, output_attentions=True, interpolate_pos_encoding=True)
    maps = torch.stack(output.attentions)  # [layers, B, heads, tokens, tokens]
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]), rtol=0, atol=1e-5)
    last = maps[-1, :, :, 0, 1:].mean(1)  # [B, patches]
    colours = pixels.float().unflatten(2, (16, 14)).unflatten(1, (16, 14)).mean((2, 4)).flatten(1, 2)
    green = colours[..., 1] - (colours[..., 0] + colours[..., 2]) / 2
    leaf = green > green.median(1, keepdim=True).values
    on_leaf = [attention[mask].mean() / attention[~mask].mean() for attention, mask in zip(last, leaf, strict=True)]
    assert np.mean(on_leaf) > 1.5 and np.mean(np.array(on_leaf) > 1) >= 0.75
    last = last.view(-1, 16, 16)
    inner = last[:, 2:-2, 2:-2].mean((1, 2))
    outer = (last.sum((1, 2)) - inner * 144) / 112
    assert (outer / inner).mean() < 0.9
    assert (last.amax((1, 2)) > 2 * last.mean((1, 2))).all()  # not uniform
