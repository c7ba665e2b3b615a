"""The predictor's model runner: out of memory, padding and CUDA graphs."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastvit.serve.preprocessing import Preprocessor
from fastvit.serve.runner import WARM_UP_CALLS, GraphCache, Runner, capture_graphs


class Sums(nn.Module):
    """A model whose logits are the sums of the channels. It raises `error` for batches of more than `room` images."""

    def __init__(self, room=1000, error=torch.OutOfMemoryError, text="CUDA out of memory. Tried 1 TiB\nand more"):
        super().__init__()
        self.config = SimpleNamespace(num_labels=3, problem_type=None)
        self.room, self.error, self.text, self.sizes = room, error, text, []

    def forward(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) > self.room:
            raise self.error(self.text)
        return SimpleNamespace(logits=pixels.sum((2, 3)))


PLAIN = Preprocessor((2, 2), None, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_runner(model, **options):
    return Runner(model, PLAIN, device=torch.device("cpu"), **{"max_batch": 8, "top_k": 2, **options})


def make_images(count):
    return list(np.random.default_rng(count).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8))


def assert_sums(results, images):
    assert len(results) == len(images)
    for (probabilities, best), image in zip(results, images, strict=True):
        expected = torch.from_numpy(image / 255).sum((0, 1)).softmax(0).numpy()
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
        assert list(best) == list(np.argsort(-expected)[:2])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, lambda text: MemoryError()])
def test_out_of_memory_halves_the_batch_size(error):
    model = Sums(room=2, error=error)
    runner = make_runner(model)
    with pytest.warns(UserWarning, match="out of memory: the batch size is limited to") as caught:
        assert_sums(runner.launch(make_images(7))(), make_images(7))
    assert [str(one.message).partition(" (")[0] for one in caught] == [
        "out of memory: the batch size is limited to 3",
        "out of memory: the batch size is limited to 1",
    ]
    assert model.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_sums(runner.launch(make_images(2))(), make_images(2))


def test_out_of_memory_for_a_single_image_raises():
    with pytest.raises(torch.OutOfMemoryError):
        make_runner(Sums(room=0)).launch(make_images(1))
    with pytest.raises(ValueError, match="out of memory"):  # not an out-of-memory type
        make_runner(Sums(room=1, error=ValueError)).launch(make_images(4))


def test_onednn_is_disabled_after_it_ran_out_of_memory():
    runner = make_runner(Sums(room=2, error=RuntimeError, text="could not create a primitive"))
    with torch.backends.mkldnn.flags(enabled=True):
        with pytest.warns(UserWarning) as caught:
            assert_sums(runner.launch(make_images(7))(), make_images(7))
        assert not torch.backends.mkldnn.enabled
    assert [str(one.message).partition(":")[0] for one in caught] == [
        "oneDNN is off from now on",
        "out of memory",
        "out of memory",
    ]
    runner = make_runner(Sums(room=0, error=RuntimeError, text="could not create a primitive"))
    with torch.backends.mkldnn.flags(enabled=True):
        with pytest.warns(UserWarning, match="oneDNN is off"), pytest.raises(RuntimeError, match="create a primitive"):
            runner.launch(make_images(1))  # fails; without oneDNN the next call may succeed
        assert not torch.backends.mkldnn.enabled


class Recorder:
    """A substitute for the capture of CUDA graphs: a replay reads the captured inputs and overwrites the outputs."""

    def __init__(self):
        self.captured, self.replays = 0, 0

    def __call__(self, function):
        self.captured += 1
        outputs = function()

        def replay():
            self.replays += 1
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        for output in outputs:
            output.fill_(0)  # a capture does not compute
        return replay, outputs


def test_batch_sizes_are_padded_to_powers_of_two_and_captured_after_warm_up():
    model, recorder = Sums(), Recorder()
    runner = make_runner(model, max_batch=6, capture=recorder)
    for call in range(WARM_UP_CALLS + 3):
        for count in (1, 2, 3, 4, 5, 6):
            images = make_images(count + 10 * call)[:count]
            assert_sums(runner.launch(images)(), images)
    assert sorted(runner.graphs.buckets) == [1, 2, 4, 6] == sorted(set(model.sizes))
    assert recorder.captured == 4
    calls = {1: WARM_UP_CALLS + 3, 2: WARM_UP_CALLS + 3, 4: 2 * (WARM_UP_CALLS + 3), 6: 2 * (WARM_UP_CALLS + 3)}
    assert recorder.replays == sum(calls.values()) - 4 * WARM_UP_CALLS


def test_padding_is_zeroed_before_each_call():
    seen = []

    def forward(pixels):
        seen.append(pixels.clone())
        return pixels, pixels

    graphs = GraphCache(forward, 4, Recorder())
    graphs(torch.full((4, 2, 2, 3), 9, dtype=torch.uint8))
    outputs = graphs(torch.full((3, 2, 2, 3), 7, dtype=torch.uint8))
    assert seen[1][:3].eq(7).all() and seen[1][3].eq(0).all() and len(outputs[0]) == len(outputs[1]) == 3


def test_failed_capture_warns_and_disables_graphs():
    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nat ...")

    model = Sums()
    runner = make_runner(model, capture=fails)
    with pytest.warns(
        UserWarning, match="CUDA graphs are off: a batch of 4 cannot be captured .operation not permitted"
    ):
        for _ in range(WARM_UP_CALLS + 2):
            assert_sums(runner.launch(make_images(3))(), make_images(3))
    assert model.sizes == [4] * WARM_UP_CALLS + [3, 3] and not runner.graphs.buckets


def test_out_of_memory_frees_graphs_of_larger_batches():
    model, recorder = Sums(), Recorder()
    runner = make_runner(model, capture=recorder)
    for _ in range(WARM_UP_CALLS + 1):
        runner.launch(make_images(8))
        runner.launch(make_images(2))
    model.room = 4
    with pytest.warns(UserWarning, match="limited to 4"):
        assert_sums(runner.launch(make_images(8))(), make_images(8))
    assert sorted(runner.graphs.buckets) == [2, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_cuda_graph_replays_the_captured_function():
    pixels = torch.ones(4, device="cuda")
    pixels.mul(2)
    replay, (doubled, tripled) = capture_graphs()(lambda: (pixels.mul(2), pixels.mul(3)))
    pixels.fill_(5)
    replay()
    assert doubled.eq(10).all() and tripled.eq(15).all()
