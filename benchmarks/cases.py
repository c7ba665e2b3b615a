"""What is measured: operations, the shapes of a Vision Transformer, and the providers of each operation.

A benchmark is an `Operation`: a setup that draws random inputs for a ViT's shapes, the reference definition, the cost
in FLOPs and bytes, and the providers, one small function each, which all get the same inputs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastvit import ops
from fastvit.benchmarks.measure import Step, count_saved_bytes
from fastvit.train.options import SIZES

OURS = "fastvit"  # prefix of our providers' names
PASSES = ("forward", "backward", "forward + backward")
LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch for a ViT with 16 x 16 patches. tier: 0 always runs, 1 runs while there is time, 2 needs --full."""

    size: str
    image_size: int
    batch: int
    tier: int = 0
    variant: str = ""  # whatever else an operation distinguishes, such as the layout of its input

    @property
    def name(self) -> str:
        model = f"ViT-{LETTERS[self.size]}/16" if self.size in LETTERS else self.size
        return f"{model} {self.image_size}, batch {self.batch}" + (f", {self.variant}" if self.variant else "")

    hidden = property(lambda self: SIZES[self.size][0])
    layers = property(lambda self: SIZES[self.size][1])
    heads = property(lambda self: SIZES[self.size][2])
    patches = property(lambda self: (self.image_size // 16) ** 2)
    tokens = property(lambda self: self.patches + 1)
    rows = property(lambda self: self.batch * self.tokens)

    def get_sizes(self) -> dict[str, int]:
        """Returns the numbers for the results file."""
        return {name: getattr(self, name) for name in ("batch", "tokens", "hidden", "layers", "heads", "image_size")}


FIRST = {
    "cuda": (("base", 224, 256), ("base", 224, 8), ("tiny", 224, 256), ("large", 224, 32), ("base", 384, 32)),
    "cpu": (("tiny", 224, 8), ("base", 224, 8)),
}


def list_vit_shapes(device: torch.device, quick: bool) -> list[Shape]:
    """Lists the shapes for this kind of device, the most important first; the rest of the grid has tier 2."""
    if quick:
        return [Shape("tiny", 224, 8) if device.type == "cuda" else Shape("micro", 64, 2)]
    shapes = [Shape(*row, tier=min(number, 1)) for number, row in enumerate(FIRST[device.type])]
    grid = [Shape(size, side, batch, 2) for size in LETTERS for side in (224, 384) for batch in (1, 8, 32, 256)]
    known = {shape.name for shape in shapes}
    return shapes + [shape for shape in grid if shape.name not in known]


class Cost(NamedTuple):
    """The fewest floating-point operations, and the fewest bytes read and written, that a pass needs."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Provider:
    """One implementation of an operation.

    tier: how long it compiles. 0: not at all; 1: a compiler, skipped on a CPU without --full; 2: an autotuner, which
    without --full runs at the first shapes only; 3: with --full only.
    """

    name: str
    function: Callable[..., Any]
    tier: int = 0
    needs: tuple[str, ...] = ()  # packages to import
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernel: str | None = None  # ours: the entry of `fastvit.ops.KERNEL_MODULES` that its label follows from
    compile_mode: str | None = None  # for torch.compile; None: eager
    max_batch: int | None = None

    def get_label(self, device: torch.device, dtype: torch.dtype) -> str:
        """Returns the name in the results; ours says whether the kernel runs."""
        if self.kernel is None:
            return self.name
        return self.name.replace(OURS, label_ours(self.kernel, device, dtype), 1)

    def unsupported_reason(self, device: torch.device) -> str | None:
        """Returns why it cannot run on this machine, or None."""
        if device.type not in self.devices:
            return f"runs on {' or '.join(self.devices)} only"
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"package {missing[0]} is not installed" if missing else None


# Fields of `Provider` for each way to compile one.
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"compile_mode": "default", "tier": 1},
    "max-autotune": {"compile_mode": "max-autotune-no-cudagraphs", "tier": 2},
    # A question of small batches, where launches decide.
    "CUDA graphs": {"compile_mode": "reduce-overhead", "tier": 1, "devices": ("cuda",), "max_batch": 32},
}


def label_ours(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns our provider's label: its kernel on a GPU, plain PyTorch, or its kernel interpreted on a CPU."""
    backend = ops.current_backend()
    if operation not in ops.KERNEL_MODULES or backend == "reference" or (device.type == "cpu" and backend == "auto"):
        return f"{OURS} reference"
    if backend == "auto" and ops.kernel_unavailable_reason(operation, device.type, device.index, dtype) is not None:
        return f"{OURS} reference"
    return OURS if device.type == "cuda" else f"{OURS} interpreted"


class Case(NamedTuple):
    """One operation at one shape, ready for every provider."""

    inputs: dict[str, Any]  # arguments of the providers
    leaves: list[Tensor]  # inputs that require a gradient
    grad_outputs: list[Tensor]
    expected: dict[str, Tensor]  # outputs and gradients of the definition, float64


class Operation:
    """A kernel's benchmark. `bench_<operation>.py` makes one and registers providers on it.

    Args:
        name: of the operation and of its results file.
        setup: (shape, dtype, device) -> random inputs by name, with `requires_grad` set where gradients are checked.
        definition: the function of `fastvit.ops.reference`, called with those inputs in float64.
        cost: (shape, bytes of an element) -> cost of "forward" and "backward".
        variants: of the shapes; all of them run at the first shape, only the first at others.
    """

    passes: Sequence[str] = PASSES
    hides_launch = True  # measure device time, however slow the host is
    baseline = "PyTorch"  # the provider whose error in the same dtype is the measure of all others
    counts_images = False  # report images per second
    seconds = 0.2  # of timing for each provider and pass
    seconds_on_cpu: float | None = None  # more, where passes are long and other processes share the machine
    # pass -> targets on a GPU at the first shape. speed_up: over the best other; "over NAME": over that provider, not
    # compiled; of_floor: share of the roofline; memory: relative to the best other's; images_per_s
    targets: Mapping[str, Mapping[str, float]] = {}

    def __init__(
        self,
        name: str,
        *,
        setup: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]] = lambda *_: {},
        definition: Callable[..., Any] = lambda: None,
        cost: Callable[[Shape, int], Mapping[str, Cost]] = lambda *_: {},
        variants: Sequence[str] = ("",),
    ):
        self.name, self.setup, self.definition, self.cost = name, setup, definition, cost
        self.variants = variants
        self.providers: dict[str, Provider] = {}

    def provider(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers the decorated function of the inputs as `name`; options are the fields of `Provider`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.providers[name] = Provider(name, function, **options)
            return function

        return register

    def add_compiled(self, name: str, labels: Sequence[str] = ("compiled", "max-autotune"), **options: Any) -> None:
        """Registers provider `name` again through torch.compile, as "name label" for each label of `COMPILED`."""
        for label in labels:
            fields = {"name": f"{name} {label}", **COMPILED[label], **options}
            self.providers[fields["name"]] = dataclasses.replace(self.providers[name], **fields)

    def list_shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        """Lists all variants at the first shape, and the first variant at the others that run by default."""
        return [
            dataclasses.replace(shape, variant=variant, tier=2 if shape.tier and number else shape.tier)
            for shape in list_vit_shapes(device, quick)
            for number, variant in enumerate(self.variants)
        ]

    def compute_costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        costs = dict(self.cost(shape, dtype.itemsize))
        both = Cost(*(sum(pair) for pair in zip(*costs.values(), strict=True)))
        return costs | {"forward + backward": both}

    def make_case(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
        """Makes inputs and expected results, in any form that the other methods accept; here a `Case`."""
        torch.manual_seed(0)
        inputs = self.setup(shape, dtype, device)

        def to_float64(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        exact = tree_map(to_float64, inputs)
        outputs = list_tensors(self.definition(**exact))
        grad_outputs = [torch.randn_like(output, dtype=dtype) for output in outputs]
        grads = torch.autograd.grad(outputs, find_leaves(exact), [grad.double() for grad in grad_outputs])
        return Case(inputs, find_leaves(inputs), grad_outputs, name_results(outputs, grads))

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        """Returns the passes of one provider."""
        function = provider.function
        if provider.compile_mode is not None:
            function = torch.compile(function, mode=provider.compile_mode, dynamic=False)

        def forward(_: Any = None) -> list[Tensor]:
            return list_tensors(function(**case.inputs))

        def backward(outputs: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, case.leaves, case.grad_outputs)

        return {
            "forward": Step(torch.no_grad()(forward)),
            "backward": Step(backward, forward),
            "forward + backward": Step(lambda _: backward(forward())),
        }

    def compute_results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        """Computes outputs and gradients by name, to be compared with `case.expected`."""
        outputs = steps["backward"].prepare()
        grads: Any = steps["backward"].run(outputs)
        inferred: Any = steps["forward"].run(None)
        results = name_results(outputs, grads)
        return results | {f"{name} of inference": tensor for name, tensor in name_results(inferred, []).items()}

    def get_error_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the relative error that is always allowed, rounding of the result, and the one that never is."""
        return torch.finfo(dtype).eps, {torch.float32: 1e-4, torch.bfloat16: 5e-2}.get(dtype, 1e-2)

    def list_first_calls(self, steps: dict[str, Step]) -> dict[str, Step]:
        """Returns, for each pass that they make ready, the calls that compile, load and tune."""
        return {name: step for name, step in steps.items() if name != "backward"}

    def measure_saved_bytes(self, steps: Mapping[str, Step], case: Any) -> int | None:
        return count_saved_bytes(steps["backward"].prepare, tree_leaves(case.inputs))

    def describe_provider(self, provider: Provider) -> dict[str, Any]:
        """Returns further fields of a provider's records, after `prepare`."""
        return {}

    def get_targets(self, shape: Shape, device: torch.device) -> Mapping[str, Mapping[str, float]]:
        """Returns pass -> targets at this shape."""
        return self.targets if shape.tier == 0 and device.type == "cuda" else {}


def list_tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def find_leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def name_results(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient {index}": grad for index, grad in enumerate(grads)}
