"""How fast is the whole model beside transformers and timm, with the same weights and images?

Inference is a forward pass for logits with weights in the requested dtype; a training step is forward, backward and
AdamW with float32 weights, under autocast for other dtypes. Host overhead counts here, as in use.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTConfig

import fastvit
from fastvit.benchmarks.cases import Cost, Operation, Provider, Shape
from fastvit.benchmarks.measure import Step, count_saved_bytes, free_memory
from fastvit.checkpoints.convert import convert

NUM_CLASSES = 10
INFERENCE, TRAINING = "inference", "training step"


class ModelCase(NamedTuple):
    folder: tempfile.TemporaryDirectory  # the weights, as transformers saves them
    pixels: Tensor  # [B, 3, H, W] float32
    labels: Tensor  # [B]
    dtype: torch.dtype
    models: dict[Callable[..., Any], tuple[nn.Module, nn.Module]]  # shared by all compile modes of a provider
    expected: dict[str, Tensor]


def make_config(shape: Shape, **changes: Any) -> ViTConfig:
    config = ViTConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        image_size=shape.image_size,
        layer_norm_eps=1e-6,  # timm's
        num_labels=NUM_CLASSES,
    )
    config.update(changes)
    return config


def compute_logits(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.logits


def count_forward_flops(shape: Shape) -> float:
    """Counts the FLOPs of all matmuls of a forward pass for logits, with all tokens through all blocks."""
    block = 24 * shape.hidden**2 + 4 * shape.tokens * shape.hidden
    return shape.batch * (shape.layers * shape.tokens * block + 2 * shape.patches * 768 * shape.hidden)


class Model(Operation):
    passes: Sequence[str] = (INFERENCE, TRAINING)
    hides_launch = False
    counts_images = True
    baseline = "transformers"
    seconds, seconds_on_cpu = 2.0, 5.0
    # images_per_s: on an H100, a little more than half of what its matmuls alone would allow.
    targets: Mapping[str, Mapping[str, float]] = {
        INFERENCE: {"speed_up": 1.2, "images_per_s": 12_000},
        TRAINING: {"speed_up": 1.2, "memory": 0.75, "images_per_s": 4_300},
    }

    def __init__(self) -> None:
        super().__init__("model")

    def list_shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        if quick:
            return super().list_shapes(device, quick)
        if device.type == "cuda":  # after the large batch the smallest, which launches dominate
            few = [Shape("base", 224, 256), Shape("base", 224, 1, 1), Shape("base", 224, 32, 1)]
            few += [Shape("small", 224, 256, 1), Shape("large", 224, 32, 1), Shape("tiny", 224, 256, 1)]
        else:
            few = [
                Shape(size, 224, batch, int(size == "base")) for size in ("tiny", "small", "base") for batch in (8, 1)
            ]
        known = {shape.name for shape in few}
        grid = [dataclasses.replace(shape, tier=2) for shape in super().list_shapes(device, quick)]
        return few + [shape for shape in grid if shape.name not in known]

    def compute_costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        return {name: Cost(flops * count_forward_flops(shape), 0) for name, flops in ((INFERENCE, 1), (TRAINING, 3))}

    def get_targets(self, shape: Shape, device: torch.device) -> Mapping[str, Mapping[str, float]]:
        if device.type == "cpu":
            return {name: {"speed_up": 1.05, "over transformers": 1.15} for name in self.passes}
        if shape.size == "base" and shape.batch == 1:
            return {INFERENCE: {"speed_up": 1.0}}
        return super().get_targets(shape, device)

    def get_error_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        return (1e-4, 1e-2) if dtype == torch.float32 else (2e-2, 0.2)

    def make_inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> ModelCase:
        """Makes a case without the expected results."""
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.ViTForImageClassification(make_config(shape))
        with torch.no_grad():
            for parameter in model.parameters():  # no bias of 0, no scale of 1
                parameter.add_(0.02 * torch.randn_like(parameter))
        folder = tempfile.TemporaryDirectory()
        model.save_pretrained(folder.name)
        pixels = torch.randn(shape.batch, 3, shape.image_size, shape.image_size, device=device)
        labels = torch.arange(shape.batch, device=device) % NUM_CLASSES
        return ModelCase(folder, pixels, labels, dtype, {}, {})

    def make_case(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> ModelCase:
        case = self.make_inputs(shape, dtype, device)
        exact = case._replace(dtype=torch.float32, models={})
        steps = self.prepare(self.providers["transformers"], exact)
        case.expected.update(self.compute_results(steps, exact))
        del steps, exact
        free_memory(device)
        return case

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        if provider.function not in case.models:
            trained = provider.function(Path(case.folder.name)).to(case.pixels.device)
            case.models[provider.function] = trained.train(), copy.deepcopy(trained).to(case.dtype).eval()
        models = case.models[provider.function]
        trained, pixels = models[0], case.pixels.to(case.dtype)
        if provider.compile_mode is not None:
            models = tuple(torch.compile(model, mode=provider.compile_mode, dynamic=False) for model in models)
        train, call = models
        graphs = provider.compile_mode in ("reduce-overhead", "max-autotune")
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)

        def infer(_: Any) -> Tensor:
            if graphs:  # the outputs of the last call may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return compute_logits(call, pixels)

        def loss() -> Tensor:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(pixels.device.type, case.dtype, enabled=case.dtype != torch.float32):
                logits = compute_logits(train, case.pixels)
            return nn.functional.cross_entropy(logits.float(), case.labels)

        def step(_: Any) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        def gradients() -> dict[str, Tensor]:
            value = loss()
            value.backward()
            # The gradient of the patch embedding passes through the whole model; the norm covers all others.
            (projection,) = (parameter.grad for parameter in trained.parameters() if parameter.ndim == 4)
            grads = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
            norm = torch.stack([grad.norm() for grad in grads]).norm()
            found = {
                "loss": value.detach().clone(),
                "gradient of the patches": projection.clone(),
                "gradients' norm": norm,
            }
            optimizer.zero_grad()
            return found

        return {
            INFERENCE: Step(infer),
            TRAINING: Step(step),
            "gradients": Step(lambda _: gradients()),
            "loss": Step(lambda _: loss()),
        }

    def list_first_calls(self, steps: dict[str, Step]) -> dict[str, Step]:
        """Returns the calls; that of a training step is without AdamW, which would change weights before the check."""
        calls = {INFERENCE: steps[INFERENCE], TRAINING: steps["gradients"]}
        return {name: calls[name] for name in self.passes}

    def compute_results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        found: Any = steps["gradients"].run(None) if TRAINING in self.passes else {}
        if INFERENCE in self.passes:
            inferred: Any = steps[INFERENCE].run(None)
            found["logits"] = inferred.clone()
        return found

    def measure_saved_bytes(self, steps: Mapping[str, Step], case: Any) -> int | None:
        if TRAINING not in self.passes:
            return None
        parameters = [p for models in case.models.values() for model in models for p in model.parameters()]
        known = [case.pixels, case.labels, *parameters]
        return count_saved_bytes(lambda: steps["loss"].run(None), known)


model = Model()


@model.provider("fastvit", kernel="layer_norm")
def load_fastvit(folder: Path) -> nn.Module:
    return fastvit.ViTForImageClassification.from_pretrained(folder)


@model.provider("transformers")
def load_transformers(folder: Path) -> nn.Module:
    return transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")


@model.provider("timm", needs=("timm", "torchvision"))
def load_timm(folder: Path) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    config = ViTConfig.from_pretrained(folder)
    model = VisionTransformer(
        img_size=config.image_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_classes=NUM_CLASSES,
    )
    model.load_state_dict(load_file(convert(folder, folder / "timm.safetensors", overwrite=True)))
    return model


for label in ("compiled", "CUDA graphs", "max-autotune"):
    for name in ("fastvit", "transformers", "timm"):
        model.add_compiled(name, (label,), **({"tier": 3} if label == "max-autotune" else {}))  # minutes each

OPERATIONS = (model,)
