"""Compile the whole model with torch.compile, and time inference and a training step against the uncompiled model.

    python examples/compile.py                                      # google/vit-base-patch16-224, batch size 32
    python examples/compile.py --batch-size 256 --dtype bfloat16    # for a large GPU

The first call of a compiled model compiles it, which takes about a minute; it is not timed.
"""

import argparse
import time
from collections.abc import Callable

import torch

from fastvit import ViTForImageClassification


def measure_ms(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of one call, without the first call, which compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="hub id or folder (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="%(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="number of timed calls (%(default)s)")
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend (%(default)s)")
    parser.add_argument("--mode", help='torch.compile\'s mode: for example "reduce-overhead", which uses CUDA graphs')
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ViTForImageClassification.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device)
    # fullgraph=True: a graph break would be an error.
    compiled = torch.compile(model, fullgraph=True, backend=options.compiler, mode=options.mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    size = model.config.image_size
    pixels = torch.randint(256, (options.batch_size, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(model.config.num_labels, (options.batch_size,), device=device)

    def infer(network: Callable) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return network(pixels).logits

    def train_one_step(network: Callable) -> None:
        model.train()
        network(pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    expected, found = infer(model), infer(compiled)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"logits: largest difference {difference:.1e} of the largest value")
    print(f"milliseconds for {options.batch_size} images, {options.dtype}, {device}:")
    for name, run in (("inference", infer), ("training step", train_one_step)):
        plain, fast = (measure_ms(lambda run=run, one=one: run(one), options.repeats) for one in (model, compiled))
        print(f"{name:>15} {plain:9.2f} uncompiled {fast:9.2f} compiled")


if __name__ == "__main__":
    main()
