"""Fine-tuning by two processes over Gloo equals that by one process, and survives the loss of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import evaluate_sizes, launch, read_output, run_finetune
from safetensors.torch import load_file
from shards import make_shards
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers.trainer_utils import get_last_checkpoint

import fastvit
from fastvit.train.finetune import main

# No random numbers while training: each process would draw other crops than a single process.
RUN = ["--dataset", "generated", "--generated-images", "89", "--image-size", "16", "--patch-size", "8"]
RUN += ["--no-augment", "--cpu", "--precision", "fp32", "--max-steps", "8", "--eval-steps", "2", "--logging-steps", "1"]
RUN += ["--warmup", "2", "--keep-checkpoints", "9"]  # 72 training images: 9 batches of 8; 17 validation images


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == list(range(1, 9))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def metrics(folder: Path) -> tuple[float, float, float]:
    results = json.loads((folder / "eval_results.json").read_text())
    return results["eval_accuracy"], results["eval_loss"], results["eval_macro_f1"]


def differences(one: Path, other: Path) -> list[float]:
    """The largest absolute difference of each tensor."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return [(first[name] - second[name]).abs().max().item() for name in first]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, with the batch of both processes together."""
    folder = tmp_path_factory.mktemp("alone")
    assert main([*RUN, "--batch-size", "8", "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The run of two processes, under DDP."""
    folder = tmp_path_factory.mktemp("together")
    argv = [*RUN, "--batch-size", "4", "--output-dir", str(folder / "out")]
    launch(run_finetune, argv, str(folder / "cache"), None, logs=folder / "logs")
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The run of two processes that share the model, under FSDP2, with two batches per step."""
    folder = tmp_path_factory.mktemp("sharded")
    argv = [*RUN, "--batch-size", "2", "--gradient-accumulation", "2", "--fsdp", "--output-dir", str(folder / "out")]
    launch(run_finetune, argv, str(folder / "cache"), None, logs=folder / "logs")
    return folder


@pytest.mark.parametrize("kind", ["together", "sharded"])
def test_two_processes_equal_one(kind, alone, request):
    # float32 sums in another order: the loss of a step differs by about 2**-24 of its terms. AdamW normalises small
    # gradients, so their rounding moves a weight by up to the learning rate (1e-3): hence the absolute 1e-4.
    out = request.getfixturevalue(kind) / "out"
    np.testing.assert_allclose(losses(out), losses(alone), rtol=5e-6)
    np.testing.assert_allclose(metrics(out), metrics(alone), rtol=1e-5)
    assert max(differences(alone, out)) < 1e-4


def test_the_result_of_shards_is_one_file(sharded):
    out = sharded / "out"
    checkpoint = Path(get_last_checkpoint(out))
    assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").exists()
    assert len(list((checkpoint / "optimizer_0").glob("*.distcp"))) == 2
    assert not (checkpoint / "model.safetensors").exists()
    model = fastvit.ViTForImageClassification.from_pretrained(out)
    assert type(model).__name__ == model.config.architectures[0] == "ViTForImageClassification"


def test_only_the_first_process_prints_and_decodes(together):
    assert "validation: accuracy" in read_output(together / "logs", 0)
    assert read_output(together / "logs", 1) == ""
    assert "decoding train" in read_output(together / "logs", 0, "stderr")
    assert "decoding" not in read_output(together / "logs", 1, "stderr")
    assert len(list((together / "cache" / "images").iterdir())) == 2  # train and validation, for both
    assert not (together / "out" / ".launch").exists()


def test_a_finished_run_is_refused_however_often_torchrun_starts_it(together):
    argv = [*RUN, "--batch-size", "4", "--output-dir", str(together / "out")]
    before = (together / "out" / "config.yaml").stat().st_mtime_ns
    with pytest.raises(ChildFailedError):
        launch(run_finetune, argv, str(together / "cache"), None, logs=together / "refused", max_restarts=1)
    for attempt in (0, 1):
        errors = read_output(together / "refused", 0, "stderr", attempt)
        assert "already holds a run; give --overwrite, --resume or another folder" in errors
        assert "error" not in read_output(together / "refused", 1, "stderr", attempt)
    assert (together / "out" / "config.yaml").stat().st_mtime_ns == before


def test_a_killed_process_ends_the_run_which_can_be_resumed(together, tmp_path):
    argv = [*RUN, "--batch-size", "4", "--output-dir", str(tmp_path / "out")]
    # The other process ends shortly after; torchrun names whichever it finds first.
    with pytest.raises(ChildFailedError, match=r"rank +: (1(.|\n)*Signal 9 \(SIGKILL\)|0(.|\n)*exitcode +: 2)"):
        launch(run_finetune, argv, str(tmp_path / "cache"), (1, 5), logs=tmp_path / "killed")
    last = tmp_path / "out" / "checkpoint-4"
    error = read_output(tmp_path / "killed", 0, "stderr").strip().splitlines()[-1]
    assert error.startswith("error: process 0: the connection to another process was lost"), error
    assert f"the last checkpoint is {last}; continue with the same command and --resume" in error
    fastvit.ViTForImageClassification.from_pretrained(last)
    launch(run_finetune, [*argv, "--resume"], str(tmp_path / "cache"), None, logs=tmp_path / "resumed")
    assert losses(tmp_path / "out") == losses(together / "out")
    assert max(differences(together / "out", tmp_path / "out")) == 0


def test_torchrun_restarts_a_run_of_shards_from_its_last_checkpoint(sharded, tmp_path):
    argv = [*RUN, "--batch-size", "2", "--gradient-accumulation", "2", "--fsdp", "--output-dir", str(tmp_path / "out")]
    launch(run_finetune, argv, str(tmp_path / "cache"), (1, 7), logs=tmp_path / "logs", max_restarts=1)
    assert "| 7/8" in read_output(tmp_path / "logs", 0, "stderr", attempt=1)
    assert "| 6/8" not in read_output(tmp_path / "logs", 0, "stderr", attempt=1)
    assert losses(tmp_path / "out") == losses(sharded / "out")
    assert max(differences(sharded / "out", tmp_path / "out")) == 0


def test_torchrun_starts_over_what_was_lost_before_its_first_checkpoint(together, tmp_path):
    argv = [*RUN, "--batch-size", "4", "--output-dir", str(tmp_path / "out")]
    launch(run_finetune, argv, str(tmp_path / "cache"), (0, 1), logs=tmp_path / "logs", max_restarts=1)
    assert losses(tmp_path / "out") == losses(together / "out")


def test_streamed_images_train_two_processes(tmp_path):
    make_shards(tmp_path / "shards", shards=2, per_shard=9, validation=7)
    argv = ["--data-dir", str(tmp_path / "shards"), "--streaming", "--from-scratch", "micro", "--image-size", "16"]
    argv += ["--patch-size", "8", "--cpu", "--max-steps", "6", "--eval-steps", "3", "--batch-size", "4"]
    argv += ["--output-dir", str(tmp_path / "out")]
    launch(run_finetune, argv, str(tmp_path / "cache"), (0, 4), logs=tmp_path / "logs", max_restarts=1)
    assert "7 images, 3 classes" in (tmp_path / "out" / "classification_report.txt").read_text()
    assert (tmp_path / "out" / "checkpoint-6").exists()


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_counts_every_image_once(processes, tmp_path):
    sizes = [1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 31, 47, 48, 49]  # batches of 8
    seen = launch(evaluate_sizes, sizes, str(tmp_path), logs=tmp_path / "logs", processes=processes)
    for rank in range(processes):
        assert seen[rank] == [list(range(size)) for size in sizes]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_the_module(launcher, tmp_path):
    command = {
        "torchrun": "torch.distributed.run --standalone --nproc-per-node 2 -m fastvit.finetune",
        "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
        " --dynamo_backend no -m fastvit.train.finetune",
    }[launcher]
    argv = [*RUN, "--batch-size", "4", "--max-steps", "1", "--output-dir", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTVIT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu:0 and 1 more" in done.stdout
    assert (tmp_path / "out" / "checkpoint-1" / "rng_state_1.pth").exists()
