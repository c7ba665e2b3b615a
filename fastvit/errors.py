"""Errors caused by user input (files, options, checkpoints), their display, out-of-memory detection and signals."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """An input cannot be used. The message names the input, the expected value and the actual value.

    The command line prints the message on one line and exits with code 2. In library use it is an ordinary exception.
    In distributed training all processes raise it and local rank 0 prints it.
    """


class ProcessError(InputError):
    """An input error of a single process in distributed training. That process prints it, whatever its rank."""


class Stopped(KeyboardInterrupt):
    """Raised for a clean stop after a signal. The command line exits with 128 + the signal number, as shells do."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# oneDNN passes no status code to Python, only these messages. They are raised for supported operations, where memory is
# the remaining cause of failure. For unsupported operations the message is longer ("could not create a primitive
# descriptor for ..."), so these are compared for equality.
ONEDNN_OUT_OF_MEMORY = (
    "could not create a primitive",
    "could not create a memory",
    "could not create a memory object",
    "could not execute a primitive",
)
OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "std::bad_alloc",
    "_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",  # raised when no memory is left for cuDNN's workspace
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that device or host memory ran out. PyTorch has a class for few of these cases."""
    import torch  # not at the top: commands that need no PyTorch would wait for its import

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text in ONEDNN_OUT_OF_MEMORY or any(part in text for part in OUT_OF_MEMORY)
    )


def escape_unprintable(text: str) -> str:
    """Escape all characters that would move a terminal's cursor or cannot be encoded. The result is one line.

    File and class names are untrusted: they may contain line breaks, control sequences and undecodable bytes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def report_errors(command: Callable[[], object]) -> int:
    """Run a command, print its input error on one line, and convert the outcome to an exit code.

    In distributed training local rank 0 of each machine prints the error, and every process that raised `ProcessError`.

    Args:
        command: called without arguments.

    Returns:
        The integer that `command` returns, or 0. Input errors: 2. Ctrl-C: 130. SIGTERM: 143. Closed pipe: 141.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file and class names may have characters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command()
    except InputError as error:
        if isinstance(error, ProcessError) and "RANK" in os.environ:
            print(f"error: process {os.environ['RANK']}: {escape_unprintable(str(error))}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {escape_unprintable(str(error))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe; Python's flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0
