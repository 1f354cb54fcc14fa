"""The command line: arguments and printing."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Read when torch is loaded. A thread that waits for another one must not keep the processor busy for long: beside other
# work that costs most of the speed (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000", **os.environ}

from recbole_llm.comparison.plan import is_comparison
from recbole_llm.comparison.report import report as work_out
from recbole_llm.comparison.report import terminal_table
from recbole_llm.config.command_line import split_models
from recbole_llm.experiment.table import result_table
from recbole_llm.quick_start import compare_models, run_recbole_llm
from recbole_llm.serving.commands import COMMANDS, run_command
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.text_output import write_any_text

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The command line: ``--model --dataset --config_files`` and any ``--key=value``, as RecBole's.

    Returns:
        The exit status: 0; 1 where models of a comparison failed; 2 for an error; 130 for Ctrl-C.
    """
    write_any_text((sys.stdout, sys.stderr))
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return guarded(lambda: run_command(argv))
    parser = argparse.ArgumentParser(
        prog="run_recbole_llm.py",
        description="Train and evaluate one recommender, LLM or conventional, with RecBole's data and evaluator.",
        epilog=f"To use a finished run: recbole-llm {'|'.join(COMMANDS)} RUN ...; see docs/using_a_model.md. "
        "Every other --key=value is a configuration key; see properties/overall.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", "-m", default="RecLoRA", help="name of the model (default: RecLoRA)")
    parser.add_argument("--dataset", "-d", default="ml-100k", help="name of the dataset (default: ml-100k)")
    parser.add_argument("--config_files", default="", help="yaml files, separated by spaces; later ones win")
    parser.add_argument(
        "--report", metavar="FOLDER", help="run nothing: write the report of a comparison's folder again"
    )
    known, rest = parser.parse_known_args(argv)
    files = known.config_files.split() or None

    def run() -> int:
        models = split_models(known.model)
        if known.report:
            result = work_out(Path(known.report))
        elif len(models) > 1 or is_comparison(files, rest):
            result = compare_models(models, known.dataset, files, cmd_line=rest)
        else:
            result = run_recbole_llm(known.model, known.dataset, files, cmd_line=rest)
        if launched().is_first:
            print(result["dry_run"] if "dry_run" in result else report(result))
        return 1 if result.get("failed") else 0

    return guarded(run)


def guarded(command: Callable[[], int]) -> int:
    """The exit status of a command; errors of the user's become one line, Ctrl-C a word."""
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # the log has said how to resume
        return 130
    except (ValueError, OSError) as error:
        logger.debug("traceback of the error below", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(result: dict) -> str:
    """The end of a run's output: the table, and where the result is."""
    if "files" in result:
        return "\n".join([terminal_table(result), *(f"report: {path}" for path in result["files"])])
    results = result.get("compared", [result])
    if not result["metrics"]["test"]:
        valid = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"]["valid"].items())
        told = f"the test split was not read (read_test: False); validation: {valid or 'none'}"
        return f"{told}\nresult: {result['path']}"
    lines = [result_table(results)]
    if "comparison" in result:
        lines += [
            *result["comparison"]["sentences"],
            *(f"report: {path}" for path in result["comparison"]["files"]),
        ]
    for found in results:
        if work := found.get("scoring"):
            lines.append(
                f"{found['name']}: {work['tokens']:,} tokens computed for {work['rows']:,} samples, "
                f"{work['ratio']:.2f} x (prompt tokens {work['prompt_tokens']:,} + edges of the title trees "
                f"{work['edges']:,})"
            )
        if written := found.get("generated"):
            ratios = [("ValidRatio", "valid_ratio"), ("HitRatio@1 of all samples", "hit_ratio_all")]
            ratios.append(("HitRatio@1 of valid answers", "hit_ratio_valid"))
            lines.append(
                f"{found['name']}, written answers of {written['n']:,} samples: "
                + ", ".join(f"{title} {_ratio(written['intervals'][key])}" for title, key in ratios)
            )
    return "\n".join([*lines, *(f"result: {found['path']}" for found in results)])


def _ratio(interval: dict) -> str:
    """``0.5263 [0.4211, 0.6211]``, without the interval where there is none."""
    if interval["value"] is None:
        return "undefined"
    bounds = "" if interval["low"] is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return f"{interval['value']:.4f}{bounds}"
