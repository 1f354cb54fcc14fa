"""What every run does: fit, evaluate, result. LLM recommenders and conventional models fill in the steps."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from recbole.data.dataset import Dataset
from recbole.trainer import Trainer

from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.experiment.assembly import Assembly
from recbole_llm.experiment.result import Cost, Evaluation, build_result
from recbole_llm.experiment.splits import ranked_items
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.files import write_atomically
from recbole_llm.utils.run_files import VALID_ROWS_FILE
from recbole_llm.utils.timing import stage

logger = logging.getLogger(__name__)


class Experiment(ABC):
    """One run in its folder.

        experiment = LLMExperiment(config, folder)      # data, model, trainer
        experiment.resume()                             # only to continue an interrupted run
        experiment.fit()
        experiment.evaluate()
        result = experiment.result()

    Attributes:
        parts: data, model and loaders.
        trainer: RecBole's, or built on it.
        valid, test: metrics of the best epoch by RecBole's evaluator; ``test`` is ``None`` until evaluated, and without
            ``read_test``.
        rows: the columns of ``test_rows.npz``; ``None`` where the protocol leaves none.
    """

    parts: Assembly
    trainer: Trainer
    keeps_rows: bool = True
    reads_best: bool = True
    """Whether the test reads the best epoch from the trainer's file; if not, the model has it after `fit`."""

    def __init__(self, parts: Assembly, trainer: Trainer, folder: Path) -> None:
        self.parts, self.trainer, self.folder = parts, trainer, folder
        self.config = parts.config
        self.valid: dict[str, float] = {}
        self.test: dict[str, float] | None = None
        self.rows: dict[str, np.ndarray] | None = None

    @classmethod
    @abstractmethod
    def assemble(cls, config: Config, *, fit: bool = True, saved: Path | None = None) -> Assembly:
        """Build everything but the trainer.

        Args:
            fit: ``False`` for dry runs: a lens has random weights instead of being trained.
            saved: the folder of a run that is loaded, which has its own copies of lens and LoRA.
        """

    @classmethod
    @abstractmethod
    def describe(cls, parts: Any) -> str:
        """What a run would do, for ``dry_run``."""

    @classmethod
    @abstractmethod
    def load_trained(cls, parts: Any, folder: Path) -> None:
        """Put the trained weights of a finished run into ``parts.model``.

        Raises:
            CheckpointError: if there are none, or they belong to other data, backbone or lens.
        """

    @abstractmethod
    def resume(self) -> None:
        """Continue from what the run's folder has.

        Raises:
            CheckpointError: if it has nothing, or belongs to another run.
        """

    @abstractmethod
    def fit(self) -> None:
        """Train, and select the best epoch on the validation samples."""

    def evaluate(self) -> None:
        """Evaluate the best epoch on the test samples; with ``score_valid`` keep the validation samples' scores too."""
        if self.config["read_test"]:
            with stage(self.parts.seconds, "test"):
                self.test = self.trainer.evaluate(
                    self.parts.test_data,
                    load_best_model=self.reads_best,
                    show_progress=self.config["show_progress"],
                )
            if self.keeps_rows:
                self.rows = self._columns("test")
                if isinstance(self.parts.test, HistoryDataset):
                    self.rows |= facts_of(self.rows, self.parts.test, self.parts.full_train)
        if self.config["score_valid"] and self.keeps_rows:
            with stage(self.parts.seconds, "score_valid"):
                self._save_valid_scores()

    def _save_valid_scores(self) -> None:
        """The scores of the validation samples, under the names of ``test_rows.npz``."""
        self.trainer.evaluate(
            self.parts.valid_data, load_best_model=False, show_progress=self.config["show_progress"]
        )
        if not launched().is_first:
            return
        columns: dict[str, Any] = self._columns("valid")
        write_atomically(
            self.folder / VALID_ROWS_FILE,
            lambda file: np.savez_compressed(file, **columns),
        )

    def _columns(self, split: str) -> dict[str, np.ndarray]:
        """The columns of the last evaluation, which was of ``split``; users and items as the dataset's tokens."""
        collector: RowCollector = self.trainer.eval_collector
        found = named(self.parts.dataset, collector.rows())
        if self.parts.candidates is None:
            found.pop("candidate_items", None)
            found.pop("candidate_scores", None)
        else:
            found["candidates"] = found.pop("candidate_items")
        return found

    def result(self) -> dict[str, Any]:
        """Everything the run leaves behind; see :mod:`recbole_llm.experiment.result`."""
        return build_result(
            self.parts.configuration(),
            Evaluation(
                counts=self.counts(),
                valid=self.valid,
                test=self.test,
                rows=self.rows,
                n_items=ranked_items(self.parts.dataset),
            ),
            self.parts.ingredients,
            self.cost(),
            facts_of_data(self.parts.dataset) | self._facts_of_topk() | self.extra(),
        )

    def _facts_of_topk(self) -> dict[str, Any]:
        """The cut-offs, where the catalogue is smaller than those asked for."""
        asked, used = self.config, self.parts.trainer_config
        if asked["topk"] == used["topk"]:
            return {}
        return {"topk": {"asked": asked["topk"], "used": used["topk"], "valid_metric": used["valid_metric"]}}

    def clean_up(self) -> None:  # noqa: B027 - most runs have nothing to remove
        """Remove what only an unfinished run needs."""

    def close(self) -> None:
        """Close what RecBole's trainer leaves open for each run: a file and a thread of TensorBoard."""
        writer = getattr(self.trainer, "tensorboard", None)
        if writer is not None:
            with suppress(OSError):  # a full disk: the error that ended the run is the one to show
                writer.close()

    @abstractmethod
    def counts(self) -> dict[str, int | None]:
        """Numbers of samples for the result's ``rows``."""

    def cost(self) -> Cost:
        """What the run took."""
        return Cost(seconds=self.parts.seconds)

    @abstractmethod
    def extra(self) -> dict[str, Any]:
        """Keys of the result that only this kind of model has."""


def facts_of_data(dataset: Dataset) -> dict[str, Any]:
    """What the result says about the data beside its sizes: what was dropped, and which items are ranked."""
    return dataset.facts() if isinstance(dataset, HistoryDataset) else {}


def named(dataset: Dataset, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Evaluated samples under the names of ``test_rows.npz``, users and items as the dataset's own tokens."""
    fields = {"user": dataset.uid_field, "item": dataset.iid_field, "candidate_items": dataset.iid_field}
    columns = {
        name: dataset.id2token(fields[name], values) if name in fields else values
        for name, values in rows.items()
    }
    value = "score" if "score" in columns else "rank"
    columns[f"model_{value}"] = columns.pop(value)
    return columns


def facts_of(
    rows: dict[str, np.ndarray], test: HistoryDataset, train: HistoryDataset
) -> dict[str, np.ndarray]:
    """:meth:`HistoryDataset.row_facts` of evaluated samples, in their order."""
    row_ids = test.inter_feat[ROW_ID].numpy()
    order = np.argsort(row_ids, kind="stable")
    place = order[np.searchsorted(row_ids[order], rows[ROW_ID])]
    return {name: values[place] for name, values in test.row_facts(train).items()}
