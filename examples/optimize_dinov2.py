"""Optimize the blocks of a DINOv2 with fastvit, and compare features and speed before and after.

    python examples/optimize_dinov2.py                                   # facebook/dinov2-base, a synthetic leaf
    python examples/optimize_dinov2.py leaf.jpg cat.png --dtype bfloat16

--model may also name another vision model that AutoModel loads and fastvit.optimize supports: a ViT, BEiT, DINOv3, ...
"""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import fastvit
from fastvit.data.leaves import draw_leaf


def measure_ms(function, repeats: int) -> float:
    """Return the median time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files (default: one synthetic leaf)")
    parser.add_argument("--model", default="facebook/dinov2-base", help="hub id or folder (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="number of timed calls (%(default)s)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype=dtype).to(device).eval()
    images = [Image.open(path).convert("RGB") for path in options.images] or [draw_leaf("healthy", seed=0, size=256)]
    pixels = processor(images, return_tensors="pt").pixel_values.to(device, dtype)

    @torch.inference_mode()
    def compute_features() -> torch.Tensor:  # [images, tokens, hidden size]
        return model(pixels).last_hidden_state

    before = compute_features()
    time_before = measure_ms(compute_features, options.repeats)

    print(fastvit.optimize(model))
    after = compute_features()
    time_after = measure_ms(compute_features, options.repeats)

    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(f"features: {list(after.shape)}, largest difference {difference:.1e} of the largest value ({options.dtype})")
    print(f"milliseconds on {device}: {time_before:.2f} before, {time_after:.2f} after")

    fastvit.restore(model)
    print(f"restored: {'the same bits as before' if torch.equal(compute_features(), before) else 'different bits'}")


if __name__ == "__main__":
    main()
