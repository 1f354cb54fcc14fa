"""Running a comparison: finished runs are not repeated, a failing one is reported and the others continue."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import recbole_llm
from recbole_llm.comparison.plan import PLAN_FILE, Plan, PlannedRun
from recbole_llm.comparison.report import report
from recbole_llm.comparison.workers import side_by_side
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import lasting_configuration
from recbole_llm.experiment.run import run_one
from recbole_llm.utils.files import read_json, write_json
from recbole_llm.utils.run_files import LAST_FILE, RESULT_FILE

logger = logging.getLogger(__name__)


def check_folder(plan: Plan) -> None:
    """Refuse a folder whose finished runs were made by another version, or with other settings.

    Raises:
        ValueError: naming the run and the keys that differ.
    """
    file = plan.folder / PLAN_FILE
    if file.is_file():
        made_by = read_json(file)["version"]
        if made_by != recbole_llm.__version__:
            raise ValueError(
                f"{plan.folder} was made by recbole_llm {made_by}, this is {recbole_llm.__version__}: choose another "
                "output_dir, or remove the folder"
            )
    for run in plan.runs:
        if run.finished:
            there = read_json(run.folder / RESULT_FILE)["config"]
            here = json.loads(json.dumps(lasting_configuration(run.config)))
            if "few_shot" not in run.config.origins:  # a default is reduced to the size of the data
                here.pop("few_shot", None)
            different = [key for key, value in here.items() if key in there and there[key] != value]
            if different:
                what = ", ".join(f"{key} {there[key]!r} there, {here[key]!r} here" for key in different[:5])
                raise ValueError(f"{run.folder} holds a run of {run} with other settings ({what}): remove it")


def run_all(runs: Sequence[PlannedRun], nproc: int = 1) -> list[dict[str, Any]]:
    """Run everything that has no result yet.

    Args:
        runs: the runs.
        nproc: how many of them side by side, each in a process of its own; 1: one after another in this process.

    Returns:
        ``{"name", "seed", "error"}`` of the runs that failed; the others have a result.
    """
    waiting = _unfinished(runs)
    outcomes = one_by_one(waiting) if nproc == 1 else side_by_side(waiting, nproc)
    failed = []
    for run, error in outcomes:
        if error is not None:
            logger.error("%s failed, the other runs continue: %s", run, error)
            failed.append({"name": run.text, "seed": run.config["seed"], "error": error})
        elif nproc > 1:
            logger.info("%s: finished", run)
    return failed


def _unfinished(runs: Sequence[PlannedRun]) -> Iterator[PlannedRun]:
    """The runs without a result, each in its turn, ready to start or to resume."""
    for number, run in enumerate(runs, 1):
        if run.finished:
            logger.info("%d of %d: %s: already finished, %s", number, len(runs), run, run.folder)
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        if (run.folder / LAST_FILE).is_file():
            values = {**run.arguments["config_dict"], "resume": str(run.folder)}
            arguments = {**run.arguments, "config_dict": values}
            run = replace(run, config=Config(**arguments), arguments=arguments)
        logger.info("%d of %d: %s, in %s", number, len(runs), run, run.folder)
        yield run


def one_by_one(runs: Iterable[PlannedRun]) -> Iterator[tuple[PlannedRun, str | None]]:
    """Run everything in this process; yields each run and why it failed, ``None`` if it did not."""
    for run in runs:
        message = None
        try:
            run_one(run.config, run.folder)
        except Exception as error:  # reported by the caller; one model must not cost the others' results
            logger.debug("traceback of the error below", exc_info=True)
            message = f"{type(error).__name__}: {error}"
        yield run, message


def run_comparison(plan: Plan, command: str = "") -> dict[str, Any]:
    """Run what is missing and report.

    Returns:
        The comparison, with ``files``: the report's paths.

    Raises:
        ValueError: for a folder that does not fit, or if every run failed.
        KeyboardInterrupt: what is finished is kept, and the same command resumes from there.
    """
    check_folder(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 1,
        "version": recbole_llm.__version__,
        "dataset": plan.first.dataset,
        "task": plan.first["task"],
        "subject": plan.subject,
        "command": command,
        "runs": [{"name": r.text, "seed": r.config["seed"], "folder": r.folder.name} for r in plan.runs],
        "samples": plan.first["bootstrap_samples"],
        "failed": [],
    }
    write_json(plan.folder / PLAN_FILE, content)
    try:
        content["failed"] = run_all(plan.runs, plan.first["nproc"])
    except KeyboardInterrupt:
        logger.warning("interrupted; finished runs are kept in %s: repeat the command to resume", plan.folder)
        raise
    write_json(plan.folder / PLAN_FILE, content)
    return report(plan.folder)
