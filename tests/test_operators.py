"""Both ways to an operator, through PyTorch's dispatcher and past it, give the same bits; who follows operators sees
one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from fastvit.kernels import attention, gelu, layer_norm
from fastvit.kernels.operators import register

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Follower(TorchDispatchMode):
    """Writes down which of our operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastvit":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor subclass that writes down which of our operators it meets, and computes them on the tensor within."""

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
each_call = pytest.mark.parametrize("name", CALLS)


def inputs_of(shapes):
    return [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@each_call
def test_both_ways_give_the_same_bits(name):
    function, shapes = CALLS[name]
    results = []
    for follower in (Follower(), None):
        inputs = inputs_of(shapes)
        with follower or torch.enable_grad():
            out = function(*inputs)
            out.backward(random(*out.shape, seed=9))
        results.append([out, *(tensor.grad for tensor in inputs)])
        if follower is not None:
            assert follower.seen == [name, f"{name}_backward"]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@each_call
def test_a_tensor_subclass_meets_the_operator(name):
    function, shapes = CALLS[name]
    with torch.no_grad():
        inputs = inputs_of(shapes)
        Wrapped.seen = []
        assert torch.equal(function(Wrapped(inputs[0]), *inputs[1:]), function(*inputs))
    assert Wrapped.seen == [name]


@each_call
def test_nothing_is_recorded_where_nothing_needs_a_gradient(name):
    function, shapes = CALLS[name]
    inputs = inputs_of(shapes)
    with torch.no_grad():
        assert not function(*inputs).requires_grad
    assert not function(*(tensor.detach() for tensor in inputs)).requires_grad
    frozen = [tensor.detach() for tensor in inputs[1:]]
    out = function(inputs[0], *frozen)
    out.sum().backward()
    assert inputs[0].grad is not None


@each_call
def test_a_second_derivative_is_an_error_and_not_a_zero(name):
    function, shapes = CALLS[name]
    inputs = inputs_of(shapes)
    (grad,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"fastvit\.{name}_backward"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_and_a_compiler_see_the_operator():
    x, weight, bias = (tensor.detach() for tensor in inputs_of([(3, 24), (24,), (24,)]))
    seen = []

    def count(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(lambda x: layer_norm.layer_norm(x, weight, bias, 1e-6), backend=count, fullgraph=True)
    assert torch.equal(compiled(x), layer_norm.layer_norm(x, weight, bias, 1e-6))
    assert torch.ops.fastvit.layer_norm.default in seen
    traced = torch.jit.trace(lambda x: layer_norm.layer_norm(x, weight, bias, 1e-6), x, check_trace=False)
    assert "fastvit::layer_norm" in str(traced.graph)


def test_an_operator_without_derivatives_says_so():
    doubled = register("test_double", fallback=double)(double)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(doubled(x), 2 * x)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        doubled(x).sum().backward()


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x.detach()
