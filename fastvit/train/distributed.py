"""Several processes that train one model (`torchrun`, `accelerate launch`): what Trainer and accelerate leave open.

They split the pictures, add up the gradients and shard the model. Here are the start, an agreement to stop, whose run a
folder holds after torchrun has started everything again, and the message when a process is lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from fastvit.errors import ProcessError

# For as long the other processes wait while the first one decodes all pictures. That a process was lost does not take
# as long to notice: torchrun watches them.
WAIT = timedelta(hours=3)
MARKER = ".launch"  # in the folder of an unfinished run: the launch that writes it


@contextlib.contextmanager
def join_processes(cpu: bool) -> Iterator[PartialState]:
    """Join the other processes, if there are any: NCCL between GPUs, Gloo between CPUs. Only the first one prints.

    All have read their options when this begins, so that what the first one writes next surprises none.
    """
    cpu = cpu or not torch.cuda.is_available()
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        # torchrun keeps its store when it starts again; the addresses of processes that are gone must not be found.
        store, rank, world_size = next(dist.rendezvous("env://", timeout=WAIT))
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "gloo" if cpu else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=WAIT)
    state = PartialState(cpu=cpu)
    with contextlib.ExitStack() as stack:
        if not state.is_main_process:
            transformers.utils.logging.set_verbosity_error()
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield state
    state.destroy_process_group()


def on_any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; all must ask at the same point. Goes by the CPU: no GPU is waited for."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags)
    return bool(flags)


def launch_id() -> str | None:
    """Names the launch that this process belongs to, the same after torchrun has started it again; None without one."""
    if "LOCAL_RANK" not in os.environ:
        return None
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run_id != "none":  # given as --rdzv-id, or made up by --standalone
        return run_id
    launcher = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {launcher.pid} {launcher.create_time()}"


def is_own_run(folder: Path) -> bool:
    """Whether `folder` holds what an earlier start of this very launch has begun."""
    with contextlib.suppress(OSError):
        return (folder / MARKER).read_text() == launch_id()
    return False


@contextlib.contextmanager
def explain_lost_process(output_dir: Path) -> Iterator[None]:
    """Turn the errors of a connection whose other end is gone into one line that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not (isinstance(error, dist.DistError) or "gloo" in reason):
            raise
        last = get_last_checkpoint(output_dir)
        raise ProcessError(
            f"training: the connection to another process was lost; the last checkpoint is {last or 'none'}; go on with"
            f" the same command and --resume ({reason[:200]})"
        ) from None
