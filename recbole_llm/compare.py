"""Several models on the same rows and candidates, after the model of a run: ``compare_with``.

Each model is a run of its own, in a folder below the first one's, with its own defaults. What decides which rows are
seen and what targets are ranked among is taken over from the first; what makes the first one's adapter is not, and
RecBole's own models keep their own way of being trained. A finished run is not repeated when the command is resumed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.config import Config, parse_value
from recbole_llm.evaluation import bootstrap, bootstrap_ranks, delong, holm, mcnemar, write_json
from recbole_llm.keys import KEYS
from recbole_llm.registry import get_model, is_own

logger = logging.getLogger(__name__)

FILE = "comparison.json"
FOLDER = "compare"
RESULT_FILE = "result.json"
ROWS_FILE = "test_rows.npz"

# Of the first run only, or of its adapter.
_OF_THE_RUN = ("model", "dataset", "compare_with", "resume", "run_name", "output_dir", "checkpoint_dir")
_OF_THE_ADAPTER = (
    "mixer", "gate", "num_experts", "temperature", "top_k", "share_gate", "gate_dropout", "gate_learning_rate",
    "curriculum", "lens_residual", "prompt", "mixed_training", "lora_from",
    "stage_one_share",
)  # fmt: skip
# How a model is trained: RecBole's own models go by their own defaults.
_OF_THE_TRAINING = (
    "epochs", "train_batch_size", "learning_rate", "weight_decay", "learner", "eval_step", "stopping_step",
    "clip_grad_norm", "loss_type",
)  # fmt: skip


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """``"iLoRA gate=uniform"`` -> the model's name and the keys to change.

    Raises:
        ValueError: for anything else than a name followed by ``key=value``.
    """
    name, *changes = text.split()
    values = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"compare_with: cannot read {change!r} in {text!r}; write 'NAME key=value'")
        values[key] = parse_value(value, key)
    return name, values


def config_for(first: Config, text: str, folder: Path) -> Config:
    """The configuration of one more model on the rows of ``first``; its run will be in ``folder``."""
    name, changes = parse_model(text)
    own = is_own(get_model(name))
    left_out = {*_OF_THE_RUN, *_OF_THE_ADAPTER}
    if not own:
        left_out |= {*_OF_THE_TRAINING} | {key for key, known in KEYS.items() if known.llm}
    given = {key: value for key, value in first.external_config_dict.items() if key not in left_out}
    # Defaults of the first model that decide rows and candidates hold for all.
    locked = {key for key, known in KEYS.items() if not known.llm} | {
        "eval_args",
        "topk",
        "metrics",
        "valid_metric",
    }
    locked -= {*_OF_THE_RUN, "device", "dry_run", "cache_dir"}
    for key in sorted(locked):
        value = first[key]
        if key in changes and changes[key] != value:
            raise ValueError(
                f"compare_with: {text!r} changes {key}, which decides rows or candidates and must be the same for all"
            )
        given[key] = {k: v for k, v in value.items() if k != "mode"} if _mode_follows(first, key) else value
    given |= changes | {"run_name": text, "output_dir": str(folder)}
    return Config(name, first.dataset, config_dict=given)


def _mode_follows(first: Config, key: str) -> bool:
    return key == "eval_args" and first["task"] == "next_item"


def check_models(first: Config, folder: Path) -> list[tuple[str, Config]]:
    """The configurations of all models to compare with, so that a mistake shows before anything is computed.

    Raises:
        ValueError: for a model that cannot be run, or where models would not be tested on the same rows.
    """
    wanted = first["compare_with"]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    redrawn = first["task"] == "next_item" and first["eval_mode"] not in ("candidates", "full")
    if wanted and (redrawn or first["task"] is None):
        what = (
            f"eval_mode: {first['eval_mode']} draws other negatives for every model; use candidates or full"
            if redrawn
            else "RecBole's own protocols keep no rows to compare on; set task: ctr or task: next_item"
        )
        if "compare_with" in first.origins:
            raise ValueError(f"compare_with: {what}")
        logger.warning("compare_with: %s is left out, %s", ", ".join(wanted), what)
        wanted = []
    return [(text, config_for(first, text, folder / FOLDER / slug(text))) for text in wanted]


def slug(text: str) -> str:
    """A folder's name for a model and its changes."""
    return "".join(c if c.isalnum() or c in "-._=" else "-" for c in text)


def run_others(
    first: Config, models: Sequence[tuple[str, Config]], folder: Path, run: Callable[[Config, Path], dict]
) -> list[dict]:
    """Run every model that has no result yet; a failing one is reported and the others go on.

    Args:
        first: the configuration of the first model, whose run in ``folder`` is finished.
        models: from :func:`check_models`.
        folder: the first model's run.
        run: trains and tests one configuration in a given folder, and returns its result.

    Returns:
        The results that there are, in order.
    """
    results = []
    for text, config in models:
        where = folder / FOLDER / slug(text)
        finished = where / RESULT_FILE
        if finished.is_file():
            logger.info("%s: finished before, %s", text, finished)
            results.append({**json.loads(finished.read_text(encoding="utf-8")), "path": str(finished)})
            continue
        where.mkdir(parents=True, exist_ok=True)
        if (where / "last.safetensors").is_file():
            config["resume"] = str(where)
        try:
            results.append(run(config, where))
        except KeyboardInterrupt:
            logger.warning(
                "interrupted; what is finished is kept: repeat the command with --resume=%s", folder
            )
            raise
        except (ValueError, OSError) as error:
            logger.error("%s failed and is left out of the comparison: %s", text, error)
    return results


def compare_rows(folder: Path, results: Sequence[Mapping[str, Any]], *, samples: int, seed: int) -> dict:
    """Paired differences between all models of a comparison, and write them to ``comparison.json``.

    Args:
        folder: the first model's run.
        results: of all models, the first one's first; each with ``path``.
        samples: bootstrap samples of users.
        seed: of these samples.

    Returns:
        ``{"names": [...], "intervals": ..., "tests": ...}``: :meth:`recbole_llm.evaluation.Bootstrap.to_dict` with the
        first model as the reference, and :func:`significance`.

    Raises:
        ValueError: if a model was tested on other rows than the first.
    """
    columns: dict[str, np.ndarray] = {}
    base = None
    kind = "rank" if results[0]["task"] == "next_item" else "score"
    for result in results:
        with np.load(Path(result["path"]).with_name(ROWS_FILE), allow_pickle=False) as file:
            rows = dict(file)
        order = np.argsort(rows["row_id"], kind="stable")
        if base is None:
            base = {name: rows[name][order] for name in ("row_id", "user", "item", "label") if name in rows}
        if not all(np.array_equal(base[name], rows[name][order]) for name in base):
            raise ValueError(f"{result['name']} was tested on other rows than {results[0]['name']}")
        for column, name in result["names"].items():
            if name not in columns:
                columns[name] = rows[f"{column}_{kind}"][order]
    if kind == "rank":
        metrics = tuple(results[0]["intervals"]["models"]["model"])
        estimate = bootstrap_ranks(base["user"], columns, metrics, n=samples, seed=seed)
    else:
        estimate = bootstrap(base["user"], base["label"], columns, n=samples, seed=seed)
    comparison = {
        "names": list(columns),
        "intervals": estimate.to_dict(results[0]["name"]),
        "tests": significance(base, columns, results[0]["name"], kind),
    }
    write_json(folder / FILE, comparison)
    return comparison


def significance(
    base: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray], first: str, kind: str
) -> dict[str, Any]:
    """Two-sided p-values of the first model against every other, Holm-adjusted over all of them.

    Ranks: McNemar's exact test of HR@1, where every user has one row (else rows are not independent, and there is no
    test). Scores: DeLong's test of the AUC, clustered by user.

    Returns:
        ``{"test": name or None, "p": {other: p}, "p_holm": {other: p}}``.
    """
    others = [name for name in columns if name != first]
    if kind == "rank":
        if len(np.unique(base["user"])) < len(base["user"]):
            return {"test": None, "p": {}, "p_holm": {}}
        found = {name: mcnemar(columns[first] == 1, columns[name] == 1).p_value for name in others}
        return {"test": "McNemar, HR@1", "p": found, "p_holm": holm(found)}
    found = {
        name: delong(base["label"], columns[first], columns[name], users=base["user"]).p_value
        for name in others
    }
    return {"test": "DeLong by user, AUC", "p": found, "p_holm": holm(found)}


def comparison_table(comparison: Mapping[str, Any], first: str) -> str:
    """Lines ``first - other`` with the paired difference of the leading metric."""
    differences = comparison["intervals"]["differences"]
    lines = []
    for name, by_metric in differences.items():
        other = name.removesuffix(f" - {first}")
        metric, found = next(iter(by_metric.items()))
        if found["value"] is None:
            continue
        # turned round: what the first model gains over the other
        low, high = found["low"], found["high"]
        interval = "" if low is None else f" [{-high:+.4f}, {-low:+.4f}]"
        p = comparison["tests"]["p_holm"].get(other)
        test = "" if p is None else f", p = {p:.3g} ({comparison['tests']['test']}; Holm)"
        lines.append(f"{first} - {other}: {metric.upper()} {0.0 - found['value']:+.4f}{interval}{test}")
    return "\n".join(lines)
