"""Conventional models, trained by RecBole's own Trainer, resume after their last validated epoch.

RecBole's ``resume_checkpoint`` reads the best epoch, not the last, and restores neither the random-number states nor
the order of the samples, so a resumed model is another one. Here everything that the next epoch depends on is kept.
LLM recommenders have a trainer of their own, which resumes in the middle of an epoch
(:class:`recbole_llm.trainer.llm_trainer.LLMTrainer`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer
from recbole.utils import ModelType
from torch import Tensor

import recbole_llm
from recbole_llm.trainer.checkpoint import (
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
from recbole_llm.utils.recbole_repairs import load_recbole_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class EpochTraining:
    """A training by :class:`recbole.trainer.Trainer`, saved to a file after each validated epoch.

    Attributes:
        trainer: RecBole's trainer of one process.
        train_data: RecBole's loader; the state of its shuffling is part of what is kept.
        file: written after each validated epoch.
        identities: what the training belongs to, by name.
        how_to_resume: what the log says on Ctrl-C.
        keep_best: whether the best epoch's weights are kept here (``best``); else RecBole saves them in its own file.
        valid: the metrics of the best epoch on the validation samples.
        curve: ``valid_metric`` of each validation.
        best_epoch: from 1.
        seconds: spent in training and validation, earlier processes included.
    """

    trainer: Trainer
    train_data: torch.utils.data.DataLoader
    file: Path
    identities: Mapping[str, str]
    how_to_resume: str = "repeat the command"
    keep_best: bool = False
    best: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    _started: float = 0.0
    _finished: bool = False

    @property
    def pickles(self) -> bool:
        """Whether RecBole's own ``torch.save`` keeps the best epoch: of trainers and models with more state."""
        return type(self.trainer) is not Trainer or bool(self.trainer.model.other_parameter())

    def _save_best_epoch(self, epoch: int, verbose: bool = True, **_: object) -> None:
        """In place of RecBole's ``_save_checkpoint``, which pickles: the weights alone, written whole or not at all."""
        meta = {"version": recbole_llm.__version__, "epoch": epoch}
        save_checkpoint(Path(self.trainer.saved_model_file), model_tensors(self.trainer.model), meta)

    @property
    def can_be_kept(self) -> bool:
        """Not where a model or a trainer has a state besides parameters, buffers and one optimizer."""
        return (
            type(self.trainer) is Trainer
            and bool(self.trainer.config["single_spec"])
            and not self.trainer.model.other_parameter()
            and hasattr(self.train_data, "generator")  # loaders of knowledge graphs shuffle elsewhere
        )

    def fit(self, valid_data, *, show_progress: bool) -> None:
        """Train to the end, with the random-number states of an uninterrupted training.

        Raises:
            KeyboardInterrupt: what was trained up to the last validated epoch is in ``file``.
        """
        if self._finished:
            self.trainer.eval_collector.data_collect(self.train_data)  # what else RecBole's fit does
            return
        self._started = time.monotonic() - self.seconds
        if not self.pickles:
            self.trainer._save_checkpoint = self._save_best_epoch
            file = Path(self.trainer.saved_model_file).with_suffix(".safetensors")
            self.trainer.saved_model_file = str(file)
        callback = {"callback_fn": self._after_validation} if self.keep_best or self.can_be_kept else {}
        try:
            _, valid = self.trainer.fit(
                self.train_data, valid_data, saved=not self.keep_best, show_progress=show_progress, **callback
            )
        except KeyboardInterrupt:
            if self.file.is_file():
                logger.warning(
                    "interrupted; %s has the training up to its last validation: %s to resume",
                    self.file,
                    self.how_to_resume,
                )
            raise
        self.seconds = time.monotonic() - self._started
        if valid is not None:
            self.valid = {name: float(value) for name, value in valid.items()}

    def load(self) -> None:
        """Resume from ``file``.

        Raises:
            CheckpointError: if it is missing, damaged, or belongs to another training.
        """
        tensors, meta = load_checkpoint(self.file)
        check_identity(meta["identities"], dict(self.identities), self.file)
        parts, trainer = parted(tensors), self.trainer
        trainer.model.load_state_dict(parts["model"])
        load_optimizer_tensors(trainer.optimizer, parts["optimizer"], self._names())
        set_rng_state(parts["rng"])
        self.train_data.generator.set_state(parts["rows"]["generator"])
        trainer.start_epoch, trainer.cur_step = meta["epoch"] + 1, meta["cur_step"]
        trainer.best_valid_score, trainer.best_valid_result = meta["best_valid_score"], meta["valid"]
        if not self.keep_best:
            trainer.saved_model_file = str(self.file.with_name(meta["saved_model_file"]))
        self.best, self.valid, self.curve = parts["best"], meta["valid"], meta["curve"]
        self.best_epoch, self.seconds = meta["best_epoch"], meta["seconds"]
        # RecBole's fit would train one more epoch, or overwrite its file of the best one with the last.
        self._finished = trainer.cur_step > trainer.stopping_step or trainer.start_epoch >= trainer.epochs
        logger.info("resuming after epoch %d, from %s", meta["epoch"], self.file)

    def save_best(self, file: Path, identities: Mapping[str, str]) -> None:
        """Put the best epoch into the model and save its weights without pickles, for :meth:`load_best`.

        Decision trees, which have no tensors, are left to RecBole's own file.
        """
        model = self.trainer.model
        if self.trainer.config["MODEL_TYPE"] == ModelType.DECISIONTREE:
            return
        if self.pickles:
            best = load_recbole_checkpoint(self.trainer.saved_model_file, map_location=self.trainer.device)
            model.load_state_dict(best["state_dict"])
            model.load_other_parameter(best["other_parameter"])
        else:
            self.load_best(model, load_checkpoint(Path(self.trainer.saved_model_file))[0])
        meta = {"version": recbole_llm.__version__, "identities": dict(identities)}
        save_checkpoint(file, model_tensors(model), meta)

    @staticmethod
    def load_best(model: AbstractRecommender, tensors: Mapping[str, Tensor]) -> None:
        """Put what :meth:`save_best` saved into a model of the same configuration."""
        parts = parted({name: tensor.to(model.device) for name, tensor in tensors.items()})
        model.load_state_dict(parts["model"])
        model.load_other_parameter(parts["other"])

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}

    def _after_validation(self, epoch: int, score: float) -> None:
        trainer = self.trainer
        self.curve.append(float(score))
        weights = trainer.model.state_dict()
        if trainer.cur_step == 0:  # RecBole has just seen an improvement, or the best score again
            self.best_epoch = epoch + 1
            if self.keep_best:
                self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
        if not self.can_be_kept:
            return
        parts = {
            "model": {name: tensor.clone() for name, tensor in weights.items()},  # some models tie theirs
            "optimizer": optimizer_tensors(trainer.optimizer, self._names()),
            "rng": rng_state(),
            "best": self.best,
            "rows": {"generator": self.train_data.generator.get_state()},
        }
        meta = {
            "version": recbole_llm.__version__,
            "identities": dict(self.identities),
            "epoch": epoch,
            "cur_step": trainer.cur_step,
            "best_valid_score": float(trainer.best_valid_score),
            "valid": {name: float(value) for name, value in trainer.best_valid_result.items()},
            "saved_model_file": Path(trainer.saved_model_file).name,
            "curve": self.curve,
            "best_epoch": self.best_epoch,
            "seconds": time.monotonic() - self._started,
        }
        save_checkpoint(self.file, joined(parts), meta)


def model_tensors(model: AbstractRecommender) -> dict[str, Tensor]:
    """All tensors of a model by name: its weights (``model/``), and those that RecBole calls other parameters."""
    others = {name: value for name, value in model.other_parameter().items() if isinstance(value, Tensor)}
    return joined({"model": {name: t.clone() for name, t in model.state_dict().items()}, "other": others})
