"""RecBole's Trainer, extended where tuning a language model needs it.

What RecBole already does is inherited: the loop over epochs, validation, early stopping, selection of the best model,
TensorBoard, the evaluator. What is added: micro-batches with accumulation, parameter groups, a learning-rate schedule,
clipping under a gradient scaler, a choice of autocast dtype, and checkpoints from which a run that was killed in the
middle of an epoch ends with the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer
from recbole.utils import set_color
from torch.nn.utils.clip_grad import clip_grad_norm_
from tqdm import tqdm

import recbole_llm
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.trainer.checkpoint import (
    CheckpointError,
    check_identity,
    joined,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    parted,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from recbole_llm.trainer.score_cache import KeptScores
from recbole_llm.utils.distributed import ProcessLost
from recbole_llm.utils.hashing import hash_tensors
from recbole_llm.utils.memory import is_out_of_memory, within_memory
from recbole_llm.utils.run_files import BEST_FILE, LAST_FILE

logger = logging.getLogger(__name__)


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (0-based).

    Linear warm-up from ``1 / warmup_steps`` to 1, then ``linear`` or ``cosine`` decay towards 0 at ``total_steps``,
    or ``constant``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defer a Ctrl-C until the block is done, so that it cannot leave half-updated parameters behind."""
    in_main = threading.current_thread() is threading.main_thread()  # only there are signals handled
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


class LLMTrainer(Trainer):
    """Trains an :class:`~recbole_llm.model.base.LLMRecommender`.

    Args:
        run_folder: an existing, writable folder; ``best.safetensors`` and ``last.safetensors`` are kept in it.
        identities: what a checkpoint of this run belongs to (backbone, lens, data, configuration), by name.
        residual_samples: validation samples on which ``lens_residual`` is fitted (``residual_rows``), if any are.
    """

    def __init__(
        self,
        config: Config,
        model: AbstractRecommender,
        *,
        run_folder: Path,
        identities: dict[str, str],
        residual_samples: Interaction | None = None,
    ) -> None:
        # Read by _build_optimizer, which RecBole's constructor calls.
        self._names = {
            id(p): f"{group}.{name}"
            for group, params in model.parameter_groups().items()
            for name, p in params.items()
        }
        super().__init__(config, model)
        self.run_folder = run_folder
        self.residual_samples = residual_samples
        self.identities = identities
        self.best_file = run_folder / BEST_FILE
        self.last_file = run_folder / LAST_FILE
        self.scores_folder = run_folder / "scores"
        self.processes = model.processes
        self.saved_model_file = str(self.best_file)
        self.eval_collector = RowCollector(config)
        self.checkpoint_seconds = config["checkpoint_seconds"]
        self._saved_at = time.monotonic()
        self.autocast_dtype = getattr(torch, config["autocast_dtype"]) if config["autocast_dtype"] else None
        half = torch.float16 in (self.autocast_dtype, model.backbone_dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half and self.device.type == "cuda")
        self.start_step = 0
        self.seconds_before = 0.0  # what earlier processes spent on the last evaluation
        self.seconds = {"fit": 0.0, "train": 0.0, "evaluate": 0.0}
        self._fit_started = time.monotonic()
        self.tokens = {"train": 0, "evaluate": 0}
        self.trained_on = {"rows": 0, "steps": 0}
        self._epoch = self._step = 0
        self._loss_sum = 0.0
        self._rng = rng_state()

    # ------------------------------------------------------------------ optimizer

    def _build_optimizer(self, **kwargs) -> torch.optim.Optimizer:
        groups = []
        for name, parameters in self.model.parameter_groups().items():
            rate = self.config[f"{name}_learning_rate"] or self.learning_rate  # none for lora
            groups.append({"params": list(parameters.values()), "lr": rate, "peak_lr": rate, "name": name})
        if not groups:
            raise ValueError("the model has nothing to train")
        return super()._build_optimizer(params=groups, **kwargs)

    def _set_learning_rate(self, step: int, total_steps: int) -> float:
        first, end = self.model.schedule_span(step, total_steps)
        step, total_steps = step - first, end - first
        warmup_steps = round(self.config["warmup_ratio"] * total_steps)
        factor = learning_rate_factor(step, total_steps, warmup_steps, self.config["lr_schedule"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return factor

    def _autocast(self):
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    # ------------------------------------------------------------------ training

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False) -> float:
        """One pass over the samples; returns the mean loss per sample.

        The order of the samples depends on ``(seed, epoch)`` alone, so that a resumed epoch continues with the batch
        after the checkpoint's.
        """
        n_rows = len(train_data._dataset)
        batches = self._epoch_batches(train_data, epoch_idx)
        total_steps = len(batches) * self.epochs
        first, self.start_step = self.start_step, 0
        self._epoch, self._step = epoch_idx, first
        if first == 0:
            self._loss_sum = 0.0
        self.model.train()
        progress = tqdm(
            total=len(batches),
            initial=first,
            ncols=100,
            desc=set_color(f"Train {epoch_idx:>5}", "pink"),
            disable=not show_progress,
        )
        if first == 0 and epoch_idx == 0:
            self._save_last()  # so that even a run killed before its first checkpoint can be resumed
        for step in range(first, len(batches)):
            started, tokens_before = time.monotonic(), self.model.counts["tokens"]
            global_step = epoch_idx * len(batches) + step
            factor = self._set_learning_rate(global_step, total_steps)
            self.model.begin_step(global_step, len(batches), self.epochs)
            self._rng = rng_state()
            batch = train_data.collate_fn(batches[step])
            loss = self._backward(batch, step)
            with deferred_interrupt():
                self._update()
                self._loss_sum += loss * len(batch)
                self.trained_on["rows"] += len(batch)
                self.trained_on["steps"] += 1
                self._step = step + 1
                self._rng = rng_state()
            seconds, tokens = time.monotonic() - started, self.model.counts["tokens"] - tokens_before
            self.seconds["train"] += seconds
            self.tokens["train"] += tokens
            self.tensorboard.add_scalar("Loss/Step", loss, global_step)
            self.tensorboard.add_scalar("LearningRate", factor * self.learning_rate, global_step)
            progress.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")
            progress.update()
            if time.monotonic() - self._saved_at >= self.checkpoint_seconds:
                self._save_last()
        progress.close()
        if batches:
            self._fit_residual()
        self._save_last()
        return self._loss_sum / n_rows

    def _fit_residual(self) -> None:
        """With ``residual_rows``: the three scalars of ``lens_residual`` from validation samples."""
        if self.residual_samples is None:
            return
        self.model.eval()
        with self._autocast():
            self.model.fit_residual(self.residual_samples)
        self.model.train()

    def _epoch_batches(self, train_data, epoch: int) -> list[list]:
        """What :meth:`collate_fn` of the loader makes the batch of each optimizer step of; by (seed, epoch) alone."""
        if hasattr(train_data, "epoch_batches"):
            return train_data.epoch_batches(epoch)
        generator = torch.Generator().manual_seed(self.config["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(train_data._dataset), generator=generator)
        return [batch.tolist() for batch in order.split(self.config["train_batch_size"])]

    def _backward(self, interaction, step: int) -> float:
        """Accumulate the gradient of a batch over its micro-batches; returns the batch's mean loss.

        Where memory does not suffice, the batch starts again with micro-batches of half the size, from the same random
        numbers. (Running statistics of gate ``cnn`` have then seen some samples twice.)
        """
        counts, started = self.model.counts.copy(), rng_state()

        def ask_less(reason: str) -> None:
            self.optimizer.zero_grad()
            self.model.halve("micro_batch_size", reason)
            self.model.counts.clear()
            self.model.counts.update(counts)
            set_rng_state(started)

        return within_memory(lambda: self._together(interaction, step), ask_less)

    def _together(self, interaction, step: int) -> float:
        """Each process accumulates its share; then all have the sums, or all fail."""
        if not self.processes.several:
            return self._accumulate(interaction, step)
        if self.model.sharded:  # where one fails, the others cannot finish either
            return self._sum(self.processes.together(lambda: self._accumulate(interaction, step)))
        error: Exception | None = None
        loss = 0.0
        try:
            loss = self._accumulate(interaction, step)
        except Exception as raised:  # of any kind, and raised below: till they know, the others wait
            error = raised
        trouble = 0 if error is None else 1 if is_out_of_memory(error) else 2
        worst = self.processes.largest(trouble, self.device)
        if trouble == worst and error is not None:
            raise error
        if worst:
            kinds = {1: torch.OutOfMemoryError, 2: ProcessLost}
            raise kinds[worst](
                f"another of the {self.processes.count} processes has failed, and has said why"
            ) from error
        return self._sum(loss)

    def _sum(self, loss: float) -> float:
        """Add up the gradients, and the losses."""
        self.processes.sum_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        return float(self.processes.add_up(torch.tensor(loss, dtype=torch.float64, device=self.device)))

    def _accumulate(self, interaction, step: int) -> float:
        self.optimizer.zero_grad()
        n_rows, total = len(interaction), 0.0
        for batch, share in self._own(self.model.micro_batches(interaction), n_rows):
            with self._autocast():
                loss = self.model.loss(batch) * share
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the training loss is {loss.item()} in epoch {self._epoch}, batch {step} "
                    f"(users {batch.interaction[self.model.USER_ID].tolist()}, "
                    f"items {batch.interaction[self.model.ITEM_ID].tolist()}, internal ids). The last good state is "
                    f"kept in {self.last_file}. Lower learning_rate (now {self.learning_rate}) or use dtype: float32."
                )
            self.scaler.scale(loss).backward()
            total += loss.item()
        return total

    def _own(self, batches: Iterator[Any], n_rows: int) -> Iterator[tuple[Any, float]]:
        """The micro-batches of this process, and the share of each in the mean loss.

        Neighbours are of similar length, so that in turn all processes have as much to do. With ``shard_backbone`` they
        run the layers together: one without a micro-batch in the last round repeats the last of all, which counts
        nothing.
        """
        number, count = -1, self.processes.count
        for number, batch in enumerate(batches):
            if number % count == self.processes.rank:
                yield batch, len(batch.rows) / n_rows
        if self.model.sharded and number % count < self.processes.rank:
            yield batch, 0.0

    def _update(self) -> None:
        if self.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            clip_grad_norm_(parameters, **self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def fit(self, *args, **kwargs):
        """As RecBole's; Ctrl-C keeps what was trained and says how to resume."""
        self._fit_started = time.monotonic() - self.seconds["fit"]
        try:
            if (self.start_epoch, self.start_step) == (0, 0):
                self._fit_residual()
            result = super().fit(*args, **kwargs)
            self.seconds["fit"] = time.monotonic() - self._fit_started
            samples, seconds = self.trained_on["rows"], self.seconds["train"]
            if samples:
                logger.info(
                    "trained on %d samples in %d optimizer steps: %.1f labels and %.0f tokens a second",
                    *(samples, self.trained_on["steps"], samples / seconds, self.tokens["train"] / seconds),
                )
            else:
                logger.info("nothing was trained")
            return result
        except KeyboardInterrupt:
            # An update cannot be interrupted, so the parameters are those of the last finished step and `_rng` is the
            # state after it: only the unfinished step is lost.
            with deferred_interrupt():
                self._save_last()
            logger.warning(
                "interrupted in epoch %d after step %d; saved %s: repeat the command with --resume=%s to resume",
                self._epoch,
                self._step,
                self.last_file,
                self.run_folder,
            )
            raise
        except ProcessLost as error:
            with deferred_interrupt():
                self._save_last()
            raise ProcessLost(
                f"{error}. The last good state is in {self.last_file}: repeat the command with "
                f"--resume={self.run_folder} to resume"
            ) from error

    # ------------------------------------------------------------------ checkpoints

    def _meta(self, epoch: int) -> dict:
        return {
            "version": recbole_llm.__version__,
            "identities": self.identities,
            "epoch": epoch,
            "step": self._step,
            "loss_sum": self._loss_sum,
            "cur_step": self.cur_step,
            "best_valid_score": None if math.isinf(self.best_valid_score) else float(self.best_valid_score),
            "best_valid_result": self.best_valid_result,
            "seconds": {**self.seconds, "fit": time.monotonic() - self._fit_started},
            "tokens": self.tokens,
            "trained_on": self.trained_on,
        }

    def _save_checkpoint(self, epoch, verbose=True, **kwargs) -> None:
        """The best model so far: what was trained, without the optimizer (RecBole calls this on improvement)."""
        if not self.processes.is_first:
            return
        save_checkpoint(self.best_file, self.model.trained_state(), self._meta(epoch))
        if verbose:
            logger.info(set_color("Saving current", "blue") + f": {self.best_file}")

    def _save_last(self) -> None:
        """Everything needed to resume after the last finished optimizer step."""
        if not self.processes.is_first:
            return
        optimizer = optimizer_tensors(self.optimizer, self._names)
        parts = {"model": self.model.trained_state(), "rng": self._rng, "optimizer": optimizer}
        meta = self._meta(self._epoch) | {"scaler": self.scaler.state_dict()}
        save_checkpoint(self.last_file, joined(parts), meta)
        self._saved_at = time.monotonic()

    def resume_checkpoint(self, resume_file: str | Path) -> None:
        """Continue from ``last.safetensors`` (a file, or the run folder that holds it).

        Raises:
            CheckpointError: if it is damaged, or belongs to another backbone, lens, dataset or configuration.
        """
        path = Path(resume_file)
        path = path / self.last_file.name if path.is_dir() else path
        tensors, meta = load_checkpoint(path)
        check_identity(meta["identities"], self.identities, path)
        parts = parted(tensors)
        self.model.load_trained_state(parts["model"])
        load_optimizer_tensors(self.optimizer, parts["optimizer"], self._names)
        self.scaler.load_state_dict(meta["scaler"])
        set_rng_state(parts["rng"])
        self._rng = parts["rng"]
        self.start_epoch, self.start_step = meta["epoch"], meta["step"]
        self._epoch, self._step, self._loss_sum = meta["epoch"], meta["step"], meta["loss_sum"]
        self.cur_step = meta["cur_step"]
        if meta["best_valid_score"] is not None:
            self.best_valid_score = meta["best_valid_score"]
        self.best_valid_result = meta["best_valid_result"]
        self.seconds |= meta["seconds"]
        self.tokens, self.trained_on = meta["tokens"], meta["trained_on"]
        logger.info("resuming %s at epoch %d, step %d", path, self.start_epoch, self.start_step)

    def load_best(self, model_file: str | Path | None = None) -> None:
        """Put the parameters of the best validated epoch (or of ``model_file``) into the model."""
        self.processes.wait()  # for the first one, which writes it
        path = Path(model_file or self.best_file)
        tensors, meta = load_checkpoint(path)
        check_identity(meta["identities"], self.identities, path)
        if any(name.startswith("optimizer/") or name.startswith("rng/") for name in tensors):
            raise CheckpointError(
                f"{path} is a checkpoint to resume from; evaluate {self.best_file.name} instead"
            )
        self.model.load_trained_state(tensors)
        logger.info("Loading model structure and parameters from %s", path)

    # ------------------------------------------------------------------ evaluation

    @contextmanager
    def _kept(self, eval_data) -> Iterator[KeptScores]:
        """Keep the scores of an evaluation: with the same weights and samples it resumes where it was interrupted."""
        texts = [f"{key} {value}" for key, value in self.identities.items()]
        identity = hash_tensors(self.model.trained_state(), *texts, eval_data._dataset.content_hash())
        file = self.scores_folder / f"{identity[:32]}.safetensors"
        shared = self.processes if self.model.shares_samples else None
        with KeptScores(file, identity, self.model.counts, self.checkpoint_seconds, shared) as kept:
            self.model.kept_scores = kept
            try:
                yield kept
            finally:
                self.model.kept_scores = None

    def _sum_counts(self, before: Counter[str]) -> None:
        """Count what the other processes have scored, too; in training every process counts the whole batch."""
        if not self.model.shares_samples:
            return
        added = {name: count - before[name] for name, count in self.model.counts.items()}
        total = sum((Counter(of) for of in self.processes.all(added)), Counter())
        for name, count in total.items():
            self.model.counts[name] = before[name] + count

    @torch.no_grad()
    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """As RecBole's, on safetensors checkpoints and under the same autocast as training.

        The scores by sample of the last evaluation are in ``self.eval_collector.rows()``.
        """
        if load_best_model:
            self.load_best(model_file)
        self.eval_collector.reset()  # an evaluation that Ctrl-C or an error ended leaves its samples behind
        started, counts_before = time.monotonic(), self.model.counts.copy()
        with self._autocast(), self._kept(eval_data) as kept:
            result = super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)
        self.seconds_before = kept.seconds_before
        self._fit_started -= kept.seconds_before  # a validation is part of the training
        self.seconds["evaluate"] += time.monotonic() - started + kept.seconds_before
        self._sum_counts(counts_before)
        self.tokens["evaluate"] += self.model.counts["tokens"] - counts_before["tokens"]
        return result
