"""Is every kernel, with every candidate, as accurate as PyTorch's own operation? Two shapes, both directions.

About 70 cases that cover what the tests cover with 1,600: for a machine that is lent for minutes (`benchmarks/gpu.py`).
A case's errors are taken against float64; `tests/accuracy.py` judges them.
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that the arguments below call so."""
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
    "ViT-B": Size(32, 197, 768, 12, 224),  # 32 x 12 heads: enough for the kernels of short sequences
    "odd": Size(3, 50, 320, 5, 112),
    "toy": Size(1, 17, 32, 2, 64),
    # More for a cache of binaries only.
    "ViT-Ti": Size(64, 197, 192, 3, 224),
    "ViT-S": Size(64, 197, 384, 6, 224),
    "ViT-L": Size(16, 197, 1024, 16, 224),
}


def uneven(tokens: Tensor) -> dict[str, Any]:
    """Images of other lengths in the rows of a batch."""
    bounds = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device) * tokens.shape[1]
    bounds[1:-1] -= 5
    return {"cu_seqlens": bounds, "max_seqlen": tokens.shape[1] + 5}


def multiplied(values: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return (values.float() * scale).to(dtype)


# How each function is called: the kernel's and the definition's alike. Further arguments are tensors by name.
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
        *(tensor.flatten(0, 1) for tensor in (query, key, value)), **uneven(query)
    ),
    "quantize_rows": lambda f, x: multiplied(*f(x)),
    "layer_norm_fp8": lambda f, x, scale, shift: multiplied(*f(x, scale, shift, EPS)),
    "add_layer_norm_fp8": lambda f, x, residual, scale, shift: multiplied(*f(x, residual, scale, shift, EPS)[1:]),
    "bias_gelu_fp8": lambda f, wide, bias: multiplied(*f(wide, bias)),
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


def cases(large: str = "ViT-B", small: str | None = "odd") -> list[Case]:
    """All candidates of each kernel at the large shape in bfloat16, the first at the small one in float16."""
    steps = [Case("training step", size, dtype) for size in (large,) for dtype in (torch.bfloat16, torch.float32)]
    found = []
    for call in CALLS:
        if call == "linear_fp8" and large == "toy":
            continue  # PyTorch's matmul with a scale for each row is for GPUs
        name = call.split(",")[0]
        count = 3 if "candidate" in inspect.signature(function_of(name)).parameters and name == call else 1
        found += [Case(call, large, torch.bfloat16, candidate) for candidate in range(count)]
        if small is not None:
            found.append(Case(call, small, torch.bfloat16 if is_fp8(call) else torch.float16))
    return steps + found


def function_of(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"fastvit.kernels.{MODULES[name]}"), name)


def draw(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The arguments of a case by name, random, in the case's dtype but for pixels and masks."""
    torch.manual_seed(0)
    found = {}
    for name in list(inspect.signature(CALLS[case.call]).parameters)[1:]:
        shape = SIZES[case.size].shape(name)
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


def ours(case: Case) -> Callable[..., Any]:
    function = function_of(case.call.split(",")[0])
    return (lambda *a, **k: function(*a, candidate=case.candidate, **k)) if case.candidate else function


def results(case: Case, function: Callable[..., Any], inputs: dict[str, Tensor], exact: bool) -> dict[str, Tensor]:
    """Outputs, and gradients of the arguments in the case's dtype; exact: all of it in float64."""
    wanted = [name for name, tensor in inputs.items() if tensor.dtype == case.dtype and name not in ("uint8", "pixels")]
    leaves = {name: tensor.detach() for name, tensor in inputs.items()}
    if exact:
        leaves |= {name: leaves[name].double() for name in wanted}
    if not is_fp8(case.call):
        leaves = {name: leaf.requires_grad_(name in wanted) for name, leaf in leaves.items()}
    outputs = CALLS[case.call](function, **leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if is_fp8(case.call):
        return named
    torch.manual_seed(1)
    grads = [torch.randn(output.shape, device=output.device).to(case.dtype).to(output.dtype) for output in outputs]
    found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], grads)
    return named | {f"gradient of {name}": grad for name, grad in zip(wanted, found, strict=True)}


def check(case: Case) -> dict[str, Any]:
    """Run a case in this process: how its errors compare with PyTorch's, and what is wrong."""
    sys.path.insert(0, str(TESTS))
    from accuracy import assert_no_worse_than, errors, poisoned

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if case.call == "training step":
        return check_training_step(case, device)
    inputs, definition = draw(case, device), getattr(reference, case.call.split(",")[0])
    # A kernel that does not run is an error here, no reason to fall back.
    with ops.backend("triton"), poisoned():
        first, second = (results(case, ours(case), inputs, exact=False) for _ in range(2))
    with torch.backends.mkldnn.flags(enabled=case.dtype != torch.float32):
        theirs = results(case, definition, inputs, exact=False)
    exact = results(case, definition, inputs, exact=True)
    wrong, ratios = [], []
    for name, tensor in first.items():
        our_error, their_error, rounding = (
            errors(one, exact[name])[0] for one in (tensor, theirs[name], exact[name].to(tensor.dtype))
        )
        ratios.append(our_error / max(their_error, rounding, 1e-7))
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            wrong.append(f"{name}: a second run has other bits")
        if is_fp8(case.call):  # where a number is rounded to the other side, it is a step of three bits away
            if not our_error <= max(1.25 * their_error, 4e-3):
                wrong.append(f"{name}: error {our_error:.3g}, PyTorch's {their_error:.3g}")
            continue
        try:
            assert_no_worse_than(tensor, theirs[name], exact[name], name=name)
        except AssertionError as error:
            wrong.append(str(error))
    return {"wrong": wrong, "error_over_pytorch": max(ratios)}


def check_training_step(case: Case, device: torch.device) -> dict[str, Any]:
    """Gradients of two blocks beside those of plain PyTorch, and no kernel may have fallen back to it."""
    from fastvit.kernels import operators

    size = SIZES[case.size]
    torch.manual_seed(0)
    config = fastvit.ViTConfig(
        hidden_size=size.hidden, num_hidden_layers=2, num_attention_heads=size.heads, num_labels=10,
        intermediate_size=4 * size.hidden, image_size=size.image,
    )  # fmt: skip
    model = fastvit.ViTForImageClassification(config).to(device).train()
    pixels = torch.randn(size.shape("pixels"), device=device)
    labels = torch.arange(size.batch, device=device) % 10

    def gradients(backend: str, exact: bool = False) -> Tensor:
        model.to(torch.float64 if exact else torch.float32)
        lower = case.dtype != torch.float32 and not exact
        with fastvit.backend(backend), torch.autocast(device.type, case.dtype, enabled=lower):
            loss = model(pixels.to(model.dtype), labels=labels).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)]).double()

    found = gradients("auto" if device.type == "cuda" else "triton"), gradients("reference")
    exact = gradients("reference", exact=True)
    our_error, their_error = (((one - exact).norm() / exact.norm()).item() for one in found)
    wrong = [f"fell back: {' '.join(failure)}" for failure in operators.failures.values()]
    if not our_error <= max(1.25 * their_error, 1e-6):
        wrong.append(f"gradients: error {our_error:.3g}, PyTorch's {their_error:.3g}")
    return {"wrong": wrong, "error_over_pytorch": our_error / max(their_error, 1e-7)}


def launch(case: Case, device: torch.device) -> None:
    """Forward and backward, unchecked: for a sanitizer, or to have them compiled."""
    results(case, ours(case), draw(case, device), exact=False)
