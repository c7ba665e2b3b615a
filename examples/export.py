"""Export a classifier for use without fastvit: as a torch.export program and as ONNX, for any batch size.

    python examples/export.py                                      # google/vit-base-patch16-224 -> runs/export
    python examples/export.py --model runs/leaves --output-dir leaves-model

Both files are loaded, run and compared with the model. ONNX requires the packages onnx, onnxscript and onnxruntime;
without them only the first file is written.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

import fastvit
from fastvit import ViTForImageClassification


class Classifier(torch.nn.Module):
    """pixel_values [batch, channels, height, width], float32 and normalised -> logits [batch, classes]."""

    def __init__(self, model: ViTForImageClassification):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: largest difference {difference:.1e} of the largest logit, batch {len(found)}")
    if not difference < 1e-4:
        raise SystemExit(f"{name}: expected the logits of the model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="hub id or folder (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/export"), help="%(default)s")
    options = parser.parse_args()

    model = Classifier(ViTForImageClassification.from_pretrained(options.model)).eval()
    config = model.model.config
    pixels = torch.randn(3, config.num_channels, config.image_size, config.image_size)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    any_batch = {"pixel_values": {0: torch.export.Dim("batch")}}

    # The reference backend consists of plain PyTorch operations, which every runtime supports.
    with fastvit.backend("reference"), torch.no_grad():
        program = torch.export.export(model, (pixels[:2],), dynamic_shapes=any_batch)
        torch.export.save(program, options.output_dir / "model.pt2")
        loaded = torch.export.load(options.output_dir / "model.pt2").module()
        check("model.pt2", loaded(pixels), model(pixels))

        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            print(f"no ONNX file: pip install {' '.join(missing)}")
            return
        path = options.output_dir / "model.onnx"
        torch.onnx.export(
            model, (pixels[:2],), path, input_names=["pixel_values"], output_names=["logits"], dynamic_shapes=any_batch
        )
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
        check("model.onnx", torch.from_numpy(logits), model(pixels))


if __name__ == "__main__":
    main()
