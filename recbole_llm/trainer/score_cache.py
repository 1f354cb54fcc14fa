"""Scores of an evaluation, kept while it runs, so that an interrupted one does not start again."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from recbole_llm.utils.distributed import Processes

logger = logging.getLogger(__name__)


PROCESS = uuid.uuid4().hex
"""Tells scores of this process, whose cost is already counted, from those of earlier ones."""


class KeptScores:
    """The scores of an evaluation's batches, each under a key of its own. A context manager.

    The file is written at the first batch after every ``seconds`` seconds and when the context is left, however that
    happens. The caller removes it when it is no longer needed.

    Args:
        file: where they are kept.
        identity: of model and samples; scores of another identity are ignored.
        counts: the cost of scoring, which every batch adds to; the cost of batches that an earlier process scored is
            added when they are used.
        seconds: least time between two writings.
        processes: those that compute each batch together; the first one reads and writes the file.

    Attributes:
        seconds_before: seconds that earlier processes spent on the scores that were used.
    """

    def __init__(
        self,
        file: Path,
        identity: str,
        counts: Counter[str],
        seconds: float,
        processes: Processes | None = None,
    ) -> None:
        self.file, self.identity, self.counts, self.every = file, identity, counts, seconds
        self.processes = processes or Processes()
        self.seconds_before = 0.0
        self._scores: dict[str, Tensor] = {}
        self._costs: dict[str, dict[str, Any]] = {}
        self._unsaved = 0

    def __enter__(self) -> KeptScores:
        self._saved_at = time.monotonic()
        self._scores, self._costs = self.processes.from_first(self._load)
        return self

    def __call__(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """A batch's scores, on the CPU: the kept ones, else those that ``compute`` gives."""
        if key in self._scores:
            cost = self._costs[key]
            if self.processes.is_first and cost["process"] != PROCESS:
                self.seconds_before += cost["seconds"]
                self.counts.update(cost["counts"])
            return self._scores[key]
        started, before = time.monotonic(), Counter(self.counts)
        self._scores[key] = compute().cpu()
        counts = {name: count - before[name] for name, count in self.counts.items()}
        total = sum((Counter(of) for of in self.processes.all(counts)), Counter())
        self._costs[key] = {
            "seconds": time.monotonic() - started,
            "counts": dict(total),
            "process": PROCESS,
        }
        self._unsaved += 1
        if time.monotonic() - self._saved_at >= self.every:
            self._save()
        return self._scores[key]

    def __exit__(self, *_) -> None:
        if self._unsaved:
            self._save()

    def _load(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Scores and costs of the file, if it is there and of this model and these samples."""
        if self.file.is_file():
            try:
                scores, meta = load_checkpoint(self.file)
            except CheckpointError as error:
                logger.warning("ignoring cached scores; recomputing: %s", error)
                return {}, {}
            if meta["identity"] == self.identity:
                logger.info("scores of %d batches from %s", len(scores), self.file)
                return scores, meta["costs"]
        return {}, {}

    def _save(self) -> None:
        if not self.processes.is_first:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.file, self._scores, {"identity": self.identity, "costs": self._costs})
        self._unsaved, self._saved_at = 0, time.monotonic()


def batch_key(*columns: Tensor) -> str:
    """Hash of the columns that identify the samples of a batch."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column.cpu().numpy()).tobytes() + b"|")
    return digest.hexdigest()[:32]
