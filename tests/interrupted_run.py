"""Fine-tuning runs in processes of their own, with injected faults, for test_interruptions.py.

The processes are forked from a server that has imported everything and trained once, so that a run costs less than a
second. A fault is a function of this module, called in the process before the run begins.
"""

import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import torch
import tqdm
from transformers import modeling_utils

from fastvit.train.finetune import main
from fastvit.train.training import FineTuner

# 16 training and 4 validation images, 2.5 epochs of 4 steps, and a checkpoint every other step: after half an epoch, at
# its end, and at the end of the run. Crops, flips and dropout draw random numbers.
OPTIONS = ["--dataset", "generated", "--generated-images", "20", "--from-scratch", "micro", "--image-size", "16"]
OPTIONS += ["--patch-size", "8", "--precision", "fp32", "--cpu", "--learning-rate", "1e-3", "--hidden-dropout", "0.1"]
OPTIONS += ["--max-steps", "10", "--eval-steps", "2", "--batch-size", "4", "--logging-steps", "1"]


SERVER = "FASTVIT_TEST_SERVER"  # set while the server imports this module
at_the_end: list[Callable] = []  # called at the end of a finished run


class Run:
    """`fastvit finetune` with OPTIONS and `options`, or with `only`, in `folder`; its output is in `folder`/log."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        only: list[str] | None = None,
        fault: Callable | None = None,
        fault_args: tuple = (),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "log").touch()
        self.folder = folder
        self.options = only or [*OPTIONS, "--output-dir", "out", *options]
        self.process = get_server().Process(target=train, args=(str(folder), self.options, fault, fault_args))
        self.process.start()

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end; returns the exit code, or minus the number of the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.read_log()}"
        return self.process.exitcode

    def read_log(self) -> str:
        return (self.folder / "log").read_text()


def train(folder: str, options: list[str], fault: Callable | None, fault_args: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for the workers that prepare batches, as in an ordinary run
    os.chdir(folder)
    with open("log", "w") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if fault is not None:
        fault(*fault_args)
    code = main(options)
    for action in at_the_end:
        action()
    sys.exit(code)


def get_server() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from the server, inside `start_server`."""
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def start_server() -> Iterator[None]:
    """Context in which processes are forked from a server that has trained; other tests have another server.

    It has one thread and no GPU: neither survives a fork, and the bits depend on the number of threads.
    """
    settings = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        SERVER: "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    before = {name: os.environ.get(name) for name in settings}
    usual = forkserver._forkserver._preload_modules
    forkserver._forkserver._stop()
    os.environ |= settings
    try:
        forkserver.set_forkserver_preload([__name__, "pytest"])
        with tempfile.TemporaryDirectory() as folder:
            Run(Path(folder), "--help").wait()  # starts the server
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    try:
        yield
    finally:
        forkserver._forkserver._stop()
        forkserver.set_forkserver_preload(usual)


def warm_up() -> None:
    """Import and allocate everything that a first run needs, once for all processes forked from here."""
    tqdm.tqdm.monitor_interval = 0  # a thread
    # The default lock is shared by all forked processes, and a killed one may hold it.
    tqdm.tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        process = os.getcwd(), os.dup(1), os.dup(2)  # noqa: PTH109
        try:
            with open(os.devnull, "w") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            os.chdir(folder)
            assert main([*OPTIONS, "--max-steps", "2"]) == 0
        finally:
            os.chdir(process[0])
            os.dup2(process[1], 1)
            os.dup2(process[2], 2)
    gc.freeze()  # collecting all imported objects takes a quarter of such a run


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_change(number: int) -> None:
    """kill -9 before the `number`-th change of the file system: a file opened to write, renamed, removed, ...

    A finished run writes their number to `changes`. With 0 they are only counted.
    """
    changes = 0

    def hook(event, arguments):
        nonlocal changes
        if event == "open":
            _, mode, flags = arguments
            counts = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set(mode) & set("wax+")
        else:
            counts = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if counts:
            changes += 1
            if changes == number:
                kill()

    sys.addaudithook(hook)
    at_the_end.append(lambda: Path("changes").write_text(str(changes)))


def kill_half_way_through(name: str, number: int) -> None:
    """kill -9 when half of the file `name` has been written for the `number`-th time."""
    times = 0

    def truncate_after(save):
        def write(content, path, *args, **kwargs):
            nonlocal times
            save(content, path, *args, **kwargs)
            if Path(path).name == name:
                times += 1
                if times == number:
                    os.truncate(path, Path(path).stat().st_size // 2)
                    kill()

        return write

    torch.save = truncate_after(torch.save)
    modeling_utils.safe_save_file = truncate_after(modeling_utils.safe_save_file)


def kill_during_deletion() -> None:
    """kill -9 when some of the files of an old checkpoint have been deleted."""
    delete = shutil.rmtree

    def rmtree(path, **kwargs):
        if any(Path(path).glob("*")) and "checkpoint-" in Path(path).name:
            for file in sorted(Path(path).iterdir())[:3]:
                file.unlink()
            kill()
        delete(path, **kwargs)

    shutil.rmtree = rmtree


def kill_after_checkpoint() -> None:
    """kill -9 after the first checkpoint."""
    FineTuner._save_checkpoint = run_after(FineTuner._save_checkpoint, lambda trainer, *args: kill())


def kill_before_results() -> None:
    """kill -9 when training is over."""
    FineTuner.save_state = run_before(FineTuner.save_state, lambda trainer: kill())


def run_before(method: Callable, action: Callable) -> Callable:
    def both(self, *args, **kwargs):
        action(self, *args)
        return method(self, *args, **kwargs)

    return both


def run_after(method: Callable, action: Callable) -> Callable:
    def both(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        action(self, *args)
        return result

    return both


def send_signal_at(signum: int, step: int, method: str, times: int = 1) -> None:
    """Send the process a signal `times` times after `step`, in FineTuner's training_step or prediction_step."""

    def send(trainer, *args):
        if trainer.state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    setattr(FineTuner, method, run_before(getattr(FineTuner, method), send))


def limit_file_size(size: int) -> None:
    """Limit files to `size` bytes: a larger write fails in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_memory(images: int, from_step: int = 0) -> None:
    """Raise PyTorch's out of memory error for batches of more than `images`, from a step on."""

    def allocate(trainer, model, inputs, *args):
        if trainer.state.global_step >= from_step and len(inputs["labels"]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")

    FineTuner.training_step = run_before(FineTuner.training_step, allocate)


def send_signal_to_all_at(step: int) -> None:
    """Send SIGTERM to the process and its workers in the step after `step`."""
    os.setpgid(0, 0)

    def send(trainer, *args):
        if trainer.state.global_step == step:
            os.killpg(0, signal.SIGTERM)

    FineTuner.training_step = run_before(FineTuner.training_step, send)


def interrupt_with_limited_memory(images: int, step: int) -> None:
    limit_memory(images)
    send_signal_at(signal.SIGTERM, step, "training_step")


def limit_address_space(mebibytes: int) -> None:
    """Limit the memory that the process may allocate during training, in addition to that at its start.

    Only during training: a Python thread that cannot allocate memory at its start blocks the thread that starts it.
    """
    train = FineTuner.train

    def limited(*args, **kwargs):
        now = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + mebibytes * 2**20, resource.RLIM_INFINITY))
        try:
            return train(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    FineTuner.train = limited


def inject_nan_at(step: int, signum: int | None = None) -> None:
    """Set weights to NaN in the step after `step`, and optionally send the process a signal in it."""

    def spoil(trainer, model, *args):
        if trainer.state.global_step == step:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))
            if signum is not None:
                os.kill(os.getpid(), signum)

    FineTuner.training_step = run_before(FineTuner.training_step, spoil)


def drop_root_rights() -> None:
    """Drop the privileges of root, to which no folder is read-only."""
    if os.geteuid() == 0:
        os.setuid(65534)


if os.environ.pop(SERVER, None):
    warm_up()
