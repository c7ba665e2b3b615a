"""How long is it until the first prediction: import, model construction, compiling and tuning?

Measured for the model alone, with random weights, and from a saved folder and an image file to the name of a class.
Every sample is a new process. Its caches (Triton, torch.compile, our tuning) are in a folder that is empty for the
first process and reused by the second.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastvit.benchmarks.bench_predictor import IMAGE_SIZE, save_model
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.harness import Settings, describe_error, make_record, run_python
from fastvit.benchmarks.measure import compute_quantiles
from fastvit.benchmarks.records import OUT_OF_TIME, Record, get_dtype_name
from fastvit.data import leaves

NAME = "in new processes"
PROGRAM = """
import json, time
start = time.perf_counter()
if {provider!r}.startswith("fastvit"):
    from fastvit import ViTForImageClassification, ViTConfig
else:
    from transformers import ViTForImageClassification, ViTConfig
imported = time.perf_counter()
import torch
config = ViTConfig(hidden_size={hidden}, num_hidden_layers={layers}, num_attention_heads={heads},
                   intermediate_size=4 * {hidden}, image_size={image_size})
model = ViTForImageClassification(config).eval().to({device!r}, torch.{dtype})
call = torch.compile(model) if {compiled} else model
pixels = torch.randn({batch}, 3, {image_size}, {image_size}).to({device!r}, torch.{dtype})
made = time.perf_counter()
with torch.no_grad():
    call(pixels).logits.sum().item()
first = time.perf_counter()
print(json.dumps({{"import": imported - start, "make the model": made - imported, "first prediction": first - made,
                   "all": first - start}}))
"""
# From a folder and a file to the name of a class.
SERVING = """
import json, time
start = time.perf_counter()
if {provider!r}.startswith("fastvit"):
    from fastvit import Predictor
    imported = time.perf_counter()
    answer = Predictor({folder!r}, {device!r}, {dtype!r})
else:
    from transformers import pipeline
    imported = time.perf_counter()
    answer = pipeline("image-classification", {folder!r}, device={device!r}, dtype={dtype!r})
made = time.perf_counter()
answer({file!r})
first = time.perf_counter()
print(json.dumps({{"import": imported - start, "make the model": made - imported, "first prediction": first - made,
                   "all": first - start}}))
"""
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "FASTVIT_CACHE_DIR": "fastvit"}
CACHED = ("empty caches", "filled caches")
SERVERS = ("fastvit Predictor", "transformers pipeline")
PHASES = ("import", "make the model", "first prediction", "all")
IMAGE = "leaf.jpg"


def save_for_serving(shape: Shape, folder: Path) -> None:
    """Saves a model, its image processor and an image."""
    save_model(shape, str(folder))
    leaves.draw_leaf(leaves.CLASSES[0], seed=0, size=IMAGE_SIZE).save(folder / IMAGE)


def start_once(provider: str, shape: Shape, dtype: str, device: str, caches: Path, folder: Path) -> dict[str, float]:
    """Returns the seconds of each phase of a new process; folder: as `save_for_serving` makes it."""
    program = (SERVING if provider in SERVERS else PROGRAM).format(
        folder=str(folder),
        file=str(folder / IMAGE),
        provider=provider,
        compiled=provider.endswith("compiled"),
        dtype=dtype,
        device=device,
        **shape.get_sizes(),
    )
    return run_python("-c", program, **{name: str(caches / cache) for name, cache in CACHES.items()})


def run(dtype: torch.dtype, settings: Settings) -> Iterator[Record]:
    """Yields records in which a phase is a pass, and empty and filled caches are two variants of the shape."""
    shape = Shape("micro", 64, 1) if settings.quick else Shape("base", 224, 1)
    is_brief = settings.quick or settings.suite == "all"
    providers = ["fastvit", "transformers", *SERVERS]
    if settings.full or (settings.device.type == "cuda" and not is_brief):
        providers += ["fastvit compiled", "transformers compiled"]
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as saved:
        save_for_serving(shape, Path(saved))
        for number in range(1 if is_brief else 3):
            for provider in providers:
                if provider in failed or (number and provider.endswith("compiled")):  # compiling takes minutes: once
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    for caches in CACHED:
                        if time.monotonic() > settings.deadline:
                            continue
                        where = settings.device.type, Path(folder), Path(saved)
                        try:
                            sample = start_once(provider, shape, get_dtype_name(dtype), *where)
                        except RuntimeError as error:
                            failed[provider] = describe_error(error)
                            break
                        seconds.setdefault((provider, caches), []).append(sample)
    for provider in providers:
        for caches in CACHED:
            samples = seconds.get((provider, caches))
            for phase in PHASES:
                record = make_record("coldstart", shape, dtype, phase, provider)
                record["shape"] = f"{shape.name}, {caches}"
                if provider in failed:
                    record |= {"status": "failed", "reason": failed[provider]}
                elif samples is None:
                    record |= {"status": "left out", "reason": OUT_OF_TIME}
                else:
                    record["ms"] = compute_quantiles([1e3 * sample[phase] for sample in samples])
                yield record
