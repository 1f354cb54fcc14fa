"""Metrics RecBole lacks, the rows it forgets, intervals, and the report of a run."""

from recbole_llm.evaluation.bootstrap import Bootstrap, Interval, bootstrap
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.evaluation.metrics import (
    UndefinedMetric,
    accuracy,
    auc,
    gauc,
    labeled_metrics,
    logloss,
    register_metrics,
)
from recbole_llm.evaluation.report import (
    build_result,
    environment,
    merge_rows,
    peak_memory,
    result_table,
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
    "build_result",
    "environment",
    "gauc",
    "labeled_metrics",
    "logloss",
    "merge_rows",
    "peak_memory",
    "register_metrics",
    "result_table",
    "write_result",
]
