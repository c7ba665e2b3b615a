"""Several processes of `fastvit.train.finetune` on CPUs, started and watched by torchrun's own agent.

They are forked from a server that has everything imported, so that a start takes a moment instead of ten seconds.
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
    """One process. kill: (rank, step) of the process that ends by SIGKILL after that step, unless it was restarted."""
    import torch

    from fastvit.train.finetune import main
    from fastvit.train.training import StopOnNonFiniteLoss

    torch.set_num_threads(1)
    os.environ["FASTVIT_CACHE_DIR"] = cache
    if kill is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        usual = StopOnNonFiniteLoss.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            if (args.process_index, state.global_step) == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            usual(self, args, state, control, **kwargs)

        StopOnNonFiniteLoss.on_step_end = on_step_end
    code = main(argv)
    if code:
        raise SystemExit(code)


def evaluate_sizes(sizes: list[int], output_dir: str) -> list[list[int]]:
    """The labels that evaluation saw, for data sets of each size whose labels number the pictures; checks the loss."""
    import numpy as np
    import torch
    from transformers import TrainingArguments, ViTConfig, default_data_collator

    import fastvit
    from fastvit.data.images import ImageCache, ImageSet
    from fastvit.train.build import compute_accuracy
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
    trainer = FineTuner(model=model, args=args, data_collator=default_data_collator, compute_metrics=compute_accuracy)
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
    """What `function(*args)` returned on each process; ChildFailedError where one of them failed.

    logs: a folder; `read_output(logs, ...)` reads what a process printed.
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
    return elastic_launch(config, function)(*args)


def read_output(logs: Path, rank: int, stream: str = "stdout", attempt: int = 0) -> str:
    (file,) = logs.glob(f"*/attempt_{attempt}/{rank}/{stream}.log")
    return file.read_text()
