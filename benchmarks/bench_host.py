"""What is the overhead of a pass on the host: Python, PyTorch's dispatcher, Triton's launcher?

It needs no GPU and uses none. The model is so small that its matmuls take next to no time on a CPU, and our kernels go
through Triton's own launcher into a driver that launches nothing. A GPU that is faster than this waits for the host,
which limits small batches unless a CUDA graph replays them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastvit
from fastvit import ops
from fastvit.benchmarks.bench_model import INFERENCE, compute_logits, make_config
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.harness import Settings, describe_error, make_record, run_python
from fastvit.benchmarks.measure import compute_quantiles
from fastvit.benchmarks.records import Record

SHAPE = Shape("micro", 32, 1, variant="12 blocks")
NAME = SHAPE.name
BLOCKS = 12
TRAINING = "forward and backward"
PROVIDERS = ("fastvit", "transformers", "timm")


class NoDevice:
    """A driver for Triton that compiles for an H100 and launches nothing."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 0, 0, 0, 0, 1024  # module, function, registers, spills, maximum threads

        @staticmethod
        def unload_module(module: int) -> None:
            pass

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    class launcher_cls:
        def __init__(self, *_: Any):
            pass

        def __call__(self, *_: Any) -> None:
            pass

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_nothing(device: NoDevice | None = None) -> None:
    """Makes this process treat CPU tensors as an H100's; kernels leave their outputs unwritten."""
    from triton.runtime import driver

    from fastvit.kernels import tuning

    driver.set_active(device or NoDevice())
    tuning.describe_device = functools.cache(lambda device: tuning.Device("no device", "sm_90", 132))
    ops.is_interpreting = lambda: True


def build_models() -> dict[str, nn.Module]:
    config = make_config(SHAPE, num_hidden_layers=BLOCKS, intermediate_size=2 * SHAPE.hidden)
    found: dict[str, nn.Module] = {
        "fastvit": fastvit.ViTForImageClassification(config),
        "transformers": transformers.ViTForImageClassification(config),
    }
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):
        from timm.models.vision_transformer import VisionTransformer

        found["timm"] = VisionTransformer(
            img_size=SHAPE.image_size, embed_dim=SHAPE.hidden, depth=BLOCKS, num_heads=SHAPE.heads, mlp_ratio=2
        )
    return found


def build_passes(model: nn.Module) -> dict[str, Callable[[], object]]:
    pixels = torch.randn(SHAPE.batch, 3, SHAPE.image_size, SHAPE.image_size)
    trained, inferring = model.train(), copy.deepcopy(model).eval()

    def infer() -> Tensor:
        with torch.no_grad():
            return compute_logits(inferring, pixels)

    def train() -> None:
        compute_logits(trained, pixels).sum().backward()
        trained.zero_grad()

    return {INFERENCE: infer, TRAINING: train}


def measure_host(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Returns milliseconds of each provider and pass; ten calls in a row, as in a loop, and all of them in turn."""
    with_kernels = importlib.util.find_spec("triton") is not None
    if with_kernels:
        launch_nothing()
    steps = {
        (provider, name): step
        for provider, model in build_models().items()
        for name, step in build_passes(model).items()
    }
    milliseconds: dict[str, dict[str, list[float]]] = {}
    for number in range(1 + rounds):  # the first compiles and warms up
        for (provider, name), step in steps.items():
            backend = fastvit.backend("triton") if with_kernels and provider == "fastvit" else contextlib.nullcontext()
            with backend:
                for _ in range(10):
                    start = time.perf_counter()
                    step()
                    duration = 1e3 * (time.perf_counter() - start)
                    if number:
                        milliseconds.setdefault(provider, {}).setdefault(name, []).append(duration)
    return milliseconds


def run(_: torch.dtype, settings: Settings) -> Iterator[Record]:
    """Yields a record for each provider and pass, measured in a new process since `launch_nothing` cannot be undone."""
    failure, milliseconds = None, {}
    try:
        arguments = "-m", "fastvit.benchmarks.bench_host", "1" if settings.quick else "30"
        milliseconds = run_python(*arguments, TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES="")
    except RuntimeError as error:
        failure = describe_error(error)
    for provider in PROVIDERS:
        for name in (INFERENCE, TRAINING):
            record = make_record("host", SHAPE, torch.float32, name, provider)
            record["sizes"]["layers"] = BLOCKS
            if failure is not None:
                record |= {"status": "failed", "reason": failure}
            elif provider in milliseconds:
                record["ms"] = compute_quantiles(milliseconds[provider][name])
            else:
                record |= {"status": "missing", "reason": f"package {provider} is not installed"}
            yield record


if __name__ == "__main__":
    print(json.dumps(measure_host(int(sys.argv[1]))))
