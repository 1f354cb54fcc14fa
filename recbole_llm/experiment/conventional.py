"""RecBole's own models through our entry point: RecBole's model and trainer, and where it matters our rows.

Conventional models of ours (:mod:`recbole_llm.model.conventional`) take the same path.

Only the ends differ. With ``task: ctr`` every model runs on the very rows of our models
(:class:`recbole_llm.data.CTRDataset`; one that learns pairs of items, on the liked ones), with ``task: next_item`` on
those of the next-item task (:class:`recbole_llm.data.NextItemDataset`), and ranks the same stored candidates.
Evaluations keep their rows, and the result is written as for our models.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from recbole.data import create_samplers, data_preparation
from recbole.data.utils import get_dataloader
from recbole.utils import EvaluatorType, InputType, init_seed

from recbole_llm.config.configurator import Config, keys_read_by
from recbole_llm.data.candidates import draw_candidates
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.loading import build_splits
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.experiment.assembly import (
    bounded,
    cache_folder,
    configuration_hash,
    conventional_parts,
    eval_loader,
    few_shot_rows,
    item_counts,
    stage,
    write_configuration,
)
from recbole_llm.experiment.result import build_result, write_result
from recbole_llm.registry import create_dataset, get_trainer
from recbole_llm.trainer.checkpoint import LAST_FILE
from recbole_llm.trainer.conventional_trainer import EpochTraining

logger = logging.getLogger(__name__)


def run(config: Config, run_folder: Path) -> dict:
    """Train and evaluate a model of RecBole; see :func:`recbole_llm.quick_start.run_recbole_llm`."""
    seconds: dict[str, float] = {}
    with stage(seconds, "data"):
        dataset = create_dataset(config)
        logger.info(dataset)
        available = {}
        if isinstance(dataset, HistoryDataset):
            splits = build_splits(dataset)
            available = {"valid_available": len(splits[1]), "test_available": len(splits[2])}
            full_train = splits[0]
            train_data, valid_data, test_data = our_loaders(config, dataset, splits)
        else:
            train_data, valid_data, test_data = data_preparation(config, dataset)
    sizes = {
        name: len(data._dataset)
        for name, data in (("train", train_data), ("valid", valid_data), ("test", test_data))
    } | available
    with stage(seconds, "item_vectors"):
        arguments, backbone = conventional_parts(config, dataset)
    model_class = config.model_class
    if hasattr(model_class, "for_task"):
        model_class = model_class.for_task(config["task"])
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    model = model_class(config, train_data._dataset, **arguments).to(config["device"])
    logger.info(model)
    if config["dry_run"]:
        lines = [f"dry run: {config['model']} on {config['dataset']}", f"device: {config['device']}"]
        return {"dry_run": "\n".join([*lines, f"rows: {sizes}", str(model)])}
    config["checkpoint_dir"] = str(run_folder)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    labelled = config["eval_type"] == EvaluatorType.VALUE and config["eval_args"]["mode"]["test"] == "labeled"
    keeps_rows = labelled or config["task"] == "next_item"
    trainer.eval_collector = RowCollector(
        config
    )  # RecBole's fails on metrics that read counts: an int has no .cpu()
    if labelled and "LABEL_FIELD" not in keys_read_by(model_class):
        logger.warning(
            "%s is not trained on labels: its scores are unbounded and go through a sigmoid, so that LogLoss and "
            "ACC are defined; compare it by AUC and GAUC",
            config["model"],
        )
        unbounded = model.predict
        model.predict = lambda interaction: torch.sigmoid(unbounded(interaction).double())
    if config["epochs"] and not config["eval_step"]:
        logger.warning(
            "%s: eval_step: 0, so nothing is validated or stopped early: all %d epochs are trained, and the last one "
            "is tested; in a comparison, give eval_step to single models ('RecLoRA eval_step=0')",
            config["model"],
            config["epochs"],
        )
    show = config["show_progress"]
    training = EpochTraining(
        trainer,
        train_data,
        run_folder / LAST_FILE,
        {"configuration": configuration_hash(config), "data": data_hash(train_data._dataset)},
        how_to_go_on=f"repeat the command with --resume={run_folder}",
    )
    write_configuration(run_folder, config)
    if config["resume"]:
        training.load()
    seconds["fit"] = training.seconds
    with stage(seconds, "fit"):
        training.fit(valid_data, show_progress=show)
        valid = training.valid
        if not config["epochs"]:  # validated as it is
            valid = trainer.evaluate(valid_data, load_best_model=False, show_progress=show)
    test = rows = None
    if config["read_test"]:
        with stage(seconds, "test"):
            test = trainer.evaluate(test_data, load_best_model=True, show_progress=show)
        rows = named_rows(dataset, trainer.eval_collector.rows()) if keeps_rows else None
    if rows is not None and isinstance(dataset, HistoryDataset):
        rows |= facts_of(rows, test_data._dataset, full_train)
    result = build_result(
        model=config["model"],
        name=config["run_name"],
        dataset=config["dataset"],
        task=config["task"] or "recbole",
        seed=config["seed"],
        device=config["device"],
        config=config.as_dict(),
        row_counts={**sizes, "few_shot": sizes["train"] if config["train_rows"] == "few_shot" else None},
        valid=valid,
        test=test,
        rows=rows,
        backbone=backbone,
        eval_rows=config["eval_rows"],
        seconds=seconds,
        bootstrap_samples=config["bootstrap_samples"],
        n_items=int(dataset.ranked_items.sum())
        if isinstance(dataset, HistoryDataset)
        else dataset.item_num - 1,
        extra={
            **(dataset.facts() if isinstance(dataset, HistoryDataset) else {}),
            "trained_parameters": {"model": sum(p.numel() for p in model.parameters() if p.requires_grad)},
        },
    )
    return {**result, "path": str(write_result(run_folder, result, rows))}


def data_hash(rows) -> str:
    """Sha256 of training rows, in their order."""
    if isinstance(rows, HistoryDataset):
        return rows.content_hash()
    digest = hashlib.sha256()
    for name, column in sorted(rows.inter_feat.interaction.items()):
        digest.update(name.encode() + column.numpy().tobytes())
    return digest.hexdigest()


def our_loaders(config: Config, dataset: HistoryDataset, splits: list[HistoryDataset]) -> tuple:
    """Train, validation and test loaders on the rows, and with the candidates, of our own models.

    Validation is on all validation rows, as it is cheap here; testing is on the rows that ``eval_rows`` leaves.

    Raises:
        ValueError: for candidates that only a lens can choose.
    """
    ranks_candidates = config["task"] == "next_item" and config["eval_mode"] == "candidates"
    if ranks_candidates and config["negatives"] == "hard":
        raise ValueError(
            f"negatives: hard are chosen by a lens, and {config['model']} is run without one; set negatives: uniform "
            "or popularity"
        )
    train, valid, test = splits[0], splits[1], bounded(config, splits[2], "test")
    if config["train_rows"] == "few_shot":
        train = few_shot_rows(config, train)
    if config["task"] == "ctr" and config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE:
        train = train.liked()
    train_sampler, *_ = create_samplers(config, dataset, [train, *splits[1:]])
    train_data = get_dataloader(config, "train")(config, train, train_sampler, shuffle=True)
    loaders = []
    for name, rows in (("valid", valid), ("test", test)):
        candidates = None
        if ranks_candidates:
            candidates = draw_candidates(
                rows,
                num_negatives=config["num_negatives"],
                kind=config["negatives"],
                seed=config["candidate_seed"],
                purpose=name,
                item_counts=item_counts(splits[0]),
                allowed=rows.ranked_items,
                cache_dir=cache_folder(config),
            )
        loaders.append(eval_loader(config, dataset, rows, candidates, name))
    return train_data, *loaders


def named_rows(dataset, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The evaluated rows under the names of ``test_rows.npz``, users and items as the dataset's own tokens."""
    named = {
        **rows,
        "user": dataset.id2token(dataset.uid_field, rows["user"]),
        "item": dataset.id2token(dataset.iid_field, rows["item"]),
    }
    column = "score" if "score" in named else "rank"
    named[f"model_{column}"] = named.pop(column)
    return named


def facts_of(
    rows: dict[str, np.ndarray], test: HistoryDataset, train: HistoryDataset
) -> dict[str, np.ndarray]:
    """:meth:`HistoryDataset.row_facts` of evaluated rows, in their order."""
    row_ids = test.inter_feat["row_id"].numpy()
    order = np.argsort(row_ids, kind="stable")
    place = order[np.searchsorted(row_ids[order], rows["row_id"])]
    return {name: values[place] for name, values in test.row_facts(train).items()}
