"""From a configuration to a result: the one path behind the command line.

    config -> data -> lens -> model -> trainer -> evaluator -> result.json and a table

RecBole's own models take the same path with RecBole's own dataset, loaders and trainer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from recbole.utils import init_logger, init_seed

from recbole_llm.comparison import plan as compare
from recbole_llm.comparison.search import search
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import (
    CONFIG_FILE,
    Assembly,
    assemble,
)
from recbole_llm.experiment.run import read_result, run_one
from recbole_llm.experiment.run_folder import RESULT_FILE, open_run_folder
from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint

logger = logging.getLogger(__name__)


def run_recbole_llm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict | None = None,
    cmd_line: list[str] | None = None,
) -> dict:
    """Train and evaluate one model on one dataset.

    Args:
        model: name of one of our models or of RecBole's; ``None`` if the configuration says it.
        dataset: name of the dataset's folder and files; likewise.
        config_file_list: yaml files, later ones win.
        config_dict: parameters; win over files.
        cmd_line: ``--key=value`` arguments; win over everything.

    Returns:
        The content of ``result.json`` (see :func:`recbole_llm.evaluation.build_result`) with the key ``path``; for a
        dry run, its text under the key ``dry_run``.
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
    folder = open_run_folder(config)
    others = compare.check_models(config, folder)
    if config["resume"] and (folder / RESULT_FILE).is_file() and others:
        logger.info("%s is finished, going on with the models to compare with", folder)
        result = read_result(folder)
    else:
        result = run_one(config, folder)
    if not others or "dry_run" in result:
        return result
    try:
        failed = compare.run_all(others, run_one)
    except KeyboardInterrupt:
        logger.warning("interrupted; what is finished is kept: repeat the command with --resume=%s", folder)
        raise
    results = [result, *(read_result(run.folder) for run in others if run.finished)]
    return {**result, "compared": results, "comparison": compare.report(folder, failed)}


def compare_models(
    models: list[str],
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict | None = None,
    cmd_line: list[str] | None = None,
) -> dict:
    """Train and evaluate several models, with several seeds, on the same rows; write the report.

    Args:
        models: names of models, each possibly with changes, ``"RecLoRA gate=uniform"``.
        dataset, config_file_list, config_dict, cmd_line: as of :func:`run_recbole_llm`, for all models.

    Returns:
        The comparison (see :mod:`recbole_llm.comparison.analysis`) with ``files``, the report's paths; for a dry run,
        what would be run, under the key ``dry_run``.
    """
    plan = compare.make_plan(models, dataset, config_file_list, config_dict, cmd_line)
    if plan.first["dry_run"]:
        return {"dry_run": compare.describe(plan)}
    init_logger(plan.first)
    if plan.first["search"]:
        compare.check_folder(plan)
        plan = plan.with_values(search(plan, run_one))
    arguments = [f"--model={','.join(models)!r}", f"--dataset={plan.first.dataset}", *(cmd_line or [])]
    arguments += [f"--config_files={' '.join(map(str, config_file_list))!r}"] if config_file_list else []
    arguments = " ".join(arguments)
    return compare.run_comparison(plan, run_one, f"python run_recbole_llm.py {arguments}")


def load_data_and_model(run_folder: str | Path, device: str | None = None, **changes) -> Assembly:
    """Rebuild a finished run: its data, its prompts and its best model, ready to predict.

    Args:
        run_folder: the folder that holds ``config.json`` and ``best.safetensors``.
        device: where to put it; by default the device is chosen anew, as ``auto``.
        **changes: configuration values to change, e.g. ``data_path`` or ``eval_rows``.

    Returns:
        The assembly, whose ``model``, ``train_data``, ``valid_data`` and ``test_data`` are RecBole's usual objects.

    Raises:
        CheckpointError: if backbone, lens or data are not those of the checkpoint.
    """
    run_folder = Path(run_folder)
    tensors, meta = load_checkpoint(run_folder / "best.safetensors")
    saved = json.loads((run_folder / CONFIG_FILE).read_text())
    config = Config.from_dict({**saved, "device": device or "auto", "resume": None, **changes})
    init_seed(config["seed"], config["reproducibility"])
    parts = assemble(config, lens_root=run_folder, warm_start=False)
    wanted = {"model", "backbone", "lens", "data", *parts.prompts.identities()}
    different = [key for key in sorted(wanted) if meta["identities"].get(key) != parts.identities[key]]
    if different:
        raise CheckpointError(f"{run_folder} was made with another {' and another '.join(different)}")
    parts.model.load_trained_state(tensors)
    parts.model.eval()
    return parts
