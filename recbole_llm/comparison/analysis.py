"""Which model is better on the same samples, by how much, and is the difference significant: finished runs to one dict.

The input are the ``result.json`` and ``test_rows.npz`` of every run, so a comparison can be recomputed at any time
without running anything. The output is what the report files are written from (docs/comparisons.md describes it):

- every model's metrics: mean and standard deviation over seeds; 95% intervals over resampled users (percentile and BCa)
  for the mean of the seeds;
- the paired difference of one model, the *subject*, with every other, with intervals from the same draws of users and a
  test: labelled samples DeLong's, clustered by user; ranks McNemar's exact test of HR@1 where there is one seed and one
  sample per user, else a sign-flip permutation test by user. All p-values of a metric are adjusted together (Holm);
- calibration; the leading metric by length of history, activity of the user and popularity of the item;
- cost, and the key findings in words.

The references of a run on its own samples (the lens, which is the frozen conventional recommender; popularity; the
untrained LLM) take part, and so do stacks where runs kept the scores of their validation samples (``score_valid``): of
a run's lens and itself, and the best one of two or three conventional models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

from recbole_llm.comparison.controls import label_of
from recbole_llm.comparison.findings import SMALLER_IS_BETTER, chance, key_findings
from recbole_llm.comparison.finished_run import FinishedRun, check_same_samples
from recbole_llm.comparison.stacking import best_stack, stack
from recbole_llm.comparison.tables import COSTS
from recbole_llm.evaluation.bootstrap import METRICS, Bootstrap, Interval, bootstrap, bootstrap_ranks
from recbole_llm.evaluation.metrics import UndefinedMetric, auc
from recbole_llm.evaluation.ranking import row_rank_metric
from recbole_llm.evaluation.significance import (
    GroupMetric,
    calibration,
    delong,
    holm,
    mcnemar,
    metric_by_group,
    paired_permutation,
    quantile_groups,
)
from recbole_llm.utils.files import read_columns
from recbole_llm.utils.run_files import VALID_ROWS_FILE

FORMAT = 1
GROUPS = {"history_length": "history length", "user_rows": "user activity", "item_rows": "item popularity"}
"""Columns of ``test_rows.npz`` that samples are grouped by, and their titles."""
COLD = "0 (cold)"
BEST_STACK = "best conventional stack"


@dataclass
class _Model:
    """One line of the table: scores or ranks by seed."""

    name: str
    kind: str
    label: str
    columns: dict[int, np.ndarray] = field(default_factory=dict)
    runs: list[FinishedRun] = field(default_factory=list)

    @property
    def stacked(self) -> np.ndarray:
        """``[seeds, samples]``"""
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
    """Compare finished runs on the same samples.

    Args:
        runs: at least one; several of one name are seeds of one model.
        subject: the model whose differences with all others are tested; default: the first one.
        failed: ``{"name", "seed", "error"}`` of runs that ended without a result.
        samples: bootstrap samples of users.
        command: that produced the runs, for the report.

    Returns:
        The dict described in docs/comparisons.md.

    Raises:
        ValueError: if there are no runs, or they were tested on other samples or tasks, or twice with one seed.
    """
    if not runs:
        raise ValueError("there is no finished run to compare")
    first = runs[0]
    check_same_samples(runs)
    models, stack_notes = _models(runs)
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
        "sentences": key_findings(differences, table, metrics[0], chance(metrics[0], rows)),
        "notes": [*_notes(models, means, samples), *stack_notes],
        "gates": next((r.result["gates"] for r in runs if r.name == subject and r.result.get("gates")), None),
        "prompts": _prompts(models, rows, task),
    }


def _models(runs: Sequence[FinishedRun]) -> tuple[dict[str, _Model], list[str]]:
    """Every model and reference by name, and notes on stacks. Equal references of several runs are one."""
    models: dict[str, _Model] = {}
    suffix = "_rank" if runs[0].result["task"] == "next_item" else "_score"
    for run in runs:
        own = models.setdefault(run.name, _Model(run.name, run.kind, label_of(run.name)))
        own.columns[run.seed] = run.rows[f"model{suffix}"]
        own.runs.append(run)
    for run in runs:
        for column, title in run.result["names"].items():
            values = run.rows.get(column + suffix)
            if column == "model" or values is None:
                continue
            alike = [known for known in models.values() if f"{known.name} (".startswith(f"{title} (")]
            same_seed = [known.columns[run.seed] for known in alike if run.seed in known.columns]
            if any(np.array_equal(other, values) for other in same_seed):
                continue
            # The tuned LLM without its lens is trained, too.
            kind = run.kind if column == "llm" else "reference"
            # The untrained LLM with another prompt, or a lens trained otherwise, is another reference.
            for name, label in ((title, title), (f"{title} ({run.name})", f"{title} ({label_of(run.name)})")):
                known = models.setdefault(name, _Model(name, kind, label))
                if np.array_equal(known.columns.setdefault(run.seed, values), values):
                    break
    notes = _add_stacks(models, runs)
    if any("past_ratings" in run.result["names"] for run in runs):
        notes.append(
            "past ratings: averages of the user's earlier ratings and nothing of the item, fitted on the labels that "
            "tune the language model."
        )
    models = {name: model for name, model in models.items() if model.columns}
    counts = Counter(model.label for model in models.values())
    for model in models.values():
        if counts[model.label] > 1:
            model.label = model.name
    return models, notes


def _add_stacks(models: dict[str, _Model], runs: Sequence[FinishedRun]) -> list[str]:
    """Adds stacks as references: of each run's lens and itself, and the best one of conventional models.

    Returns:
        Notes: the weights of each stack, or why there is none.
    """
    notes: list[str] = []
    conventional: dict[int, dict[str, tuple[FinishedRun, dict[str, np.ndarray]]]] = {}

    def add(
        name: str, label: str, seed: int, valid: Mapping[str, np.ndarray], parts: Sequence[tuple]
    ) -> None:
        names, of_valid, of_test = zip(*parts, strict=True)
        try:
            found = stack(valid["label"], of_valid, of_test, names)
        except UndefinedMetric as error:
            notes.append(f"{label}, seed {seed}: none, {error}.")
            return
        models.setdefault(name, _Model(name, "reference", label)).columns[seed] = found.probabilities
        weights = ", ".join(f"{part} {weight:.3g}" for part, weight in zip(names, found.weights, strict=True))
        notes.append(f"{label}, seed {seed}: logistic regression on validation samples, weights {weights}.")

    for run in runs:
        if not (run.path / VALID_ROWS_FILE).is_file() or "label" not in run.rows:
            continue
        valid = read_columns(run.path / VALID_ROWS_FILE)
        own = run.name, valid["model_score"], run.rows["model_score"]
        if "lens_score" in run.rows:
            lens = run.result["names"]["lens"], valid["lens_score"], run.rows["lens_score"]
            name, label = (f"stack of {lens[0]} and {text}" for text in (run.name, label_of(run.name)))
            add(name, label, run.seed, valid, [lens, (label_of(run.name), *own[1:])])
        elif run.kind == "classical" and "row_id" in valid:
            order = np.argsort(valid["row_id"], kind="stable")
            valid = {column: values[order] for column, values in valid.items()}
            conventional.setdefault(run.seed, {})[run.name] = run, valid
    for seed, found in conventional.items():
        valid = next(iter(found.values()))[1]
        parts = {
            name: (name, scores["model_score"], run.rows["model_score"])
            for name, (run, scores) in found.items()
            if np.array_equal(scores["row_id"], valid["row_id"])
        }
        if names := best_stack(valid["label"], {name: part[1] for name, part in parts.items()}):
            add(BEST_STACK, BEST_STACK, seed, valid, [parts[name] for name in names])
    return notes


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
        known = [value for value in values if value is not None]
        interval = means.interval(model.name, metric)
        found[metric] = {
            "mean": interval.value,
            "sd": float(np.std(known, ddof=1)) if 1 < len(known) == len(values) else None,
            **_bounds(interval, means.interval(model.name, metric, "bca")),
            "values": values,
        }
    return {
        "name": model.name,
        "label": model.label,
        "kind": model.kind,
        "seeds": list(model.columns),
        "metrics": found,
        "cost": _cost(model.runs),
        "calibration": _calibration(model, rows),
        "groups": _groups(model, rows, metrics[0]),
        "paths": [str(run.path) for run in model.runs],
    }


def _bounds(percentile: Interval, bca: Interval) -> dict[str, float | str | None]:
    bounds = {"low": percentile.low, "high": percentile.high, "low_bca": bca.low, "high_bca": bca.high}
    return {**bounds, "reason": percentile.reason or bca.reason}


def _cost(runs: Sequence[FinishedRun]) -> dict[str, float | None]:
    """Mean cost of the runs over seeds; None where it is not known for each of them, as for references."""

    def of_run(result: Mapping[str, Any]) -> dict[str, float | None]:
        test, memory = result["seconds"].get("test"), result["peak_memory"]
        counts = result.get("trained_parameters")
        held = memory.get("gpu_bytes") or memory.get("host_bytes")
        return {
            "train_seconds": result["seconds"].get("fit"),
            "test_seconds": test,
            "samples_per_second": result["rows"]["test"] / test if test else None,
            "tokens_per_second": result.get("tokens_per_second"),
            "tokens": result.get("tokens"),
            "peak_memory_gib": held and held / 2**30,
            "trained_parameters": sum(counts.values()) if counts else None,
        }

    by_key: dict[str, list[Any]] = {key: [of_run(run.result)[key] for run in runs] for key in COSTS}
    return {k: float(np.mean(costs)) if costs and None not in costs else None for k, costs in by_key.items()}


def _calibration(model: _Model, rows: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """Of the probabilities of all seeds together; None for ranks and for scores that are no probabilities."""
    if "label" not in rows:
        return None
    try:
        found = calibration(np.tile(rows["label"], len(model.columns)), model.stacked.ravel())
    except UndefinedMetric:
        return None
    curve = {name: getattr(found, name).tolist() for name in ("predicted", "observed", "counts")}
    return {**curve, "ece": found.ece}


def _groups(model: _Model, rows: Mapping[str, np.ndarray], metric: str) -> dict[str, list[dict[str, Any]]]:
    """The leading metric, mean over seeds, in groups of samples; those without a training sample are one."""

    def by_group(names: np.ndarray, values: np.ndarray) -> dict[str, GroupMetric]:
        if "label" in rows:
            return metric_by_group(names, auc, values, rows["label"])
        return metric_by_group(names, np.mean, row_rank_metric(metric, values))

    result: dict[str, list[dict[str, Any]]] = {}
    for column, title in GROUPS.items():
        if column not in rows:
            continue
        names = _group_names(rows[column])
        first, *others = (by_group(names, values) for values in model.columns.values())
        result[title] = []
        for name in sorted(first, key=lambda name: int(name.split("-")[0].split(" ")[0])):
            found = first[name]
            values: list[Any] = [found.value, *(other[name].value for other in others)]
            mean = None if found.reason else float(np.mean(values))
            result[title].append({"name": name, "rows": found.samples, "value": mean, "reason": found.reason})
    return result


def _group_names(values: np.ndarray, n: int = 4) -> np.ndarray:
    """[samples] the name of each one's group: cold ones, and up to ``n`` of about equal size."""
    names = np.full(len(values), COLD, dtype=object)
    warm = values > 0
    if warm.any():
        names[warm] = quantile_groups(values[warm], n)
    return names.astype(str)


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
    tests: dict[str, tuple[str | None, float | None, str | None]] = {}
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
            difference = {"a": subject, "b": other.name, "metric": metric, "value": interval.value, **bounds}
            p_holm = adjusted[other.name] if metric == leading else None
            tested = {"p": p, "p_holm": p_holm, "test": test, "reason": reason or bounds["reason"]}
            found.append(difference | tested)
    return found


def _test(
    mine: _Model, other: _Model, rows: Mapping[str, np.ndarray], task: str, metric: str, seed: int
) -> tuple[str, float | None, str | None]:
    """Name of the test, its p-value, and a reason where there is none."""
    users = rows["user"]
    if task != "next_item":
        p = delong(rows["label"], mine.stacked, other.stacked, users=users).p_value
        return "DeLong, clustered by user (AUC)", p, None
    gains = [row_rank_metric(metric, ranks) for ranks in mine.columns.values()]
    theirs = [row_rank_metric(metric, ranks) for ranks in other.columns.values()]
    single = len(gains) == len(theirs) == 1 and len(np.unique(users)) == len(users)
    if single and metric == "hr@1":
        return "McNemar (HR@1)", mcnemar(gains[0], theirs[0]), None
    difference = np.mean(gains, axis=0) - np.mean(theirs, axis=0)
    p = paired_permutation(users, difference, seed=seed)
    return f"sign-flip permutation by user ({metric.upper()})", p, None


def _notes(models: Mapping[str, _Model], means: Bootstrap, samples: int) -> list[str]:
    notes = [
        f"95% CIs: {samples:,} bootstrap samples of {means.users:,} resampled users, paired across models, for the "
        "mean over seeds; standard deviations are over seeds."
    ]
    numbers = {len(model.columns) for model in models.values() if model.kind != "reference"}
    if numbers == {1}:
        notes.append(
            "One seed: the variance between trainings is not known. CIs and p-values are about these trained models on "
            "further samples, not about models trained again."
        )
    elif len(numbers) > 1:
        notes.append("Models have different numbers of seeds: not all runs finished.")
    return notes


def _prompts(models: Mapping[str, _Model], rows: Mapping[str, np.ndarray], task: str) -> list[dict[str, Any]]:
    """The example prompts that the runs kept, each with every model's score of its sample (first seeds)."""
    position = {int(row): place for place, row in enumerate(rows["row_id"])}
    examples = []
    for model in models.values():
        for example in model.runs[0].result.get("examples") or () if model.runs else ():
            place = position.get(example["row_id"])
            if place is None:
                continue
            examples.append(
                {
                    "model": model.name,
                    **{side: str(rows[side][place]) for side in ("user", "item")},
                    "text": example["text"],
                    "label": int(rows["label"][place]) if "label" in rows else None,
                    "scores": {m.name: next(iter(m.columns.values()))[place].item() for m in models.values()},
                }
            )
    return examples
