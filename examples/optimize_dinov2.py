"""Let fastvit compute the blocks of a DINOv2, and compare its features and its speed with what they were.

    python examples/optimize_dinov2.py                                   # facebook/dinov2-base, a leaf drawn by code
    python examples/optimize_dinov2.py leaf.jpg cat.png --dtype bfloat16

--model may also be another vision model that AutoModel loads and fastvit.optimize knows: a ViT, BEiT, DINOv3, ...
"""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import fastvit
from fastvit.data.leaves import draw_leaf


def milliseconds(function, repeats: int) -> float:
    """Of one call, the median."""
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
    parser.add_argument("pictures", nargs="*", help="files (default: one drawn leaf)")
    parser.add_argument("--model", default="facebook/dinov2-base", help="hub id or folder (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="calls that are timed (%(default)s)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    processor = AutoImageProcessor.from_pretrained(options.model)
    model = AutoModel.from_pretrained(options.model, dtype=dtype).to(device).eval()
    images = [Image.open(path).convert("RGB") for path in options.pictures] or [draw_leaf("healthy", seed=0, size=256)]
    pixels = processor(images, return_tensors="pt").pixel_values.to(device, dtype)

    @torch.inference_mode()
    def features() -> torch.Tensor:  # [pictures, tokens, hidden size]
        return model(pixels).last_hidden_state

    before = features()
    time_before = milliseconds(features, options.repeats)

    print(fastvit.optimize(model))
    after = features()
    time_after = milliseconds(features, options.repeats)

    difference = ((after - before).abs().max() / before.abs().max()).item()
    print(f"features: {list(after.shape)}, largest difference {difference:.1e} of the largest value ({options.dtype})")
    print(f"milliseconds on {device}: {time_before:.2f} before, {time_after:.2f} after")

    fastvit.restore(model)
    print(f"restored: {'the same bits as before' if torch.equal(features(), before) else 'other bits than before'}")


if __name__ == "__main__":
    main()
