"""What a pass costs on the host: Python, PyTorch's dispatcher, Triton's launcher.

No GPU is needed, and none is used. The model is so small that a CPU computes its products in no time, and our kernels
go through Triton's own launcher into a driver that launches nothing. A GPU that is faster than this waits for the host:
that decides small batches, unless a CUDA graph replays them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import ViTConfig

import fastvit
from fastvit import ops
from fastvit.benchmarks.bench_model import INFERENCE, logits_of
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.harness import Settings, describe
from fastvit.benchmarks.timing import quantiles

SHAPE = Shape("micro", 32, 1, variant="12 blocks")
BLOCKS = 12
TRAINING = "forward and backward"
PROVIDERS = ("fastvit", "transformers", "timm")


class NoDevice:
    """A driver for Triton that compiles for an H100, and launches nothing."""

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 0, 0, 0, 0, 1024  # module, function, registers, spills, the most threads

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
    """Let this process take tensors of a CPU for those of an H100, on which kernels leave their results unwritten."""
    from triton.runtime import driver

    from fastvit.kernels import tuning

    driver.set_active(device or NoDevice())
    tuning.describe_device = functools.cache(lambda device: tuning.Device("no device", "sm_90", 132))
    ops.is_interpreting = lambda: True


def models() -> dict[str, nn.Module]:
    config = ViTConfig(
        hidden_size=SHAPE.hidden,
        num_hidden_layers=BLOCKS,
        num_attention_heads=SHAPE.heads,
        intermediate_size=2 * SHAPE.hidden,
        image_size=SHAPE.image_size,
        num_labels=10,
    )
    found: dict[str, nn.Module] = {
        "fastvit": fastvit.ViTForImageClassification(config),
        "transformers": transformers.ViTForImageClassification(config),
    }
    if importlib.util.find_spec("timm"):
        from timm.models.vision_transformer import VisionTransformer

        found["timm"] = VisionTransformer(
            img_size=SHAPE.image_size, embed_dim=SHAPE.hidden, depth=BLOCKS, num_heads=SHAPE.heads, mlp_ratio=2
        )
    return found


def passes(model: nn.Module) -> dict[str, Callable[[], object]]:
    pixels = torch.randn(SHAPE.batch, 3, SHAPE.image_size, SHAPE.image_size)
    used, trained = copy.deepcopy(model).eval(), model.train()
    parameters = list(trained.parameters())

    def infer() -> Tensor:
        with torch.no_grad():
            return logits_of(used, pixels)

    def train() -> None:
        logits_of(trained, pixels).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return {INFERENCE: infer, TRAINING: train}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each provider and pass: ten of a kind, as a loop has them, and all kinds in turn."""
    with_kernels = importlib.util.find_spec("triton") is not None
    if with_kernels:
        launch_nothing()
    steps = {(provider, name): step for provider, model in models().items() for name, step in passes(model).items()}
    milliseconds: dict[str, dict[str, list[float]]] = {}
    for number in range(1 + rounds):  # the first to compile and to warm up
        for (provider, name), step in steps.items():
            backend = fastvit.backend("triton") if with_kernels and provider == "fastvit" else contextlib.nullcontext()
            with backend:
                for _ in range(10):
                    start = time.perf_counter()
                    step()
                    took = 1e3 * (time.perf_counter() - start)
                    if number:
                        milliseconds.setdefault(provider, {}).setdefault(name, []).append(took)
    return milliseconds


def in_its_own_process(rounds: int) -> dict[str, dict[str, list[float]]]:
    """`measure` where nothing else is disturbed by what it replaces."""
    root = str(Path(fastvit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "fastvit.benchmarks.bench_host", str(rounds)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process ended")
    return json.loads(done.stdout.splitlines()[-1])


def run(settings: Settings, tick: Callable[[str], object] = lambda what: None) -> Iterator[dict[str, Any]]:
    """Records, one for each provider and pass."""
    tick("compiling for an H100 that is not there")
    failure, milliseconds = None, {}
    try:
        milliseconds = in_its_own_process(1 if settings.quick else 30)
    except RuntimeError as error:
        failure = describe(error)
    for provider in PROVIDERS:
        for name in (INFERENCE, TRAINING):
            outcome: dict[str, Any] = {"status": "missing", "reason": f"{provider} is not installed"}
            if failure is not None:
                outcome = {"status": "failed", "reason": failure}
            elif provider in milliseconds:
                outcome = {"status": "timed", "reason": None, "ms": quantiles(milliseconds[provider][name])}
            yield {
                "operation": "host",
                "shape": SHAPE.name,
                "sizes": SHAPE.sizes() | {"layers": BLOCKS},
                "headline": True,
                "dtype": "float32",
                "pass": name,
                "provider": provider,
                "registered": provider,
                "ours": provider == "fastvit",
                **outcome,
            }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
