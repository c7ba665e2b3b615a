"""The error for what a user gave (a file, an option, a checkpoint), how to show it, memory, and the end by a signal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what was expected and what was found.

    The command line prints the message on one line and exits with code 2; as a library it is an ordinary exception.
    Where several processes train one model, all run into it, and the first one says so.
    """


class ProcessError(InputError):
    """What one of several processes ran into alone, so that it must say so itself."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; the command line exits with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# Of the texts of oneDNN, those of an operation that it has found possible: what is left to fail is its memory. Where it
# supports no such operation the texts go on ("could not create a primitive descriptor for ..."). Python gets no status.
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
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",  # what cuDNN says where it finds no room to work in
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, did not suffice; for most of it PyTorch has no class of its own."""
    import torch  # whoever has such an error has it loaded; the command line waits for it where it does not need it

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        text in ONEDNN_OUT_OF_MEMORY or any(part in text for part in OUT_OF_MEMORY)
    )


def escape_unprintable(text: str) -> str:
    """Text on one line that a terminal only shows: what would move the cursor or cannot be encoded is escaped.

    File and class names come from anywhere: they may hold line ends, control sequences and bytes that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def report_errors(command: Callable[[], object]) -> int:
    """Run `command` and return the exit code: the integer that it returns, or 0.

    What the user gave wrongly is one line and exit code 2, Ctrl-C is exit code 130, SIGTERM 143. Of several processes
    that train one model the first one of each machine speaks, and any that had an error of its own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may hold what it cannot encode
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
    except BrokenPipeError:  # the reader, such as `head`, has closed: what Python flushes at its end must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code if isinstance(code, int) else 0
