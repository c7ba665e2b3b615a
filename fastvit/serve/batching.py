"""Dynamic batching: calls of many threads are merged into batches for one thread that owns the model.

    caller 1: decode ─┐                     ┌─> results
    caller 2: decode ─┼─> waiting ─> batch ─┤
    caller 3: decode ─┘                     └─> results

While a batch is computed, incoming calls queue up and form the next one. So batches grow with the load without waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

CLOSED = "the predictor is closed"


class Request(NamedTuple):
    """The inputs of one call and the future of its results, one per input."""

    inputs: Sequence[Any]
    results: Future[list[Any]]


class Batch(NamedTuple):
    """Launched requests; `finish` waits for the results of all their inputs."""

    requests: list[Request]
    finish: Callable[[], Sequence[Any]]


class Batcher:
    """The request queue and its worker thread.

    Exceptions of `launch` are set on the futures of that batch's requests; the thread continues.

    Args:
        launch: accepts up to `max_batch` inputs, starts their computation and returns a function that waits for their
            results.
        max_batch: maximum number of inputs per batch.
        max_wait: seconds that a batch with room may wait for announced calls. Without announced calls it never waits.
        launch_ahead: launch the next batch before waiting for the previous one, for an asynchronous device.
    """

    def __init__(
        self,
        launch: Callable[[list[Any]], Callable[[], Sequence[Any]]],
        *,
        max_batch: int,
        max_wait: float = 0.0,
        launch_ahead: bool = False,
    ):
        self.launch, self.max_batch, self.max_wait, self.launch_ahead = launch, max_batch, max_wait, launch_ahead
        self._process = os.getpid()
        # A condition's lock is reentrant, as needed: the garbage collector may call `close` in any thread at any time.
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._announced = 0
        self._closed = False
        # A daemon thread, so that a program that does not call `close` can exit.
        self._thread = threading.Thread(target=self._run, name="fastvit-predictor", daemon=True)
        self._thread.start()

    def check_open(self) -> None:
        """Raise RuntimeError if the batcher is closed, or in a forked process, which does not have its thread."""
        if os.getpid() != self._process:
            raise RuntimeError("a predictor cannot be used in a forked process: create it after the fork")
        if self._closed:
            raise RuntimeError(CLOSED)

    @property
    def is_alive(self) -> bool:
        """Whether calls will be computed: the batcher is open, and its thread has not died."""
        return not self._closed and self._thread.is_alive()

    def announce(self) -> None:
        """Announce a call whose inputs are being prepared. `submit` or `withdraw` must follow."""
        self.check_open()
        with self._changed:
            self._announced += 1

    def withdraw(self) -> None:
        """Withdraw an announced call."""
        with self._changed:
            self._announced -= 1
            self._changed.notify()

    def submit(self, inputs: Sequence[Any]) -> Future[list[Any]]:
        """Queue an announced call.

        Args:
            inputs: at most `max_batch` inputs, which are computed in one batch.

        Returns:
            A future of the list of results.

        Raises:
            RuntimeError: the batcher is closed or belongs to another process.
        """
        request = Request(inputs, Future())
        with self._changed:
            self._announced -= 1
            self.check_open()
            if inputs:
                self._waiting.append(request)
            self._changed.notify()
        if not inputs:
            request.results.set_result([])
        return request.results

    def close(self) -> None:
        """Finish the launched batch, fail queued requests with RuntimeError, and end the thread. Idempotent."""
        if os.getpid() != self._process:  # a forked process has no such thread, and its copy of the lock may be held
            return
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for request in waiting:
            request.results.set_exception(RuntimeError(CLOSED))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        computing: Batch | None = None
        while True:
            requests = self._collect_requests(block=computing is None)
            if computing is None and not requests:
                return
            launched = self._launch(requests) if requests else None
            if computing is not None:
                deliver_results(computing)
            computing = launched
            del requests, launched  # free delivered inputs before the next wait
            if computing is not None and not self.launch_ahead:
                deliver_results(computing)
                computing = None

    def _collect_requests(self, block: bool) -> list[Request]:
        """Collect the requests of one batch; none after `close`, or if the queue is empty and `block` is false."""
        with self._changed:
            while block and not (self._waiting or self._closed):
                self._changed.wait()
            requests: list[Request] = []
            count, deadline = 0, time.monotonic() + self.max_wait
            while True:
                while self._waiting and count + len(self._waiting[0].inputs) <= self.max_batch:
                    requests.append(self._waiting.popleft())
                    count += len(requests[-1].inputs)
                left = deadline - time.monotonic()
                full = bool(self._waiting) or count == self.max_batch
                if not requests or full or not self._announced or left <= 0 or self._closed:
                    return requests
                self._changed.wait(left)

    def _launch(self, requests: list[Request]) -> Batch | None:
        try:
            return Batch(requests, self.launch([each for request in requests for each in request.inputs]))
        except BaseException as error:
            fail_requests(requests, error)
            return None


def deliver_results(batch: Batch) -> None:
    """Wait for the results of a batch and set them on the futures of its requests."""
    try:
        results = batch.finish()
    except BaseException as error:
        fail_requests(batch.requests, error)
        return
    start = 0
    for request in batch.requests:
        request.results.set_result(list(results[start : start + len(request.inputs)]))
        start += len(request.inputs)


def fail_requests(requests: list[Request], error: BaseException) -> None:
    for request in requests:
        request.results.set_exception(error)
