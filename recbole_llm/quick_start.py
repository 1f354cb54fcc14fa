"""RecBole's quick start with language models: train one model, compare several, load a finished run.

One run is config -> data -> model -> trainer -> fit -> evaluate -> result (:func:`recbole_llm.experiment.run.run_one`),
for LLM recommenders and conventional models alike.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from recbole_llm.comparison import plan as compare
from recbole_llm.comparison.report import report
from recbole_llm.comparison.running import check_folder, run_all, run_comparison
from recbole_llm.comparison.search import search
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import Assembly
from recbole_llm.experiment.loading import load_run
from recbole_llm.experiment.run import read_result, run_one
from recbole_llm.experiment.run_folder import open_run_folder
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.run_files import RESULT_FILE
from recbole_llm.utils.text_output import start_log

logger = logging.getLogger(__name__)


def run_recbole_llm(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    cmd_line: list[str] | None = None,
) -> dict[str, Any]:
    """Train and evaluate one model on one dataset.

    For example ``run_recbole_llm("RecLoRA", "ml-100k", config_dict={"epochs": 1})``.

    Args:
        model: name of a built-in model, of one of RecBole's, or of one that an installed package registers under the
            entry point group ``recbole_llm.models``; or a class, such as your own subclass of
            :class:`recbole_llm.model.answer_ctr.AnswerCTR`. ``None`` if the configuration names it.
        dataset: name of the dataset's folder and files; likewise.
        config_file_list: yaml files, later ones win.
        config_dict: parameters; win over files.
        cmd_line: ``--key=value`` arguments; win over everything.

    Returns:
        The content of ``result.json`` (see :mod:`recbole_llm.experiment.result`) with the key ``path``; for a dry run,
        its text under the key ``dry_run``.

    Raises:
        ValueError: for keys, values and data that cannot work; the message names the remedy.
        OSError: if a file is missing or a folder cannot be written.
    """
    config = Config(
        model=model,
        dataset=dataset,
        config_file_list=config_file_list,
        config_dict=config_dict,
        cmd_line=cmd_line,
    )
    if config["nproc"] > 1 and not config["world_size"]:
        raise ValueError(
            f"nproc: {config['nproc']} spreads the runs of a comparison (--model=A,B or --seeds=N) over processes, and "
            "this is one run"
        )
    processes = launched()
    folder = processes.from_first(lambda: open_run_folder(config))
    others = [] if processes.several else compare.check_models(config, folder)
    if processes.several and config["compare_with"]:
        logger.warning("compare_with is left out: the %d processes train one model", processes.count)
    if config["resume"] and (folder / RESULT_FILE).is_file() and others:
        logger.info("%s is finished, continuing with the models to compare with", folder)
        result = read_result(folder)
    else:
        result = run_one(config, folder)
    if not others or "dry_run" in result:
        return result
    try:
        failed = run_all(others)
    except KeyboardInterrupt:
        logger.warning("interrupted; finished runs are kept: repeat the command with --resume=%s", folder)
        raise
    results = [result, *(read_result(run.folder) for run in others if run.finished)]
    return {**result, "compared": results, "comparison": report(folder, failed)}


def compare_models(
    models: list[str],
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    cmd_line: list[str] | None = None,
) -> dict[str, Any]:
    """Train and evaluate several models, with several seeds, on the same samples; write the report.

    Args:
        models: names of models, each possibly with changes, ``"RecLoRA gate=uniform"``.
        dataset, config_file_list, config_dict, cmd_line: as of :func:`run_recbole_llm`, for all models.

    Returns:
        The comparison (see :mod:`recbole_llm.comparison.analysis`) with ``files``, the report's paths; for a dry run,
        what would be run, under the key ``dry_run``.
    """
    if (count := launched().count) > 1:
        raise ValueError(
            f"torchrun has started {count} processes, which train one model together; for the runs of a comparison "
            "side by side start it without torchrun, with nproc"
        )
    plan = compare.make_plan(models, dataset, config_file_list, config_dict, cmd_line)
    if plan.first["dry_run"]:
        return {"dry_run": compare.describe(plan)}
    start_log(plan.first)
    if plan.first["search"]:
        check_folder(plan)
        plan = plan.with_values(search(plan))
    arguments = [f"--model={','.join(models)!r}", f"--dataset={plan.first.dataset}", *(cmd_line or [])]
    arguments += [f"--config_files={' '.join(map(str, config_file_list))!r}"] if config_file_list else []
    return run_comparison(plan, f"python run_recbole_llm.py {' '.join(arguments)}")


def load_data_and_model(
    run_folder: str | Path, device: str | None = None, model: type | None = None, **changes: Any
) -> Assembly:
    """Rebuild a finished run, of an LLM recommender or a conventional model: its data and its best model.

    ``run.model.predict(interaction)`` and ``run.model.full_sort_predict(interaction)`` take batches of the loaders, and
    also ``Interaction({"user_id": ..., "item_id": ...})``, or ``{"user_id": ...}`` for the scores of all items
    ``[B, n_items]``. Such a pair is scored after all interactions of the user in the data, those of the test split
    included. ``run.dataset.token2id("user_id", "42")`` gives the internal id of a token.

    Args:
        run_folder: the folder that holds ``config.json`` and ``best.safetensors``.
        device: where to put it; by default the device is chosen again, as ``auto``.
        model: the class, where the run was made with a class that no name stands for.
        **changes: configuration values to change, e.g. ``data_path`` or ``eval_rows``.

    Returns:
        ``config``, ``dataset``, ``model``, ``train_data``, ``valid_data`` and ``test_data``, RecBole's usual objects,
        and what else the run is made of.

    Raises:
        CheckpointError: if model, backbone, lens or data are not those of the checkpoint.
    """
    return load_run(Path(run_folder), model=model, device=device, changes=changes)
