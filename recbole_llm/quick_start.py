"""From a configuration to a result: the one path behind the command line.

    config -> data -> lens -> model -> trainer -> evaluator -> result.json and a table

RecBole's own models take the same path with RecBole's own dataset, loaders and trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from recbole.utils import init_logger, init_seed

from recbole_llm.comparison import plan as compare
from recbole_llm.comparison.analysis import VALID_ROWS_FILE
from recbole_llm.comparison.report import terminal_table
from recbole_llm.comparison.search import search
from recbole_llm.config.configurator import Config
from recbole_llm.experiment import conventional as classical
from recbole_llm.experiment.assembly import (
    CONFIG_FILE,
    Assembly,
    assemble,
    lasting_configuration,
    stage,
    write_configuration,
)
from recbole_llm.experiment.conventional import facts_of, named_rows
from recbole_llm.experiment.dry_run import decisions, describe
from recbole_llm.experiment.exhibits import example_prompts, gate_table
from recbole_llm.experiment.references import lens_scores, reference_columns, written_answers
from recbole_llm.experiment.result import build_result, reset_peak_memory, result_table, write_result
from recbole_llm.lens.fit import lens_folder
from recbole_llm.trainer.checkpoint import LAST_FILE, CheckpointError, load_checkpoint
from recbole_llm.trainer.llm_trainer import LLMTrainer
from recbole_llm.utils.energy import start_meter
from recbole_llm.utils.files import write_atomically

logger = logging.getLogger(__name__)

FREE_BYTES_NEEDED = 1 << 30
RESULT_FILE = "result.json"


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


def read_result(folder: Path) -> dict:
    """The result of a finished run, with ``path``."""
    path = folder / RESULT_FILE
    return {**json.loads(path.read_text(encoding="utf-8")), "path": str(path)}


def run_one(config: Config, folder: Path) -> dict:
    """Train and evaluate the one model of a configuration in an existing folder."""
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    logger.info("device: %s", config["device"])
    reset_peak_memory()
    start_meter(None if config["resume"] or config["dry_run"] else config["device"])
    if not config.is_own:
        return classical.run(config, folder)
    if config["dry_run"]:
        return {"dry_run": describe(assemble(config, fit=False))}
    return _train_and_evaluate(config, folder)


def _train_and_evaluate(config: Config, run_folder: Path) -> dict:
    parts = assemble(config)
    trainer = LLMTrainer(config, parts.model, run_folder=run_folder, identities=parts.identities)
    write_configuration(run_folder, config)
    if parts.lens is not None:
        parts.lens.save(lens_folder(run_folder, parts.lens.name, parts.lens.identity))
    if config["resume"]:
        trainer.resume_checkpoint(run_folder)
    for line in decisions(parts):
        logger.info("%s", line)

    references = reference_columns(parts) if config["read_test"] else {}
    _, valid_metrics = trainer.fit(
        parts.train_data, parts.valid_data, saved=True, show_progress=config["show_progress"]
    )
    parts.model.reset_work()
    test_metrics = rows = None
    if config["read_test"]:
        with stage(parts.seconds, "test"):
            test_metrics = trainer.evaluate(parts.test_data, show_progress=config["show_progress"])
        parts.seconds["test"] += trainer.seconds_before
        rows = {**named_rows(parts.dataset, trainer.eval_collector.rows()), **references}
        rows |= facts_of(rows, parts.test, parts.full_train)
    if config["score_valid"]:
        with stage(parts.seconds, "score_valid"):
            save_valid_scores(parts, trainer, run_folder)
    extra = parts.model.extra_results()
    if config["generate"] and config["read_test"]:
        with stage(parts.seconds, "generate"):
            rows["written"], extra["generated"] = written_answers(parts)
    lens, sizes, tuned = parts.lens, parts.sizes, trainer.tokens["train"]
    result = build_result(
        model=config["model"],
        name=config["run_name"],
        dataset=config["dataset"],
        task=config["task"],
        seed=config["seed"],
        device=config["device"],
        config=config.as_dict(),
        row_counts={
            "train": sizes["train"],
            "few_shot": sizes["few_shot"],
            "valid": sizes["valid_used"],
            "test": sizes["test_used"],
            "valid_available": sizes["valid"],
            "test_available": sizes["test"],
        },
        valid=valid_metrics,
        test=test_metrics,
        rows=rows,
        backbone={
            "name": parts.backbone.name,
            "sha256": parts.backbone.sha256,
            "source": parts.backbone.source,
            "dtype": str(parts.backbone.dtype).removeprefix("torch."),
        },
        lens={"name": lens.name, "identity": lens.identity, "gate_scope": lens.gate_scope, **lens.info}
        if lens
        else None,
        eval_rows=config["eval_rows"],
        seconds={**parts.seconds, **trainer.seconds},
        tokens_per_second=tuned / trainer.seconds["train"] if tuned else None,
        bootstrap_samples=config["bootstrap_samples"],
        n_items=parts.dataset.item_num - 1,
        extra={
            "identities": parts.identities,
            "prompts_shortened": parts.model.counts["prompts_shortened"],
            "tokens": sum(trainer.tokens.values()),
            "gates": gate_table(parts) if config["read_test"] else None,
            "examples": example_prompts(parts) if config["read_test"] else [],
            "trained_on": trainer.trained_on,
            "trained_parameters": {
                name: sum(p.numel() for p in group.values())
                for name, group in parts.model.parameter_groups().items()
            },
            **extra,
        },
    )
    result = finish(result, rows, run_folder)
    shutil.rmtree(trainer.scores_folder, ignore_errors=True)  # all of them are in the result now
    return result


def save_valid_scores(parts: Assembly, trainer: LLMTrainer, run_folder: Path) -> None:
    """The scores of model and lens on the validation rows, under the names of ``test_rows.npz``."""
    trainer.evaluate(parts.valid_data, load_best_model=False, show_progress=parts.config["show_progress"])
    rows = named_rows(parts.dataset, trainer.eval_collector.rows())
    if parts.lens is not None and parts.config["task"] == "ctr":
        rows["lens_score"] = lens_scores(parts, "valid")
    write_atomically(run_folder / VALID_ROWS_FILE, lambda file: np.savez_compressed(file, **rows))


def finish(result: dict, rows: dict[str, np.ndarray] | None, run_folder: Path) -> dict:
    """Write the result; the returned copy says where."""
    return {**result, "path": str(write_result(run_folder, result, rows))}


# ---------------------------------------------------------------------- folders and saved runs


def open_run_folder(config: Config) -> Path:
    """A new, writable folder for this run, or the one to resume.

    Raises:
        OSError: if the folder cannot be written or its disk is full; checked before anything is computed.
        CheckpointError: if ``resume`` finds nothing to resume.
    """
    root = Path(config["output_dir"] or config["checkpoint_dir"])
    name = f"{config['model']}-{config['dataset']}"
    if config["dry_run"]:
        return root
    if config["resume"]:
        folder = find_run(root, name, config["resume"])
        check_same_configuration(folder, config)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise OSError(f"cannot write to the output folder {root.resolve()} (output_dir): {error}") from error
    free = shutil.disk_usage(root).free
    if free < FREE_BYTES_NEEDED:
        raise OSError(
            f"only {free / 2**20:.0f} MiB are free on the disk of the output folder {root.resolve()} (output_dir); "
            f"a run needs up to {FREE_BYTES_NEEDED / 2**20:.0f} MiB for its checkpoints"
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = root / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise OSError(f"could not find a free name for this run in {root.resolve()}")


def find_run(root: Path, name: str, resume: str | bool) -> Path:
    """The folder named by ``resume``, or (``resume: True``) the newest unfinished run of this model and dataset."""
    if resume is not True:
        folder = Path(resume)
        if not (folder / LAST_FILE).is_file():
            raise CheckpointError(f"--resume={resume}: there is no {LAST_FILE} in that folder")
        return folder
    found = sorted(root.glob(f"{name}-*/{LAST_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"--resume: no run of {name} with a checkpoint in {root.resolve()}")
    return found[-1].parent


def check_same_configuration(folder: Path, config: Config) -> None:
    """Refuse to resume under another configuration, before anything is computed.

    Raises:
        CheckpointError: naming every key that differs and can change a result.
    """
    saved, current = json.loads((folder / CONFIG_FILE).read_text()), lasting_configuration(config)
    if (
        "few_shot" not in config.origins
    ):  # a default is cut to the size of the data; the checkpoint's hash is of that
        current.pop("few_shot", None)
    different = [key for key, value in current.items() if saved.get(key) != value]
    if different:
        values = "\n  ".join(f"{key}: {saved.get(key)!r} there, {current[key]!r} here" for key in different)
        raise CheckpointError(f"the run {folder} cannot be resumed with another configuration:\n  {values}")


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
    wanted = {"model", "backbone", "lens", "data"}
    different = [key for key in sorted(wanted) if meta["identities"][key] != parts.identities[key]]
    if different:
        raise CheckpointError(f"{run_folder} was made with another {' and another '.join(different)}")
    parts.model.load_trained_state(tensors)
    parts.model.eval()
    return parts


def main(argv: list[str] | None = None) -> int:
    """The command line: ``--model --dataset --config_files`` and any ``--key=value``, as RecBole's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="run_recbole_llm.py",
        description="Train and evaluate one recommender, LLM or classical, with RecBole's data and evaluator.",
        epilog="Every other --key=value is a configuration key; see properties/overall.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", default="RecLoRA", help="name of the model (default: RecLoRA)")
    parser.add_argument("--dataset", "-d", default="ml-100k", help="name of the dataset (default: ml-100k)")
    parser.add_argument("--config_files", default="", help="yaml files, separated by spaces; later ones win")
    parser.add_argument(
        "--report", metavar="FOLDER", help="run nothing: work out the report of a comparison's folder anew"
    )
    known, rest = parser.parse_known_args(argv)
    models, files = compare.split_models(known.model), known.config_files.split() or None
    try:
        if known.report:
            result = compare.report(Path(known.report))
        elif len(models) > 1 or compare.is_comparison(files, rest):
            result = compare_models(models, known.dataset, files, cmd_line=rest)
        else:
            result = run_recbole_llm(known.model, known.dataset, files, cmd_line=rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # what was kept has been logged where it was kept
        return 130
    except (ValueError, OSError) as error:
        logger.debug("traceback of the error below", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result["dry_run"] if "dry_run" in result else report(result))
    return 1 if result.get("failed") else 0


def report(result: dict) -> str:
    """The end of a run's output: the table, and where the result is."""
    if "files" in result:
        return "\n".join([terminal_table(result), *(f"report: {path}" for path in result["files"])])
    results = result.get("compared", [result])
    if not result["metrics"]["test"]:
        valid = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"]["valid"].items())
        return f"test rows were not read (read_test: False); validation: {valid or 'none'}\nresult: {result['path']}"
    lines = [result_table(results)]
    if "comparison" in result:
        lines += [
            *result["comparison"]["sentences"],
            *(f"report: {path}" for path in result["comparison"]["files"]),
        ]
    for found in results:
        if work := found.get("scoring"):
            lines.append(
                f"{found['name']}: {work['tokens']:,} tokens computed for {work['rows']:,} rows, {work['ratio']:.2f} x "
                f"(prompt tokens {work['prompt_tokens']:,} + edges of the title trees {work['edges']:,})"
            )
        if written := found.get("generated"):
            ratios = [("ValidRatio", "valid_ratio"), ("HitRatio@1 of all rows", "hit_ratio_all")]
            ratios.append(("HitRatio@1 of valid answers", "hit_ratio_valid"))
            lines.append(
                f"{found['name']}, written answers of {written['n']:,} rows: "
                + ", ".join(f"{title} {_ratio(written['intervals'][key])}" for title, key in ratios)
            )
    return "\n".join([*lines, *(f"result: {found['path']}" for found in results)])


def _ratio(interval: dict) -> str:
    """``0.5263 [0.4211, 0.6211]``, or as much of it as there is."""
    if interval["value"] is None:
        return "undefined"
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return f"{interval['value']:.4f}{bounds}"
