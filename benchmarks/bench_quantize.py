"""What does `fastvit.quantize(model, "fp8")` gain in inference, and what does it lose?

The logits' error stands beside each provider: against transformers in float32, as for `bench_model`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fastvit
from fastvit.benchmarks.bench_model import INFERENCE, Model, ours, theirs
from fastvit.benchmarks.cases import Compiled, Shape
from fastvit.benchmarks.harness import as_test


class QuantizedModel(Model):
    passes = (INFERENCE,)

    def __init__(self) -> None:
        super().__init__()
        self.name = "quantized model"

    def shapes(self, device: torch.device, quick: bool) -> list[Shape]:
        """Large batches of wide models, where products decide. A CPU would only imitate e4m3, slowly."""
        if quick:
            return super().shapes(device, quick)
        return [Shape("base", 224, 256), Shape("large", 224, 32, 1)] if device.type == "cuda" else []

    def targets_at(self, shape: Shape, device: torch.device) -> dict[str, dict[str, float]]:
        return {}

    def floor_of_error(self, dtype: torch.dtype) -> float:
        return 0.15  # 4 significant bits, through all blocks of random weights

    def limit_of_error(self, dtype: torch.dtype) -> float:
        return 0.3


quantized_model = QuantizedModel()


@quantized_model.provider("fastvit fp8", kernel="layer_norm_fp8")
def in_fp8(folder: Path) -> nn.Module:
    model = fastvit.ViTForImageClassification.from_pretrained(folder)
    return fastvit.quantize(model.to("cuda" if torch.cuda.is_available() else "cpu"), "fp8")


quantized_model.provider("fastvit", kernel="layer_norm")(ours)
quantized_model.provider("transformers")(theirs)
quantized_model.compiled("transformers", {"compiled": Compiled("default", tier=1)})

OPERATIONS = (quantized_model,)

test_quantized_model = as_test(quantized_model)
