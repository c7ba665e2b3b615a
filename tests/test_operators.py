"""Direct calls of an operator match calls through the dispatcher; modes, subclasses and tracers see one operator."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from operations import randn

from fastvit.kernels import attention, gelu, layer_norm
from fastvit.kernels.operators import register


class Recorder(TorchDispatchMode):
    """Records which fastvit operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastvit":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor subclass that records the fastvit operators applied to it, and runs them on its inner tensor."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace == "fastvit":
            cls.seen.append(function._opname)
        return function(*(value.inner if isinstance(value, cls) else value for value in args), **(kwargs or {}))


CALLS = {
    "layer_norm": (lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-6), [(2, 5, 24), (24,), (24,)]),
    "attention_packed": (lambda qkv: attention.attention_packed(qkv), [(2, 5, 3, 2, 16)]),
    "activation": (lambda x, b: gelu.bias_gelu(x, b), [(2, 5, 24), (24,)]),
}
EACH_CALL = pytest.mark.parametrize("name", CALLS)


def make_inputs(shapes):
    return [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@EACH_CALL
def test_dispatcher_and_direct_call_are_bitwise_equal(name):
    function, shapes = CALLS[name]
    results = []
    for recorder in (Recorder(), None):
        inputs = make_inputs(shapes)
        with recorder or torch.enable_grad():
            out = function(*inputs)
            out.backward(randn(*out.shape, seed=9))
        results.append([out, *(tensor.grad for tensor in inputs)])
        if recorder is not None:
            assert recorder.seen == [name, f"{name}_backward"]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@EACH_CALL
def test_tensor_subclass_sees_the_operator(name):
    function, shapes = CALLS[name]
    with torch.no_grad():
        inputs = make_inputs(shapes)
        Wrapped.seen = []
        assert torch.equal(function(Wrapped(inputs[0]), *inputs[1:]), function(*inputs))
    assert Wrapped.seen == [name]


@EACH_CALL
def test_autograd_records_only_calls_that_need_gradients(name):
    function, shapes = CALLS[name]
    inputs = make_inputs(shapes)
    with torch.no_grad():
        assert not function(*inputs).requires_grad
    assert not function(*(tensor.detach() for tensor in inputs)).requires_grad
    frozen = [tensor.detach() for tensor in inputs[1:]]
    out = function(inputs[0], *frozen)
    out.sum().backward()
    assert inputs[0].grad is not None


@EACH_CALL
def test_second_derivative_raises(name):
    function, shapes = CALLS[name]
    inputs = make_inputs(shapes)
    (grad,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"fastvit\.{name}_backward"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_and_compilation_see_the_operator():
    x, weight, bias = (tensor.detach() for tensor in make_inputs([(3, 24), (24,), (24,)]))
    seen = []

    def count(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: layer_norm.layer_norm(x, weight, bias, 1e-6), backend=count, fullgraph=True)
    assert torch.equal(compiled(x), layer_norm.layer_norm(x, weight, bias, 1e-6))
    assert torch.ops.fastvit.layer_norm.default in seen
    traced = torch.jit.trace(lambda x: layer_norm.layer_norm(x, weight, bias, 1e-6), x, check_trace=False)
    assert "fastvit::layer_norm" in str(traced.graph)


def test_operator_without_autograd_formula_raises():
    doubled = register("test_double", fallback=double)(double)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(doubled(x), 2 * x)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        doubled(x).sum().backward()


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x.detach()
