"""How long until the first prediction: importing, making a model, and what is compiled or tuned on the way?

Once for the model alone, with random weights, and once from a saved folder and a picture file to the name of a class.
Every sample is a process of its own. Its caches (Triton's, the compiler's, our tuning) are in a folder that is empty
the first time and kept for the second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastvit
from fastvit.benchmarks.bench_predictor import PHOTOGRAPH, save_model
from fastvit.benchmarks.cases import OURS, Shape
from fastvit.benchmarks.environment import name_of
from fastvit.benchmarks.harness import Settings, describe
from fastvit.benchmarks.timing import quantiles
from fastvit.data import leaves

PROGRAM = """
import json, sys, time
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
PICTURE = "leaf.jpg"
PHASES = ("import", "make the model", "first prediction", "all")


def save_for_serving(shape: Shape, folder: Path) -> None:
    """A model, its image processor and a picture."""
    save_model(shape, str(folder))
    leaves.draw_leaf(leaves.CLASSES[0], seed=0, size=PHOTOGRAPH).save(folder / PICTURE)


def start_once(provider: str, shape: Shape, dtype: str, device: str, caches: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase, in a new process. folder: of a saved model with a picture."""
    program = (SERVING if provider in SERVERS else PROGRAM).format(
        folder=str(folder),
        file=str(folder / PICTURE),
        provider=provider,
        compiled=provider.endswith("compiled"),
        dtype=dtype,
        device=device,
        batch=shape.batch,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        image_size=shape.image_size,
    )
    root = str(Path(fastvit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {name: str(caches / folder) for name, folder in CACHES.items()}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment | {"PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process ended")
    return json.loads(done.stdout.splitlines()[-1])


def run(settings: Settings, dtype: Any, tick: Callable[[str], object] = lambda what: None) -> Iterator[dict[str, Any]]:
    """Records: a phase is a pass; with empty and with filled caches are two shapes."""
    shape = Shape("micro", 64, 1) if settings.quick else Shape("base", 224, 1)
    few = settings.quick or settings.brief
    compiles = settings.full or (settings.device.type == "cuda" and not few)
    providers = ["fastvit", "transformers", *SERVERS]
    providers += ["fastvit compiled", "transformers compiled"] if compiles else []
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    saved = tempfile.TemporaryDirectory()
    save_for_serving(shape, Path(saved.name))
    for number in range(1 if few else 3):
        for provider in providers:
            if provider in failed or (number and provider.endswith("compiled")):  # compiling takes minutes: once
                continue
            with tempfile.TemporaryDirectory() as folder:
                for caches in CACHED:
                    if time.monotonic() > settings.deadline:
                        continue
                    tick(f"{provider}, {caches}")
                    try:
                        took = start_once(
                            provider, shape, name_of(dtype), settings.device.type, Path(folder), Path(saved.name)
                        )
                    except RuntimeError as error:
                        failed[provider] = describe(error)
                        break
                    seconds.setdefault((provider, caches), []).append(took)
    for provider in providers:
        for caches in CACHED:
            samples = seconds.get((provider, caches))
            outcome: dict[str, Any] = {"status": "timed", "reason": None}
            if provider in failed:
                outcome = {"status": "failed", "reason": failed[provider]}
            elif samples is None:
                outcome = {"status": "left out", "reason": "the time budget was spent before its turn"}
            for phase in PHASES:
                record = {
                    "operation": "coldstart",
                    "shape": f"{shape.name}, {caches}",
                    "sizes": shape.sizes(),
                    "headline": True,
                    "dtype": name_of(dtype),
                    "pass": phase,
                    "provider": provider,
                    "registered": provider,
                    "ours": provider.startswith(OURS),
                    **outcome,
                }
                if outcome["status"] == "timed" and samples is not None:
                    record["ms"] = quantiles([1e3 * took[phase] for took in samples])
                yield record
