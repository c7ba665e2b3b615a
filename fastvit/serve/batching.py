"""Calls of many threads, merged into batches for the one thread that owns the model.

    caller 1: decode ─┐                     ┌─> results
    caller 2: decode ─┼─> waiting ─> batch ─┤
    caller 3: decode ─┘                     └─> results

While one batch is computed the next one gathers: the more callers there are, the larger batches become, without a wait.
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
    """Inputs of one call, and its results, one for each input, once they are there."""

    inputs: Sequence[Any]
    results: Future[list[Any]]


class Batch(NamedTuple):
    """Requests that are being computed; finish waits for all their results."""

    requests: list[Request]
    finish: Callable[[], Sequence[Any]]


class Batcher:
    """The queue and its thread.

    launch: takes up to `max_batch` inputs, begins to compute them and returns a function that waits for their results.
    max_wait: seconds that a batch with room may wait for calls that have been announced; a lone one never waits.
    launch_ahead: launch the next batch before waiting for the last, for a device that computes while the host goes on.

    What `launch` raises goes to the callers whose inputs were in that batch; the thread goes on.
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
        # Its lock is reentrant: the garbage collector may call `close` in any thread, at any time.
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._announced = 0
        self._closed = False
        # A daemon, so that no program hangs that forgets to close it.
        self._thread = threading.Thread(target=self._run, name="fastvit-predictor", daemon=True)
        self._thread.start()

    def check_open(self) -> None:
        """Raises RuntimeError once it is closed, and in a fork, where its thread is not."""
        if os.getpid() != self._process:
            raise RuntimeError("this predictor belongs to the process that made it: make it after the fork")
        if self._closed:
            raise RuntimeError(CLOSED)

    def announce(self) -> None:
        """Inputs are on their way: `submit` or `withdraw` follows."""
        self.check_open()
        with self._changed:
            self._announced += 1

    def withdraw(self) -> None:
        """What was announced does not come."""
        with self._changed:
            self._announced -= 1
            self._changed.notify()

    def submit(self, inputs: Sequence[Any]) -> Future[list[Any]]:
        """Queue what was announced: at most `max_batch` inputs, which stay together."""
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
        """Finish what is being computed, fail what waits with RuntimeError, end the thread. May be called again."""
        if os.getpid() != self._process:  # in a fork there is no thread, and nobody will ever release the lock
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
            del requests, launched  # what was delivered is not kept until the next call
            if computing is not None and not self.launch_ahead:
                deliver_results(computing)
                computing = None

    def _collect_requests(self, block: bool) -> list[Request]:
        """Requests for one batch; none if there are none and `block` is false, or after `close`."""
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
    """Wait for the results of a batch and give each caller its own."""
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
