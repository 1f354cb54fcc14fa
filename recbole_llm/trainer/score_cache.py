"""Scores of an evaluation, kept while it goes on, so that one that was cut off does not begin anew."""

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

logger = logging.getLogger(__name__)


PROCESS = uuid.uuid4().hex
"""What is kept and used by one process has not been paid for twice."""


class KeptScores:
    """The scores of an evaluation's batches, each under a key of its own. A context.

    The file is written at the first batch after every ``seconds`` seconds and when the context is left, however that
    happens; who no longer needs it removes it.

    Args:
        file: where they are kept.
        identity: of what is scored by what, a batch apart; scores of another identity are passed over.
        counts: what scoring has cost, which every batch adds to; the cost of batches that an earlier process scored is
            added when they are used.
        seconds: least time between two writings.

    Attributes:
        seconds_before: what the scores that were used have taken in earlier processes.
    """

    def __init__(self, file: Path, identity: str, counts: Counter[str], seconds: float) -> None:
        self.file, self.identity, self.counts, self.every = file, identity, counts, seconds
        self.seconds_before = 0.0
        self._scores: dict[str, Tensor] = {}
        self._costs: dict[str, dict[str, Any]] = {}
        self._unsaved = 0

    def __enter__(self) -> KeptScores:
        self._saved_at = time.monotonic()
        if self.file.is_file():
            try:
                scores, meta = load_checkpoint(self.file)
            except CheckpointError as error:
                logger.warning("scores that were kept are computed again: %s", error)
                return self
            if meta["identity"] == self.identity:
                self._scores, self._costs = scores, meta["costs"]
                logger.info("the scores of %d batches are in %s", len(scores), self.file)
        return self

    def __call__(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """A batch's scores, on the CPU: the kept ones, else those that ``compute`` gives."""
        if key in self._scores:
            cost = self._costs[key]
            if cost["process"] != PROCESS:
                self.seconds_before += cost["seconds"]
                self.counts.update(cost["counts"])
            return self._scores[key]
        started, before = time.monotonic(), Counter(self.counts)
        self._scores[key] = compute().cpu()
        counts = {name: count - before[name] for name, count in self.counts.items()}
        self._costs[key] = {"seconds": time.monotonic() - started, "counts": counts, "process": PROCESS}
        self._unsaved += 1
        if time.monotonic() - self._saved_at >= self.every:
            self._save()
        return self._scores[key]

    def __exit__(self, *_) -> None:
        if self._unsaved:
            self._save()

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.file, self._scores, {"identity": self.identity, "costs": self._costs})
        self._unsaved, self._saved_at = 0, time.monotonic()


def batch_key(*columns: Tensor) -> str:
    """Of a batch: hash of what tells its rows apart."""
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column.cpu().numpy()).tobytes() + b"|")
    return digest.hexdigest()[:32]
