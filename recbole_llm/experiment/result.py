"""What a run hands over: a table for people, `result.json` for programs, `test_rows.npz` for later questions.

`result.json`, version 1. Anything not known is null; NaN and infinities are null too.

    schema              1
    name                the run's name in the table, such as "RecLoRA + lens_residual"
    model, dataset, task, seed, device
    backbone            {name, sha256, source, dtype} or null
    lens                {name, identity, ..., metrics: {test}} or null
    zero_shot           {metrics: {test}} or null: the same prompts, the untrained LLM
    rows                {train, few_shot, valid, test, eval_rows, eval_rows_bounded
                         [, valid_available, test_available]}: valid and test are the rows evaluated;
                        with eval_rows_bounded they are a seeded draw from those available.
                        With ranks also candidates: {min, max, all_items}: how many items a row's target was
                        ranked among, and whether they were the whole catalogue each time
    metrics             {valid: {..}, test: {..}}. On labelled rows, test auc, logloss, acc and gauc are of
                        the test rows, in float64; with ranks so are hr@k, ndcg@k and mrr@k, ties counting
                        against the model (each k below the number of candidates, and 1); the others, hit@k
                        among them, are RecBole's, rounded to metric_decimal_place
    intervals           null without rows, else (with ranks, hr@1, .. stand in the place of auc, ..)
                        {unit: "user", users, rows, samples, seed, level,
                         models: {model|lens|zero_shot: {auc|logloss|acc|gauc: {value, low, high[, reason]}}},
                         differences: {"model - lens": {auc: {value, low, high[, reason]}, ..}, ..}}
                        differences are paired (same draws of users); reason says why a bound is null
    names               the table's label of each entry of intervals.models
    seconds             stage -> seconds
    tokens_per_second   of training
    peak_memory         {host_bytes, gpu_bytes}
    versions, machine   see `environment`
    config              every setting of the run
    finished            time of writing, UTC
    test_rows           "test_rows.npz" or null

`test_rows.npz` has one array per column, all of one length, no pickles: user, item (internal ids or tokens),
row_id, label (int8), model_score, and where they exist lens_score and zero_shot_score (float64
probabilities). Rankings have, instead of label and scores, candidates (how many items were ranked) and
model_rank, and where they exist lens_rank, zero_shot_rank, popularity_rank and others (1 being best); item is
the target.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
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
_RANK_COLUMNS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr@10")
"""Of the table; the result has all `RANK_METRICS`."""


def merge_rows(
    model: Mapping[str, np.ndarray], **others: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Joins the evaluations of several models on the same rows, as `RowCollector.rows` gives them.

        merge_rows(model_rows, lens=lens_rows, zero_shot=zero_shot_rows)

    Returns:
        user, item, row_id (if known), label, model_score, and NAME_score for every other that is not None, in
        the order of `model`. Others in another order are matched by row_id. Of rankings likewise, with
        candidates (if known), model_rank and NAME_rank instead of label and scores.

    Raises:
        ValueError: if another model's rows are not the same rows, or were ranked among another number of
            candidates, or one was ranked and the other was not.
    """
    value, suffix = ("rank", _RANK) if "rank" in model else ("score", _SCORE)
    keys = [key for key in ("user", "item", "row_id", "label", "candidates") if key in model]
    merged = {key: model[key] for key in keys} | {"model" + suffix: model[value]}
    for name, rows in others.items():
        if rows is None:
            continue
        if value not in rows:
            raise ValueError(f"the rows of {name} have no [{value}], but the model's rows have")
        score, order = rows[value], np.arange(len(rows[value]))
        if "row_id" in model and "row_id" in rows and not np.array_equal(model["row_id"], rows["row_id"]):
            order = np.argsort(rows["row_id"], kind="stable")
            if len(order) == len(model["row_id"]):
                order = order[np.argsort(np.argsort(model["row_id"], kind="stable"), kind="stable")]
        shared = [key for key in keys if key not in ("row_id", "candidates") or key in rows]
        differ = [
            key for key in shared if key not in rows or not np.array_equal(rows[key][order], model[key])
        ]
        if differ == ["candidates"]:
            raise ValueError(
                f"{name} ranked {_span(rows['candidates'])} candidates where the model ranked "
                f"{_span(model['candidates'])}: evaluate both with the same candidates"
            )
        if differ:
            raise ValueError(
                f"the rows of {name} ({len(score)}) are not the rows of the model ({len(model[value])}): "
                "evaluate both on the same test data"
            )
        merged[name + suffix] = score[order]
    return merged


def build_result(
    *,
    model: str,
    dataset: str,
    task: str,
    seed: int,
    device: str | torch.device,
    config: Any,
    row_counts: Mapping[str, int | None],
    valid: Mapping[str, float] | None = None,
    test: Mapping[str, float] | None = None,
    rows: Mapping[str, np.ndarray] | None = None,
    name: str | None = None,
    backbone: Mapping[str, Any] | None = None,
    lens: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    eval_rows: int | None = None,
    seconds: Mapping[str, float] | None = None,
    tokens_per_second: float | None = None,
    memory: Mapping[str, int | None] | None = None,
    bootstrap_samples: int = 1000,
    n_items: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a run is to leave behind, as a dict of the schema above.

    Args:
        model: the model's class name, as `--model` takes it.
        dataset: its name; task: 'ctr', 'next_item'; seed: also of the bootstrap; device: what was computed
            on.
        config: a RecBole Config or any mapping.
        row_counts: train, few_shot, valid, test; valid_available and test_available where `eval_rows` cut
            them.
        valid, test: what RecBole's evaluator gave.
        rows: the test rows as `merge_rows` gives them; every column NAME_score, or NAME_rank of a ranking
            evaluation, is one model to be measured. None where `RowCollector` has none.
        name: the run's name in tables, by default the model's.
        names: labels in tables for other columns, by default "lens DIN" (its name) and "untrained LLM".
        backbone: {name, sha256, source, dtype}, None for RecBole's own models.
        lens: {name, identity, ...}, None if there is none.
        eval_rows: the setting of that name.
        seconds: stage -> seconds; tokens_per_second: of training.
        memory: by default `peak_memory()`.
        bootstrap_samples: 0 for no intervals.
        n_items: of a ranking evaluation: size of the catalogue without the padding item, to tell whether all
            items were ranked.
        extra: further keys of the result; none of the schema's.

    Raises:
        ValueError: if the rows do not fit `row_counts`, or `extra` takes a key of the schema.
    """
    labels = {"model": name or model, "zero_shot": "untrained LLM"}
    labels["lens"] = f"lens {lens['name']}" if lens and lens.get("name") else "lens"
    labels |= names or {}
    intervals, measured, counts = None, {}, dict(row_counts)
    if rows is not None:
        if len(rows["user"]) != row_counts["test"]:
            raise ValueError(
                f"{len(rows['user'])} test rows were scored, but row_counts['test'] is {row_counts['test']}"
            )
        scores, ranks = (
            {key.removesuffix(suffix): value for key, value in rows.items() if key.endswith(suffix)}
            for suffix in (_SCORE, _RANK)
        )
        if scores and ranks:
            raise ValueError(f"rows are either scored or ranked, but these have the columns {sorted(rows)}")
        if ranks:
            counts["candidates"] = _candidates(rows.get("candidates"), n_items)
            metrics = _metrics_below(counts["candidates"]["min"])
            estimate = bootstrap_ranks(rows["user"], ranks, metrics, n=bootstrap_samples, seed=seed)
        else:
            estimate = bootstrap(rows["user"], rows["label"], scores, n=bootstrap_samples, seed=seed)
        _log_reasons(estimate, labels)
        intervals, measured = estimate.to_dict("lens"), estimate.values
        labels |= {key: key.replace("_", " ") for key in scores | ranks if key not in labels}
    result = {
        "schema": SCHEMA,
        "name": labels["model"],
        "model": model,
        "dataset": dataset,
        "task": task,
        "seed": seed,
        "device": str(device),
        "backbone": dict(backbone) if backbone else None,
        "lens": {**lens, "metrics": {"test": measured.get("lens")}} if lens else None,
        "zero_shot": {"metrics": {"test": measured["zero_shot"]}} if "zero_shot" in measured else None,
        "rows": counts
        | {
            "eval_rows": eval_rows,
            "eval_rows_bounded": any(
                (counts.get(f"{part}_available") or 0) > (counts.get(part) or 0) for part in ("valid", "test")
            ),
        },
        "metrics": {"valid": dict(valid or {}), "test": {**(test or {}), **measured.get("model", {})}},
        "intervals": intervals,
        "names": {key: labels[key] for key in measured} or {"model": labels["model"]},
        "seconds": dict(seconds or {}),
        "tokens_per_second": tokens_per_second,
        "peak_memory": dict(memory or peak_memory()),
        **environment(),
        "config": dict(getattr(config, "final_config_dict", config)),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "test_rows": None,
    }
    taken = sorted(set(result) & set(extra or {}))
    if taken:
        raise ValueError(f"extra may not hold {taken}: these keys belong to the result's schema")
    return result | dict(extra or {})


def result_table(results: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """A fixed-width table of one run, or of several on the same test rows, as `build_result` gives them.

    One line per model: the untrained LLM, the lens, others, then each run's own model; with AUC and its
    interval, LogLoss, ACC, GAUC, and the paired difference of the AUC to the lens of the same run. Runs with
    ranks show HR@1 in the place of AUC and HR@5, NDCG@5, NDCG@10 and MRR@10 beside it, as far as k is below
    the number of candidates; rankings without rows show RecBole's metrics.

    Raises:
        ValueError: if the runs were measured on different numbers of rows, users or candidates, or one ranked
            and one did not.
    """
    results = [results] if isinstance(results, Mapping) else list(results)
    basis = {_basis(r) for r in results}
    if len(basis) != 1:
        what = "rows, users, candidates" if any("candidates" in r["rows"] for r in results) else "rows, users"
        raise ValueError(f"one table needs one test set, but these runs were measured on ({what}) {basis}")
    if results[0]["intervals"] is None:
        columns = list(dict.fromkeys(key for r in results for key in r["metrics"]["test"]))
        body = [[r["name"], *(_number(r["metrics"]["test"].get(key)) for key in columns)] for r in results]
        return _layout([["model", *columns], *body])

    main, columns = "auc", ("logloss", "acc", "gauc")
    if "candidates" in results[0]["rows"]:
        known = next(iter(results[0]["intervals"]["models"].values()))
        main, *columns = (metric for metric in _RANK_COLUMNS if metric in known)
    notes: list[str] = []
    lines: list[list[str]] = []
    own: list[list[str]] = []
    for result in results:
        found = result["intervals"]
        for key in sorted(
            found["models"], key=lambda k: ("zero_shot", "lens").index(k) if k in ("zero_shot", "lens") else 2
        ):
            label, values = result["names"][key], found["models"][key]
            difference = found["differences"].get(f"{key} - lens", {}).get(main)
            line = [
                label,
                _cell(values[main], f"{label}, {_title(main)}", notes),
                *(_number(values[metric]["value"]) for metric in columns),
                _cell(difference, f"{label}, {_title(main)} - lens", notes, sign="+") if difference else "",
            ]
            notes += [
                f"{label}, {_title(m)}: {values[m]['reason']}" for m in columns if values[m]["value"] is None
            ]
            if key == "model":
                own.append(line)
            elif line not in lines:
                lines.append(line)
    first = results[0]["intervals"]
    level = f"[{first['level']:.0%} interval]"
    head = ["model", f"{_title(main)} {level}", *map(_title, columns), f"{_title(main)} - lens {level}"]
    table = [head, *lines, *own]
    if not any(line[-1] for line in table[1:]):
        table = [line[:-1] for line in table]
    return "\n".join([_layout(table), _footer(results[0]), *dict.fromkeys(notes)])


def write_result(
    folder: str | os.PathLike, result: Mapping[str, Any], rows: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Writes `test_rows.npz` (if there are rows) and then `result.json` into `folder`, each atomically.

    A `result.json` that exists is therefore complete, and so are its rows.

    Args:
        result: as `build_result` gives it; NumPy and torch scalars, paths, enums and the like become plain
            JSON.
        rows: columns of one length; tokens become fixed-width strings.

    Returns:
        The path of `result.json`.

    Raises:
        ValueError: if the columns are not vectors of one length, or hold something else than numbers and
            strings.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = {key: _column(key, value) for key, value in (rows or {}).items()}
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
                logger.warning("%s, %s: %s", labels.get(key, key), _title(metric), reason)


def _title(metric: str) -> str:
    """'gauc' -> 'GAUC', 'ndcg@5' -> 'NDCG@5'."""
    return _TITLES.get(metric, metric.upper())


def _candidates(counts: np.ndarray | None, n_items: int | None) -> dict[str, int | bool | None]:
    """What the result says of the [rows] numbers of candidates, which may be unknown."""
    if counts is None:
        return {"min": None, "max": None, "all_items": None}
    low, high = int(np.min(counts)), int(np.max(counts))
    return {"min": low, "max": high, "all_items": None if n_items is None else low == high == n_items}


def _metrics_below(candidates: int | None) -> tuple[str, ...]:
    """The rank metrics that say something: at a k of all candidates, every model hits. HR@1 always stays."""
    return tuple(
        metric
        for metric in RANK_METRICS
        if metric == "hr@1" or candidates is None or parse_rank_metric(metric)[1] < candidates
    )


def _span(counts: np.ndarray) -> str:
    low, high = int(np.min(counts)), int(np.max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _basis(result: Mapping[str, Any]) -> Any:
    """What two results must share to stand in one table."""
    found, ranked = result["intervals"], result["rows"].get("candidates")
    if not found:
        return result["rows"].get("test")
    return (found["rows"], found["users"], *((ranked["min"], ranked["max"]) if ranked else ()))


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.4f}"


def _cell(interval: Mapping[str, Any], where: str, notes: list[str], sign: str = "") -> str:
    """'0.7412 [0.7301, 0.7520]', or the value alone and a note that says why."""
    if interval["low"] is None:
        notes.append(f"{where}: {interval['reason']}")
        return _number(interval["value"], sign)
    return "{} [{}, {}]".format(*(_number(interval[key], sign) for key in ("value", "low", "high")))


def _footer(result: Mapping[str, Any]) -> str:
    found, rows = result["intervals"], result["rows"]
    available = rows.get("test_available")
    drawn = f" of {available:,} (a seeded draw: eval_rows)" if available and available > rows["test"] else ""
    return (
        f"{result['dataset']}: {found['rows']:,}{drawn} test rows of {found['users']:,} users"
        f"{_among(rows['candidates']) if 'candidates' in rows else ''}; intervals "
        f"from {found['samples']:,} bootstrap samples of users, differences paired"
    )


def _among(candidates: Mapping[str, Any]) -> str:
    """The footer's words on what was ranked."""
    ties = "; ties count against the model"
    if candidates["min"] is None:
        return ties
    number = _span(np.array([candidates["min"], candidates["max"]]))
    what = f"all {number} items" if candidates["all_items"] else f"{number} candidates"
    return f", each target ranked among {what}{ties}"


def _layout(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def _column(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    if array.ndim != 1:
        raise ValueError(f"the column [{name}] must be a vector, but has the shape {array.shape}")
    if array.dtype == object:
        if not all(isinstance(value, str) for value in array):
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
