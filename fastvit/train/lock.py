"""The lock of a run's folder: one run at a time writes there.

The lock is a file that names its process. It is created with O_EXCL, which is atomic on shared file systems too (NFS
since version 3); locks of the operating system do not reach other machines on all of them. A lock whose process has
ended is taken over: at once on the same machine, where the process can be looked up, and after `EXPIRY` seconds without
a sign of life on another one. `filelock.SoftFileLock` is similar, but older versions, which the hub's libraries accept,
never take over a lock, and no version has the time for the message or knows the processes that torchrun restarts.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback

from fastvit.errors import InputError
from fastvit.files import wrap_write_errors
from fastvit.report import run_log
from fastvit.train.distributed import get_launch_id

LOCK_FILE = "_lock"  # `Trainer.push_to_hub` leaves out names that begin with an underscore
BEAT = 30.0  # seconds between two signs of life, the modification times of the lock
EXPIRY = 600.0  # seconds without a sign of life after which a process on another machine counts as dead
UNREADABLE = 2.0  # seconds after which a lock without content counts as that of a process killed while it wrote it


class FolderLock:
    """The lock of one folder, as a context; the folder is created where it is missing, and removed if it stays empty.

    Attributes:
        is_lost: another process has taken the lock over, because this one was suspended for too long.

    Raises:
        InputError: another process has the lock, or that of the parent folder or of a sub-folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LOCK_FILE
        self.is_lost = False
        self.released = threading.Event()
        self.content = json.dumps(
            {**identify_process(), "launch": get_launch_id(), "since": time.time(), "number": os.urandom(4).hex()}
        ).encode()

    def __enter__(self) -> FolderLock:
        parents = [self.folder, *self.folder.parents]
        self.created = [folder for folder in parents if not folder.exists()]
        with wrap_write_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                acquire(self.path, self.content)
            except BaseException:
                self.remove_created()
                raise
        try:
            for related in (self.folder.absolute().parent / LOCK_FILE, *self.folder.glob(f"*/{LOCK_FILE}")):
                if (found := read_lock(related)) is not None and not is_own_process(found):
                    check_is_stale(related, found)
        except BaseException:
            self.remove()
            raise
        self.thread = threading.Thread(target=self.send_signs_of_life, name="fastvit-lock", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.released.set()
        self.thread.join()
        self.remove()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if read_lock(self.path) == self.content:
                self.path.unlink()
        self.remove_created()

    def remove_created(self) -> None:
        for folder in self.created:
            with contextlib.suppress(OSError):  # it has files
                folder.rmdir()

    def send_signs_of_life(self) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):  # the file server may be away
                found = read_lock(self.path)
                if found is None:
                    create(self.path, self.content)
                elif found == self.content:
                    os.utime(self.path)
                else:
                    self.is_lost = True
                    return


class StopOnLostLock(TrainerCallback):
    """Stops a run before it writes to a folder that another process has taken over."""

    def __init__(self, lock: FolderLock | None):
        self.lock = lock

    def on_step_end(self, args, state, control, **kwargs):
        if self.lock is not None and self.lock.is_lost:
            raise InputError(
                f"training: another process has taken over {self.lock.folder}: this one gave no sign of life for more"
                f" than {EXPIRY / 60:.0f} minutes"
            )


@contextlib.contextmanager
def lock_for_all(folder: Path, processes: PartialState) -> Iterator[FolderLock | None]:
    """The lock of a run of one or several processes: the first one has it, and all raise its error.

    torchrun's restarts take over the lock of the process that they replace.
    """
    with contextlib.ExitStack() as stack:
        lock, error = None, None
        if processes.is_main_process:
            try:
                lock = stack.enter_context(FolderLock(folder))
            except InputError as found:
                error = found
        if dist.is_initialized():
            errors = [error]
            dist.broadcast_object_list(errors, src=0, device=torch.device("cpu"))
            error = errors[0]
        if error is not None:
            raise error
        yield lock


def acquire(path: Path, content: bytes) -> None:
    """Create a lock, or take it over from a process that has ended.

    Of several processes that find the same stale lock, one creates the claim to it, a lock whose name has the stale
    content's hash, and may replace the lock as long as it has that content.

    Raises:
        InputError: another process has the lock.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            create(path, content)
            return
        found = read_lock(path)
        if found is None:  # it was released meanwhile
            continue
        check_is_stale(path, found)
        claim = path.with_name(f"{path.name}.{hashlib.sha256(found).hexdigest()[:16]}")
        acquire(claim, content)
        if read_lock(path) == found:
            claim.replace(path)
            return
        claim.unlink()


def create(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def read_lock(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_is_stale(path: Path, found: bytes) -> None:
    """Check that the process of a lock has ended.

    Args:
        found: content of the lock.

    Raises:
        InputError: the process runs, or may run on another machine.
    """
    try:
        holder = json.loads(found)
        host, pid = holder["host"], holder["pid"]
        since = datetime.datetime.fromtimestamp(holder["since"]).strftime("%Y-%m-%d %H:%M:%S")
        alive = is_alive(holder)
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        end = time.monotonic() + UNREADABLE
        while time.monotonic() < end and read_lock(path) == found:
            time.sleep(0.05)
        return
    message = f"--output-dir: {path.parent} is in use by another run: process {pid} on {host}, since {since}"
    if alive:
        raise InputError(f"{message}; wait for its end, or give another folder")
    if alive is None and (holder["launch"] is None or holder["launch"] != get_launch_id()):
        with contextlib.suppress(FileNotFoundError):
            silence = read_time(path.parent) - path.stat().st_mtime
            if silence < EXPIRY:
                raise InputError(
                    f"{message} (last sign of life {max(0.0, silence):.0f} s ago); if that process is dead, delete"
                    f" {path}, or wait: the lock expires after {EXPIRY / 60:.0f} minutes without a sign of life"
                )


def read_time(folder: Path) -> float:
    """The time on the clock of the machine that has the folder's files, which may differ from that of this machine."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def identify_process() -> dict[str, Any]:
    """The host, number and start of this process; the start also since the machine's own, whatever its clock does.

    Containers can have the name of their host, and processes of their own with the same numbers.
    """
    identity = run_log.identify_process()
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return {**identity, "namespace": namespace, "uptime": round(identity["started"] - psutil.boot_time(), 2)}


def is_own_process(found: bytes) -> bool:
    own = identify_process()
    with contextlib.suppress(ValueError, AttributeError):
        holder = json.loads(found)
        return all(holder.get(name) == own[name] for name in ("host", "namespace", "pid"))
    return False


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the process of a lock runs; None on another machine, or in another container."""
    own = identify_process()
    if (holder["host"], holder["namespace"]) != (own["host"], own["namespace"]):
        return None
    try:
        process = psutil.Process(holder["pid"])
        started = process.create_time()
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.ZombieProcess:
        return False
    except psutil.Error:
        return psutil.pid_exists(holder["pid"])
    uptime = started - psutil.boot_time()
    return abs(started - holder["started"]) < 1 or abs(uptime - holder["uptime"]) < 0.05
