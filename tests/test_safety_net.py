"""If a kernel cannot be compiled or launched, PyTorch replaces it with one warning and nothing else changes."""

import logging

import pytest
import torch

pytest.importorskip("triton")
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import fastvit
from fastvit import cli, ops
from fastvit.kernels import operators
from fastvit.kernels import tuning as tiles
from fastvit.kernels.operators import register
from fastvit.report import info

failing: dict[str, Exception] = {}  # by operator


def double(x: Tensor) -> Tensor:
    return 2 * x


@register("test_twice", fallback=double)
def launch(x: Tensor) -> Tensor:
    if "test_twice" in failing:
        raise failing["test_twice"]
    return 2 * x + 0.5  # differs from the fallback's result, to show which one ran


@register("test_twice_backward", fallback=double)
def launch_backward(grad: Tensor) -> Tensor:
    if "test_twice_backward" in failing:
        raise failing["test_twice_backward"]
    return 3 * grad


launch.register_fake(torch.empty_like)
launch_backward.register_fake(torch.empty_like)
launch.register_autograd(lambda ctx, grad: launch_backward(grad), setup_context=lambda ctx, inputs, output: None)


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    """Fallbacks apply to GPUs only; enable them for the interpreter."""
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(operators, "failures", {})
    failing.clear()
    ops.import_kernels()


def run_forward_and_backward(columns=4):
    x = torch.ones(3, columns, requires_grad=True)
    y = launch(x)
    y.sum().backward()
    return y.detach().unique().item(), x.grad.unique().item()


ERRORS = {
    "Triton": lambda: CompilationError("x = 1", None, "'int' object has no attribute 'type'"),
    "shared memory": lambda: OutOfResources(300_000, 232_448, "shared memory"),
    "ptxas": lambda: RuntimeError("`ptxas` failed with error code 255"),
    "driver": lambda: RuntimeError("Triton Error [CUDA]: invalid device function"),
    "a bug": lambda: AttributeError("'int' object has no attribute 'type'"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_fallback_replaces_failing_kernel_with_one_warning(error, caplog):
    assert run_forward_and_backward() == (2.5, 3.0)
    failing["test_twice"] = error()
    with caplog.at_level(logging.WARNING, "fastvit"):
        assert [run_forward_and_backward() for _ in range(3)] == [(2.0, 3.0)] * 3
    assert caplog.text.count("kernel test_twice failed on float32 [3, 4]") == 1
    assert f"triton {triton.__version__}" in caplog.text
    assert type(error()).__name__ in caplog.text


def test_failing_backward_keeps_the_forward_kernel(caplog):
    failing["test_twice_backward"] = RuntimeError("no")
    assert run_forward_and_backward() == (2.5, 2.0)
    assert "kernel test_twice_backward failed" in caplog.text


def test_fallback_applies_to_calls_of_the_same_class_only():
    failing["test_twice"] = RuntimeError("too wide")
    assert run_forward_and_backward()[0] == 2.0
    failing.clear()
    assert run_forward_and_backward()[0] == 2.0
    assert run_forward_and_backward(columns=8)[0] == 2.5


def test_lengths_of_a_packed_batch_do_not_change_its_class():
    """Neither the image size nor the largest number of tokens in a packed batch changes the class."""
    tensors = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 5)
    assert len({operators._describe_argument("x", tensor) for tensor in tensors}) == 3
    assert operators._describe_argument("pixels", tensors[0]) == operators._describe_argument("pixels", tensors[2])
    assert operators._describe_argument("max_seqlen", 17) == operators._describe_argument("max_seqlen", 50)
    assert operators._describe_argument("candidate", 0) != operators._describe_argument("candidate", 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["PyTorch", "Python", "driver", "cuBLAS"],
)
def test_out_of_memory_is_raised(error):
    failing["test_twice"] = error
    with pytest.raises(type(error)):
        run_forward_and_backward()
    failing.clear()
    assert run_forward_and_backward()[0] == 2.5


def test_backend_triton_raises_instead_of_falling_back():
    failing["test_twice"] = RuntimeError("no")
    assert run_forward_and_backward()[0] == 2.0
    with fastvit.backend("triton"), pytest.raises(RuntimeError, match="no"):
        run_forward_and_backward()
    assert run_forward_and_backward()[0] == 2.0


def test_info_and_run_report_list_failed_kernels(capsys):
    from fastvit.train import page

    failing["test_twice"] = RuntimeError("no such instruction")
    run_forward_and_backward()
    expected = "test_twice failed on float32 [3, 4], replaced by PyTorch: RuntimeError: no such instruction (torch "
    assert info.summarize_kernels()["failed"][0].startswith(expected)
    assert cli.main(["info"]) == 0
    assert f"kernel {expected}" in capsys.readouterr().out
    assert page.describe_environment(torch.device("cpu"))["kernels failed"].startswith(expected)


def test_model_falls_back_if_every_kernel_fails(monkeypatch, caplog):
    """Outputs and gradients: every operator's fallback matches its kernel."""
    config = fastvit.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(config)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)

    def compute_results():
        loss = model(pixels, labels=torch.tensor([0, 1])).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    def fail(*case):
        raise RuntimeError("no tile")

    with fastvit.backend("reference"):
        expected = compute_results()
    monkeypatch.setattr(tiles, "find_candidates", fail)
    with fastvit.backend("triton"):
        with pytest.raises(RuntimeError, match="no tile"):
            compute_results()
        monkeypatch.setattr(operators, "is_strict", lambda: False)  # as under "auto", which uses kernels on GPUs only
        found = compute_results()
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    fell_back = {failure.operator for failure in operators.failures.values()}
    for operation in ("patch_embed", "attention_packed", "attention_packed_backward"):
        assert operation in fell_back
        assert caplog.text.count(f"kernel {operation} failed") == 1
