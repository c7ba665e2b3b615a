"""How fast is the whole model beside transformers' and timm's, with the same weights and the same pictures?

Inference is a forward pass for logits with weights in the dtype asked for; a training step is forward, backward and
AdamW with float32 weights, under autocast where the dtype is another. What the host takes counts here, as in use.
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
from fastvit.benchmarks.cases import Compiled, Cost, Operation, Provider, Shape
from fastvit.benchmarks.harness import as_test
from fastvit.benchmarks.memory import bytes_kept, free
from fastvit.benchmarks.timing import Step
from fastvit.checkpoints.convert import convert

NUM_CLASSES = 10
INFERENCE, TRAINING = "inference", "training step"


class ModelCase(NamedTuple):
    folder: tempfile.TemporaryDirectory  # the weights, as transformers saves them
    pixels: Tensor  # [B, 3, H, W] float32
    labels: Tensor  # [B]
    dtype: torch.dtype
    models: dict[Callable[..., Any], tuple[nn.Module, nn.Module]]  # made once for all modes of a provider
    expected: dict[str, Tensor]


def vit_config(shape: Shape) -> ViTConfig:
    return ViTConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        image_size=shape.image_size,
        layer_norm_eps=1e-6,  # timm's
        num_labels=NUM_CLASSES,
    )


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.logits


def forward_flops(shape: Shape) -> float:
    """Matrix products of one forward pass for logits, all tokens through all blocks."""
    block = 24 * shape.hidden**2 + 4 * shape.tokens * shape.hidden
    return shape.batch * (shape.layers * shape.tokens * block + 2 * shape.patches * 768 * shape.hidden)


class Model(Operation):
    passes: Sequence[str] = (INFERENCE, TRAINING)
    hides_launch = False
    baseline = "transformers"
    seconds, seconds_on_cpu = 2.0, 5.0
    # images_per_s: on an H100, a little more than half of what its matrix products alone would allow.
    targets: Mapping[str, Mapping[str, float]] = {
        INFERENCE: {"speed_up": 1.2, "images_per_s": 12_000},
        TRAINING: {"speed_up": 1.2, "memory": 0.75, "images_per_s": 4_300},
    }

    def __init__(self) -> None:
        super().__init__("model", setup=lambda *_: {}, definition=lambda: None, cost=lambda *_: {})

    def shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        if quick:
            return super().shapes(device, quick)
        if device.type == "cuda":  # after the large batch the smallest, where launches decide
            few = [Shape("base", 224, 256), Shape("base", 224, 1, 1), Shape("base", 224, 32, 1)]
            few += [Shape("small", 224, 256, 1), Shape("large", 224, 32, 1), Shape("tiny", 224, 256, 1)]
        else:
            few = [
                Shape(size, 224, batch, int(size == "base")) for size in ("tiny", "small", "base") for batch in (8, 1)
            ]
        known = {shape.name for shape in few}
        grid = [dataclasses.replace(shape, tier=2) for shape in super().shapes(device, quick)]
        return few + [shape for shape in grid if shape.name not in known]

    def costs(self, shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        flops = forward_flops(shape)
        return {INFERENCE: Cost(flops, 0), TRAINING: Cost(3 * flops, 0)}

    def targets_at(self, shape: Shape, device: torch.device) -> Mapping[str, Mapping[str, float]]:
        if device.type == "cpu":
            return {name: {"speed_up": 1.05, "over transformers": 1.15} for name in self.passes}
        if shape.size == "base" and shape.batch == 1:
            return {INFERENCE: {"speed_up": 1.0}}
        return super().targets_at(shape, device)

    def rate(self, shape: Shape) -> float:
        return shape.batch

    def floor_of_error(self, dtype: torch.dtype) -> float:
        return 1e-4 if dtype == torch.float32 else 2e-2

    def limit_of_error(self, dtype: torch.dtype) -> float:
        return 1e-2 if dtype == torch.float32 else 0.2

    def make_inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> ModelCase:
        """A case without the results that are held against the others'."""
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()  # one for each model that is loaded
        model = transformers.ViTForImageClassification(vit_config(shape))
        with torch.no_grad():
            for parameter in model.parameters():  # no bias stays 0, no scale 1
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
        case.expected.update(self.results(steps, exact))
        del steps, exact
        free(device)
        return case

    def prepare(self, provider: Provider, case: Any) -> dict[str, Step]:
        if provider.function not in case.models:
            trained = provider.function(Path(case.folder.name)).to(case.pixels.device)
            used = copy.deepcopy(trained).to(case.dtype)
            case.models[provider.function] = trained.train(), used.eval()
        trained, used = case.models[provider.function]
        pixels = case.pixels.to(case.dtype)
        call, train = used, trained
        if provider.compile_mode is not None:
            call, train = (torch.compile(model, mode=provider.compile_mode, dynamic=False) for model in (used, trained))
        graphs = provider.compile_mode in ("reduce-overhead", "max-autotune")
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)

        def infer(_: Any) -> Tensor:
            if graphs:  # the outputs of the last call may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return logits_of(call, pixels)

        def loss() -> Tensor:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(pixels.device.type, case.dtype, enabled=case.dtype != torch.float32):
                logits = logits_of(train, case.pixels)
            return nn.functional.cross_entropy(logits.float(), case.labels)

        def step(_: Any) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        def gradients() -> dict[str, Tensor]:
            value = loss()
            value.backward()
            # The patch embedding's gradient comes through the whole model; the norm holds everybody else's.
            (projection,) = (parameter.grad for parameter in trained.parameters() if parameter.ndim == 4)
            norm = torch.stack(
                [grad.norm() for grad in (p.grad for p in trained.parameters()) if grad is not None]
            ).norm()
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

    def first_calls(self, steps: dict[str, Step]) -> dict[str, Step]:
        """A training step's is without AdamW: weights must not change before they are checked."""
        calls = {INFERENCE: steps[INFERENCE], TRAINING: steps["gradients"]}
        return {name: calls[name] for name in self.passes}

    def results(self, steps: dict[str, Step], case: Any) -> dict[str, Tensor]:
        found: Any = steps["gradients"].run(None) if TRAINING in self.passes else {}
        if INFERENCE in self.passes:
            inferred: Any = steps[INFERENCE].run(None)
            found["logits"] = inferred.clone()
        return found

    def kept_bytes(self, steps: dict[str, Step], case: Any) -> int | None:
        if TRAINING not in self.passes:
            return None
        known = [case.pixels, case.labels]
        for models in case.models.values():
            for model in models:
                known.extend(model.parameters())
        return bytes_kept(lambda: steps["loss"].run(None), known)


model = Model()


@model.provider("fastvit", kernel="layer_norm")
def ours(folder: Path) -> nn.Module:
    return fastvit.ViTForImageClassification.from_pretrained(folder)


@model.provider("transformers")
def theirs(folder: Path) -> nn.Module:
    return transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")


@model.provider("timm", needs=("timm", "torchvision"))
def timm(folder: Path) -> nn.Module:
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


for mode in (
    {"compiled": Compiled("default", tier=1)},
    {"CUDA graphs": Compiled("reduce-overhead", tier=1, devices=("cuda",), max_batch=32)},  # for the launches of few
    {"max-autotune": Compiled("max-autotune-no-cudagraphs", tier=3)},  # minutes each
):
    for name in ("fastvit", "transformers", "timm"):
        model.compiled(name, mode)

OPERATIONS = (model,)

test_model = as_test(model)
