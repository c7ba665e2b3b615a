"""How fast is the whole model beside transformers' and timm's, with the same weights' shapes and the same pictures?

    python benchmarks/bench_model.py --size base --batch-size 8

Every round times each provider once, in turn, so that a machine that slows down slows all of them. Before anything is
timed, each provider's logits are checked against transformers' eager ones with the same weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig

import fastvit
from fastvit.options import SIZES
from fastvit.weights import convert

NUM_CLASSES = 10
STEPS = ("forward", "training step")


def vit_config(size: str, image_size: int) -> ViTConfig:
    hidden_size, num_layers, num_heads = SIZES[size]
    return ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        image_size=image_size,
        layer_norm_eps=1e-6,  # timm's
        num_labels=NUM_CLASSES,
    )


def make_transformers(folder: Path) -> nn.Module:
    return transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")


def make_fastvit(folder: Path) -> nn.Module:
    return fastvit.ViTForImageClassification.from_pretrained(folder)


def make_timm(folder: Path) -> nn.Module:
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


PROVIDERS = {"fastvit": make_fastvit, "transformers": make_transformers, "timm": make_timm}


def make_models(config: ViTConfig, folder: Path) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every provider's model with the same random weights, and why those that are missing are missing."""
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    models, missing = {}, {}
    for name, make in PROVIDERS.items():
        try:
            models[name] = make(folder)
        except ImportError as error:
            missing[name] = str(error)
    return models, missing


def logits_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = model(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def check(models: dict[str, nn.Module], pixels: torch.Tensor) -> None:
    """Nothing is timed that gives other logits than transformers' model."""
    with torch.inference_mode():
        expected = logits_of(models["transformers"].eval(), pixels)
        for name, model in models.items():
            error = (logits_of(model.eval(), pixels) - expected).norm() / expected.norm()
            if not error < 1e-4:
                raise SystemExit(f"{name}: logits are wrong by {error:.1e} relative; nothing was timed")


def make_step(model: nn.Module, step: str, pixels: torch.Tensor, precision: str) -> Callable[[], None]:
    """One forward pass for logits, or one training step: forward, backward, AdamW."""
    labels = torch.arange(len(pixels), device=pixels.device) % NUM_CLASSES
    autocast = torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16")
    if step == "forward":

        def forward() -> None:
            model.eval()
            with torch.inference_mode(), autocast:
                logits_of(model, pixels)

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        model.train()
        with autocast:
            loss = nn.functional.cross_entropy(logits_of(model, pixels).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def measure(functions: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round for every provider, in turn, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in tqdm(range(rounds + 1), leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(samples: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return {"q25": float(low), "median": float(median), "q75": float(high), "min": min(samples)}


def environment(device: torch.device) -> dict[str, str | int]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="size of the model [tiny]")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the result as JSON to this file")
    options = parser.parse_args()
    device = torch.device(options.device)

    with tempfile.TemporaryDirectory() as folder:
        models, missing = make_models(vit_config(options.size, options.image_size), Path(folder))
    pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    models = {name: model.to(device) for name, model in models.items()}
    check(models, pixels)
    result = {"options": {**vars(options), "out": None}, "environment": environment(device), "missing": missing}
    print(f"ViT {options.size}, {options.image_size} px, batch {options.batch_size}, {options.precision}, {device}")
    for name, reason in missing.items():
        print(f"  {name} is missing: {reason}")
    for step in STEPS:
        functions = {name: make_step(model, step, pixels, options.precision) for name, model in models.items()}
        seconds = measure(functions, options.rounds, device)
        result[step] = {name: quartiles(samples) for name, samples in seconds.items()}
        ours = result[step]["fastvit"]["median"]
        for name, statistics in result[step].items():
            median, low, high = (1e3 * statistics[key] for key in ("median", "q25", "q75"))
            print(
                f"  {step:<14}{name:<14}{median:9.1f} ms ({low:.1f} to {high:.1f})"
                f"{options.batch_size / statistics['median']:9.1f} images/s{statistics['median'] / ours:8.2f}x"
            )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(options.out)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["fastvit", "transformers"])
def test_model_step(benchmark, name, step, tmp_path):
    """The same as pytest-benchmark rows: pytest benchmarks --benchmark-enable."""
    models, _ = make_models(vit_config("micro", 64), tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    check(models, pixels)
    benchmark(make_step(models[name], step, pixels, "fp32"))


if __name__ == "__main__":
    main()
