"""What every benchmark shares: operations and their providers, the check before the clock, the clock, the memory.

A benchmark is an `Operation`: a setup that makes random inputs for a ViT's shapes, the definition that says what is
right, the cost that says how fast it could be, and providers, one small function each, that all get the same inputs.

    check   every provider's outputs and gradients against the definition in float64; what is wrong is not timed
    clock   providers take turns, round by round, so that a machine that slows down slows all of them. On a GPU: events,
            caches flushed before each call, and the call queued behind a pause, so that the device's time is measured
            and not the host's (which is reported beside it). On a CPU: the wall clock
    memory  on a GPU the allocator's peak; everywhere the bytes that are kept for backward
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib.util
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastvit import ops
from fastvit.ops import eager
from fastvit.report import info
from fastvit.train.options import SIZES

OURS = "fastvit"  # how the names of our own providers begin
PASSES = ("forward", "backward", "forward + backward")
QUANTILES = {"min": 0.0, "p05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "p95": 0.95, "max": 1.0}
LETTERS = {"micro": "micro", "tiny": "Ti", "small": "S", "base": "B", "large": "L"}
PACKAGES = ("torch", "triton", "transformers", "timm", "liger-kernel", "flash-attn", "numpy")

# ---------------------------------------------------------------------------------------------------------------------
# Shapes: always those of a Vision Transformer
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch for a ViT with patches of 16 pixels. tier: 0 is always run, 1 while there is time, 2 with --full."""

    size: str
    image_size: int
    batch: int
    tier: int = 0
    variant: str = ""  # what else an operation tells apart, such as the layout of its input

    @property
    def name(self) -> str:
        model = "micro" if self.size == "micro" else f"ViT-{LETTERS[self.size]}/16"
        return f"{model} {self.image_size}, batch {self.batch}" + (f", {self.variant}" if self.variant else "")

    @property
    def hidden(self) -> int:
        return SIZES[self.size][0]

    @property
    def layers(self) -> int:
        return SIZES[self.size][1]

    @property
    def heads(self) -> int:
        return SIZES[self.size][2]

    @property
    def patches(self) -> int:
        return (self.image_size // 16) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def sizes(self) -> dict[str, int]:
        """The numbers for the results file."""
        return {name: getattr(self, name) for name in ("batch", "tokens", "hidden", "layers", "heads", "image_size")}


FIRST = {
    "cuda": (
        ("base", 224, 256, 0),
        ("base", 224, 8, 1),
        ("tiny", 224, 256, 1),
        ("large", 224, 32, 1),
        ("base", 384, 32, 1),
    ),
    "cpu": (("tiny", 224, 8, 0), ("base", 224, 8, 1)),
}


def vit_shapes(device: torch.device, quick: bool) -> list[Shape]:
    """What is measured on this kind of device, the most telling first; the rest of the grid has tier 2."""
    if quick:
        return [Shape("tiny", 224, 8) if device.type == "cuda" else Shape("micro", 64, 2)]
    shapes = [Shape(*row) for row in FIRST[device.type]]
    grid = [
        Shape(size, image_size, batch, 2)
        for size in ("tiny", "small", "base", "large")
        for image_size in (224, 384)
        for batch in (1, 8, 32, 256)
    ]
    known = {shape.name for shape in shapes}
    return shapes + [shape for shape in grid if shape.name not in known]


# ---------------------------------------------------------------------------------------------------------------------
# Operations and providers
# ---------------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """The fewest floating-point operations, and the fewest bytes read and written, that a pass can do with."""

    flops: float
    bytes: float


class Step(NamedTuple):
    """What is timed, `run(prepare())`, and what comes before each time and is not."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Provider:
    """One who computes an operation.

    tier: how long it takes before it runs. 0: not at all; 1: a compiler, not run on a CPU without --full; 2: an
    autotuner, without --full at the first shapes only; 3: with --full only.
    """

    name: str
    function: Callable[..., Any]
    tier: int = 0
    needs: tuple[str, ...] = ()  # packages to import
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernel: str | None = None  # ours: the operation of `fastvit.ops.KERNELS` that says who computes
    compile_mode: str | None = None  # for torch.compile; None: not compiled
    max_batch: int | None = None  # it is no question above

    def label(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name in the results; ours says whether its kernel computes."""
        if self.kernel is None:
            return self.name
        return self.name.replace(OURS, who_computes(self.kernel, device, dtype), 1)

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine, or None."""
        if device.type not in self.devices:
            return f"it runs on {' or '.join(self.devices)} only"
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed"
        return None


def who_computes(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Our provider's name: its kernel on a GPU, its plain PyTorch, or its kernel step by step on a CPU."""
    asked = ops.current_backend()
    if operation not in ops.KERNELS or asked == "reference" or (device.type == "cpu" and asked == "auto"):
        return f"{OURS} reference"
    if asked == "auto" and ops.why_not_triton(operation, device.type, device.index, dtype) is not None:
        return f"{OURS} reference"
    return OURS if device.type == "cuda" else f"{OURS} interpreted"


class Compiled(NamedTuple):
    """How a provider is registered once more through torch.compile: its mode and fields of `Provider`."""

    mode: str
    tier: int
    devices: tuple[str, ...] | None = None  # None: those of the provider
    max_batch: int | None = None


COMPILED = {"compiled": Compiled("default", 1), "max-autotune": Compiled("max-autotune-no-cudagraphs", 2)}


class Case(NamedTuple):
    """One operation at one shape, ready for every provider."""

    inputs: dict[str, Any]  # arguments of the providers
    leaves: list[Tensor]  # those that get a gradient
    grad_outputs: list[Tensor]
    expected: dict[str, Tensor]  # by the definition: outputs and gradients


class Operation:
    """A kernel's benchmark. `bench_<operation>.py` makes one and registers providers on it."""

    passes: Sequence[str] = PASSES
    hides_launch = True  # measure the device's time, however slow the host is
    baseline = "PyTorch"  # whose error in the same dtype is the measure of everybody's
    seconds = 0.2  # of timing for a provider and pass
    seconds_on_cpu: float | None = None  # where they are more: passes are long there, and others use the machine
    variants: Sequence[str] = ("",)
    # pass -> what is wanted on a GPU at the first shape. speed_up: over the best other; "over NAME": over one provider,
    # not compiled; of_floor: of the speed that the ceilings allow; memory: of the best other's; images_per_s
    targets: Mapping[str, Mapping[str, float]] = {}

    def __init__(
        self,
        name: str,
        *,
        setup: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]],
        definition: Callable[..., Any],
        cost: Callable[[Shape, int], Mapping[str, Cost]],
        variants: Sequence[str] = ("",),
    ):
        """setup: random inputs by name, on which the gradients that are wanted are switched on.

        definition: the function of `fastvit.ops.reference`, called with those inputs in float64.
        cost: (shape, bytes of an element) -> what forward and backward cost.
        """
        self.name, self.setup, self.definition, self.cost = name, setup, definition, cost
        self.variants = variants
        self.providers: dict[str, Provider] = {}

    def provider(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function of the inputs as `name`; options are those of `Provider`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.providers[name] = Provider(name, function, **options)
            return function

        return register

    def compiled(self, name: str, modes: Mapping[str, Compiled] = COMPILED) -> None:
        """Register the provider `name` again through torch.compile, as `name label` for each label in `modes`."""
        eager = self.providers[name]
        for label, compiled in modes.items():
            self.providers[f"{name} {label}"] = dataclasses.replace(
                eager,
                name=f"{name} {label}",
                tier=compiled.tier,
                devices=compiled.devices or eager.devices,
                compile_mode=compiled.mode,
                max_batch=compiled.max_batch,
            )

    def shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        """All variants at the first shape, the first variant at the others that are run by default."""
        shapes = []
        for shape in vit_shapes(device, quick):
            for number, variant in enumerate(self.variants):
                tier = 2 if shape.tier and number else shape.tier
                shapes.append(dataclasses.replace(shape, variant=variant, tier=tier))
        return shapes

    def costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        costs = dict(self.cost(shape, dtype.itemsize))
        costs["forward + backward"] = Cost(*(sum(pair) for pair in zip(*costs.values(), strict=True)))
        return costs

    def make_case(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
        """Inputs and what is right, in whatever form the other methods understand; here a `Case`."""
        torch.manual_seed(0)
        inputs = self.setup(shape, dtype, device)

        def exactly(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        exact = tree_map(exactly, inputs)
        outputs = as_list(self.definition(**exact))
        grad_outputs = [torch.randn_like(output, dtype=dtype) for output in outputs]
        grads = torch.autograd.grad(outputs, gradient_leaves(exact), [grad.double() for grad in grad_outputs])
        return Case(inputs, gradient_leaves(inputs), grad_outputs, named_results(outputs, grads))

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        """The passes of one provider."""
        function = provider.function
        if provider.compile_mode is not None:
            function = torch.compile(function, mode=provider.compile_mode, dynamic=False)

        def forward(_: Any = None) -> list[Tensor]:
            return as_list(function(**case.inputs))

        def inference(_: Any) -> list[Tensor]:
            with torch.no_grad():
                return forward()

        def backward(outputs: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, case.leaves, case.grad_outputs)

        return {
            "forward": Step(inference),
            "backward": Step(backward, forward),
            "forward + backward": Step(lambda _: backward(forward())),
        }

    def results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        """Outputs and gradients by name, to be held against `case.expected`."""
        backward = steps["backward"]
        outputs = backward.prepare()
        grads: Any = backward.run(outputs)
        inferred: Any = steps["forward"].run(None)
        results = named_results(outputs, grads)
        return results | {f"{name} of inference": tensor for name, tensor in named_results(inferred, []).items()}

    def floor_of_error(self, dtype: torch.dtype) -> float:
        """An error that is no error: rounding of the result."""
        return torch.finfo(dtype).eps

    def judge(
        self, errors: Mapping[str, Error], baseline: Mapping[str, Error] | None, dtype: torch.dtype
    ) -> str | None:
        return what_is_wrong(errors, baseline, self.floor_of_error(dtype), self.limit_of_error(dtype))

    def limit_of_error(self, dtype: torch.dtype) -> float:
        """An error that is a mistake, whoever makes it."""
        return {torch.float32: 1e-4, torch.bfloat16: 5e-2}.get(dtype, 1e-2)

    def first_calls(self, steps: dict[str, Step]) -> dict[str, Step]:
        """What compiles, loads and tunes by being called, for each pass that is then said to be ready."""
        return {name: step for name, step in steps.items() if name != "backward"}

    def kept_bytes(self, steps: dict[str, Step], case: Any) -> int | None:
        return bytes_kept(steps["backward"].prepare, tree_leaves(case.inputs))

    def targets_at(self, shape: Shape, device: torch.device) -> Mapping[str, Mapping[str, float]]:
        """pass -> what is wanted there."""
        return self.targets if shape.tier == 0 and device.type == "cuda" else {}

    def rate(self, shape: Shape) -> float | None:
        """How many pictures a pass handles, where that is the question."""
        return None


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def gradient_leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def named_results(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient {index}": grad for index, grad in enumerate(grads)}


# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    whole: float  # of all elements, relative, Euclidean norm
    row: float  # of the worst row, the last dimension, relative to the larger of its norm and a tenth of the typical


def error_of(result: Tensor, exact: Tensor) -> Error:
    if result.shape != exact.shape:
        raise ValueError(f"shape {list(result.shape)} instead of {list(exact.shape)}")
    exact = exact.double().reshape(-1, exact.shape[-1] if exact.ndim else 1)
    difference = result.detach().double().reshape(exact.shape) - exact
    norm = exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    rows = exact.norm(dim=-1).clamp(min=0.1 * norm.item() / max(1, len(exact)) ** 0.5)
    return Error((difference.norm() / norm).item(), (difference.norm(dim=-1) / rows).max().item())


def errors_of(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Error]:
    return {name: error_of(tensor, expected[name.removesuffix(" of inference")]) for name, tensor in results.items()}


def what_is_wrong(
    errors: Mapping[str, Error], baseline: Mapping[str, Error] | None, floor: float, limit: float
) -> str | None:
    """Which result is further off than is allowed, or None. NaN is always wrong.

    Allowed are four times the error of `baseline`, PyTorch's own operations in the same dtype, or `floor` where they
    are better than that, and eight times for the worst row; never more than `limit`, which alone judges the baseline.
    """
    for name, error in errors.items():
        allowed = Error(limit, 10 * limit)
        if baseline is not None:
            whole, row = max(4 * baseline[name].whole, floor), max(8 * baseline[name].row, 4 * floor)
            allowed = Error(min(whole, allowed.whole), min(row, allowed.row))
        for measure, is_, may_be in zip(("", " in the worst row"), error, allowed, strict=True):
            if not is_ <= may_be:  # NaN too
                return f"{name} is off by {is_:.1e}{measure}, {may_be:.1e} is allowed"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The clock
# ---------------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Samples(NamedTuple):
    milliseconds: list[float]
    host_microseconds: list[float]  # until the call returned; on a CPU the same time


@cache
def cache_flusher(device: torch.device) -> Tensor:
    """A buffer of twice the last-level cache; writing it leaves nothing of the inputs there."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def run_once(step: Step, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    prepared = step.prepare()
    synchronize(device)
    start = time.perf_counter()
    step.run(prepared)
    synchronize(device)
    return time.perf_counter() - start


def time_calls(step: Step, calls: int, device: torch.device, pause: float | None) -> Samples:
    """`calls` samples in a row. pause: seconds that the device idles first, for the host to run ahead; None: no pause,
    the host's time counts."""
    if device.type != "cuda":
        seconds = [run_once(step, device) for _ in range(calls)]
        return Samples([1e3 * second for second in seconds], [1e6 * second for second in seconds])
    flusher = cache_flusher(device)
    host, events = [], []
    for _ in range(calls):
        prepared = step.prepare()
        flusher.zero_()
        if pause is None:
            torch.cuda.synchronize(device)
        else:
            torch.cuda._sleep(int(pause * 2e9))  # cycles; clocks are near 2 GHz
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        result = step.run(prepared)
        end.record()
        host.append(1e6 * (time.perf_counter() - begin))
        events.append((start, end))
        del result, prepared
    torch.cuda.synchronize(device)
    return Samples([start.elapsed_time(end) for start, end in events], host)


# Seconds of one provider before the next has its turn. In use one model runs in a loop; a pass of 7 ms right after
# another model's finds caches, branch predictors and the allocator in the other's state, and took 10 ms on two cores.
IN_A_ROW = 0.1


def measure(
    steps: Mapping[str, Step], device: torch.device, *, seconds: float, min_rounds: int, hides_launch: bool = True
) -> dict[str, Samples | Exception]:
    """Time everybody in turn, about `seconds` each and at least `min_rounds` rounds, after two calls of warm-up.

    Who fails in the warm-up gets the exception instead of samples, and the others go on.
    """
    outcomes: dict[str, Samples | Exception] = {}
    pauses: dict[str, float | None] = {}
    calls: dict[str, int] = {}
    longest = 0.0
    for name, step in steps.items():
        try:
            run_once(step, device)
            took = run_once(step, device)
            pause = None
            if hides_launch:  # twice what the host takes
                host = time_calls(step, 3, device, 0.0).host_microseconds if device.type == "cuda" else [0.0]
                pause = 2e-6 * statistics.median(host)
        except Exception as error:
            outcomes[name] = error
            continue
        outcomes[name], pauses[name] = Samples([], []), pause
        each = took + (pause or 0.0)
        calls[name] = max(1, min(20, int(IN_A_ROW / each)))
        longest = max(longest, calls[name] * each)
    rounds = max(min_rounds, min(100, int(seconds / longest))) if calls else 0
    for number in range(rounds):
        # There and back, so that nobody always follows the same neighbour.
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            new, samples = time_calls(steps[name], calls[name], device, pauses[name]), outcomes[name]
            assert isinstance(samples, Samples)
            samples.milliseconds.extend(new.milliseconds)
            samples.host_microseconds.extend(new.host_microseconds)
    return outcomes


def median_ms(step: Step, device: torch.device, *, seconds: float, min_rounds: int) -> float:
    """The median of one alone; what it raises is raised."""
    outcome = measure({"": step}, device, seconds=seconds, min_rounds=min_rounds)[""]
    if isinstance(outcome, Exception):
        raise outcome
    return statistics.median(outcome.milliseconds)


def quantiles(samples: Sequence[float]) -> dict[str, float | int]:
    values = np.quantile(np.asarray(samples, dtype=np.float64), list(QUANTILES.values()))
    return {name: float(value) for name, value in zip(QUANTILES, values, strict=True)} | {"samples": len(samples)}


def copy_into(target: Tensor, source: Tensor, _: Any) -> None:
    target.copy_(source)


def multiply_into(out: Tensor, left: Tensor, right: Tensor, _: Any) -> None:
    torch.mm(left, right, out=out)


def multiply_by_onednn(left: Tensor, right: Tensor, _: Any) -> None:
    eager.product(left, right, None)


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, Any]:
    """What this device does at best, now: a copy (bytes read plus written), square matrix products of random data."""
    if device.type == "cuda":
        side, copied = (4096 if quick else 8192), 2**30
    else:
        side, copied = (512 if quick else 2048), (2**26 if quick else 2**28)
    seconds, rounds = (0.05, 3) if quick else (0.5, 5)

    def median(step: Step) -> float:
        return median_ms(step, device, seconds=seconds, min_rounds=rounds) / 1e3

    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median(Step(partial(copy_into, target, source)))
    del source, target
    products = {}
    for dtype in dtypes:
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)
        took = median(Step(partial(multiply_into, out, left, right)))
        if eager.takes(left, right):  # on a CPU MKL's product is not always the fastest there is
            took = min(took, median(Step(partial(multiply_by_onednn, left, right))))
        products[name_of(dtype)] = 2e-12 * side**3 / took
        del left, right, out
    free(device)
    return {
        "copy_bytes": copied,
        "copy_gb_per_s": 2e-9 * copied / copy,
        "matmul_side": side,
        "matmul_tflop_per_s": products,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """The most memory that a call holds above what was held before it and its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    run_once(step, device)  # what is allocated once and kept, such as an optimizer's state, is not the call's
    prepared = step.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step.run(prepared)
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def bytes_kept(forward: Callable[[], object], known: Sequence[Any]) -> int:
    """Bytes that a forward pass keeps for backward, without those of the tensors that are there anyway (`known`)."""
    anyway = {leaf.untyped_storage().data_ptr() for leaf in known if isinstance(leaf, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # while it lives no address is used twice
    del output
    return sum(kept.values())


# ---------------------------------------------------------------------------------------------------------------------
# Where it was measured
# ---------------------------------------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    commit, commit_is_all = info.commit()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": info.device_name(device),
        "device_type": device.type,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": commit,
        "commit_is_all": commit_is_all,
        "settings": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("FASTVIT_", "TRITON_"))
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = info.output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda or torch.version.hip,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    device: torch.device
    quick: bool = False
    full: bool = False  # all shapes, and compilers everywhere
    memory_only: bool = False
    brief: bool = False  # one suite among others, which want their time too
    providers: str = ""  # a regular expression; only those whose name holds it
    deadline: float = float("inf")  # time.monotonic() after which nothing new is begun
    ceilings: dict[str, Any] | None = None

    def why_left_out(self, provider: Provider, shape: Shape) -> str | None:
        if time.monotonic() > self.deadline:
            return "the time budget was spent before its turn"
        if provider.max_batch is not None and shape.batch > provider.max_batch:
            return f"it is for batches up to {provider.max_batch}"
        if provider.tier == 0 or self.full:
            return None
        if self.quick or self.device.type == "cpu":
            return "compiling takes longer than all the rest; --full includes it"
        if provider.tier > 2 or (provider.tier == 2 and shape.tier > 0):
            return "autotuning takes longer than all the rest; --full includes it"
        return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def run_case(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
    tick: Callable[[str], object] = lambda what: None,
) -> Iterator[dict[str, Any]]:
    """Check, time and weigh every provider: a record for each and each pass. tick: told what is done next."""
    device = settings.device
    common = {
        "operation": operation.name,
        "shape": shape.name,
        "sizes": shape.sizes(),
        "headline": shape.tier == 0 or (device.type == "cpu" and shape.tier == 1),
        "dtype": name_of(dtype),
    }
    torch._dynamo.reset()  # its limit of compilations for one function is not meant for a list of shapes
    selected = [
        provider
        for provider in operation.providers.values()
        if re.search(settings.providers, provider.name) or provider.name == operation.baseline
    ]
    tick("definition")
    case = operation.make_case(shape, dtype, device)
    records: dict[tuple[str, str], dict[str, Any]] = {}
    ready: dict[str, dict[str, Step]] = {}
    baseline: dict[str, Error] | None = None
    # Whoever is the measure of the others comes first.
    for provider in sorted(selected, key=lambda provider: provider.name != operation.baseline):
        label = provider.label(device, dtype)
        tick(label)
        verdict: dict[str, Any] = {"status": "timed", "reason": None}
        first: dict[str, float] = {}
        if reason := provider.why_not(device):
            verdict = {"status": "missing", "reason": reason}
        elif reason := settings.why_left_out(provider, shape):
            verdict = {"status": "left out", "reason": reason}
        else:
            try:
                steps = operation.prepare(provider, case)
                first = {name: run_once(step, device) for name, step in operation.first_calls(steps).items()}
                errors = errors_of(operation.results(steps, case), case.expected)
                verdict["error"] = max(error.whole for error in errors.values())
                is_baseline = provider.name == operation.baseline
                reason = operation.judge(errors, None if is_baseline else baseline, dtype)
                if reason:
                    verdict |= {"status": "wrong", "reason": reason}
                else:
                    ready[label] = steps
                    baseline = errors if is_baseline else baseline
            except Exception as error:  # what one provider cannot do is no reason to stop the others
                verdict = {"status": "failed", "reason": describe(error)}
                free(device)
        for name in operation.passes:
            who = {"provider": label, "registered": provider.name, "ours": label.startswith(OURS)}
            record = common | {"pass": name, **who, **verdict}
            if not settings.quick and (targets := operation.targets_at(shape, device).get(name)):
                record["targets"] = dict(targets)
            records[label, name] = record | {"first_call_s": first.get(name)}

    costs = operation.costs(shape, dtype)
    seconds = operation.seconds if device.type != "cpu" else operation.seconds_on_cpu or operation.seconds
    for name in operation.passes:
        if not settings.memory_only:
            tick(f"timing {name}")
            measured = measure(
                {label: steps[name] for label, steps in ready.items()},
                device,
                seconds=0.02 if settings.quick else seconds,
                min_rounds=3 if settings.quick else 5,
                hides_launch=operation.hides_launch,
            )
            for label, outcome in measured.items():
                if isinstance(outcome, Exception):
                    records[label, name] |= {"status": "failed", "reason": describe(outcome)}
                else:
                    records[label, name] |= speeds(outcome, costs[name], dtype, settings, operation.rate(shape))
        tick(f"memory {name}")
        for label, steps in ready.items():
            record = records[label, name]
            try:
                record["peak_bytes"] = peak_bytes(steps[name], device)
                record["kept_bytes"] = operation.kept_bytes(steps, case) if name == operation.passes[-1] else None
                record["status"] = "measured" if settings.memory_only else record["status"]
            except Exception as error:
                record["memory_error"] = describe(error)
                if settings.memory_only:
                    record |= {"status": "failed", "reason": describe(error)}
    yield from records.values()


def floor_ms(cost: Cost, dtype: torch.dtype, settings: Settings) -> float | None:
    """The time that no implementation can beat, by the ceilings of this run."""
    if settings.ceilings is None:
        return None
    matmul = settings.ceilings["matmul_tflop_per_s"].get(name_of(dtype))
    if matmul is None:
        return None
    return 1e3 * max(cost.flops / (1e12 * matmul), cost.bytes / (1e9 * settings.ceilings["copy_gb_per_s"]))


def speeds(
    samples: Samples, cost: Cost, dtype: torch.dtype, settings: Settings, pictures: float | None
) -> dict[str, Any]:
    milliseconds = quantiles(samples.milliseconds)
    seconds = milliseconds["median"] / 1e3
    floor = floor_ms(cost, dtype, settings)
    return {
        "ms": milliseconds,
        "host_us": statistics.median(samples.host_microseconds) if settings.device.type == "cuda" else None,
        "flops": cost.flops,
        "bytes": cost.bytes or None,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "gb_per_s": cost.bytes / seconds / 1e9 if cost.bytes else None,
        "floor_ms": floor,
        "of_floor": floor / milliseconds["median"] if floor is not None else None,
        "images_per_s": pictures / seconds if pictures else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# As tests
# ---------------------------------------------------------------------------------------------------------------------


def as_test(operation: Operation) -> Callable[..., None]:
    """A pytest-benchmark test of every provider that needs no compiler, at toy size: checked first, then timed."""
    if importlib.util.find_spec("pytest") is None:  # benchmarks run where no tests do
        return lambda: None
    import pytest

    names = [name for name, provider in operation.providers.items() if provider.tier == 0]

    @pytest.mark.parametrize("step", operation.passes)
    @pytest.mark.parametrize("name", names)
    def test(benchmark: Any, name: str, step: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        provider = operation.providers[name]
        if reason := provider.why_not(device):
            pytest.skip(reason)
        shape = operation.shapes(device, quick=True)[0]
        case = operation.make_case(shape, torch.float32, device)
        baseline_steps = operation.prepare(operation.providers[operation.baseline], case)
        baseline = errors_of(operation.results(baseline_steps, case), case.expected)
        steps = operation.prepare(provider, case)
        try:
            errors = errors_of(operation.results(steps, case), case.expected)
        except RuntimeError as error:
            if provider.kernel is not None:  # ours must run
                raise
            pytest.skip(describe(error))
        assert operation.judge(errors, baseline, torch.float32) is None
        if benchmark.enabled:
            milliseconds = median_ms(steps[step], device, seconds=0.1, min_rounds=3)
            benchmark.extra_info["device_ms"] = milliseconds
            benchmark.extra_info["gb_per_s"] = operation.costs(shape, torch.float32)[step].bytes / milliseconds / 1e6
        benchmark(run_once, steps[step], device)

    return test
