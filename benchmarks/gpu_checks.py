"""Is every kernel, with every candidate, as accurate as PyTorch's own operation? Two shapes, forward and backward.

About 70 cases that cover what the tests cover with 1,600, for a machine that is available for minutes
(`benchmarks/gpu.py`). Errors are relative to float64; `tests/accuracy.py` judges them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvit
from fastvit import ops
from fastvit.ops import reference

TESTS = Path(__file__).resolve().parent.parent / "tests"
EPS = 1e-6
PATCH = {"patch_size": (16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
MODULES = ops.KERNEL_MODULES | {"bias_gelu": "gelu", "layer_norm_act": "layer_norm"}


class Size(NamedTuple):
    batch: int
    tokens: int
    hidden: int
    heads: int
    image: int

    def get_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an argument of `CALLS`."""
        hidden, wide, rows = self.hidden, 4 * self.hidden, (self.batch, self.tokens)
        heads = (self.heads, hidden // self.heads)
        return {
            "x": (*rows, hidden), "residual": (*rows, hidden), "wide": (*rows, wide),
            "scale": (hidden,), "shift": (hidden,), "weight": (wide, hidden), "bias": (wide,),
            "weight2": (hidden, wide), "bias2": (hidden,), "half_bias": (hidden // 2,),
            "query": (*rows, *heads), "key": (*rows, *heads), "value": (*rows, *heads), "qkv": (*rows, 3, *heads),
            "mask": (self.batch, 1, 1, self.tokens), "pixels": (self.batch, 3, self.image, self.image),
            "uint8": (self.batch, self.image, self.image, 3), "patches": (hidden, 3, 16, 16),
            "cls_token": (1, 1, hidden), "pos_embed": (1, self.tokens, hidden),
        }[name]  # fmt: skip


SIZES = {
    "ViT-B": Size(32, 197, 768, 12, 224),  # 32 x 12 heads select the kernels of short sequences
    "odd": Size(3, 50, 320, 5, 112),
    "toy": Size(1, 17, 32, 2, 64),
    # For a cache of binaries only.
    "ViT-Ti": Size(64, 197, 192, 3, 224),
    "ViT-S": Size(64, 197, 384, 6, 224),
    "ViT-L": Size(16, 197, 1024, 16, 224),
}


def make_uneven_lengths(tokens: Tensor) -> dict[str, Any]:
    """Returns boundaries that split the rows of a batch into images of unequal lengths."""
    bounds = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device) * tokens.shape[1]
    bounds[1:-1] -= 5
    return {"cu_seqlens": bounds, "max_seqlen": tokens.shape[1] + 5}


def dequantize(values: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return (values.float() * scale).to(dtype)


# How to call each kernel and its definition, f; the other arguments are tensors by name.
CALLS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda f, x, scale, shift: f(x, scale, shift, EPS),
    "add_layer_norm": lambda f, x, residual, scale, shift: f(x, residual, scale, shift, EPS),
    "layer_norm_act": lambda f, x, scale, shift: f(x, scale, shift, EPS),
    "bias_gelu": lambda f, wide, bias: f(wide, bias),
    "swiglu": lambda f, x, shift: f(x, shift),
    "layer_norm_linear": lambda f, x, scale, shift, weight, bias: f(x, scale, shift, EPS, weight, bias),
    "add_layer_norm_linear": lambda f, x, residual, scale, shift, weight, bias: f(
        x, residual, scale, shift, EPS, weight, bias
    ),
    "layer_norm_gelu": lambda f, x, scale, shift, weight, bias: f(x, scale, shift, EPS, weight, bias),
    "feed_forward": lambda f, x, weight, bias, weight2, bias2: f(x, weight, bias, weight2, bias2, "gelu"),
    "add_layer_norm_feed_forward": lambda f, x, residual, scale, shift, weight, bias, weight2, bias2: f(
        x, residual, scale, shift, EPS, weight, bias, weight2, bias2
    ),
    "attention": lambda f, query, key, value: f(query, key, value),
    "attention_packed": lambda f, qkv: f(qkv),
    "patch_embed": lambda f, uint8, patches, shift, cls_token, pos_embed: f(
        uint8, patches, shift, cls_token, pos_embed, **PATCH
    ),
    "patch_embed, float pixels": lambda f, pixels, patches, shift, cls_token, pos_embed: f(
        pixels, patches, shift, cls_token, pos_embed, **PATCH
    ),
    "attention, mask": lambda f, query, key, value, mask: f(query, key, value, mask=mask),
    "attention, cu_seqlens": lambda f, query, key, value: f(
        *(tensor.flatten(0, 1) for tensor in (query, key, value)), **make_uneven_lengths(query)
    ),
    "quantize_rows": lambda f, x: dequantize(*f(x)),
    "layer_norm_fp8": lambda f, x, scale, shift: dequantize(*f(x, scale, shift, EPS)),
    "add_layer_norm_fp8": lambda f, x, residual, scale, shift: dequantize(*f(x, residual, scale, shift, EPS)[1:]),
    "bias_gelu_fp8": lambda f, wide, bias: dequantize(*f(wide, bias)),
    "linear_fp8": lambda f, x, weight, bias: f(*reference.quantize_rows(x), *reference.quantize_rows(weight), bias),
}


def is_fp8(name: str) -> bool:
    return "fp8" in name or name == "quantize_rows"


class Case(NamedTuple):
    call: str  # a key of CALLS, or "training step"
    size: str  # a key of SIZES
    dtype: torch.dtype
    candidate: int = 0

    def __str__(self) -> str:
        return f"{self.call} {self.size} {str(self.dtype)[6:]}, candidate {self.candidate}"


def list_cases(large: str = "ViT-B", small: str | None = "odd") -> list[Case]:
    """Lists all candidates of each kernel at the large shape in bfloat16, the first at the small shape in float16."""
    steps = [Case("training step", size, dtype) for size in (large,) for dtype in (torch.bfloat16, torch.float32)]
    found = []
    for call in CALLS:
        if call == "linear_fp8" and large == "toy":
            continue  # PyTorch's matmul with row-wise scales needs a GPU
        name = call.split(",")[0]
        count = 3 if "candidate" in inspect.signature(get_kernel(name)).parameters and name == call else 1
        found += [Case(call, large, torch.bfloat16, candidate) for candidate in range(count)]
        if small is not None:
            found.append(Case(call, small, torch.bfloat16 if is_fp8(call) else torch.float16))
    return steps + found


def get_kernel(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"fastvit.kernels.{MODULES[name]}"), name)


def draw_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Draws random arguments by name, in the case's dtype except for pixels and masks."""
    torch.manual_seed(0)
    found = {}
    for name in list(inspect.signature(CALLS[case.call]).parameters)[1:]:
        shape = SIZES[case.size].get_shape(name)
        tensor = torch.randn(shape, device=device)
        if name == "uint8":
            found[name] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        elif name == "mask":
            found[name] = tensor > -1
        elif name == "pixels":
            found[name] = tensor
        else:
            spread = 1.0 if len(shape) > 2 and name != "patches" else 0.2 if len(shape) < 2 else shape[-1] ** -0.5
            found[name] = (spread * tensor + (name == "scale")).to(case.dtype)
    return found


def bind_candidate(case: Case) -> Callable[..., Any]:
    function = get_kernel(case.call.split(",")[0])
    return (lambda *a, **k: function(*a, candidate=case.candidate, **k)) if case.candidate else function


def compute_results(
    case: Case, function: Callable[..., Any], inputs: dict[str, Tensor], exact: bool
) -> dict[str, Tensor]:
    """Computes outputs, and gradients of the arguments in the case's dtype; exact: in float64."""
    names = [name for name, tensor in inputs.items() if tensor.dtype == case.dtype and name not in ("uint8", "pixels")]
    leaves = {name: tensor.detach() for name, tensor in inputs.items()}
    if exact:
        leaves |= {name: leaves[name].double() for name in names}
    if not is_fp8(case.call):
        leaves = {name: leaf.requires_grad_(name in names) for name, leaf in leaves.items()}
    outputs = CALLS[case.call](function, **leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if is_fp8(case.call):
        return named
    torch.manual_seed(1)
    grads = [torch.randn(output.shape, device=output.device).to(case.dtype).to(output.dtype) for output in outputs]
    found = torch.autograd.grad(outputs, [leaves[name] for name in names], grads)
    return named | {f"gradient of {name}": grad for name, grad in zip(names, found, strict=True)}


def check_case(case: Case) -> dict[str, Any]:
    """Runs a case in this process; returns what is wrong, and the largest ratio of its errors to PyTorch's."""
    sys.path.insert(0, str(TESTS))
    from accuracy import assert_no_worse_than, measure_errors, poison_memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if case.call == "training step":
        return check_training_step(case, device)
    inputs, definition = draw_inputs(case, device), getattr(reference, case.call.split(",")[0])
    # With this backend a kernel that does not run is an error, and nothing falls back.
    with ops.backend("triton"), poison_memory():
        first, second = (compute_results(case, bind_candidate(case), inputs, exact=False) for _ in range(2))
    with torch.backends.mkldnn.flags(enabled=case.dtype != torch.float32):
        baseline = compute_results(case, definition, inputs, exact=False)
    exact = compute_results(case, definition, inputs, exact=True)
    wrong, ratios = [], []
    for name, tensor in first.items():
        our_error, baseline_error, rounding = (
            measure_errors(one, exact[name])[0] for one in (tensor, baseline[name], exact[name].to(tensor.dtype))
        )
        ratios.append(our_error / max(baseline_error, rounding, 1e-7))
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            wrong.append(f"{name}: a second run differs")
        if is_fp8(case.call):  # one number rounded the other way is a step of three bits
            if not our_error <= max(1.25 * baseline_error, 4e-3):
                wrong.append(f"{name}: error {our_error:.3g}, PyTorch's {baseline_error:.3g}")
            continue
        try:
            assert_no_worse_than(tensor, baseline[name], exact[name], name=name)
        except AssertionError as error:
            wrong.append(str(error))
    return {"wrong": wrong, "error_over_pytorch": max(ratios)}


def check_training_step(case: Case, device: torch.device) -> dict[str, Any]:
    """Compares gradients of two blocks with those of plain PyTorch; no kernel may fall back to it."""
    from fastvit.kernels import operators

    size = SIZES[case.size]
    torch.manual_seed(0)
    config = fastvit.ViTConfig(
        hidden_size=size.hidden, num_hidden_layers=2, num_attention_heads=size.heads, num_labels=10,
        intermediate_size=4 * size.hidden, image_size=size.image,
    )  # fmt: skip
    model = fastvit.ViTForImageClassification(config).to(device).train()
    pixels = torch.randn(size.get_shape("pixels"), device=device)
    labels = torch.arange(size.batch, device=device) % 10

    def compute_gradients(backend: str, exact: bool = False) -> Tensor:
        model.to(torch.float64 if exact else torch.float32)
        lower = case.dtype != torch.float32 and not exact
        with fastvit.backend(backend), torch.autocast(device.type, case.dtype, enabled=lower):
            loss = model(pixels.to(model.dtype), labels=labels).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)]).double()

    found = compute_gradients("auto" if device.type == "cuda" else "triton"), compute_gradients("reference")
    exact = compute_gradients("reference", exact=True)
    our_error, baseline_error = (((one - exact).norm() / exact.norm()).item() for one in found)
    wrong = [f"fell back: {' '.join(failure)}" for failure in operators.failures.values()]
    if not our_error <= max(1.25 * baseline_error, 1e-6):
        wrong.append(f"gradients: error {our_error:.3g}, PyTorch's {baseline_error:.3g}")
    return {"wrong": wrong, "error_over_pytorch": our_error / max(baseline_error, 1e-7)}


def launch_case(case: Case, device: torch.device) -> None:
    """Runs forward and backward unchecked, for a sanitizer or to compile them."""
    compute_results(case, bind_candidate(case), draw_inputs(case, device), exact=False)
