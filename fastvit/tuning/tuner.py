"""Measure the fastest candidate for each operation of a model: collect its calls, compile, check, time and record."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastvit import ops
from fastvit.errors import InputError
from fastvit.ops import records
from fastvit.ops.records import OURS, PYTORCH, Record, Timing
from fastvit.tuning.compiling import compile_ahead
from fastvit.tuning.trials import Call, Trial, list_candidates, record_tiles

Timer = Callable[[Trial], float]

logger = logging.getLogger("fastvit")

COMPILE_TIME_SHARE = 0.6  # the share of the time limit for compiling in parallel
ROUNDS = (5, 30)  # minimum and maximum; each candidate is timed once per round
TIMING_SECONDS = 0.5  # per operation; no further rounds after it, once the minimum is reached
MAX_ERROR_RATIO = 2.0  # largest allowed error of a candidate relative to that of PyTorch's default
MIN_ALLOWED_ERROR = 1e-5  # always allowed: float32 sums over many rows in another order


def tune(
    model: nn.Module,
    *,
    batch_size: int,
    image_size: int | tuple[int, int] | None = None,
    training: bool = False,
    dtype: torch.dtype | None = None,
    time_limit: float = 60.0,
    timer: Timer | None = None,
    progress: bool = True,
    keep: bool = False,
) -> list[Record]:
    """Measure the fastest candidate for each operation of `model`, save the records, and use them in this process.

    Compiled models keep the choices made when they were traced: tune first, then compile. The model's weights and mode
    and the random number generators are restored afterwards. Like `fastvit.backend` it affects the whole process: no
    other thread may run a model meanwhile.

    Args:
        model: on the GPU to be measured.
        batch_size: images per batch.
        image_size: height and width in pixels; the model's own if None.
        training: measure forward and backward together, in training mode, instead of forward alone.
        dtype: run under autocast to this dtype, as `fastvit finetune` does; without autocast if None.
        time_limit: seconds for compiling and timing; operations not reached in time have no record.
        timer: returns the milliseconds of one call of a `Trial`; CUDA events if None. With a timer, kernels interpreted
            on a CPU can be tuned as well, for tests.
        progress: show a progress bar.
        keep: skip calls that already have a record.

    Returns:
        The new records, one for each operation and shape.

    Raises:
        InputError: if the model is not on a GPU, or the sizes do not fit it.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" and timer is None:
        raise InputError(f"tuning: expected a model on a GPU, got one on {device}: kernels are timed on GPUs only")
    deadline = time.monotonic() + time_limit
    with measurement_mode(model, device, training):
        calls = collect_calls(model, batch_size, image_size, training, dtype)
        calls = [call for call in calls if can_run(call, device) and not (keep and has_record(call, device))]
        jobs = [(call, name) for call in calls for name in list_candidates(call.case) if name.startswith(OURS)]
        broken: dict[tuple, str] = {}
        if device.type == "cuda" and jobs:
            found = compile_ahead(jobs, device, COMPILE_TIME_SHARE * time_limit)
            broken = {(jobs[index][0].case, jobs[index][1]): error for index, error in found.items()}
        made = measure_all(calls, device, timer or CudaTimer(device), broken, deadline, progress)
    records.add_to_cache(made)
    records.adopt(made)
    return made


def can_run(call: Call, device: torch.device) -> bool:
    dtype = getattr(torch, call.case.dtype)
    return ops.kernel_unavailable_reason(call.case.operation, device.type, device.index, dtype) is None


def has_record(call: Call, device: torch.device) -> bool:
    name = records.get_gpu_name(device.type, device.index)
    return records.find(call.case, name, ops.KERNEL_MODULES[call.case.operation]) is not None


@contextlib.contextmanager
def measurement_mode(model: nn.Module, device: torch.device, training: bool) -> Iterator[None]:
    """Context manager that sets the model's mode and makes failing kernels errors; restores everything afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = [device] if device.type == "cuda" else []
    on_device = torch.cuda.device(device) if gpus else contextlib.nullcontext()
    with torch.random.fork_rng(gpus), ops.backend("triton"), on_device:
        model.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


# ---------------------------------------------------------------------------------------------------------------------
# Collecting a model's calls
# ---------------------------------------------------------------------------------------------------------------------


def collect_calls(
    model: nn.Module, batch_size: int, image_size: int | tuple[int, int] | None, training: bool, dtype: Any
) -> list[Call]:
    """The calls of one forward, one for each case; PyTorch computes them."""
    found: dict[Any, Call] = {}

    def add(case: Any, args: tuple, kwargs: dict) -> None:
        if case not in found:
            found[case] = Call.from_arguments(case, args, kwargs)

    eager: Any = getattr(model, "_orig_mod", model)  # a compiled model would not dispatch again
    eager = eager.get_base_model() if hasattr(eager, "get_base_model") else eager  # a peft model
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
    with ops.intercept_calls(add), torch.set_grad_enabled(training), autocast:
        for pixels, options in make_pixels(eager, batch_size, image_size):
            eager(pixels, **options)
    return list(found.values())


def make_pixels(model: Any, batch_size: int, image_size: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Images in the formats that the model accepts; ours also accepts uint8, as used by `finetune` and `Predictor`."""
    from fastvit.checkpoints.configuration import make_pair
    from fastvit.models.backbone import get_vision_config
    from fastvit.models.pretrained import ViTPreTrainedModel

    config = get_vision_config(getattr(model, "config", None))
    native_size = (
        getattr(config, "image_size", None) or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[1:]
    )
    height, width = make_pair(image_size or native_size)
    channels = getattr(config, "num_channels", 3)
    first = next(model.parameters())
    options = {}
    if isinstance(model, ViTPreTrainedModel):
        options = {"interpolate_pos_encoding": True} if (height, width) != make_pair(native_size) else {}
        yield torch.zeros(batch_size, height, width, channels, dtype=torch.uint8, device=first.device), options
    yield torch.zeros(batch_size, channels, height, width, dtype=first.dtype, device=first.device), options


# ---------------------------------------------------------------------------------------------------------------------
# Measuring an operation
# ---------------------------------------------------------------------------------------------------------------------


def measure_all(
    calls: list[Call], device: torch.device, timer: Timer, broken: dict[tuple, str], deadline: float, progress: bool
) -> list[Record]:
    """The records of as many calls as the deadline allows."""
    made = []
    bar = tqdm(calls, desc="tuning", unit="operation", disable=not progress, leave=False)
    for number, call in enumerate(bar):
        bar.set_postfix_str(call.case.operation)
        try:
            record = measure(call, device, timer, broken, deadline)
        except TimeoutError:
            logger.warning("tuning: the time is up; %d operations have no record", len(calls) - number)
            break
        if record is not None:
            made.append(record)
    return made


def measure(call: Call, device: torch.device, timer: Timer, broken: dict[tuple, str], deadline: float) -> Record | None:
    """Check and time every candidate of a call; None if PyTorch itself cannot compute it.

    Raises TimeoutError at the deadline, unless all candidates have been checked: timing them takes about a second.
    """
    try:
        inputs = call.make_inputs(device)
        exact = call.compute_reference(inputs)
        pytorch_errors = compute_errors(Trial(call.case, PYTORCH, inputs)(), exact)
    except Exception as error:
        logger.warning(
            "tuning: %s has no record: PyTorch cannot compute it (%s)", call.case.operation, format_error(error)
        )
        return None
    timings: dict[str, Timing] = {}
    valid_trials, tiles_seen = [], []
    for name in list_candidates(call.case):
        if time.monotonic() > deadline:
            raise TimeoutError
        trial = Trial(call.case, name, inputs)
        reason = broken.get((call.case, name))
        if reason is None:
            with record_tiles() as tiles:
                reason = find_rejection_reason(trial, exact, pytorch_errors)
            if tiles and tiles in tiles_seen:
                continue  # the table has no further tile
            tiles_seen.append(tiles)
        if reason is None:
            valid_trials.append(trial)
        timings[name] = Timing(name, None, reason)
    del exact
    timings |= time_trials(valid_trials, timer)
    winner = records.choose_winner(timings.values())
    if winner is None:
        return None
    gpu = records.get_gpu_name(device.type, device.index)
    source = records.hash_kernel(ops.KERNEL_MODULES[call.case.operation])
    return Record(*call.case, gpu, *records.get_versions(), source, tuple(timings.values()), winner)


def find_rejection_reason(trial: Trial, exact: list[Tensor], pytorch_errors: list[float]) -> str | None:
    """Why a candidate is rejected, or None: it raises, or its error against the float32 definition is too large."""
    try:
        results = trial()
        errors = compute_errors(results, exact)
    except Exception as error:  # of any kind: Triton's, the driver's, out of memory
        return format_error(error)
    for index, (result, own, pytorch) in enumerate(zip(results, errors, pytorch_errors, strict=True)):
        allowed = max(MAX_ERROR_RATIO * pytorch, torch.finfo(result.dtype).eps / 4, MIN_ALLOWED_ERROR)
        if not own <= allowed:  # also where it is NaN
            return f"wrong: result {index} has a relative error of {own:.2g}, {allowed:.2g} is allowed"
    return None


def compute_errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The relative error (Euclidean norm) against the definition for each output and gradient."""
    pairs = zip(results, exact, strict=True)
    norms = [(torch.dist(result.to(right.dtype), right), right.norm()) for result, right in pairs]
    return [float(distance / length) if length > 0 else float(distance) for distance, length in norms]


def time_trials(trials: list[Trial], timer: Timer) -> dict[str, Timing]:
    """Median times over rounds in which each trial runs once, so that a slowdown of the GPU affects all alike. A trial
    that raises is excluded, with the reason."""
    samples: dict[str, list[float]] = {trial.candidate: [] for trial in trials}
    reasons: dict[str, str] = {}
    begin = time.monotonic()
    for number in range(ROUNDS[1]):
        if number > ROUNDS[0] and time.monotonic() - begin > TIMING_SECONDS:
            break
        for trial in trials:
            if trial.candidate in reasons:
                continue
            try:
                samples[trial.candidate].append(timer(trial))
            except Exception as error:
                reasons[trial.candidate] = format_error(error)
    return {
        name: Timing(name, None, reasons[name])
        if name in reasons
        else Timing(name, statistics.median(times[1:]))  # the first round warms up
        for name, times in samples.items()
    }


def format_error(error: Exception) -> str:
    """One line for an exception: its type and message, or those of its first cause."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0][:200]}" if text else type(cause).__name__


class CudaTimer:
    """GPU milliseconds of one trial, with a cold cache.

    Memory is overwritten until the launches are queued, so that their time on the host is not counted: in a model it is
    hidden behind the previous operation.
    """

    def __init__(self, device: torch.device):
        self.cache = torch.empty(2**28, dtype=torch.int8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, trial: Trial) -> float:
        for _ in range(8):
            self.cache.zero_()
        self.begin.record()
        trial()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end)
