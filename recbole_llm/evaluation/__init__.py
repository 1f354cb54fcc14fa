"""Metrics RecBole lacks, the rows it forgets, intervals, tests of significance, and the report of a run."""

from recbole_llm.evaluation.bootstrap import Bootstrap, Interval, bootstrap, bootstrap_ranks
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.evaluation.compare_report import terminal_table, write_report
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
from recbole_llm.evaluation.statistics import (
    AUCInterval,
    Calibration,
    DeLong,
    GroupMetric,
    Groups,
    McNemar,
    bca_interval,
    calibration,
    delong,
    delong_interval,
    holm,
    mcnemar,
    metric_by_group,
    quantile_groups,
)

__all__ = [
    "AUCInterval",
    "Bootstrap",
    "Calibration",
    "DeLong",
    "GroupMetric",
    "Groups",
    "Interval",
    "McNemar",
    "RowCollector",
    "UndefinedMetric",
    "accuracy",
    "auc",
    "bca_interval",
    "bootstrap",
    "bootstrap_ranks",
    "build_result",
    "calibration",
    "delong",
    "delong_interval",
    "environment",
    "gauc",
    "generation_report",
    "holm",
    "labeled_metrics",
    "logloss",
    "match_title",
    "mcnemar",
    "merge_rows",
    "metric_by_group",
    "peak_memory",
    "quantile_groups",
    "rank_metrics",
    "register_metrics",
    "result_table",
    "target_ranks",
    "terminal_table",
    "write_json",
    "write_report",
    "write_result",
]
