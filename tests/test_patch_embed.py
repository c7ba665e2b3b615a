"""Patch embedding: errors against the definition in float64 are no larger than those of PyTorch's convolution."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit.ops import reference

pytest.importorskip("triton")
from fastvit.kernels import patch_embed as kernels
from fastvit.kernels import tuning
from fastvit.kernels.patch_embed import patch_embed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEANS, STDS = (0.5, 0.4, 0.3, 0.2, 0.6, 0.7), (0.2, 0.25, 0.3, 0.35, 0.15, 0.1)
GRADIENTS = ("pixels", "weight", "bias", "cls_token", "pos_embed", "mask_token")


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, dtypes and layout of random inputs."""

    dtype: torch.dtype = torch.float32
    pixel_dtype: torch.dtype = torch.float32
    layout: str = "channels_first"
    batch: int = 2
    image_size: tuple[int, int] = (16, 24)
    patch_size: tuple[int, int] = (8, 8)
    channels: int = 3
    hidden: int = 48
    prefix: int = 1
    masked: bool = False
    bias: bool = True
    pos_embed: bool = True
    token_dtype: torch.dtype | None = None  # of cls_token, pos_embed and mask_token; None: dtype
    scale: float = 1.0

    def make_inputs(self, seed: int = 0) -> dict:
        """Return the keyword arguments of `patch_embed`, on DEVICE, as leaves that require gradients."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape, dtype=self.token_dtype or self.dtype, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE).requires_grad_()

        height, width = self.image_size
        shape = (self.batch, self.channels, height, width)
        patches = (height // self.patch_size[0]) * (width // self.patch_size[1])
        if self.pixel_dtype == torch.uint8:
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(DEVICE)
        else:
            pixels = randn(*shape, dtype=self.pixel_dtype, scale=self.scale)
        with torch.no_grad():
            pixels = lay_out(pixels, self.layout)
        size = self.channels * self.patch_size[0] * self.patch_size[1]
        return {
            "pixels": pixels.requires_grad_(pixels.is_floating_point()),
            "weight": randn(self.hidden, self.channels, *self.patch_size, dtype=self.dtype, scale=size**-0.5),
            "bias": randn(self.hidden, dtype=self.dtype) if self.bias else None,
            "cls_token": randn(1, self.prefix, self.hidden) if self.prefix else None,
            "pos_embed": randn(1, self.prefix + patches, self.hidden) if self.pos_embed else None,
            "patch_size": self.patch_size,
            "mean": MEANS[: self.channels],
            "std": STDS[: self.channels],
            "mask_token": randn(1, 1, self.hidden) if self.masked else None,
            "mask": (torch.rand(self.batch, patches, generator=generator) < 0.4).to(DEVICE) if self.masked else None,
        }


def lay_out(pixels, layout):
    """Copy images [B, C, H, W] into another memory layout; `channels_last` returns [B, H, W, C]."""
    batch, channels, height, width = pixels.shape
    if layout == "channels_first":
        return pixels.detach()
    if layout == "channels_last":
        return pixels.permute(0, 2, 3, 1).contiguous()
    if layout == "memory_format":
        return pixels.to(memory_format=torch.channels_last)
    if layout == "batch_last":
        return pixels.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "width_before_height":
        return pixels.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return pixels[:1].expand(batch, -1, -1, -1)
    large = torch.zeros(batch + 1, channels + 2, height + 3, width + 5, dtype=pixels.dtype, device=pixels.device)
    if layout == "cropped":
        view = large[1:, 1:-1, 2:-1, 3:-2]
    elif layout == "cropped_channels_last":
        view = large.to(memory_format=torch.channels_last)[1:, :channels, 2:-1, 3:-2]
    elif layout == "every_other":
        large = torch.zeros(batch, channels, height * 2, width * 2, dtype=pixels.dtype, device=pixels.device)
        view = large[:, :, ::2, ::2]
    else:
        raise ValueError(layout)
    return view.copy_(pixels)


def compute_definition(pixels, mean, std, **inputs):
    """Run `reference.patch_embed` in float64, and normalise uint8 pixels in float64 as well."""
    channels = inputs["weight"].shape[1]
    if pixels.shape[1] != channels:
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.dtype == torch.uint8:
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=pixels.device).view(-1, 1, 1) for values in (mean, std)
        )
        pixels = (pixels.double() / 255 - mean) / std
    return reference.patch_embed(pixels, **inputs)


def run_convolution(pixels, weight, bias, cls_token, pos_embed, *, patch_size, mean, std, mask_token, mask):
    """The usual PyTorch code: normalise, convolve, flatten, concatenate, add."""
    if pixels.shape[1] != weight.shape[1]:
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.dtype == torch.uint8:
        pixels = reference.normalize_pixels(pixels, mean, std, weight.dtype)
    tokens = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    return reference.join_tokens(tokens, cls_token, pos_embed, mask_token=mask_token, mask=mask)


def cast_to_float64(inputs):
    def convert(value):
        if not torch.is_tensor(value) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in inputs.items()}


def compute_results(function, inputs, grad_out=None):
    """Return the output and all gradients by name, for a fixed random output gradient."""
    out = function(**inputs)
    if grad_out is None:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = {name: inputs[name] for name in GRADIENTS if torch.is_tensor(inputs[name]) and inputs[name].requires_grad}
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def check(case, function=patch_embed, **changes):
    """Assert that outputs and gradients are as close to float64 as PyTorch's in the same dtype."""
    case = dataclasses.replace(case, **changes)
    inputs = case.make_inputs()
    # Both get the same output gradient, rounded to the dtype, so that its rounding is not counted as an error.
    tokens = case.prefix + (case.image_size[0] // case.patch_size[0]) * (case.image_size[1] // case.patch_size[1])
    shape = (case.batch, tokens, case.hidden)
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype).to(DEVICE)
    ours = compute_results(function, inputs, grad_out)
    theirs = compute_results(run_convolution, inputs, grad_out)
    exact = compute_results(compute_definition, cast_to_float64(inputs), grad_out)
    assert ours.keys() == exact.keys()
    for name in ours:
        assert ours[name].shape == exact[name].shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        assert_no_worse_than(ours[name], theirs[name], exact[name], name=name)


DTYPES = [
    pytest.param(dtype, pixel_dtype, id=f"{str(dtype)[6:]}-{str(pixel_dtype)[6:]}-pixels")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for pixel_dtype in dict.fromkeys((torch.uint8, torch.float32, dtype))
]


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(("dtype", "pixel_dtype"), DTYPES)
def test_tokens_and_gradients_match_reference(dtype, pixel_dtype, layout):
    check(Case(), dtype=dtype, pixel_dtype=pixel_dtype, layout=layout, masked=layout == "channels_last")


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(
    ("patch_size", "image_size", "hidden"),
    [
        ((4, 4), (16, 12), 32),
        ((8, 8), (16, 16), 192),
        ((14, 14), (28, 28), 33),  # K = 588 ends in the middle of a block, whatever the block
        ((16, 16), (16, 32), 64),
        ((32, 32), (32, 32), 8),
        ((4, 8), (16, 16), 48),
        ((8, 2), (16, 8), 17),
        ((1, 1), (3, 2), 5),
    ],
    ids=str,
)
def test_any_patch_size(patch_size, image_size, hidden, layout):
    check(Case(), patch_size=patch_size, image_size=image_size, hidden=hidden, layout=layout)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_any_number_of_channels(channels, pixel_dtype, layout):
    check(Case(), channels=channels, pixel_dtype=pixel_dtype, layout=layout)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_any_number_of_prefix_tokens(prefix, masked):
    check(Case(), prefix=prefix, masked=masked, pixel_dtype=torch.uint8)


@pytest.mark.parametrize("missing", ["bias", "pos_embed"])
def test_bias_and_position_embedding_may_be_missing(missing):
    check(Case(), **{missing: False})


@pytest.mark.parametrize(
    "layout",
    [
        "memory_format",
        "batch_last",
        "width_before_height",
        "expanded",
        "cropped",
        "cropped_channels_last",
        "every_other",
    ],
)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_pixels_of_any_layout_match_reference(layout, pixel_dtype):
    check(Case(), layout=layout, pixel_dtype=pixel_dtype)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("image_size", [(23, 24), (16, 31), (21, 19)], ids=str)
def test_partial_patches_at_the_edges_are_ignored_and_have_zero_gradient(image_size, layout):
    check(Case(), image_size=image_size, layout=layout)
    inputs = Case(image_size=image_size, layout=layout).make_inputs()
    gradient = compute_results(patch_embed, inputs)["grad_pixels"]
    gradient = gradient if layout == "channels_first" else gradient.permute(0, 3, 1, 2)
    assert not gradient[:, :, image_size[0] // 8 * 8 :].any()
    assert not gradient[:, :, :, image_size[1] // 8 * 8 :].any()
    assert gradient[:, :, : image_size[0] // 8 * 8, : image_size[1] // 8 * 8].all()


def test_one_image():
    check(Case(), batch=1, pixel_dtype=torch.uint8)


def test_many_images_are_summed_over_several_splits():
    check(Case(), batch=48, image_size=(16, 16), hidden=16, channels=1, masked=True)


@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_empty_batch_returns_no_tokens_and_zero_gradients(pixel_dtype):
    ours = compute_results(patch_embed, Case(batch=0, pixel_dtype=pixel_dtype, masked=True).make_inputs())
    assert ours["out"].shape == (0, 7, 48)
    for name, gradient in ours.items():
        assert not gradient.any(), name
    assert ours["grad_weight"].shape == (48, 3, 8, 8)
    assert ours["grad_mask_token"].shape == (1, 1, 48)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tiny_and_huge_pixels(dtype, scale):
    check(Case(), dtype=dtype, pixel_dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_tokens_with_half_precision_weight_return_float32(dtype):
    case = Case(dtype=dtype, token_dtype=torch.float32, masked=True)
    assert patch_embed(**case.make_inputs()).dtype == torch.float32
    check(case)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_tokens():
    inputs = Case(pixel_dtype=torch.uint8).make_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = compute_results(patch_embed, inputs)
        theirs = compute_results(reference.patch_embed, inputs)
    half = dict(inputs, weight=inputs["weight"].bfloat16(), bias=inputs["bias"].bfloat16())
    assert torch.equal(ours["out"], patch_embed(**half))
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_own_patch(value):
    inputs = Case(image_size=(16, 27)).make_inputs()
    inputs["pixels"].requires_grad_(False)
    clean = patch_embed(**inputs)
    inputs["pixels"][1, 2, 9, 17] = value  # second image, last of its 2 x 3 patches
    inputs["pixels"][0, :, :, 24:] = value  # a partial patch: not read
    dirty = patch_embed(**inputs)
    theirs = run_convolution(**inputs)
    assert torch.equal(dirty.isnan(), theirs.isnan())
    assert torch.equal(dirty.isinf(), theirs.isinf())
    assert not dirty[1, 6].isfinite().any()
    dirty[1, 6] = clean[1, 6]
    assert torch.equal(dirty, clean)


def test_nan_in_a_masked_patch_reaches_neither_tokens_nor_gradients():
    inputs = Case(masked=True).make_inputs()
    inputs["mask"][:] = False
    inputs["mask"][0, 0] = True
    with torch.no_grad():
        inputs["pixels"][0, :, :8, :8] = float("nan")
    for name, tensor in compute_results(patch_embed, inputs).items():
        assert tensor.isfinite().all(), name


def test_nan_gradient_of_a_prefix_token_does_not_reach_weight_and_pixels():
    inputs = Case().make_inputs()
    grad_out = torch.ones(2, 7, 48, device=DEVICE)
    grad_out[:, 0] = float("nan")
    ours = compute_results(patch_embed, inputs, grad_out)
    assert ours["grad_cls_token"].isnan().all()
    for name in ("grad_weight", "grad_pixels", "grad_bias"):
        assert ours[name].isfinite().all(), name


def test_output_gradients_of_any_strides():
    inputs = Case(masked=True).make_inputs()
    grad_out = torch.randn(7, 48, 2, device=DEVICE).permute(2, 0, 1)
    ours = compute_results(patch_embed, inputs, grad_out)
    for name, tensor in compute_results(patch_embed, inputs, grad_out.contiguous()).items():
        assert torch.equal(tensor, ours[name]), name
    expanded = compute_results(patch_embed, inputs, torch.ones((), device=DEVICE).expand(2, 7, 48))
    for name, tensor in compute_results(patch_embed, inputs, torch.ones(2, 7, 48, device=DEVICE)).items():
        assert torch.equal(tensor, expanded[name]), name


def test_only_requested_gradients_are_computed(monkeypatch):
    def forbidden(*args):
        raise AssertionError("computed a gradient that was not requested")

    monkeypatch.setattr(kernels, "_weight_backward", forbidden)
    monkeypatch.setattr(kernels, "pixels_backward", forbidden)
    inputs = Case().make_inputs()
    for name in GRADIENTS:
        if torch.is_tensor(inputs[name]):
            inputs[name].requires_grad_(name == "bias")
    assert list(compute_results(patch_embed, inputs)) == ["out", "grad_bias"]


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_every_output_is_fully_written(layout):
    case = Case(image_size=(19, 26), layout=layout, masked=True, hidden=40)
    with poison_memory():
        ours = compute_results(patch_embed, case.make_inputs())
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name


def test_results_are_deterministic():
    case = Case(batch=16, dtype=torch.bfloat16, pixel_dtype=torch.uint8, masked=True)
    first = compute_results(patch_embed, case.make_inputs())
    for name, tensor in compute_results(patch_embed, case.make_inputs()).items():
        assert torch.equal(tensor, first[name]), name


def test_pixels_beyond_int32_offsets_are_addressed():
    storage = torch.UntypedStorage(2**31 + 2**12, device=DEVICE)  # untouched pages take no physical memory
    large = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(storage)
    inputs = Case(image_size=(8, 8), pixel_dtype=torch.uint8).make_inputs()
    expected = patch_embed(**inputs)
    for stride in ((2**31, 64, 8, 1), (64, 2**30, 8, 1)):
        far = large.as_strided((2, 3, 8, 8), stride).copy_(inputs["pixels"])
        assert torch.equal(patch_embed(**dict(inputs, pixels=far)), expected)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_any_candidate(layout):
    case = Case(batch=3, layout=layout, masked=True, hidden=80)
    check(case, function=partial(patch_embed, candidate=1))


def test_requested_candidate_is_used_in_forward_and_backward(monkeypatch):
    requested = []
    select = tuning.select

    def record(operation, *case):
        requested.append((operation, case[-1]))
        return select(operation, *case)

    monkeypatch.setattr(tuning, "select", record)
    compute_results(partial(patch_embed, candidate=1), Case().make_inputs())
    assert requested == [("patch_embed_forward", 1), ("patch_embed_weight", 1)]


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("dtype", "pixel_dtype"), DTYPES)
def test_fallbacks_match_launchers(dtype, pixel_dtype, masked, layout):
    case = Case(dtype, pixel_dtype, layout, image_size=(19, 26), prefix=2, masked=masked, token_dtype=torch.float32)
    inputs = {name: value.detach() if torch.is_tensor(value) else value for name, value in case.make_inputs().items()}
    if masked and pixel_dtype.is_floating_point:
        inputs["pixels"][:, :8, :8, :8] = torch.where(inputs["mask"][:, 0].view(-1, 1, 1, 1), float("nan"), 1)
    mean, std = (None, None) if pixel_dtype.is_floating_point else (list(inputs["mean"]), list(inputs["std"]))
    names = ("pixels", "weight", "bias", "cls_token", "pos_embed", "mask_token", "mask")
    arguments = (*map(inputs.get, names), mean, std, 0)
    out = kernels.launch_forward(*arguments)
    pixels, weight, mask = inputs["pixels"], inputs["weight"], inputs["mask"]
    for launcher, fallback, given_arguments in (
        (kernels.launch_forward, kernels.forward_fallback, arguments),
        (
            kernels.launch_weight_backward,
            kernels.weight_fallback,
            (torch.randn_like(out), pixels, weight, mask, mean, std, 0),
        ),
        (kernels.launch_tokens_backward, kernels.tokens_fallback, (torch.randn_like(out), mask, 2)),
    ):
        ours, plain = launcher(*given_arguments), fallback(*given_arguments)
        assert plain.shape == ours.shape
        assert plain.dtype == ours.dtype
        assert plain.stride() == ours.stride()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(plain, ours, atol=8 * eps * ours.abs().max().item(), rtol=0)


@pytest.mark.parametrize("tiles", [1, 18, 25, 40, 72, 144, 1000])
@pytest.mark.parametrize("total_patches", [1, 49, 196, 50176])
def test_splits_of_the_weight_gradient_cover_every_patch_once(total_patches, tiles):
    split_patches = kernels._choose_split(total_patches, tiles, 64)
    splits = tuning.cdiv(total_patches, split_patches)
    assert split_patches % 64 == 0
    assert (splits - 1) * split_patches < total_patches <= splits * split_patches
    assert splits <= max(4, kernels.MULTIPROCESSORS // tiles)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_operators_pass_opcheck(masked):
    case = Case(image_size=(8, 16), hidden=16, channels=2, masked=masked)
    inputs = case.make_inputs()
    arguments = [
        inputs[name] for name in ("pixels", "weight", "bias", "cls_token", "pos_embed", "mask_token", "mask")
    ] + [None, None, 0]
    torch.library.opcheck(torch.ops.fastvit.patch_embed.default, arguments)

    pixels, weight, mask = inputs["pixels"].detach(), inputs["weight"].detach(), inputs["mask"]
    grad_out = torch.randn(2, 3, 16, device=DEVICE)
    weight_arguments = (grad_out, pixels, weight, mask, None, None, 0)
    torch.library.opcheck(torch.ops.fastvit.patch_embed_weight_backward.default, weight_arguments)
    torch.library.opcheck(torch.ops.fastvit.patch_embed_tokens_backward.default, (grad_out, mask, 1))


@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_compiles_as_one_graph(pixel_dtype):
    inputs = Case(pixel_dtype=pixel_dtype, masked=True).make_inputs()
    compiled = compute_results(torch.compile(patch_embed, backend="aot_eager", fullgraph=True), inputs)
    for name, tensor in compute_results(patch_embed, inputs).items():
        assert torch.equal(tensor, compiled[name]), name


def test_compiles_as_one_graph_under_autocast():
    inputs = Case().make_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        compiled = torch.compile(patch_embed, backend="aot_eager", fullgraph=True)(**inputs)
        assert torch.equal(compiled, patch_embed(**inputs))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        pixel_dtype=st.sampled_from([torch.uint8, torch.float32]),
        layout=st.sampled_from(["channels_first", "channels_last", "cropped", "batch_last", "width_before_height"]),
        batch=st.integers(1, 3),
        image_size=st.tuples(st.integers(7, 20), st.integers(7, 20)),
        patch_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
        channels=st.sampled_from([1, 3, 4]),
        hidden=st.integers(1, 70),
        prefix=st.integers(0, 3),
        masked=st.booleans(),
        bias=st.booleans(),
        pos_embed=st.booleans(),
    )
)
def test_any_shape(case):
    inputs = case.make_inputs()
    exact = compute_results(compute_definition, cast_to_float64(inputs))
    for name, tensor in compute_results(patch_embed, inputs).items():
        # With few elements, either error may be the larger by chance, so a fixed bound replaces PyTorch's error.
        bound = 16 * torch.finfo(tensor.dtype if name != "grad_pixels" else case.dtype).eps
        error = (tensor.double() - exact[name]).abs().max()
        assert error <= bound * max(exact[name].abs().max(), 1), name


def change_inputs(**changes):
    return lambda inputs: inputs | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_inputs(pixels=torch.zeros(3, 16, 24)), r"pixels: expected \[B, 3, H, W\].*got \[3, 16, 24\]"),
        (change_inputs(pixels=torch.zeros(2, 4, 16, 24)), r"pixels: .*weight has 3 channels.*got \[2, 4, 16, 24\]"),
        (
            change_inputs(pixels=torch.zeros(2, 3, 7, 24)),
            r"pixels: expected room for one patch of \(8, 8\), got \(7, 24\)",
        ),
        (change_inputs(pixels=torch.zeros(2, 3, 16, 24, dtype=torch.int32)), "pixels: expected uint8.*got torch.int32"),
        (
            change_inputs(pixels=torch.zeros(2, 3, 16, 24, dtype=torch.float64)),
            "pixels: expected uint8.*got torch.float64",
        ),
        (change_inputs(pixels=torch.zeros(2, 3, 16, 24, device="meta")), "pixels: expected device .*got meta"),
        (
            change_inputs(pixels=torch.zeros(2, 3, 16, 24, dtype=torch.uint8), mean=None),
            "mean: expected 3 floats.*got None",
        ),
        (
            change_inputs(pixels=torch.zeros(2, 3, 16, 24, dtype=torch.uint8), std=(0.5,)),
            r"std: expected 3 floats.*\(0.5,\)",
        ),
        (
            change_inputs(pixels=torch.zeros(2, 3, 16, 24, dtype=torch.uint8), std=(0.5, 0.0, 0.5)),
            r"std: expected floats other than 0.*\(0.5, 0.0, 0.5\)",
        ),
        (change_inputs(weight=torch.zeros(48, 192)), r"weight: expected \[D, C, ph, pw\].*got \[48, 192\]"),
        (change_inputs(weight=torch.zeros(48, 3, 8, 8, dtype=torch.float64)), "weight: expected .*got .*torch.float64"),
        (change_inputs(patch_size=(16, 16)), r"patch_size: expected weight's \(8, 8\), got \(16, 16\)"),
        (change_inputs(bias=torch.zeros(47)), r"bias: expected \[48\], got \[47\]"),
        (change_inputs(bias=torch.zeros(48, dtype=torch.bfloat16)), "bias: expected torch.float32, got torch.bfloat16"),
        (change_inputs(bias=torch.zeros(48, device="meta")), "bias: expected device .*got meta"),
        (change_inputs(cls_token=torch.zeros(1, 48)), r"cls_token: expected \[1, T, 48\], got \[1, 48\]"),
        (change_inputs(pos_embed=torch.zeros(1, 6, 48)), r"pos_embed: expected \[1, 7, 48\], got \[1, 6, 48\]"),
        (change_inputs(pos_embed=torch.zeros(1, 7, 48, dtype=torch.int32)), "pos_embed: expected .*got torch.int32"),
        (change_inputs(mask=torch.zeros(2, 6, dtype=torch.bool)), "mask_token: expected .* with a mask, got None"),
        (
            change_inputs(mask=torch.zeros(2, 6), mask_token=torch.zeros(1, 1, 48)),
            "mask: expected torch.bool, got torch.float32",
        ),
        (
            change_inputs(mask=torch.zeros(2, 5, dtype=torch.bool), mask_token=torch.zeros(1, 1, 48)),
            r"mask: expected \[2, 6\], got \[2, 5\]",
        ),
    ],
)
def test_invalid_input_raises_before_launch(change, message, monkeypatch):
    monkeypatch.setattr(kernels, "_patch_embed", None)
    inputs = {
        name: value.detach().cpu() if torch.is_tensor(value) else value for name, value in Case().make_inputs().items()
    }
    with pytest.raises(ValueError, match=message):
        patch_embed(**change(inputs))


def test_mask_token_without_mask_is_ignored():
    inputs = Case().make_inputs()
    expected = patch_embed(**inputs)
    assert torch.equal(patch_embed(**dict(inputs, mask_token=torch.ones(1, 1, 48, device=DEVICE))), expected)
