"""The predictor's request queue: batches, waiting, errors and closing."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastvit
from fastvit.serve.batching import Batcher


class Model:
    """A substitute for `Runner.launch` that squares numbers. It blocks while `gate` is not set."""

    def __init__(self):
        self.batches, self.finished, self.gate = [], [], threading.Event()
        self.gate.set()

    def __call__(self, inputs):
        self.batches.append(inputs)
        assert self.gate.wait(10)
        if "boom" in inputs:
            raise ValueError("boom")
        if "bang" in inputs:
            raise SystemExit("bang")

        def finish():
            self.finished.append(inputs)
            if "late" in inputs:
                raise ValueError("late")
            return [each * each for each in inputs]

        return finish

    def wait_for(self, batches):
        deadline = time.monotonic() + 10
        while len(self.batches) < batches:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def square():
    model = Model()
    yield model
    model.gate.set()


def submit(batcher, *inputs):
    batcher.announce()
    return batcher.submit(list(inputs))


def test_queued_calls_form_one_batch_without_being_split(square):
    batcher = Batcher(square, max_batch=4)
    square.gate.clear()
    first = submit(batcher, 1)
    square.wait_for(1)
    futures = [submit(batcher, *inputs) for inputs in ((2, 3), (4,), (5, 6), (7,), ())]
    square.gate.set()
    assert first.result(10) == [1]
    assert [future.result(10) for future in futures] == [[4, 9], [16], [25, 36], [49], []]
    assert square.batches == [[1], [2, 3, 4], [5, 6, 7]]
    batcher.close()


def test_batch_waits_for_announced_calls_only(square):
    batcher = Batcher(square, max_batch=4, max_wait=5.0)
    begun = time.monotonic()
    assert submit(batcher, 2).result(10) == [4]
    assert time.monotonic() - begun < 4
    batcher.announce()  # another call is decoding
    first = submit(batcher, 3)
    time.sleep(0.05)
    assert square.batches == [[2]]
    second = batcher.submit([4])
    assert (first.result(10), second.result(10)) == ([9], [16])
    assert square.batches == [[2], [3, 4]]
    batcher.announce()
    third = submit(batcher, 5)
    batcher.withdraw()  # its image was invalid
    assert third.result(4) == [25]
    batcher.announce()
    assert submit(batcher, 1, 2, 3, 4).result(4) == [1, 4, 9, 16]  # a full batch does not wait
    batcher.withdraw()
    batcher.close()


def test_batch_waits_at_most_max_wait(square):
    batcher = Batcher(square, max_batch=4, max_wait=0.05)
    batcher.announce()
    assert submit(batcher, 3).result(10) == [9]
    batcher.close()


def test_launch_ahead_launches_the_next_batch_before_waiting_for_the_previous(square):
    batcher = Batcher(square, max_batch=1, launch_ahead=True)
    square.gate.clear()
    futures = [submit(batcher, number) for number in (1, 2, 3)]
    square.wait_for(1)
    log = []
    finish = square.finished
    square.finished = SimpleNamespace(
        append=lambda inputs: log.append((inputs, len(square.batches))) or finish.append(1)
    )
    square.gate.set()
    assert [future.result(10) for future in futures] == [[1], [4], [9]]
    assert log == [([1], 2), ([2], 3), ([3], 3)]  # (finished inputs, number of batches launched before)
    batcher.close()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("bad", "error"), [("boom", ValueError), ("late", ValueError), ("bang", SystemExit)])
def test_model_errors_are_raised_in_the_calls_of_the_batch_only(bad, error, ahead, square):
    batcher = Batcher(square, max_batch=2, launch_ahead=ahead)
    with pytest.raises(error, match=bad):
        submit(batcher, bad).result(10)
    assert submit(batcher, 3).result(10) == [9]
    batcher.close()


def test_close_finishes_the_launched_batch_and_fails_queued_calls(square):
    batcher = Batcher(square, max_batch=1)
    square.gate.clear()
    computing = submit(batcher, 2)
    square.wait_for(1)
    waiting = submit(batcher, 3)
    batcher.announce()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        batcher.submit([4])
    square.gate.set()
    closing.join(10)
    assert computing.result(10) == [4] and not closing.is_alive()
    batcher.close()
    with pytest.raises(RuntimeError, match="the predictor is closed"):
        batcher.announce()


def test_open_batcher_does_not_keep_the_program_from_exiting():
    program = (
        "import threading, time\n"
        "from fastvit.serve.batching import Batcher\n"
        "batcher = Batcher(lambda inputs: time.sleep(600), max_batch=1)\n"
        "batcher.announce()\n"
        "threading.Thread(target=batcher.submit([1]).result, daemon=True).start()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fastvit.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
