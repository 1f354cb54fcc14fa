"""Training a lens with RecBole's own Trainer, once per content of what determines it."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import recbole
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader, TrainDataLoader
from recbole.trainer import Trainer
from torch import nn

from recbole_llm.config.model_spec import spec_of
from recbole_llm.lens.lens import DESCRIPTION, Lens, LensError
from recbole_llm.lens.next_item import NextItemSequence
from recbole_llm.lens.settings import build_model, lens_settings, lens_task
from recbole_llm.trainer.checkpoint import CheckpointError
from recbole_llm.trainer.conventional_trainer import EpochTraining
from recbole_llm.utils import recbole_repairs
from recbole_llm.utils.files import locked
from recbole_llm.utils.random_state import random_state_kept

logger = logging.getLogger(__name__)

CODE_VERSIONS = {"ctr": {"SASRec": 2}, "next_item": {}}
"""Part of every lens's identity, by task and lens, 1 where none is given: raise it when the code changes what that lens
computes or how it is trained."""

TRAINING_SUFFIX = ".training.safetensors"
"""Of the file beside a lens's folder, while that lens is trained."""


def fit_lens(
    config,
    train,
    valid,
    *,
    cache_dir: Path,
    exclude_rows: np.ndarray | None = None,
    fit: bool = True,
    saved: bool = False,
) -> Lens:
    """Train the lens of a configuration, or take it from the cache.

    It is trained on all samples of ``train``, selected on ``valid``, and stops early: in the ctr task on their
    labels and by AUC, in the next-item task on their items and by NDCG@10 of ranking all items. The caller's
    random-number state does not change, so that nothing depends on whether the cache was warm.

    Args:
        config: the run's (``task``, ``lens``, ``lens_config``, ``lens_ratings``, ``gate_scope``, ``seed``, ...).
        train: all training samples (:class:`recbole_llm.data.CTRDataset`, or samples of its interface without labels).
        valid: all validation samples.
        cache_dir: the cache; lenses are kept in its subfolder ``lens``.
        exclude_rows: ``row_id`` of training samples that the lens must not be trained on (``lens_rows:
            without_few_shot``: the samples that will tune the LLM, as stacking requires). They remain part of the
            histories of later samples.
        fit: ``False``: random weights, no training and no cache (dry runs).
        saved: ``cache_dir`` is the folder of a finished run, which has its lens: nothing is trained.

    Returns:
        The frozen lens, on the configuration's device.

    Raises:
        ValueError: for a lens that cannot be built or cannot have the wanted ``gate_scope``, samples of one
            class only (``ctr``), no samples (``next_item``), or ``exclude_rows`` that are not
            training samples.
    """
    name, seed, task = config["lens"], config["seed"], lens_task(config)
    settings = lens_settings(config, train)
    if task == "ctr" and config["lens_ratings"] and not settings["lens_ratings"]:
        logger.warning("lens %s: the dataset has no ratings, so past ratings are not an input", name)
    train = without_rows(train, exclude_rows)
    for split, rows in (("training", train), ("validation", valid)):
        if task == "ctr":
            _check_labels(rows, settings["LABEL_FIELD"], name, split)
        else:
            _check_samples(rows, name, split)

    with random_state_kept(seed):
        model = build_model(settings, train)
        _check_state(model, train)
        scope = resolve_scope(name, model, config["gate_scope"], config["id_retrieval"])
        if not fit:
            return Lens(model, name=name, gate_scope=scope, identity="untrained", info={"trained": False})

        identity = lens_identity(settings, train, valid)
        folder = lens_folder(cache_dir, name, identity)
        with locked(folder, folder / DESCRIPTION):
            if folder.exists():
                try:
                    lens = Lens.load(folder, config, train, gate_scope=scope)
                    if lens.identity != identity:
                        raise LensError(f"{folder} holds the lens {lens.identity}, not {identity}")
                    logger.info("lens %s: from the cache, %s", name, folder)
                    lens.info["from_cache"] = True
                    return lens
                except LensError as error:
                    if saved:
                        raise
                    logger.warning("lens %s is trained again: %s", name, error)
            elif saved:
                why = "the run was copied without its lens"
                if others := [path.name for path in folder.parent.glob(f"{name}-*") if path.is_dir()]:
                    why = (
                        f"data or configuration are not those that its {others[0]} was trained with; restore them, or "
                        "train again (recbole-llm recommend reads later interactions by --interactions)"
                    )
                raise LensError(f"{folder} is missing: {why}")
            training = folder.with_name(folder.name + TRAINING_SUFFIX)
            info = _train(settings, model, train, valid, training, identity)
            lens = Lens(model, name=name, gate_scope=scope, identity=identity, info=info)
            lens.save(folder)
            training.unlink(missing_ok=True)
    lens.info["from_cache"] = False
    return lens


def lens_folder(root: Path, name: str, identity: str) -> Path:
    """Where a lens is kept below ``root``, which is a cache or the folder of one run."""
    return Path(root) / "lens" / f"{name}-{identity[:24]}"


def without_rows(dataset, rows: np.ndarray | None):
    """``dataset`` without the samples whose ``row_id`` is in ``rows``.

    Raises:
        ValueError: if one of ``rows`` is not in the dataset: it would be excluded from nothing, unnoticed.
    """
    if rows is None or len(rows) == 0:
        return dataset
    row_ids = dataset.inter_feat["row_id"].numpy()
    unknown = np.setdiff1d(rows, row_ids)
    if len(unknown):
        raise ValueError(
            f"exclude_rows: {len(unknown)} of {len(rows)} are not training samples, e.g. row_id {unknown[0]}"
        )
    return dataset.subset(np.flatnonzero(~np.isin(row_ids, rows)))


def resolve_scope(name: str, model: nn.Module, wanted: str, id_retrieval: str) -> str:
    """What the state will depend on: ``user_item`` or ``user``.

    A retrieved history is chosen by the target, so with it every state depends on the target, and items cannot
    be ranked: the history of the sample's own item would give that item away.

    Args:
        wanted: the configuration's ``gate_scope``: ``auto``, ``user_item`` or ``user``.
        id_retrieval: how the lens's history is chosen.

    Raises:
        ValueError: if the lens cannot give a state of that scope, or items cannot be ranked.
    """
    by_target = id_retrieval != "recent"
    if by_target and isinstance(model, NextItemSequence):
        raise ValueError(
            f"id_retrieval: {id_retrieval} chooses the history by the target, which the next-item task is to find; "
            "set id_retrieval: recent"
        )
    if by_target:
        if wanted == "user" and "user_item" in model.spec.gate_scopes:
            raise ValueError(
                "gate_scope: user needs id_retrieval: recent; a retrieved history is chosen by the target, "
                "so a state made from it is not the user's alone"
            )
        return "user_item"
    if wanted in (None, "auto"):
        return model.spec.gate_scopes[0]
    if wanted not in model.spec.gate_scopes:
        raise ValueError(
            f"gate_scope: {wanted} is not possible with the lens {name}, which offers "
            f"{', '.join(model.spec.gate_scopes)}; use lens: DIN or gate_scope: auto"
        )
    return wanted


def lens_identity(settings, train, valid) -> str:
    """Hash of all that determines a trained lens: data, split, histories, configuration, seed, code."""
    digest = hashlib.sha256()
    plain = {
        "code": CODE_VERSIONS[lens_task(settings)].get(settings["lens"], 1),
        **({"task": "next_item"} if lens_task(settings) == "next_item" else {}),
        "recbole": recbole.__version__,
        "lens": settings["lens"],
        "keys": settings["lens_keys"],
        "ratings": settings["lens_ratings"],
        "seed": settings["seed"],
        "history": {
            key: settings[key]
            for key in ("MAX_ITEM_LIST_LENGTH", "id_retrieval", "history_ties", "history_scope")
        },
    }
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())

    for rows in (train, valid):
        digest.update(rows.content_hash().encode())
        # The retriever may be anything, so its work is hashed, on samples from all over the split.
        probe = rows[np.unique(np.linspace(0, len(rows) - 1, 1024).astype(np.int64))]
        digest.update(probe[rows.iid_field + settings["LIST_SUFFIX"]].numpy().tobytes())
    return digest.hexdigest()


def _check_labels(rows, label_field: str, name: str, split: str) -> None:
    labels = np.unique(rows.inter_feat[label_field].numpy()) if len(rows) else np.zeros(0)
    if not np.array_equal(labels, [0, 1]):
        raise ValueError(
            f"lens {name}: the {len(rows)} {split} samples have the labels {labels.tolist()}, both 0 and 1 are "
            "needed; check threshold, the split and lens_rows"
        )


def _check_samples(rows, name: str, split: str) -> None:
    if len(rows) == 0:
        raise ValueError(
            f"lens {name}: there are no {split} samples; check min_history, eval_args and lens_rows"
        )


@torch.no_grad()
def _check_state(model: nn.Module, rows) -> None:
    """Ask for a representation once, so that an unsuitable model is refused before hours of training."""
    model.eval()
    batch = rows[np.arange(min(2, len(rows)))].to(next(model.parameters()).device)
    if isinstance(model, NextItemSequence):
        model.check(batch)
    else:
        model.represent(batch, model.spec.gate_scopes[0])


def _train(settings, model: nn.Module, train, valid, file: Path, identity: str) -> dict:
    """Train ``model`` in place, leave the best epoch's weights in it, and say how it went.

    An interrupted training resumes after the last validated epoch, which is in ``file``.
    """
    name = settings["lens"]
    shuffled = partial(TrainDataLoader, sampler=None, shuffle=True)
    logger.info("lens %s: training on %d samples, validating on %d", name, len(train), len(valid))
    task, metric = lens_task(settings), settings["valid_metric"].lower()
    eval_loader = NegSampleEvalDataLoader if task == "ctr" else FullSortEvalDataLoader
    make_loader = spec_of(type(model)).training_loader or shuffled
    # The folder stays empty: nothing is pickled with the configuration.
    with tempfile.TemporaryDirectory() as scratch, recbole_repairs.no_tensorboard():
        settings = settings.override(checkpoint_dir=scratch)
        training = EpochTraining(
            Trainer(settings, model),
            make_loader(settings, train),
            file,
            {"lens": identity},
            keep_best=True,
        )
        if file.is_file():
            try:
                training.load()
            except CheckpointError as error:
                logger.warning("lens %s is trained from the start: %s", name, error)
        training.fit(
            eval_loader(settings, valid, None, shuffle=False), show_progress=bool(settings["show_progress"])
        )
    model.load_state_dict(training.best)
    curve, metrics = training.curve, training.valid
    told = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    logger.info("lens %s: %d epochs in %.0f s, valid %s", name, len(curve), training.seconds, told)
    return {
        "trained": True,
        "task": task,
        "seconds": round(training.seconds, 2),
        "epochs": len(curve),
        "best_epoch": training.best_epoch,
        "valid": metrics,
        f"valid_{metric}_by_epoch": curve,
        "rows": {"train": len(train), "valid": len(valid)},
        "keys": settings["lens_keys"],
        "ratings": settings["lens_ratings"],
        "device": str(settings["device"]),
    }
