"""Training and evaluation of an LLM recommender."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from recbole.data.interaction import Interaction

from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.streams import draw_by_user
from recbole_llm.experiment import dry_run
from recbole_llm.experiment.base import Experiment
from recbole_llm.experiment.exhibits import example_prompts, gate_table
from recbole_llm.experiment.llm_assembly import LLMAssembly, assemble
from recbole_llm.experiment.references import lens_scores, reference_columns, written_answers
from recbole_llm.experiment.result import Cost
from recbole_llm.lens.fit import lens_folder
from recbole_llm.trainer.checkpoint import check_origin, load_checkpoint
from recbole_llm.trainer.llm_trainer import LLMTrainer
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.run_files import BEST_FILE
from recbole_llm.utils.timing import stage

logger = logging.getLogger(__name__)


class LLMExperiment(Experiment):
    """Training and evaluation of an LLM recommender, beside its lens and the untrained language model."""

    parts: LLMAssembly
    trainer: LLMTrainer

    def __init__(self, config: Config, folder: Path) -> None:
        processes = launched()
        parts = self.assemble(config)
        parts.identities = processes.from_first(lambda: parts.identities)  # `state` of the others differs
        trainer = LLMTrainer(
            parts.trainer_config,
            parts.model,
            run_folder=folder,
            identities=parts.identities,
            residual_samples=residual_samples(config, parts.valid),
        )
        super().__init__(parts, trainer, folder)
        if parts.lens is not None and processes.is_first:
            parts.lens.save(lens_folder(folder, parts.lens.name, parts.lens.identity))

    def resume(self) -> None:
        """Continue from ``last.safetensors``."""
        self.trainer.resume_checkpoint(self.folder)

    def fit(self) -> None:
        """Score the test samples by what the model is compared with, then tune the adapter."""
        for line in dry_run.decisions(self.parts):
            logger.info("%s", line)
        writes = launched().is_first  # the others need no references: they write no result
        self._references = reference_columns(self.parts) if self.config["read_test"] and writes else {}
        _, self.valid = self.trainer.fit(
            self.parts.train_data,
            self.parts.valid_data,
            saved=True,
            show_progress=self.config["show_progress"],
        )

    def evaluate(self) -> None:
        """Evaluate the best epoch; with ``generate`` let it write its answers, too."""
        self.parts.model.reset_work()
        super().evaluate()
        self._extra = self.parts.model.extra_results()
        if self.rows is not None and self.config["generate"]:
            with stage(self.parts.seconds, "generate"):
                self.rows["written"], self._extra["generated"] = written_answers(self.parts)

    def _columns(self, split: str) -> dict[str, np.ndarray]:
        columns = super()._columns(split)
        if split == "test":
            self.parts.seconds["test"] += self.trainer.seconds_before
            columns |= self._references
        elif self.parts.lens is not None and self.config["task"] == "ctr":
            columns["lens_score"] = lens_scores(self.parts, split)
        if self.config["lens_residual"] and "lens_score" in columns:  # only the first process has references
            alone = self.parts.model.llm_alone(columns["model_score"], columns["lens_score"])
            if alone is not None:
                columns["llm_score"] = alone
        return columns

    def counts(self) -> dict[str, int | None]:
        sizes = self.parts.sizes
        return {
            "train": sizes["train"],
            "few_shot": sizes["few_shot"],
            "valid": sizes["valid_used"],
            "test": sizes["test_used"],
            "valid_available": sizes["valid"],
            "test_available": sizes["test"],
        }

    def cost(self) -> Cost:
        trainer = self.trainer
        tuned = trainer.tokens["train"]
        return Cost(
            seconds={**self.parts.seconds, **trainer.seconds},
            tokens_per_second=tuned / trainer.seconds["train"] if tuned else None,
        )

    def extra(self) -> dict[str, Any]:
        parts, read_test = self.parts, self.config["read_test"]
        return {
            "identities": parts.identities,
            "prompts_shortened": parts.model.counts["prompts_shortened"],
            "tokens": sum(self.trainer.tokens.values()),
            "gates": gate_table(parts) if read_test else None,
            "examples": example_prompts(parts) if read_test else [],
            "trained_on": self.trainer.trained_on,
            "trained_parameters": {
                name: sum(p.numel() for p in group.values())
                for name, group in parts.model.parameter_groups().items()
            },
            **self._extra,
        }

    def clean_up(self) -> None:
        """Remove the scores of single batches, which are all in the result."""
        shutil.rmtree(self.trainer.scores_folder, ignore_errors=True)

    # ------------------------------------------------------------------ assembly

    @classmethod
    def describe(cls, parts: LLMAssembly) -> str:
        return dry_run.describe(parts)

    @classmethod
    def load_trained(cls, parts: LLMAssembly, folder: Path) -> None:
        tensors, meta = load_checkpoint(folder / BEST_FILE)
        check_origin(folder, meta["identities"], parts.identities)
        parts.model.load_trained_state(tensors)

    @classmethod
    def assemble(cls, config: Config, *, fit: bool = True, saved: Path | None = None) -> LLMAssembly:
        return assemble(config, fit=fit, saved=saved)


def residual_samples(config: Config, valid: HistoryDataset) -> Interaction | None:
    """The validation samples that ``residual_rows`` draws, of whole users as far as possible; ``None``: none."""
    size = config["residual_rows"]
    if not config["lens_residual"] or size is None:
        return None
    users = valid.inter_feat[valid.uid_field].numpy()
    return valid[draw_by_user(users, min(size, len(valid)), config["eval_seed"], "residual_rows")]
