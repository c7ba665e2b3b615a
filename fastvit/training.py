"""What `transformers.Trainer` lacks for fine-tuning: layer-wise learning rates, stopping well and going on exactly as
if nothing had happened, a progress bar."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    TrainOutput,
    get_last_checkpoint,
    sort_checkpoints,
)

from fastvit.errors import InputError
from fastvit.files import PARTIAL, remove_folder, sync, whole_files, write_errors, write_text


class NonFiniteLoss(InputError):
    """The loss or the gradient became NaN or infinite; training cannot go on."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends training before a checkpoint with NaN weights can replace a good one."""

    def on_step_end(self, args, state, control, **kwargs):
        # The loss is looked at before every save. Looking at every step would make a GPU wait at every step.
        if control.should_save:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                last = get_last_checkpoint(args.output_dir)
                raise NonFiniteLoss(
                    f"training: the {name} is {logs[name]} at step {state.global_step}; the last good checkpoint is"
                    f" {last or 'none'}; try a lower --learning-rate, --warmup or --precision fp32"
                )


class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C, or the SIGTERM of a scheduler: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

    An evaluation is not waited for; `EvaluateWhatIsDue` does it when the run goes on. Before StopOnNonFiniteLoss in the
    list of callbacks, so that it looks at the loss before this checkpoint too.
    signum: the signal that came, or None.
    """

    def __init__(self):
        self.signum: int | None = None
        self.asked: torch.Tensor | None = None  # the largest signum of all processes

    def __enter__(self):
        self.previous = {signum: signal.signal(signum, self.handle) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        name = "interrupted" if signum == signal.SIGINT else f"{signal.Signals(signum).name} received"
        print(f"\n{name}: saving a checkpoint after this step (Ctrl-C to stop at once)", file=sys.stderr)

    def asked_to_stop(self, args) -> bool:
        """Whether any of the processes was: they must all stop at the same step."""
        if args.world_size == 1:
            return self.signum is not None
        # The answer to the question before this one: a GPU would have to be waited for to know this one's.
        answer = 0 if self.asked is None else int(self.asked)
        self.asked = torch.tensor(self.signum or 0, device=args.device)
        torch.distributed.all_reduce(self.asked, torch.distributed.ReduceOp.MAX)
        self.signum = answer or self.signum
        return answer != 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked_to_stop(args):
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.asked_to_stop(args):
            raise EvaluationStopped


class EvaluateWhatIsDue(TrainerCallback):
    """A checkpoint that a signal asked for may lack its evaluation: the run that goes on from it begins with that."""

    def __init__(self, trainer: FineTuner):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.eval_strategy != IntervalStrategy.STEPS or state.global_step == 0:
            return
        due = state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps
        if due and not any(log["step"] == state.global_step and "eval_loss" in log for log in state.log_history):
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        self.trainer.find_best_checkpoint()


class FollowEpochs(TrainerCallback):
    """Tells the training pictures the epoch, which their random numbers depend on."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


class Progress(ProgressCallback):
    """Trainer's progress bar, with the loss and images a second in it, and a line for each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.start_step = time.perf_counter(), state.global_step
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            speed = (state.global_step - self.start_step) * self.images_per_step / (time.perf_counter() - self.start)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:.0f} images/s")
            self.start, self.start_step = time.perf_counter(), state.global_step
        if "eval_accuracy" in logs:
            result = f"validation accuracy {logs['eval_accuracy']:.2%}, loss {logs['eval_loss']:.3f}"
            self.training_bar.write(f"step {state.global_step}: {result}", file=sys.stdout)

    def close(self) -> None:
        """Take the bars off the terminal, so that nothing is drawn after an error message."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.start, self.start_step = time.perf_counter(), state.global_step


class FineTuner(Trainer):
    """Trainer that can be killed at any moment, with a learning rate for each depth.

    Every folder checkpoint-N is whole, and a run that goes on from one ends with the bits of a run that never stopped:
    what Trainer keeps (weights, optimizer, schedule, random numbers, order of the pictures) needs only that pictures
    draw their random numbers for themselves (`ImageSet`) and that evaluations draw none.
    Layer-wise decay: Clark et al. 2020, arXiv:2003.10555.
    keep_checkpoints: how many stay, the newest and the best always; 0: all. Instead of `save_total_limit`, by which
        Trainer deletes them file by file under their names.
    model_card: once set, the text that `create_model_card` (and so `push_to_hub`) writes.
    """

    def __init__(self, *args, layer_decay: float = 1.0, keep_checkpoints: int = 0, **kwargs):
        self.layer_decay = layer_decay
        self.model_card: ModelCard | None = None
        self.keep_checkpoints = keep_checkpoints
        self.checkpoint_home: Path | None = None  # where a checkpoint is written, while it is
        super().__init__(*args, **kwargs)
        self.add_callback(FollowEpochs())
        self.add_callback(EvaluateWhatIsDue(self))

    def train(self, *args, **kwargs) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except EvaluationStopped:
            # The step is over, and nothing of its evaluation has been noted.
            self._save_checkpoint(self.model_wrapped, trial=None)
            return TrainOutput(self.state.global_step, math.nan, {})

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer goes on from the last checkpoint with one more step
            super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        loader.base_dataloader.worker_init_fn = partial(start_worker, loader.worker_init_fn)
        return loader

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a loader of pictures draws a seed for its workers
            return super().evaluate(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self.checkpoint_home is None else str(self.checkpoint_home)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's checkpoint, written in another folder and moved to its place once it is whole."""
        home = Path(self._get_output_dir(trial))
        checkpoint = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = home / PARTIAL / checkpoint.name
        with write_errors(checkpoint):
            try:
                if self.args.should_save:
                    shutil.rmtree(home / PARTIAL, ignore_errors=True)  # of a process that was killed
                self.accelerator.wait_for_everyone()
                self.checkpoint_home = partial.parent
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                    sync(partial, *partial.rglob("*"))
                    if checkpoint.exists():
                        remove_folder(checkpoint)
                    partial.rename(checkpoint)
                    sync(home)
                    self.remove_old_checkpoints(home)
                self.accelerator.wait_for_everyone()
            finally:
                self.checkpoint_home = None
                if self.args.should_save:
                    shutil.rmtree(home / PARTIAL, ignore_errors=True)

    def remove_old_checkpoints(self, home: Path) -> None:
        """Leave `keep_checkpoints`, among them the newest and the best."""
        checkpoints = sort_checkpoints(str(home))
        old = [folder for folder in checkpoints[:-1] if folder != self.state.best_model_checkpoint]
        if self.keep_checkpoints:
            for folder in old[: max(0, len(checkpoints) - self.keep_checkpoints)]:
                remove_folder(Path(folder))

    def find_best_checkpoint(self) -> None:
        """The best checkpoint where it is now: the run's folder may have been moved."""
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save or self.checkpoint_home is not None:
            super()._save(output_dir, state_dict)
            return
        with whole_files(Path(output_dir or self.args.output_dir)) as folder:
            super()._save(str(folder), state_dict)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with whole_files(Path(self.args.output_dir)) as folder:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_text(folder / f"{split}_results.json", json.dumps(metrics, indent=4, sort_keys=True))
        if combined:
            path = folder / "all_results.json"
            together = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write_text(path, json.dumps(together | metrics, indent=4, sort_keys=True))

    def create_model_card(self, *args, **kwargs) -> None:
        if self.model_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", str(self.model_card))

    def create_optimizer(self, model=None):
        if self.layer_decay == 1.0 or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = self.layer_decay ** depth_from_top(name, self.model.config.num_hidden_layers)
                weight_decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((scale, weight_decay), []).append(parameter)
        optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {"params": parameters, "lr": self.args.learning_rate * scale, "weight_decay": weight_decay}
                for (scale, weight_decay), parameters in groups.items()
            ],
            **optimizer_kwargs,
        )
        return self.optimizer


def start_worker(start: Callable[[int], None] | None, worker_id: int) -> None:
    """What a process that prepares batches does first; `start` is what Trainer has it do.

    Schedulers and terminals send signals to all processes of a run. The main one still needs batches for its last step,
    and ends the others; should it be gone, they end by themselves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(30))
    if start is not None:
        start(worker_id)


def depth_from_top(name: str, num_layers: int) -> int:
    """0 for the head and the final norm, 1 for the last block, num_layers + 1 for the embeddings."""
    if "embeddings." in name:
        return num_layers + 1
    if ".layer." in name:
        return num_layers - int(name.split(".layer.")[1].split(".")[0])
    return 0
