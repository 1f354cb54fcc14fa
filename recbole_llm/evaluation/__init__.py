"""Metrics RecBole lacks, the rows it forgets, intervals, and the report of a run."""

from recbole_llm.evaluation.bootstrap import Bootstrap, Interval, bootstrap, bootstrap_ranks
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.evaluation.generation import generation_report, match_title
from recbole_llm.evaluation.metrics import (
    UndefinedMetric,
    accuracy,
    auc,
    gauc,
    labeled_metrics,
    logloss,
    register_metrics,
)
from recbole_llm.evaluation.ranking import rank_metrics, target_ranks
from recbole_llm.evaluation.report import (
    build_result,
    environment,
    merge_rows,
    peak_memory,
    result_table,
    write_json,
    write_result,
)

__all__ = [
    "Bootstrap",
    "Interval",
    "RowCollector",
    "UndefinedMetric",
    "accuracy",
    "auc",
    "bootstrap",
    "bootstrap_ranks",
    "build_result",
    "environment",
    "gauc",
    "generation_report",
    "labeled_metrics",
    "logloss",
    "match_title",
    "merge_rows",
    "peak_memory",
    "rank_metrics",
    "register_metrics",
    "result_table",
    "target_ranks",
    "write_json",
    "write_result",
]
