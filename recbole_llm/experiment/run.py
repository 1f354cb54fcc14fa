"""One run in its folder: train, evaluate, write the result."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from recbole.utils import init_logger, init_seed

from recbole_llm.comparison.analysis import VALID_ROWS_FILE
from recbole_llm.config.configurator import Config
from recbole_llm.experiment import conventional as classical
from recbole_llm.experiment.assembly import (
    Assembly,
    assemble,
    stage,
    write_configuration,
)
from recbole_llm.experiment.conventional import facts_of, named_rows
from recbole_llm.experiment.dry_run import decisions, describe
from recbole_llm.experiment.exhibits import example_prompts, gate_table
from recbole_llm.experiment.references import lens_scores, reference_columns, written_answers
from recbole_llm.experiment.result import build_result, reset_peak_memory, write_result
from recbole_llm.experiment.run_folder import RESULT_FILE
from recbole_llm.lens.fit import lens_folder
from recbole_llm.trainer.llm_trainer import LLMTrainer
from recbole_llm.utils.energy import start_meter
from recbole_llm.utils.files import write_atomically

logger = logging.getLogger(__name__)


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
    if not config.spec.is_llm:
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
