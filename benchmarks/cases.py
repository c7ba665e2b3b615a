"""What is measured: operations, the shapes of a Vision Transformer, and the providers that compute them.

A benchmark is an `Operation`: a setup that makes random inputs for a ViT's shapes, the definition that says what is
right, the cost that says how fast it could be, and providers, one small function each, that all get the same inputs.
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
from fastvit.benchmarks.errors import Error, find_mistake
from fastvit.benchmarks.memory import bytes_kept
from fastvit.benchmarks.timing import Step
from fastvit.train.options import SIZES

OURS = "fastvit"  # how the names of our own providers begin
PASSES = ("forward", "backward", "forward + backward")
LETTERS = {"micro": "micro", "tiny": "Ti", "small": "S", "base": "B", "large": "L"}


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

    hidden = property(lambda self: SIZES[self.size][0])
    layers = property(lambda self: SIZES[self.size][1])
    heads = property(lambda self: SIZES[self.size][2])
    patches = property(lambda self: (self.image_size // 16) ** 2)
    tokens = property(lambda self: self.patches + 1)
    rows = property(lambda self: self.batch * self.tokens)

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


class Cost(NamedTuple):
    """The fewest floating-point operations, and the fewest bytes read and written, that a pass can do with."""

    flops: float
    bytes: float


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
    kernel: str | None = None  # ours: the operation of `fastvit.ops.KERNEL_MODULES` that says who computes
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
    if operation not in ops.KERNEL_MODULES or asked == "reference" or (device.type == "cpu" and asked == "auto"):
        return f"{OURS} reference"
    if asked == "auto" and ops.kernel_unavailable_reason(operation, device.type, device.index, dtype) is not None:
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
        return find_mistake(errors, baseline, self.floor_of_error(dtype), self.limit_of_error(dtype))

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
        """How many images a pass handles, where that is the question."""
        return None


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def gradient_leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def named_results(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient {index}": grad for index, grad in enumerate(grads)}
