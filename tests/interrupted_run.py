"""A fine-tuning run in a process of its own that something happens to, for test_interruptions.py.

The processes are forked from a server that has imported everything and has trained once, so that one costs less than a
second. `fault` is a function of this module, called in the process before the run begins.
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

# 16 pictures to train on and 4 to look at, 2.5 epochs of 4 steps, a checkpoint every other step: after half an epoch,
# at its end, and at the end of all. Random numbers are drawn for crops and flips, and for dropout.
OPTIONS = ["--dataset", "generated", "--generated-images", "20", "--from-scratch", "micro", "--image-size", "16"]
OPTIONS += ["--patch-size", "8", "--precision", "fp32", "--cpu", "--learning-rate", "1e-3", "--hidden-dropout", "0.1"]
OPTIONS += ["--max-steps", "10", "--eval-steps", "2", "--batch-size", "4", "--logging-steps", "1"]


SERVER = "FASTVIT_TEST_SERVER"  # set where this module is imported by the server
exit_actions: list[Callable] = []  # done by a run that gets there


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
        """Its exit code; minus the signal's number where one killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.read_log()}"
        return self.process.exitcode

    def read_log(self) -> str:
        return (self.folder / "log").read_text()


def train(folder: str, options: list[str], fault: Callable | None, fault_args: tuple) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the workers that prepare batches, as in a run by itself
    os.chdir(folder)
    with open("log", "w") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if fault is not None:
        fault(*fault_args)
    code = main(options)
    for action in exit_actions:
        action()
    sys.exit(code)


def get_server() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from one that has imported this module, inside `start_server`."""
    return multiprocessing.get_context("forkserver")


@contextlib.contextmanager
def start_server() -> Iterator[None]:
    """Inside, processes are forked from one that has trained; other tests have a server of their own.

    One thread and no GPU: both would not survive a fork, and bits depend on the number of threads.
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
    """What a first run imports and allocates, done once for all that are forked from here."""
    tqdm.tqdm.monitor_interval = 0  # a thread
    # The usual lock is one of all forked processes, and one that is killed may hold it.
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
    gc.freeze()  # a collection of all that is imported is a quarter of such a run


# ---------------------------------------------------------------------------------------------------------------------
# What happens to it
# ---------------------------------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_change(number: int) -> None:
    """kill -9 before the `number`-th change of the file system: a file opened to write, renamed, removed, ...

    A run that gets to its end writes their number to `changes`; 0 counts only.
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
    exit_actions.append(lambda: Path("changes").write_text(str(changes)))


def kill_half_way_through(name: str, number: int) -> None:
    """kill -9 when half of the file `name` has been written, the `number`-th time."""
    times = 0

    def half_of(save):
        def write(content, path, *args, **kwargs):
            nonlocal times
            save(content, path, *args, **kwargs)
            if Path(path).name == name:
                times += 1
                if times == number:
                    os.truncate(path, Path(path).stat().st_size // 2)
                    kill()

        return write

    torch.save = half_of(torch.save)
    modeling_utils.safe_save_file = half_of(modeling_utils.safe_save_file)


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
    """kill -9 as soon as a checkpoint has been written."""
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
    """The process gets a signal `times` times after `step`, in FineTuner's training_step or prediction_step."""

    def send(trainer, *args):
        if trainer.state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    setattr(FineTuner, method, run_before(getattr(FineTuner, method), send))


def limit_file_size(size: int) -> None:
    """No file may grow beyond `size` bytes: its writer gets an error in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_memory(images: int, from_step: int = 0) -> None:
    """PyTorch's own error where a batch has more than `pictures`, from a step on."""

    def allocate(trainer, model, inputs, *args):
        if trainer.state.global_step >= from_step and len(inputs["labels"]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")

    FineTuner.training_step = run_before(FineTuner.training_step, allocate)


def send_signal_to_all_at(step: int) -> None:
    """The process and its workers get SIGTERM in the step after `step`."""
    os.setpgid(0, 0)

    def send(trainer, *args):
        if trainer.state.global_step == step:
            os.killpg(0, signal.SIGTERM)

    FineTuner.training_step = run_before(FineTuner.training_step, send)


def interrupt_with_limited_memory(images: int, step: int) -> None:
    limit_memory(images)
    send_signal_at(signal.SIGTERM, step, "training_step")


def limit_address_space(mebibytes: int) -> None:
    """While it trains the process may allocate that much more than it has when training begins.

    Not longer: a thread of Python that finds no memory for its first words leaves the one that starts it waiting.
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
    """The weights become NaN in the step after `step`, in which the process may also get a signal."""

    def spoil(trainer, model, *args):
        if trainer.state.global_step == step:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))
            if signum is not None:
                os.kill(os.getpid(), signum)

    FineTuner.training_step = run_before(FineTuner.training_step, spoil)


def drop_root_rights() -> None:
    """Without the rights of root, which no folder is read-only for."""
    if os.geteuid() == 0:
        os.setuid(65534)


if os.environ.pop(SERVER, None):
    warm_up()
