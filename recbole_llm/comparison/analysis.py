"""Which model is better on the same rows, by how much, and is it more than chance: from finished runs to one dict.

The input are the ``result.json`` and ``test_rows.npz`` that every run leaves, so a comparison can be recomputed at any
time without running anything. The output is what the report files are written from (``compare_report``):

- every model's metrics: mean and standard deviation over seeds; 95% intervals over users (percentile and BCa) for the
  mean of the seeds;
- the paired difference of one model, the *subject*, with every other, with intervals from the same draws of users and a
  test: labelled rows DeLong's, rows of a user together; ranks McNemar's exact test of HR@1 where there is one seed and
  one row per user, else random changes of sign by user. All p-values of a metric are adjusted together (Holm);
- calibration; the leading metric by length of history, activity of the user and popularity of the item;
- cost, and in words what follows.

What a run was compared with on its own rows (lens, popularity, untrained LLM) takes part as a reference, and so does a
stack of its lens and itself where it kept the scores of its validation rows (``score_valid``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.comparison.stacking import stacked
from recbole_llm.evaluation.bootstrap import METRICS, Bootstrap, Interval, bootstrap, bootstrap_ranks
from recbole_llm.evaluation.metrics import UndefinedMetric, auc
from recbole_llm.evaluation.ranking import row_rank_metric
from recbole_llm.evaluation.significance import (
    calibration,
    delong,
    holm,
    mcnemar,
    metric_by_group,
    paired_permutation,
    quantile_groups,
)
from recbole_llm.utils.run_files import RESULT_FILE, TEST_ROWS_FILE, VALID_ROWS_FILE

FORMAT = 1
ALPHA = 0.05
GROUPS = {"history_length": "history length", "user_rows": "user activity", "item_rows": "item popularity"}
"""Columns of ``test_rows.npz`` that rows are grouped by, and what they are called."""
COLD = "0 (cold)"
SMALLER_IS_BETTER = ("logloss",)


@dataclass
class FinishedRun:
    """One model with one seed.

    Attributes:
        name: what the model is called in the comparison; runs of one name differ by their seed.
        result: the content of ``result.json``.
        rows: the arrays of ``test_rows.npz``, sorted by ``row_id``.
    """

    name: str
    seed: int
    path: Path
    result: Mapping[str, Any]
    rows: dict[str, np.ndarray]

    @property
    def kind(self) -> str:
        """``llm`` where a language model took part in the model, else ``classical``."""
        return "llm" if self.result["backbone"] else "classical"


def load_run(folder: Path, name: str | None = None) -> FinishedRun:
    """The finished run in a folder.

    Raises:
        FileNotFoundError: if the run is not finished, or left no scores.
    """
    result_file, rows_file = folder / RESULT_FILE, folder / TEST_ROWS_FILE
    if not result_file.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULT_FILE}: the run is not finished")
    if not rows_file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {TEST_ROWS_FILE}: without its scores by row this run cannot be compared; run it again"
        )
    result = json.loads(result_file.read_text(encoding="utf-8"))
    with np.load(rows_file, allow_pickle=False) as file:
        rows = dict(file)
    if "row_id" not in rows:
        raise ValueError(
            f"{rows_file} has no row_id: {result['model']} was not run on the rows of task ctr or next_item"
        )
    if (
        rows.get("candidates", rows["row_id"]).ndim == 2
    ):  # the items, where only their number is asked for here
        rows["candidates"] = np.full(len(rows["row_id"]), rows["candidates"].shape[1])
        del rows["candidate_scores"]
    order = np.argsort(rows["row_id"], kind="stable")
    rows = {column: values[order] for column, values in rows.items()}
    return FinishedRun(name or result["name"], int(result["seed"]), folder, result, rows)


@dataclass
class _Model:
    """Everything of one line of the table: scores or ranks by seed."""

    name: str
    kind: str
    columns: dict[int, np.ndarray] = field(default_factory=dict)
    runs: list[FinishedRun] = field(default_factory=list)

    @property
    def stacked(self) -> np.ndarray:
        """``[seeds, rows]``"""
        return np.stack(list(self.columns.values()))


def build_comparison(
    runs: Sequence[FinishedRun],
    *,
    subject: str | None = None,
    failed: Sequence[Mapping[str, Any]] = (),
    samples: int = 1000,
    seed: int = 2020,
    command: str = "",
) -> dict[str, Any]:
    """Compare finished runs on the same rows.

    Args:
        runs: at least one; several of one name are seeds of one model.
        subject: the model whose differences with all others are tested; default: the first one.
        failed: ``{"name", "seed", "error"}`` of runs that ended without a result.
        samples: bootstrap samples of users.
        seed: of these samples.
        command: what produced the runs, for the report.

    Returns:
        The dict described in :mod:`recbole_llm.comparison.report`.

    Raises:
        ValueError: if there are no runs, or they were tested on other rows or tasks, or twice with one seed.
    """
    if not runs:
        raise ValueError("there is no finished run to compare")
    first = runs[0]
    _check_same_rows(runs)
    models = _models(runs)
    subject = subject or first.name
    if subject not in models:
        raise ValueError(f"subject: there is no finished run of {subject!r} among {', '.join(models)}")
    rows, task = first.rows, first.result["task"]
    estimate = _estimate(first, models, samples, seed)
    metrics = list(estimate.metrics)
    means = estimate.averaged({name: [_member(name, s) for s in m.columns] for name, m in models.items()})
    table = [_line(model, estimate, means, rows, metrics) for model in models.values()]
    differences = _differences(models, subject, means, metrics, rows, task, seed)
    counts, versions, machine = (first.result[key] for key in ("rows", "versions", "machine"))
    return {
        "format": FORMAT,
        "task": task,
        "dataset": first.result["dataset"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": f"{machine['processor']}, {machine['cores']} cores"
        + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "device": first.result["device"],
        "command": command,
        "subject": subject,
        "metrics": metrics,
        "leading": metrics[0],
        "smaller_is_better": [metric for metric in metrics if metric in SMALLER_IS_BETTER],
        "rows": {
            "train": counts["train"],
            "few_shot": next(
                (r.result["rows"]["few_shot"] for r in runs if r.result["rows"]["few_shot"]), None
            ),
            "valid": counts["valid"],
            "test": len(rows["row_id"]),
            "test_available": counts.get("test_available") or len(rows["row_id"]),
            "users": means.users,
        },
        "seeds": sorted({run.seed for run in runs}),
        "models": table,
        "differences": differences,
        "failed": [dict(entry) for entry in failed],
        "sentences": _sentences(differences, table, metrics[0], guessing(metrics[0], rows)),
        "notes": _notes(models, means, samples),
        "gates": next((r.result["gates"] for r in runs if r.name == subject and r.result.get("gates")), None),
        "prompts": _prompts(models, rows, task),
    }


def _check_same_rows(runs: Sequence[FinishedRun]) -> None:
    first = runs[0]
    given = set()
    for run in runs:
        if run.result["task"] != first.result["task"]:
            raise ValueError(
                f"{run.name} is of task {run.result['task']}, {first.name} of {first.result['task']}: they "
                "cannot be compared"
            )
        for column in ("row_id", "user", "item", "label", "candidates"):
            mine, theirs = run.rows.get(column), first.rows.get(column)
            if (mine is None) != (theirs is None) or (mine is not None and not np.array_equal(mine, theirs)):
                raise ValueError(
                    f"{run.name} ({run.path}) was tested on other rows than {first.name} ({first.path}): their "
                    f"columns {column!r} differ"
                )
        if (run.name, run.seed) in given:
            raise ValueError(f"there are two runs of {run.name} with seed {run.seed}")
        given.add((run.name, run.seed))


def _models(runs: Sequence[FinishedRun]) -> dict[str, _Model]:
    """Every model and reference by name. Equal references of several runs are one."""
    models: dict[str, _Model] = {}
    suffix = "_rank" if runs[0].result["task"] == "next_item" else "_score"
    for run in runs:
        own = models.setdefault(run.name, _Model(run.name, run.kind))
        own.columns[run.seed] = run.rows[f"model{suffix}"]
        own.runs.append(run)
    for run in runs:
        for column, title in run.result["names"].items():
            values = run.rows.get(column + suffix)
            if column == "model" or values is None:
                continue
            # The untrained LLM asked with another prompt, or a lens trained otherwise, is another reference.
            for name in (title, f"{title} ({run.name})"):
                known = models.setdefault(name, _Model(name, "reference"))
                if np.array_equal(known.columns.setdefault(run.seed, values), values):
                    break
    for run in runs:
        file = run.path / VALID_ROWS_FILE
        if not file.is_file() or "lens_score" not in run.rows:
            continue
        with np.load(file, allow_pickle=False) as valid:
            name = f"stack of {run.result['names']['lens']} and {run.name}"
            columns = ("lens_score", "model_score")
            stack = models.setdefault(name, _Model(name, "reference"))
            stack.columns[run.seed] = stacked(valid, run.rows, columns)
    return {name: model for name, model in models.items() if model.columns}


def _member(name: str, seed: int) -> str:
    return f"{name}\n{seed}"


def _estimate(first: FinishedRun, models: Mapping[str, _Model], samples: int, seed: int) -> Bootstrap:
    columns = {_member(m.name, s): values for m in models.values() for s, values in m.columns.items()}
    if first.result["task"] == "next_item":
        metrics = tuple(first.result["intervals"]["models"]["model"])
        return bootstrap_ranks(first.rows["user"], columns, metrics, n=samples, seed=seed, jackknife=True)
    return bootstrap(
        first.rows["user"], first.rows["label"], columns, METRICS, n=samples, seed=seed, jackknife=True
    )


def _line(
    model: _Model,
    estimate: Bootstrap,
    means: Bootstrap,
    rows: Mapping[str, np.ndarray],
    metrics: Sequence[str],
) -> dict[str, Any]:
    found = {}
    for metric in metrics:
        values = [estimate.values[_member(model.name, seed)][metric] for seed in model.columns]
        interval = means.interval(model.name, metric)
        found[metric] = {
            "mean": interval.value,
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 and None not in values else None,
            **_bounds(interval, means.interval(model.name, metric, "bca")),
            "values": values,
        }
    return {
        "name": model.name,
        "kind": model.kind,
        "seeds": list(model.columns),
        "metrics": found,
        "cost": _cost(model.runs),
        "calibration": _calibration(model, rows),
        "groups": _groups(model, rows, metrics[0]),
        "changes": {},
        "paths": [str(run.path) for run in model.runs],
    }


def _bounds(percentile: Interval, bca: Interval) -> dict[str, float | str | None]:
    return {
        "low": percentile.low,
        "high": percentile.high,
        "low_bca": bca.low,
        "high_bca": bca.high,
        "reason": percentile.reason or bca.reason,
    }


def _cost(runs: Sequence[FinishedRun]) -> dict[str, float | None]:
    """Means over seeds of what the runs cost; of references nothing is known."""

    def mean(of_run) -> float | None:
        values = [of_run(run.result) for run in runs]
        return float(np.mean(values)) if values and None not in values else None

    def seconds(result: Mapping[str, Any], stage: str) -> float | None:
        return result["seconds"].get(stage)

    def peak(result: Mapping[str, Any]) -> float | None:
        memory = result["peak_memory"]
        held = memory.get("gpu_bytes") or memory.get("host_bytes")
        return held and held / 2**30

    def parameters(result: Mapping[str, Any]) -> float | None:
        counts = result.get("trained_parameters")
        return sum(counts.values()) if counts else None

    def per_second(result: Mapping[str, Any]) -> float | None:
        spent = seconds(result, "test")
        return result["rows"]["test"] / spent if spent else None

    return {
        "train_seconds": mean(lambda result: seconds(result, "fit")),
        "test_seconds": mean(lambda result: seconds(result, "test")),
        "samples_per_second": mean(per_second),
        "tokens_per_second": mean(lambda result: result.get("tokens_per_second")),
        "tokens": mean(lambda result: result.get("tokens")),
        "peak_memory_gib": mean(peak),
        "trained_parameters": mean(parameters),
        "energy_joules": mean(lambda result: result.get("energy_joules")),
    }


def _calibration(model: _Model, rows: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Of the probabilities of all seeds together; None for ranks and for scores that are no probabilities."""
    if "label" not in rows:
        return None
    try:
        found = calibration(np.tile(rows["label"], len(model.columns)), model.stacked.ravel())
    except UndefinedMetric:
        return None
    return {
        "predicted": found.predicted.tolist(),
        "observed": found.observed.tolist(),
        "counts": found.counts.tolist(),
        "ece": found.ece,
    }


def _groups(model: _Model, rows: Mapping[str, np.ndarray], metric: str) -> dict[str, list[dict[str, Any]]]:
    """The leading metric, mean over seeds, in groups of rows; what no training row has is a group of its own."""
    result = {}
    for column, title in GROUPS.items():
        if column not in rows:
            continue
        names = _group_names(rows[column])
        if "label" in rows:
            by_seed = [
                metric_by_group(names, auc, scores, rows["label"]) for scores in model.columns.values()
            ]
        else:
            by_seed = [
                metric_by_group(names, lambda gain: gain.mean(), row_rank_metric(metric, ranks))
                for ranks in model.columns.values()
            ]
        result[title] = [
            {
                "name": name,
                "rows": by_seed[0][name].rows,
                "value": None if found.reason else float(np.mean([seed[name].value for seed in by_seed])),
                "reason": found.reason,
            }
            for name, found in sorted(by_seed[0].items(), key=lambda group: _least(group[0]))
        ]
    return result


def _group_names(values: np.ndarray, n: int = 4) -> np.ndarray:
    """[rows] the name of each row's group: cold ones, and up to ``n`` of about equal size."""
    names = np.full(len(values), COLD, dtype=object)
    warm = values > 0
    if warm.any():
        groups = quantile_groups(values[warm], n)
        names[warm] = np.array(groups.names, dtype=object)[groups.codes]
    return names.astype(str)


def _least(name: str) -> int:
    return int(name.split("-")[0].split(" ")[0])


def _differences(
    models: Mapping[str, _Model],
    subject: str,
    means: Bootstrap,
    metrics: Sequence[str],
    rows: Mapping[str, np.ndarray],
    task: str,
    seed: int,
) -> list[dict[str, Any]]:
    mine, others = models[subject], [model for name, model in models.items() if name != subject]
    leading = metrics[0]
    tests = {}
    for other in others:
        try:
            tests[other.name] = _test(mine, other, rows, task, leading, seed)
        except UndefinedMetric as error:
            tests[other.name] = (None, None, str(error))
    adjusted = holm({name: p for name, (_, p, _) in tests.items()})
    found = []
    for metric in metrics:
        for other in others:
            test, p, reason = tests[other.name] if metric == leading else (None, None, None)
            interval = means.difference(subject, other.name, metric)
            bounds = _bounds(interval, means.difference(subject, other.name, metric, "bca"))
            found.append(
                {
                    "a": subject,
                    "b": other.name,
                    "metric": metric,
                    "value": interval.value,
                    **bounds,
                    "p": p,
                    "p_holm": adjusted[other.name] if metric == leading else None,
                    "test": test,
                    "reason": reason or bounds["reason"],
                }
            )
    return found


def _test(
    mine: _Model, other: _Model, rows: Mapping[str, np.ndarray], task: str, metric: str, seed: int
) -> tuple[str, float | None, str | None]:
    """Name of the test, its p-value, and a reason where there is none."""
    users = rows["user"]
    if task != "next_item":
        p = delong(rows["label"], mine.stacked, other.stacked, users=users).p_value
        return "DeLong by user, AUC", p, None
    gains = [row_rank_metric(metric, ranks) for ranks in mine.columns.values()]
    theirs = [row_rank_metric(metric, ranks) for ranks in other.columns.values()]
    single = len(gains) == len(theirs) == 1 and len(np.unique(users)) == len(users)
    if single and metric == "hr@1":
        return "McNemar, HR@1", mcnemar(gains[0], theirs[0]).p_value, None
    difference = np.mean(gains, axis=0) - np.mean(theirs, axis=0)
    return f"sign changes by user, {metric.upper()}", paired_permutation(users, difference, seed=seed), None


def guessing(metric: str, rows: Mapping[str, np.ndarray]) -> float | None:
    """What scores drawn at random have on average; ``None`` where that is not known."""
    if metric == "auc":
        return 0.5
    if "candidates" not in rows:
        return None
    sizes, counts = np.unique(rows["candidates"], return_counts=True)
    values = [row_rank_metric(metric, np.arange(1, size + 1)).mean() for size in sizes]
    return float(np.average(values, weights=counts))


def _sentences(
    differences: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
    metric: str,
    chance: float | None,
) -> list[str]:
    """What follows from the differences of the leading metric, in words."""
    lines = {line["name"]: line for line in table}

    def guesses(name: str) -> bool:
        found = lines[name]["metrics"][metric]
        return None not in (chance, found["low"]) and found["low"] <= chance <= found["high"]

    return [
        sentence(
            found,
            once=len(lines[found["a"]]["seeds"]) == 1,
            chance=chance if guesses(found["a"]) and guesses(found["b"]) else None,
        )
        for found in differences
        if found["metric"] == metric
    ]


def sentence(difference: Mapping[str, Any], *, once: bool = False, chance: float | None = None) -> str:
    """What follows from one difference of the leading metric, in words.

    Args:
        difference: one of a comparison's.
        once: whether ``a`` was trained with one seed: what is found then holds for that training.
        chance: what guessing has, if neither model is told from it: then no difference is worth a thing.
    """
    a, b, metric = difference["a"], difference["b"], difference["metric"].upper()
    value, p = difference["value"], difference["p_holm"]
    if value is None:
        return f"{a} and {b} cannot be compared: {difference['reason']}."
    low, high = difference["low"], difference["high"]
    if p is None and low is None:
        return f"{metric} of {a} minus {b}: {value:+.4f}; whether that is chance is not known ({difference['reason']})."
    certain = p < ALPHA if p is not None else low > 0 or high < 0
    if certain:
        what = "better" if value > 0 else "worse"
        start = f"{a}{', trained once,' if once else ''} is {what} than {b} on these rows"
    else:
        start = f"{a} is neither better nor worse than {b} on these rows beyond chance"
    details = [f"{metric} {value:+.4f}"]
    if low is not None:
        details.append(f"95% interval [{low:+.4f}, {high:+.4f}]")
    if p is not None:
        details.append(f"p = {p:.2g} ({difference['test']}; Holm)")
    found = f"{start}: {', '.join(details)}."
    if certain and chance is not None:
        found += (
            f" But neither is told from guessing, whose {metric} is {chance:.4g}: both intervals hold it."
        )
    return found


def _notes(models: Mapping[str, _Model], means: Bootstrap, samples: int) -> list[str]:
    notes = [
        f"Intervals: 95%, {samples:,} bootstrap samples of {means.users:,} users, paired across models, for the mean "
        "over seeds; sd is over seeds."
    ]
    numbers = {len(model.columns) for model in models.values() if model.kind != "reference"}
    if numbers == {1}:
        notes.append(
            "One seed: how much a model varies from one training to the next is not known. Intervals and p-values are "
            "about these trained models on further rows, not about models trained again."
        )
    elif len(numbers) > 1:
        notes.append("Models have different numbers of seeds: not all runs ended with a result.")
    return notes


def _prompts(models: Mapping[str, _Model], rows: Mapping[str, np.ndarray], task: str) -> list[dict[str, Any]]:
    """The example prompts that the runs kept, each with every model's score of its row (first seeds)."""
    position = {int(row): place for place, row in enumerate(rows["row_id"])}
    examples = []
    for model in models.values():
        for example in model.runs[0].result.get("examples") or () if model.runs else ():
            place = position.get(example["row_id"])
            if place is None:
                continue
            values = {m.name: next(iter(m.columns.values()))[place].item() for m in models.values()}
            label = int(rows["label"][place]) if "label" in rows else None
            named = {"user": str(rows["user"][place]), "item": str(rows["item"][place])}
            examples.append(
                {"model": model.name, **named, "text": example["text"], "label": label, "scores": values}
            )
    return examples
