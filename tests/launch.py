"""Launch several processes of `fastvit.train.finetune` on CPUs under torchrun's elastic agent.

The processes are forked from a server that has already imported the packages: importing takes about ten seconds.
"""

import multiprocessing
import os
import signal
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

multiprocessing.set_forkserver_preload(["fastvit.train.finetune", "datasets", "torch.distributed.checkpoint"])


def run_finetune(argv: list[str], cache: str, kill: tuple[int, int] | None) -> None:
    """Run fine-tuning in one process.

    Args:
        argv: Command line arguments of `fastvit finetune`.
        cache: The cache folder.
        kill: Rank and step: that process is killed by SIGKILL after that step, unless it was restarted.
    """
    import torch

    from fastvit.train.finetune import main
    from fastvit.train.training import StopOnNonFiniteLoss

    torch.set_num_threads(1)
    os.environ["FASTVIT_CACHE_DIR"] = cache
    if kill is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        original = StopOnNonFiniteLoss.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if (args.process_index, state.global_step) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, args, state, control, **kwargs)

        StopOnNonFiniteLoss.on_step_end = on_step_end
    code = main(argv)
    if code:
        raise SystemExit(code)


def run_predict(argv: list[str], stop_after: int | None = None) -> int:
    """Run `fastvit predict` in one process; `stop_after` images, as Ctrl-C does, it is interrupted."""
    import torch

    from fastvit import cli
    from fastvit.serve.predictor import Predictor

    torch.set_num_threads(1)
    stream = Predictor.stream

    def interrupt(self, images, **options):
        for count, result in enumerate(stream(self, images, **options)):
            if count == stop_after:
                raise KeyboardInterrupt
            yield result

    Predictor.stream = interrupt
    return cli.main(argv)


def evaluate_sizes(sizes: list[int], output_dir: str) -> list[list[int]]:
    """Evaluate data sets of the given sizes, check predictions and loss, and return the gathered labels.

    The label of each image is its index.
    """
    import numpy as np
    import torch
    from transformers import TrainingArguments, ViTConfig, default_data_collator

    import fastvit
    from fastvit.data.images import ImageCache, ImageSet
    from fastvit.report.tasks import TASKS
    from fastvit.train.objectives import build_metrics
    from fastvit.train.training import FineTuner

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        num_labels=100,
    )
    model = fastvit.ViTForImageClassification(config)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    args = TrainingArguments(output_dir, use_cpu=True, per_device_eval_batch_size=8, report_to="none")
    trainer = FineTuner(
        model=model,
        args=args,
        data_collator=default_data_collator,
        compute_metrics=build_metrics(TASKS["single-label"], None),
    )
    seen = []
    for size in sizes:
        result = trainer.predict(ImageSet(ImageCache(pixels[:size], {}), np.arange(size)))
        with torch.no_grad():
            whole = model.eval()(torch.from_numpy(pixels[:size]), labels=torch.arange(size))
        np.testing.assert_allclose(result.predictions, whole.logits, atol=1e-5)
        np.testing.assert_allclose(result.metrics["test_loss"], whole.loss.item(), rtol=1e-5)
        seen.append(result.label_ids.tolist())
    return seen


def launch(function, *args, logs: Path, processes: int = 2, max_restarts: int = 0) -> dict:
    """Run `function(*args)` in several processes and return its result by rank.

    Args:
        function: The function to run.
        *args: Its arguments.
        logs: Folder for the output of the processes, which `read_output` reads.
        processes: Number of processes.
        max_restarts: How often failed processes are restarted.

    Raises:
        ChildFailedError: If a process failed.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        return elastic_launch(config, function)(*args)
    finally:  # the agent leaves its own handlers, which raise in a later test
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_output(logs: Path, rank: int, stream: str = "stdout", attempt: int = 0) -> str:
    (file,) = logs.glob(f"*/attempt_{attempt}/{rank}/{stream}.log")
    return file.read_text()
