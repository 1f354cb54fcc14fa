"""One run, in RecBole's steps: config -> data -> model -> trainer -> fit -> evaluate -> result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

from recbole.utils import init_seed

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import write_configuration
from recbole_llm.experiment.base import Experiment
from recbole_llm.experiment.conventional import ConventionalExperiment
from recbole_llm.experiment.llm import LLMExperiment
from recbole_llm.experiment.result import write_result
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.files import read_json
from recbole_llm.utils.machine import reset_peak_memory
from recbole_llm.utils.run_files import RESULT_FILE
from recbole_llm.utils.text_output import start_log

logger = logging.getLogger(__name__)


def experiment_class(config: Config) -> type[Experiment]:
    """How the model of a configuration is built, trained and evaluated."""
    return LLMExperiment if config.spec.is_llm else ConventionalExperiment


def run_one(config: Config, folder: Path) -> dict:
    """Train and evaluate the one model of a configuration.

    Args:
        folder: an existing folder, which gets ``config.json``, checkpoints, ``test_rows.npz`` and ``result.json``.

    Returns:
        The content of ``result.json`` with the key ``path``; for a dry run, its text under the key ``dry_run``.

    Raises:
        CheckpointError: if there is nothing to resume, or it belongs to another run.
    """
    init_seed(config["seed"], config["reproducibility"])
    start_log(config)
    logger.info("device: %s", config["device"])
    reset_peak_memory()
    kind = experiment_class(config)
    if config["dry_run"]:
        return {"dry_run": kind.describe(kind.assemble(config, fit=False))}
    # Every kind is made of a configuration; only their common base is made of parts.
    experiment = cast(Callable[[Config, Path], Experiment], kind)(config, folder)
    processes = launched()
    try:
        if processes.is_first:
            write_configuration(folder, experiment.parts)
        if config["resume"]:
            experiment.resume()
        experiment.fit()
        experiment.evaluate()
        if not processes.is_first:
            processes.wait()
            return read_result(folder)
        result = experiment.result()
        path = write_result(folder, result, experiment.rows)
        experiment.clean_up()
        processes.wait()
    finally:
        experiment.close()
    return {**result, "path": str(path)}


def read_result(folder: Path) -> dict:
    """The result of a finished run, with ``path``."""
    path = folder / RESULT_FILE
    return {**read_json(path), "path": str(path)}
