"""Hyper-parameters by search on validation rows: the same number of trials for each model, test rows unread.

A space is one of RecBole's ``.hyper`` files, a line per key::

    learning_rate choice [0.01, 0.001]
    dropout_prob uniform 0.0,0.5
    weight_decay loguniform -12,-4          between exp(-12) and exp(-4), as in RecBole
    train_batch_size quniform 32,256,32     in steps of 32

RecBole's own search imports ray and hyperopt and reads the test rows in every trial. Here settings are drawn at random
(Bergstra & Bengio, JMLR 13, 2012), or all of them are tried where the grid is not larger than the number of trials;
every trial is a run that can be resumed; and ``search.json`` says what was tried and how often test rows were read.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.comparison.plan import Plan, PlannedRun, config_for, run_all
from recbole_llm.config.command_line import parse_model, parse_value, slug
from recbole_llm.config.configurator import Config
from recbole_llm.utils.files import write_json
from recbole_llm.utils.names import nearest
from recbole_llm.utils.run_files import RESULT_FILE

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.json"
FOLDER = "search"
KINDS = {"choice": None, "uniform": 2, "loguniform": 2, "quniform": 3}
"""Kinds of a line, and how many numbers each needs."""


@dataclass(frozen=True)
class Parameter:
    """One line of a space.

    Attributes:
        values: the list of a ``choice``, else the numbers of the line.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    def draw(self, generator: np.random.Generator) -> Any:
        """A value by chance."""
        if self.kind == "choice":
            return self.values[generator.integers(len(self.values))]
        low, high = self.values[:2]
        if self.kind == "loguniform":
            return math.exp(generator.uniform(low, high))
        value = generator.uniform(low, high)
        if self.kind == "uniform":
            return value
        step = self.values[2]
        value = min(max(round(value / step) * step, low), high)
        return int(value) if all(float(number).is_integer() for number in self.values) else value


def read_space(file: Path) -> list[Parameter]:
    """The space in a ``.hyper`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of what cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"search: there is no file {file}")
    space = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        where = f"{file}, line {number}: {text!r}"
        parts = text.split(None, 2)
        if len(parts) < 3 or parts[1] not in KINDS:
            raise ValueError(f"{where} is not 'key kind values' with a kind of {', '.join(KINDS)}")
        key, kind, values = parts
        if kind == "choice":
            found = parse_value(values)
            if not isinstance(found, (list, tuple)) or not found:
                raise ValueError(f"{where}: choice needs a list, such as [0.01, 0.001]")
        else:
            try:
                found = [float(value) for value in values.split(",")]
            except ValueError:
                found = []
            if len(found) != KINDS[kind] or found[0] > found[1] or (kind == "quniform" and found[2] <= 0):
                form = "low,high,step" if kind == "quniform" else "low,high"
                raise ValueError(f"{where}: {kind} needs numbers {form}")
        if any(parameter.key == key for parameter in space):
            raise ValueError(f"{where}: {key} stands there twice")
        space.append(Parameter(key, kind, tuple(found)))
    if not space:
        raise ValueError(f"{file} names no hyper-parameter to search")
    return space


def draw_trials(space: Sequence[Parameter], trials: int, seed: int, name: str) -> list[dict[str, Any]]:
    """Settings to try, all different: the whole grid if it is not larger than ``trials``, else a draw.

    Args:
        space: the parameters.
        trials: how many, at most.
        seed: of the draw.
        name: of the model, so that two models draw apart.
    """
    if all(parameter.kind == "choice" for parameter in space):
        size = math.prod(len(parameter.values) for parameter in space)
        if size <= trials:
            grid = itertools.product(*(parameter.values for parameter in space))
            return [dict(zip((p.key for p in space), values, strict=True)) for values in grid]
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    found: list[dict[str, Any]] = []
    for _ in range(100 * trials):  # a small space may not have as many
        drawn = {parameter.key: parameter.draw(generator) for parameter in space}
        if drawn not in found:
            found.append(drawn)
        if len(found) == trials:
            break
    return found


def space_for(path: str, name: str) -> list[Parameter] | None:
    """The space of a model: of the file ``path``, or of ``path/NAME.hyper``; ``None`` if the folder has none."""
    where = Path(path)
    if where.is_dir():
        files = {file.stem: file for file in where.glob("*.hyper")}
        if name not in files:
            near = nearest(name, files, 1)
            logger.warning(
                "search: %s holds no %s.hyper%s: %s keeps its defaults",
                where, name, f" (but {near[0]}.hyper)" if near else "", name,
            )  # fmt: skip
            return None
        where = files[name]
    return read_space(where)


def search(plan: Plan, run_one: Callable[[Config, Path], dict]) -> dict[str, dict[str, Any]]:
    """Choose the settings of every model of a comparison on validation rows.

    Trials use the comparison's first seed. Interrupted, the same command goes on.

    Args:
        plan: the comparison; its first configuration has ``search``, ``trials`` and ``nproc``, of which the trials of
            all models make use together.
        run_one: trains one configuration in a given folder.

    Returns:
        By model, the values chosen; none for a model without a space. Also written to ``search.json``.

    Raises:
        ValueError: for a space that cannot be read, or if every trial of a model failed.
    """
    first = plan.first
    planned = {}
    for text in plan.models:
        name = parse_model(text)[0]
        space = space_for(first["search"], name)
        if space is None:
            continue
        run = next(run for run in plan.runs if run.text == text)
        if not run.config["eval_step"]:
            raise ValueError(
                f"search: {text} has eval_step: 0, so there is nothing to choose by; set eval_step: 1"
            )
        settings = draw_trials(space, first["trials"], first["seed"], text)
        planned[text] = settings, trial_runs(plan, run, settings)

    trials = [run for _, runs in planned.values() for run in runs]
    failed = {f["name"]: f["error"] for f in run_all(trials, run_one, first["nproc"])}
    report, chosen = {}, {}
    for text, (settings, runs) in planned.items():
        tried = []
        for values, run in zip(settings, runs, strict=True):
            entry = {"values": values, "folder": str(run.folder.relative_to(plan.folder))}
            if run.finished:
                result = json.loads((run.folder / RESULT_FILE).read_text(encoding="utf-8"))
                entry["valid"] = result["metrics"]["valid"][first["valid_metric"].lower()]
            else:
                entry["error"] = failed.get(run.text, "has no result")
            tried.append(entry)
        scored = [entry for entry in tried if "valid" in entry]
        if not scored:
            raise ValueError(f"search: every trial of {text} failed, e.g. {tried[0]['error']}")
        best = (max if first["valid_metric_bigger"] else min)(scored, key=lambda entry: entry["valid"])
        chosen[text] = best["values"]
        report[text] = {"chosen": best["values"], "valid": best["valid"], "trials": tried}
        logger.info("search: %s: %s, %s %.4f on validation rows, the best of %d trials", text, best["values"],
                    first["valid_metric"], best["valid"], len(scored))  # fmt: skip
    write_json(
        plan.folder / SEARCH_FILE,
        {"valid_metric": first["valid_metric"], "reads_of_test_rows": 0, "models": report},
    )
    return chosen


def trial_runs(plan: Plan, run: PlannedRun, settings: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """A run for every setting, all configurations checked; none reads the test rows."""
    given = {**plan.given[run.text], "read_test": False}
    runs = []
    for number, values in enumerate(settings):
        folder = plan.folder / FOLDER / slug(run.text) / f"trial-{number:03d}"
        config = config_for(plan.first, run.text, {**given, **values}, folder)
        overridden = [key for key, value in values.items() if config[key] != value]
        if overridden:
            raise ValueError(
                f"search: {run.text} already sets {', '.join(overridden)}, which its space is to search"
            )
        runs.append(PlannedRun(f"{run.text}, trial {number}", config, folder))
    return runs
