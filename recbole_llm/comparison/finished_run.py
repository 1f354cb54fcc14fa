"""Finished runs as a comparison reads them: ``result.json`` and the arrays of ``test_rows.npz``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.utils.files import read_columns, read_json
from recbole_llm.utils.run_files import RESULT_FILE, TEST_ROWS_FILE


@dataclass
class FinishedRun:
    """One model with one seed.

    Attributes:
        name: of the model in the comparison; runs of one name differ by their seed.
        result: the content of ``result.json``.
        rows: the arrays of ``test_rows.npz``, sorted by ``row_id``.
    """

    name: str
    seed: int
    path: Path
    result: Mapping[str, Any]
    rows: dict[str, np.ndarray]

    @property
    def kind(self) -> str:
        """``llm`` where a language model took part in the model, else ``classical``."""
        return "llm" if self.result["backbone"] else "classical"


def load_run(folder: Path, name: str | None = None) -> FinishedRun:
    """The finished run in a folder.

    Raises:
        FileNotFoundError: if the run is not finished, or left no scores.
    """
    result_file, rows_file = folder / RESULT_FILE, folder / TEST_ROWS_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give that of a finished run or comparison")
    if not result_file.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULT_FILE}: the run is not finished")
    if not rows_file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {TEST_ROWS_FILE}: without per-sample scores this run cannot be compared; run it again"
        )
    result = read_json(result_file)
    rows = read_columns(rows_file)
    if "row_id" not in rows:
        raise ValueError(
            f"{rows_file} has no row_id: {result['model']} was not run on the samples of task ctr or next_item"
        )
    if (
        "candidates" in rows and rows["candidates"].ndim == 2
    ):  # the items; only their number is asked for here
        rows["candidates"] = np.full(len(rows["row_id"]), rows["candidates"].shape[1])
        del rows["candidate_scores"]
    order = np.argsort(rows["row_id"], kind="stable")
    rows = {column: values[order] for column, values in rows.items()}
    return FinishedRun(name or result["name"], int(result["seed"]), folder, result, rows)


def check_same_samples(runs: Sequence[FinishedRun]) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: if runs were tested on other samples or tasks, or twice with one seed.
    """
    first = runs[0]
    given = set()
    for run in runs:
        if run.result["task"] != first.result["task"]:
            raise ValueError(
                f"{run.name} is of task {run.result['task']}, {first.name} of {first.result['task']}: they "
                "cannot be compared"
            )
        for column in ("row_id", "user", "item", "label", "candidates"):
            both = [side.rows[column] for side in (run, first) if column in side.rows]
            if len(both) == 1 or (both and not np.array_equal(both[0], both[1])):
                raise ValueError(
                    f"{run.name} ({run.path}) was tested on other samples than {first.name} ({first.path}): their "
                    f"columns {column!r} differ"
                )
        if (run.name, run.seed) in given:
            raise ValueError(f"there are two runs of {run.name} with seed {run.seed}")
        given.add((run.name, run.seed))
