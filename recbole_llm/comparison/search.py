"""Hyper-parameters by search on validation samples: the same number of trials per model, test samples unread.

A space is one of RecBole's ``.hyper`` files, a line per key::

    learning_rate choice [0.01, 0.001]
    dropout_prob uniform 0.0,0.5
    weight_decay loguniform -12,-4          between exp(-12) and exp(-4), as in RecBole
    train_batch_size quniform 32,256,32     the multiples of 32 from 32 to 256

RecBole's own search imports ray and hyperopt and reads the test samples in every trial. Here settings are drawn at
random (Bergstra & Bengio, JMLR 13, 2012), or all of them are tried where the grid is not larger than the number of
trials; every trial is a run that can be resumed; and ``search.json`` lists the trials and how often test samples were
read.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats
from sklearn.model_selection import ParameterGrid, ParameterSampler

from recbole_llm.comparison.plan import Plan, PlannedRun, plan_run
from recbole_llm.comparison.running import run_all
from recbole_llm.config.command_line import parse_model, parse_value, slug
from recbole_llm.utils.files import read_json, write_json
from recbole_llm.utils.names import nearest
from recbole_llm.utils.run_files import RESULT_FILE

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.json"
FOLDER = "search"
LARGEST_LOG = 700.0
"""Of a loguniform bound: its exponential is still a number."""
MOST_STEPS = 100_000
"""Of a quniform parameter."""
KINDS = {"choice": None, "uniform": 2, "loguniform": 2, "quniform": 3}
"""Kinds of a line, and how many numbers each needs."""
Space = dict[str, Any]
"""Key -> a list of values, or a distribution of scipy."""


def read_space(file: Path) -> Space:
    """The space in a ``.hyper`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of what cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"search: there is no file {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    space: Space = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        where = f"{file}, line {number}: {text!r}"
        parts = text.split(None, 2)
        if len(parts) < 3 or parts[1] not in KINDS:
            raise ValueError(f"{where} is not 'key kind values' with a kind of {', '.join(KINDS)}")
        key, kind, values = parts
        if key in space:
            raise ValueError(f"{where}: {key} is given twice")
        if kind == "choice":
            space[key] = parse_value(values)
            if not isinstance(space[key], (list, tuple)) or not space[key]:
                raise ValueError(f"{where}: choice needs a list, such as [0.01, 0.001]")
            continue
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != KINDS[kind] or numbers[0] > numbers[1] or (kind == "quniform" and numbers[2] <= 0):
            form = "low,high,step" if kind == "quniform" else "low,high"
            raise ValueError(f"{where}: {kind} needs numbers {form}")
        if not all(map(math.isfinite, numbers)) or (
            kind == "loguniform" and max(map(abs, numbers)) > LARGEST_LOG
        ):
            raise ValueError(f"{where}: these numbers are too large (loguniform takes natural logarithms)")
        if kind == "quniform" and (numbers[1] - numbers[0]) / numbers[2] > MOST_STEPS:
            raise ValueError(f"{where}: there are more than {MOST_STEPS:,} steps between low and high")
        space[key] = _distribution(kind, *numbers)
        if isinstance(space[key], list) and not space[key]:
            raise ValueError(f"{where}: there is no multiple of the step between low and high")
    if not space:
        raise ValueError(f"{file} names no hyper-parameter to search")
    return space


def _distribution(kind: str, low: float, high: float, step: float = 0) -> Any:
    if kind == "quniform":
        multiples = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        return [int(n * step) if step.is_integer() else round(n * step, 12) for n in multiples]
    if low == high:
        return [math.exp(low) if kind == "loguniform" else low]
    return (
        stats.uniform(low, high - low)
        if kind == "uniform"
        else stats.loguniform(math.exp(low), math.exp(high))
    )


def draw_trials(space: Space, trials: int, seed: int, name: str) -> list[dict[str, Any]]:
    """Settings to try, all different: the whole grid if it is not larger than ``trials``, else a draw.

    Args:
        space: the parameters.
        trials: how many, at most.
        name: of the model, so that the draws of two models differ.
    """
    listed = all(isinstance(values, (list, tuple)) for values in space.values())
    if listed and len(ParameterGrid(space)) <= trials:
        return list(ParameterGrid(space))
    draws = ParameterSampler(space, trials, random_state=zlib.crc32(f"{seed} {name}".encode()))
    found: list[dict[str, Any]] = []
    for draw in draws:
        values = {
            key: draw[key] if isinstance(space[key], (list, tuple)) else float(draw[key]) for key in space
        }
        if values not in found:
            found.append(values)
    return found


def space_for(path: str, name: str) -> Space | None:
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


def search(plan: Plan) -> dict[str, dict[str, Any]]:
    """Choose the settings of every model of a comparison on validation samples.

    Trials use the comparison's first seed. Interrupted, the same command resumes.

    Args:
        plan: the comparison; its first configuration has ``search``, ``trials`` and ``nproc``, the processes that
            the trials of all models share.

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
    failed = {f["name"]: f["error"] for f in run_all(trials, first["nproc"])}
    report, chosen = {}, {}
    for text, (settings, runs) in planned.items():
        tried = []
        for values, run in zip(settings, runs, strict=True):
            entry: dict[str, Any] = {"values": values, "folder": str(run.folder.relative_to(plan.folder))}
            if run.finished:
                result = read_json(run.folder / RESULT_FILE)
                metric = result.get("topk", first)["valid_metric"]  # where the catalogue is smaller than topk
                entry["valid"] = result["metrics"]["valid"][metric.lower()]
            else:
                entry["error"] = failed.get(run.text, "has no result")
            tried.append(entry)
        scored = [entry for entry in tried if "valid" in entry]
        if not scored:
            raise ValueError(f"search: every trial of {text} failed, e.g. {tried[0]['error']}")
        best = (max if first["valid_metric_bigger"] else min)(scored, key=lambda entry: entry["valid"])
        chosen[text] = best["values"]
        report[text] = {"chosen": best["values"], "valid": best["valid"], "trials": tried}
        logger.info("search: %s: %s, %s %.4f on validation samples, the best of %d trials", text, best["values"],
                    first["valid_metric"], best["valid"], len(scored))  # fmt: skip
    write_json(
        plan.folder / SEARCH_FILE,
        {"valid_metric": first["valid_metric"], "reads_of_test_rows": 0, "models": report},
    )
    return chosen


def trial_runs(plan: Plan, run: PlannedRun, settings: Sequence[Mapping[str, Any]]) -> list[PlannedRun]:
    """A run for every setting, all configurations checked; none reads the test samples."""
    runs = []
    for number, values in enumerate(settings):
        given = {**plan.given[run.text], "read_test": False, **values}
        folder = plan.folder / FOLDER / slug(run.text) / f"trial-{number:03d}"
        trial = plan_run(plan.first, run.text, given, folder, name=f"{run.text}, trial {number}")
        overridden = [key for key, value in values.items() if trial.config[key] != value]
        if overridden:
            raise ValueError(
                f"search: {run.text} already sets {', '.join(overridden)}, which its space is to search"
            )
        runs.append(trial)
    return runs
