"""Engines that compute a classifier in place of PyTorch's eager mode: OpenVINO, ONNX Runtime, TensorRT, exported files.

checkpoint -> trace -> OpenVINO model or ONNX graph -> engine    convert_model, for a `Predictor`
exported file of `fastvit.serve.export` -> engine                load_exported, with the file's metadata
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.checkpoints.configuration import SIZE_LIMITS, check_channels, check_size, format_error, format_value
from fastvit.checkpoints.locations import EXPORTED_SUFFIXES
from fastvit.errors import InputError
from fastvit.serve.preprocessing import Preprocessor

logger = logging.getLogger("fastvit")

RUNTIMES = ("auto", "torch", "openvino", "onnxruntime")
CONVERTERS = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxscript", "onnxruntime")}  # packages
FILE_RUNTIMES = {  # format -> what can compute it, the first that is installed by default
    "onnx": ("openvino", "onnxruntime"),
    "openvino": ("openvino",),
    "torch-export": ("torch",),
    "tensorrt": ("tensorrt",),
}
INPUT, OUTPUT = "pixel_values", "logits"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # OpenVINO's names
METADATA = "fastvit.json"  # file in a .pt2 archive, and beside an .engine
FIELDS = ("class_names", "problem_type", "temperature", "label_thresholds", "dtype", "preprocessing")

Compute = Callable[[Tensor], Tensor]  # uint8 [B, H, W, channels] -> float32 [B, classes]


class EngineModel(nn.Module):
    """A classifier that an engine computes. It accepts uint8 images `[B, H, W, channels]` and has no parameters.

    Attributes:
        config: `id2label`, `num_labels`, `problem_type`, `calibration_temperature` and `label_thresholds` of the
            classifier.
        checksum: of the file.
    """

    def __init__(self, compute: Compute, config: Any, checksum: int = 0):
        super().__init__()
        self.compute, self.config, self.checksum = compute, config, checksum

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.compute(pixel_values))


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a runtime, and of its threads
# ---------------------------------------------------------------------------------------------------------------------


def find_missing_reason(*packages: str) -> str | None:
    """The first of these packages that is not installed, and how to install it; None if all are."""
    for package in packages:
        if find_spec(package) is None:
            extra = {"openvino": "fastvit[openvino]", "tensorrt": "tensorrt"}.get(package, "fastvit[onnx]")
            return f'{package} is not installed: pip install "{extra}"'
    if "tensorrt" in packages and not torch.cuda.is_available():
        return "tensorrt needs a GPU, and PyTorch finds none"
    return None


def find_dtype_reason(runtime: str, dtype: torch.dtype | None) -> str | None:
    """Why a runtime cannot compute in a dtype on this machine's CPU, or None."""
    if dtype is None or (dtype == torch.float32 and runtime in CONVERTERS):
        return None
    if runtime == "openvino" and dtype == torch.bfloat16:
        import openvino

        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in capabilities else f"this CPU has no instructions for {dtype}"
    return f"{runtime} cannot compute in {dtype} on a CPU"


def choose_runtime(runtime: str, device: torch.device, dtype: torch.dtype, is_shared: bool) -> str:
    """Choose the runtime of a PyTorch model.

    Args:
        runtime: one of `RUNTIMES`.
        device: of the model.
        dtype: of the model's weights, in which the engine is to compute.
        is_shared: whether the caller holds the model, and may change it.

    Raises:
        InputError: the runtime cannot compute on this device, in this dtype, or is not installed.
    """
    if runtime == "auto":
        runtime = os.environ.get("FASTVIT_RUNTIME") or "auto"
    if runtime not in RUNTIMES:
        raise InputError(f"runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if runtime == "torch" or (runtime == "auto" and is_shared):
        return "torch"
    name = "openvino" if runtime == "auto" else runtime
    reason = None if device.type == "cpu" else f"{name} computes on a CPU, got a model on {device}"
    reason = reason or find_missing_reason(*CONVERTERS[name]) or find_dtype_reason(name, dtype)
    if reason and runtime != "auto":
        raise InputError(f"runtime: {reason}")
    return "torch" if reason else name


def count_cpus() -> int:
    """Count the CPUs that this process may use: those of its affinity, or the quota of its control group if smaller."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # "max 100000", or the microseconds of CPU time per period: "200000 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def choose_threads() -> int:
    """Number of threads of an engine: PyTorch's (`torch.set_num_threads`, OMP_NUM_THREADS), but no more than CPUs."""
    return min(torch.get_num_threads(), count_cpus())


def warn_of_oversubscription() -> None:
    """Warn if PyTorch has more threads than CPUs, or if other programs keep the CPUs busy."""
    threads, cpus = torch.get_num_threads(), count_cpus()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > cpus:
        cause, advice = f"this process may use {cpus} CPU(s)", cpus
    elif threads > 1 and load > 2 * cpus:
        cause, advice = f"other programs keep the {cpus} CPUs busy (load average {load:.0f})", 1
    else:
        return
    message = "PyTorch has %d threads, but %s: they will wait for each other; set OMP_NUM_THREADS=%d"
    logger.warning(message, threads, cause, advice)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silence_converters() -> Iterator[None]:
    """Context without gradients, and without warnings about operators that no model here has, or deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Not in inference mode: the program's tensors would be inference tensors, which cannot be saved.
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace_classifier(classifier: nn.Module, image_shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Trace a `Classifier` for images `[H, W, channels]` and any batch size, as plain PyTorch operations."""
    pixels = torch.zeros(2, *image_shape, dtype=torch.uint8, device=next(classifier.parameters()).device)
    batch = ({0: torch.export.Dim("batch")},)
    with silence_converters(), ops.backend("reference"):
        return torch.export.export(classifier, (pixels,), dynamic_shapes=batch, strict=False)


def convert_model(classifier: nn.Module, config: Any, image_shape: tuple[int, int, int], runtime: str) -> EngineModel:
    """Convert a `Classifier` on the CPU for another runtime, which computes in the dtype of the weights."""
    program = trace_classifier(classifier, image_shape)
    if runtime == "openvino":
        precision = PRECISIONS[next(classifier.parameters()).dtype]
        return EngineModel(compile_openvino(build_openvino(program, image_shape), precision), config)
    with tempfile.TemporaryDirectory() as folder:
        build_onnx(program).save(path := Path(folder, "model.onnx"))
        return EngineModel(start_onnxruntime(path), config)


def build_openvino(program: torch.export.ExportedProgram, image_shape: tuple[int, int, int]) -> Any:
    """Convert a program to an OpenVINO model by its frontend: `openvino.convert_model` would report usage to Intel."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    with silence_converters():
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder.from_exported_program(program)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    model.reshape([-1, *image_shape])  # the frontend frees all dimensions, not the batch alone
    return model


def build_onnx(program: torch.export.ExportedProgram) -> Any:
    """Convert a program to an ONNX program, with `save` and the graph as `model`."""
    with silence_converters():
        return torch.onnx.export(
            program, (), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------------------------------


def compile_openvino(model: Any, precision: str) -> Compute:
    """Compile an OpenVINO model, or a file that it reads. The precision is explicit: its default may be bfloat16."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = str(choose_threads())
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda pixels: torch.from_numpy(request.infer([pixels.numpy()], share_inputs=True)[0])


def start_onnxruntime(path: Path) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = choose_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


def start_tensorrt(path: Path, num_labels: int) -> Compute:
    """Load a TensorRT engine. Never run so far: it needs a GPU."""
    import tensorrt

    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()

    def compute(pixels: Tensor) -> Tensor:
        logits = torch.empty(len(pixels), num_labels, device=pixels.device)
        context.set_input_shape(INPUT, tuple(pixels.shape))
        for name, tensor in ((INPUT, pixels), (OUTPUT, logits)):
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return logits

    return compute


def start_program(path: Path, device: torch.device) -> Compute:
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(torch.export.load(path), str(device)).module()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def get_default_device(exported: Path | None) -> str | None:
    """The device that computes an exported file, or None for a GPU if there is one."""
    return None if exported is None or exported.suffix == ".pt2" else "cuda" if exported.suffix == ".engine" else "cpu"


def load_exported(
    path: Path, runtime: str, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[EngineModel, Preprocessor]:
    """Load a file that `fastvit export` has written.

    Args:
        path: the file.
        runtime: one of `RUNTIMES`; auto: OpenVINO for an .onnx file where it is installed, else ONNX Runtime.
        device: that computes.
        dtype: of OpenVINO's computation; None: the file's.

    Raises:
        InputError: the file cannot be read, has no metadata, or does not fit the other arguments.
    """
    accepted = FILE_RUNTIMES[EXPORTED_SUFFIXES[path.suffix]]
    if runtime == "auto":
        runtime = next((name for name in accepted if find_spec(name)), accepted[0])
    if runtime not in accepted:
        hint = "; attention maps need a checkpoint" if runtime == "torch" else ""
        raise InputError(f"runtime: expected {' or '.join(accepted)} for {path}, got {runtime!r}{hint}")
    if reason := find_missing_reason(runtime):
        raise InputError(f"{path}: {reason}")
    if dtype is not None and runtime != "openvino":
        raise InputError(f"dtype: expected None for {path}, which has a dtype of its own, got {dtype}")
    if (expected := get_default_device(path)) not in (None, device.type):
        raise InputError(f"device: expected {expected} for {path}, got {device}")
    try:
        config, preprocessor, stored = parse_metadata(read_metadata(path, runtime), path)
        if runtime == "openvino":
            dtype = dtype or (torch.bfloat16 if stored == "bf16" else torch.float32)
            if reason := find_dtype_reason(runtime, dtype):
                raise InputError(f"{path}: {reason}")
            compute = compile_openvino(path, PRECISIONS[dtype])
        elif runtime == "onnxruntime":
            compute = start_onnxruntime(path)
        else:
            compute = start_program(path, device) if runtime == "torch" else start_tensorrt(path, config.num_labels)
    except InputError:
        raise
    except Exception as error:  # engines have no common class
        raise InputError(f"{path}: cannot be loaded ({format_error(error)})") from error
    checksum = 0
    for file in sorted(path.parent.glob(f"{path.stem}.*")):  # the weights may be in a file beside it
        checksum = zlib.crc32(file.read_bytes(), checksum)
    return EngineModel(compute, config, checksum), preprocessor


def read_metadata(path: Path, runtime: str) -> Mapping[str, str]:
    """Read the strings that `fastvit export` has written into a file."""
    if path.suffix == ".pt2":
        extra = {METADATA: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[METADATA] or "{}")
    if path.suffix == ".engine":
        return json.loads(path.with_suffix(f".{METADATA}").read_text(encoding="utf-8"))
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.get_modelmeta().custom_metadata_map
    import openvino

    model, section = openvino.Core().read_model(path), "framework" if path.suffix == ".onnx" else "fastvit"
    found = model.get_rt_info([section]).value if model.has_rt_info([section]) else {}
    return {name: str(getattr(value, "value", value)) for name, value in found.items()}


def parse_metadata(values: Mapping[str, str], path: Path) -> tuple[SimpleNamespace, Preprocessor, str]:
    """Parse and check the metadata of a file: config, preprocessing, dtype.

    Raises:
        InputError: something is missing or of the wrong type.
    """
    if "class_names" not in values:
        raise InputError(f"{path}: expected a file of `fastvit export`, found no class names in its metadata")
    try:
        names, problem_type, temperature, thresholds, dtype, settings = (json.loads(values[key]) for key in FIELDS)
        sizes = (settings["resize"], settings["crop"])
        for size in sizes:
            if size is not None:
                check_size("image_size", size, SIZE_LIMITS["image_size"], path)
        resize, crop = (tuple(size) if isinstance(size, list) else size for size in sizes)
        mean, std = (check_channels(key, settings[key], len(settings["mean"]), path) for key in ("mean", "std"))
        if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{path}: class_names: expected a list of names, got {format_value(names)}")
        config = SimpleNamespace(
            id2label=dict(enumerate(names)),
            num_labels=len(names),
            problem_type=problem_type,
            calibration_temperature=float(temperature),
            label_thresholds=thresholds,
        )
        return config, Preprocessor(resize, crop, int(settings["resample"]), mean, std), dtype
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: invalid metadata ({format_error(error)})") from error
