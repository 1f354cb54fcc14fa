"""What a run leaves: `result.json`, and `test_rows.npz` with the scores of every test sample.

`result.json`, version 1. Anything not known is null; NaN and infinities are null too.

    schema              1
    name                the run's name in the table, such as "RecLoRA + lens_residual"
    model, dataset, task, seed, device
    backbone            {name, sha256, source, dtype} or null
    lens                {name, identity, ..., metrics: {test}} or null
    zero_shot           {metrics: {test}} or null: the same prompts, the untrained LLM
    rows                numbers of samples, {train, few_shot, valid, test, eval_rows, eval_rows_bounded
                         [, valid_available, test_available]}: valid and test are the samples evaluated;
                        with eval_rows_bounded they are a seeded draw from those available.
                        With ranks also candidates: {min, max, all_items}: how many items a target was
                        ranked among, and whether they were the whole catalogue each time
    metrics             {valid: {..}, test: {..}}. On labelled samples, test auc, logloss, acc and gauc are of
                        the test samples, in float64; with ranks so are hr@k, ndcg@k and mrr@k, ties counting
                        against the model (each k below the number of candidates, and 1); the others, hit@k
                        among them, are RecBole's, rounded to metric_decimal_place
    intervals           null without scores by sample, else (with ranks, hr@1, .. stand in the place of auc, ..)
                        {unit: "user", users, rows, samples, seed, level,
                         models: {model|lens|llm|zero_shot|past_ratings:
                                  {auc|logloss|acc|gauc: {value, low, high[, reason]}}},
                         differences: {"model - lens": {auc: {value, low, high[, reason]}, ..}, ..}}
                        differences, to the lens and to the past ratings, are paired (same draws of users); reason
                        says why a bound is null
    names               the table's label of each entry of intervals.models
    seconds             stage -> seconds
    tokens_per_second   of training
    peak_memory         {host_bytes, gpu_bytes}
    versions, machine   see `environment`
    config              every setting of the run
    finished            time of writing, UTC
    test_rows           "test_rows.npz" or null

`test_rows.npz` has one array per column, each with one entry per test sample, no pickles: user, item (tokens of the
dataset), row_id, label (int8), model_score, and where they exist past_ratings_score (of LLM recommenders; see
:mod:`recbole_llm.experiment.past_ratings`), lens_score, zero_shot_score and, with lens_residual, llm_score, the tuned
LLM's without the lens (float64 probabilities).
Rankings have, instead of label and scores, model_rank, and where they exist lens_rank, zero_shot_rank,
popularity_rank and others (1 being best); item is the target. What it was ranked among is candidates: [n, C] tokens
with candidate_scores [n, C] where candidates are stored, else [n] numbers of items.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.evaluation.bootstrap import Bootstrap, bootstrap, bootstrap_ranks
from recbole_llm.evaluation.ranking import RANK_METRICS, parse_rank_metric
from recbole_llm.utils.files import write_atomically, write_json
from recbole_llm.utils.machine import environment, peak_memory
from recbole_llm.utils.run_files import RESULT_FILE, TEST_ROWS_FILE

logger = logging.getLogger(__name__)

SCHEMA = 1
_SCORE, _RANK = "_score", "_rank"
_TITLES = {"auc": "AUC", "logloss": "LogLoss", "acc": "ACC", "gauc": "GAUC"}


@dataclass(frozen=True)
class Ingredients:
    """What a model is built on.

    Attributes:
        backbone: ``{name, sha256, source, dtype}`` of the language model, ``None`` where there is none.
        lens: ``{name, identity, ...}`` of the frozen conventional recommender, ``None`` where there is none.
    """

    backbone: Mapping[str, Any] | None = None
    lens: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Evaluation:
    """How a model was evaluated.

    Attributes:
        counts: numbers of samples: train, few_shot, valid, test; valid_available and test_available where ``eval_rows``
            bounds them.
        valid, test: what RecBole's evaluator gave.
        rows: the columns of ``test_rows.npz``; every column NAME_score, or NAME_rank of a ranking, is one model to be
            evaluated. ``None`` where the protocol leaves none.
        n_items: size of the catalogue without the padding item, to know whether all items were ranked.
    """

    counts: Mapping[str, int | None]
    valid: Mapping[str, float] | None = None
    test: Mapping[str, float] | None = None
    rows: Mapping[str, np.ndarray] | None = None
    n_items: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds by stage, and tokens per second of the training."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None


def build_result(
    config: Mapping[str, Any],
    evaluation: Evaluation,
    ingredients: Ingredients | None = None,
    cost: Cost | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a run leaves, as a dict of the schema above.

    Args:
        config: every setting of the run, as :meth:`recbole_llm.experiment.assembly.Assembly.configuration` gives it.
        evaluation: samples, metrics, scores.
        ingredients: by default none.
        cost: by default unknown.
        extra: further keys of the result; none of the schema's.

    Raises:
        ValueError: if the scores do not fit ``evaluation.counts``, or ``extra`` takes a key of the schema.
    """
    ingredients, cost = ingredients or Ingredients(), cost or Cost()
    lens, counts, rows = ingredients.lens, dict(evaluation.counts), evaluation.rows
    labels = {
        "model": config["run_name"] or config["model"],
        "zero_shot": "untrained LLM",
        "lens": f"lens {lens['name']}" if lens else "lens",
    }
    labels["llm"] = f"{labels['model']}, LLM alone"
    intervals, values = None, {}
    if rows is not None:
        if len(rows["user"]) != counts["test"]:
            raise ValueError(
                f"{len(rows['user'])} test samples were scored, but counts['test'] is {counts['test']}"
            )
        estimate = _estimate(rows, counts, config, evaluation.n_items)
        intervals, values = estimate.to_dict("lens", "past_ratings"), estimate.values
        labels |= {key: key.replace("_", " ") for key in values if key not in labels}
        _log_reasons(estimate, labels)
    bounded = any(
        (counts.get(f"{part}_available") or 0) > (counts.get(part) or 0) for part in ("valid", "test")
    )
    result = {
        "schema": SCHEMA,
        "name": labels["model"],
        "model": config["model"],
        "dataset": config["dataset"],
        "task": config["task"] or "recbole",
        "seed": config["seed"],
        "device": str(config["device"]),
        "backbone": dict(ingredients.backbone) if ingredients.backbone else None,
        "lens": {**lens, "metrics": {"test": values.get("lens")}} if lens else None,
        "zero_shot": {"metrics": {"test": values["zero_shot"]}} if "zero_shot" in values else None,
        "rows": counts | {"eval_rows": config["eval_rows"], "eval_rows_bounded": bounded},
        "metrics": {
            "valid": dict(evaluation.valid or {}),
            "test": {**(evaluation.test or {}), **values.get("model", {})},
        },
        "intervals": intervals,
        "names": {key: labels[key] for key in values} or {"model": labels["model"]},
        "seconds": dict(cost.seconds),
        "tokens_per_second": cost.tokens_per_second,
        "peak_memory": peak_memory(),
        **environment(),
        "config": dict(config),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "test_rows": None,
    }
    taken = sorted(set(result) & set(extra or {}))
    if taken:
        raise ValueError(f"extra may not hold {taken}: these keys belong to the result's schema")
    return result | dict(extra or {})


def _estimate(
    rows: Mapping[str, np.ndarray], counts: dict[str, Any], config: Mapping[str, Any], n_items: int | None
) -> Bootstrap:
    """Metrics and intervals of every column of scores or ranks; of ranks, ``counts`` gets what was ranked."""
    scores, ranks = (
        {key.removesuffix(suffix): value for key, value in rows.items() if key.endswith(suffix)}
        for suffix in (_SCORE, _RANK)
    )
    if scores and ranks:
        raise ValueError(f"samples are either scored or ranked, but these have the columns {sorted(rows)}")
    options = {"n": config["bootstrap_samples"], "seed": config["seed"]}
    if scores:
        return bootstrap(rows["user"], rows["label"], scores, **options)
    counts["candidates"] = _candidates(rows.get("candidates"), n_items)
    return bootstrap_ranks(rows["user"], ranks, _metrics_below(counts["candidates"]["min"]), **options)


def write_result(
    folder: str | os.PathLike, result: Mapping[str, Any], rows: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Write `test_rows.npz` (if there are columns) and then `result.json` into `folder`, each atomically.

    A `result.json` that exists is therefore complete, and so is its `test_rows.npz`.

    Args:
        result: as `build_result` gives it; NumPy and torch scalars, paths, enums and the like become plain
            JSON.
        rows: columns ``[n]`` or ``[n, C]``; tokens become fixed-width strings.

    Returns:
        The path of `result.json`.

    Raises:
        ValueError: if the columns differ in length, have other shapes, or hold something else than numbers and
            strings.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {key: _column(key, value) for key, value in (rows or {}).items()}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"the columns differ in length: { {key: len(c) for key, c in columns.items()} }")
    if columns:
        write_atomically(folder / TEST_ROWS_FILE, lambda file: np.savez_compressed(file, **columns))
    path = folder / RESULT_FILE
    write_json(path, {**result, "test_rows": TEST_ROWS_FILE if columns else None})
    return path


def _log_reasons(estimate: Bootstrap, labels: Mapping[str, str]) -> None:
    for key in estimate.values:
        for metric in estimate.metrics:
            reason = estimate.interval(key, metric).reason
            if reason:
                logger.warning("%s, %s: %s", labels.get(key, key), metric_title(metric), reason)


def metric_title(metric: str) -> str:
    """'gauc' -> 'GAUC', 'ndcg@5' -> 'NDCG@5'."""
    return _TITLES.get(metric, metric.upper())


def _candidates(counts: np.ndarray | None, n_items: int | None) -> dict[str, int | bool | None]:
    """What the result has on candidates: ``[n, C]`` items, ``[n]`` numbers of items, or unknown."""
    if counts is None:
        return {"min": None, "max": None, "all_items": None}
    if counts.ndim == 2:
        counts = np.array(counts.shape[1])
    low, high = int(np.min(counts)), int(np.max(counts))
    return {"min": low, "max": high, "all_items": None if n_items is None else low == high == n_items}


def _metrics_below(candidates: int | None) -> tuple[str, ...]:
    """The rank metrics that can differ: at a k of all candidates, every model hits. HR@1 always stays."""
    return tuple(
        metric
        for metric in RANK_METRICS
        if metric == "hr@1" or candidates is None or parse_rank_metric(metric)[1] < candidates
    )


def _column(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim not in (1, 2):
        raise ValueError(f"the column [{name}] must be a vector or a matrix, but has the shape {array.shape}")
    if array.dtype == object:
        if not all(isinstance(value, str) for value in array.flat):
            raise ValueError(
                f"the column [{name}] mixes strings with other things; give tokens as str or ids as int"
            )
        array = array.astype(str)
    if array.dtype.kind not in "biufU":
        raise ValueError(
            f"the column [{name}] has the dtype {array.dtype}; only numbers and strings can be written"
        )
    if name == "label" and np.isin(array, (0, 1)).all():
        array = array.astype(np.int8)
    return array
