"""Export a classifier to a file for other runtimes: ONNX, OpenVINO, torch.export, TensorRT.

The graph accepts uint8 images `[batch, height, width, channels]` of any batch size, resized outside, and normalises
them. It returns logits, float32 `[batch, classes]`. Class names, preprocessing, problem type, temperature and
thresholds are strings of JSON in the file's metadata. No file is written that has not computed the model's logits.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvit.checkpoints.locations import EXPORTED_SUFFIXES
from fastvit.errors import InputError
from fastvit.files import write_atomically
from fastvit.models.calibration import get_temperature
from fastvit.serve import engines
from fastvit.serve.engines import CONVERTERS, INPUT, METADATA, find_missing_reason
from fastvit.serve.predictor import check_compatibility, get_class_names, load_classifier
from fastvit.serve.preprocessing import Preprocessor
from fastvit.serve.runner import Classifier

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
# Largest difference that is accepted, relative to the largest logit. int8 is judged by its accuracy; this finds a graph
# that computes something else.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 0.1, "int8": 0.5}
REFUSED = {
    ("onnx", "bf16"): "ONNX Runtime has no bfloat16 kernels for CPUs; use fp32 or int8",
    ("torch-export", "int8"): "PyTorch's exported programs have no quantised form here; use onnx or openvino",
}
TENSORRT_BATCHES = (1, 8, 64)  # smallest, the one that is optimised for, largest


def resolve_format(path: Path, file_format: str | None, dtype: str) -> str:
    """The format of a file, by its ending unless given.

    Raises:
        InputError: the ending is not the format's, packages are missing, or the format cannot have the dtype.
    """
    found = EXPORTED_SUFFIXES.get(path.suffix)
    names = ", ".join(f"{suffix} ({name})" for suffix, name in EXPORTED_SUFFIXES.items())
    if found is None or file_format not in (None, found):
        wanted = next((suffix for suffix, name in EXPORTED_SUFFIXES.items() if name == file_format), names)
        raise InputError(f"--output: expected a file ending in {wanted}, got {path}")
    if reason := REFUSED.get((found, dtype)):
        raise InputError(f"--dtype: {found} cannot be {dtype}: {reason}")
    packages = {"onnx": CONVERTERS["onnxruntime"], "tensorrt": ("tensorrt", "onnx", "onnxscript")}.get(found, (found,))
    if reason := find_missing_reason(*(() if found == "torch-export" else packages)):
        raise InputError(f"--format: {found}: {reason}")
    if dtype == "int8" and (reason := find_missing_reason(*CONVERTERS["onnxruntime"])):
        raise InputError(f"--dtype: int8: {reason}")
    return found


def export_model(
    model: str,
    path: Path,
    file_format: str,
    dtype: str = "fp32",
    *,
    calibrate: Callable[[Preprocessor], Sequence[np.ndarray]] = lambda preprocessor: (),
    accept: Callable[[Path], object] = lambda path: None,
) -> tuple[float, float]:
    """Export a classifier, and compare the file's logits with PyTorch's in float32.

    Args:
        model: folder or hub id.
        path: the file, and with the same stem its weights, if the format keeps them apart.
        file_format: one of `EXPORTED_SUFFIXES`' values.
        dtype: of weights and computation, a key of `DTYPES`.
        calibrate: returns preprocessed images for int8, uint8 `[H, W, channels]`.
        accept: called with the finished file before it is moved to `path`; an error that it raises prevents that.

    Returns:
        The largest difference of a logit, and the largest logit.

    Raises:
        InputError: the model cannot be exported, or the file computes other logits. Nothing is written then.
    """
    loaded, preprocessor = load_classifier(model, None)
    check_compatibility(loaded, preprocessor)
    calibration = calibrate(preprocessor)
    exact = Classifier(loaded.eval().float(), preprocessor)
    noise = np.random.default_rng(0).integers(0, 256, (3, *preprocessor.image_shape), dtype=np.uint8)
    images = torch.from_numpy(np.stack([*calibration, *noise][:3]))
    with torch.inference_mode():
        expected = exact(images)
    with write_atomically(path.parent) as folder:
        partial = folder / path.name
        # OpenVINO computes in another precision than that of the weights in its file.
        loaded.to(torch.float32 if file_format == "openvino" else DTYPES[dtype])
        write_file(partial, Classifier(loaded, preprocessor), preprocessor, file_format, dtype, calibration)
        device = torch.device(engines.get_default_device(partial) or "cpu")
        found, _ = engines.load_exported(partial, "onnxruntime" if file_format == "onnx" else "auto", device)
        with torch.inference_mode():
            logits = torch.cat([found(batch.to(device)).logits.cpu() for batch in images.split([1, 2])])  # two sizes
        difference, scale = (value.abs().max().item() for value in (logits - expected, expected))
        if not difference <= TOLERANCES[dtype] * max(scale, 1e-6):
            raise InputError(
                f"{path}: expected the logits of the model, at most {TOLERANCES[dtype]:g} of the largest apart, found"
                f" {difference:.2g} at a largest logit of {scale:.2g}; nothing was written"
            )
        accept(partial)
    return difference, scale


def write_file(
    path: Path,
    classifier: Classifier,
    preprocessor: Preprocessor,
    file_format: str,
    dtype: str,
    calibration: Sequence[np.ndarray],
) -> None:
    """Write a classifier, in its dtype, with metadata."""
    program = engines.trace_classifier(classifier, preprocessor.image_shape)
    metadata = describe_classifier(classifier.model.config, preprocessor, dtype)
    if file_format == "torch-export":
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
    elif file_format == "openvino" and dtype != "int8":
        write_openvino(engines.build_openvino(program, preprocessor.image_shape), path, metadata)
    elif file_format == "onnx":
        write_onnx(program, path, metadata, calibration)
    else:  # by way of an ONNX file
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder, "graph.onnx")
            write_onnx(program, graph, metadata, calibration)
            if file_format == "openvino":
                import openvino

                write_openvino(openvino.Core().read_model(graph), path, metadata)
            else:
                build_tensorrt(graph, path, preprocessor.image_shape)
                path.with_suffix(f".{METADATA}").write_text(json.dumps(metadata), encoding="utf-8")


def describe_classifier(config: Any, preprocessor: Preprocessor, dtype: str) -> dict[str, str]:
    """The metadata of a file: strings of JSON by name. `fastvit.serve.engines.parse_metadata` reads them."""
    fields = {
        "class_names": get_class_names(config),
        "problem_type": config.problem_type,
        "temperature": get_temperature(config),
        "label_thresholds": getattr(config, "label_thresholds", None),
        "preprocessing": dataclasses.asdict(preprocessor),
        "dtype": dtype,
        "input": "uint8 [batch, height, width, channels], resized and cropped; mean and std are applied in the graph",
    }
    return {name: json.dumps(value) for name, value in fields.items()}


def write_openvino(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write an .xml file, and its weights beside it as .bin."""
    import openvino

    for name, value in metadata.items():
        model.set_rt_info(value, ["fastvit", name])
    openvino.save_model(model, path, compress_to_fp16=json.loads(metadata["dtype"]) == "fp16")


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], calibration: Sequence[np.ndarray]
) -> None:
    """Write an .onnx file, in 8 bits if there are images for the calibration."""
    exported = engines.build_onnx(program)
    exported.model.metadata_props.update(metadata)
    if not calibration:
        exported.save(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        exported.save(Path(folder, "graph.onnx"))
        quantize_graph(Path(folder, "graph.onnx"), path, calibration)


def quantize_graph(source: Path, path: Path, calibration: Sequence[np.ndarray]) -> None:
    """Quantise the linear layers and matmuls of an ONNX graph, as pairs of QuantizeLinear and DequantizeLinear.

    Both ONNX Runtime and OpenVINO compute such pairs around a layer in 8 bits.

    Args:
        source: the graph in float32.
        path: of the quantised graph.
        calibration: preprocessed images, uint8 [H, W, channels], whose activations determine the scales.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image[None]}

    with engines.silence_converters():  # it recommends a preparation for convolutional networks
        quantize_static(
            source,
            path,
            Images(),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def build_tensorrt(graph: Path, path: Path, image_shape: tuple[int, int, int]) -> None:
    """Build a TensorRT engine from an ONNX file, in the file's dtypes. Never run so far: it needs a GPU."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise InputError(f"--format: TensorRT cannot read the model ({parser.get_error(0).desc()})")
    profile, settings = builder.create_optimization_profile(), builder.create_builder_config()
    profile.set_shape(INPUT, *((batch, *image_shape) for batch in TENSORRT_BATCHES))
    settings.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise InputError("--format: TensorRT could not build an engine; its messages are above")
    path.write_bytes(engine)
