"""How much faster is inference after `fastvit.quantize(model, "fp8")`, and how much less accurate?

The error of the logits, relative to transformers in float32, is recorded for each provider as in `bench_model`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fastvit
from fastvit.benchmarks.bench_model import INFERENCE, Model, load_fastvit, load_transformers
from fastvit.benchmarks.cases import Shape


class QuantizedModel(Model):
    passes = (INFERENCE,)

    def __init__(self) -> None:
        super().__init__()
        self.name = "quantized model"

    def list_shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        """Lists large batches of wide models, which matmuls dominate. A CPU would only emulate e4m3, slowly."""
        if quick:
            return super().list_shapes(device, quick)
        return [Shape("base", 224, 256), Shape("large", 224, 32, 1)] if device.type == "cuda" else []

    def get_targets(self, shape: Shape, device: torch.device) -> dict[str, dict[str, float]]:
        return {}

    def get_error_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        return 0.15, 0.3  # 4 significant bits, through all blocks of random weights


quantized_model = QuantizedModel()


@quantized_model.provider("fastvit fp8", kernel="layer_norm_fp8")
def load_fp8(folder: Path) -> nn.Module:
    model = fastvit.ViTForImageClassification.from_pretrained(folder)
    return fastvit.quantize(model.to("cuda" if torch.cuda.is_available() else "cpu"), "fp8")


quantized_model.provider("fastvit", kernel="layer_norm")(load_fastvit)
quantized_model.provider("transformers")(load_transformers)
quantized_model.add_compiled("transformers", ("compiled",))

OPERATIONS = (quantized_model,)
