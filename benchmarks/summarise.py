"""Turn finished runs into the table of a results page, and into one json file that can be committed.

    python benchmarks/summarise.py saved/RecLoRA-ml-1m-* --json benchmarks/results/ml-1m-ctr.json
    python benchmarks/summarise.py saved/compare-ml-100k-0123456789 --json benchmarks/results/ml-100k-quick.json

Of a comparison of several models its ``compare.md`` is printed, and ``compare.json`` kept without parts of the dataset
(prompts, users) and local paths. Else every run contributes itself, the runs below it (compare_with), and once each the
lens, the popularity and the untrained language model that it was compared with. Nothing is computed
here: all numbers come from the runs' ``result.json``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

KEPT = (
    "name", "model", "dataset", "task", "seed", "device", "backbone", "lens", "rows", "metrics", "intervals",
    "zero_shot", "names", "residual", "scoring", "generated", "trained_parameters", "seconds", "tokens_per_second",
    "peak_memory", "versions", "machine", "identities", "finished",
)  # fmt: skip


def cell(interval: dict | None, sign: str = "") -> str:
    """``0.7412 [0.7301, 0.7520]``, or as much of it as there is."""
    if interval is None or interval["value"] is None:
        return "-"
    if interval["low"] is None:
        return f"{interval['value']:{sign}.4f}"
    return f"{interval['value']:{sign}.4f} [{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"


COLUMNS = {
    "ctr": {"auc": "AUC", "logloss": "LogLoss", "acc": "ACC", "gauc": "GAUC"},
    "next_item": {
        "hr@1": "HR@1",
        "hr@5": "HR@5",
        "ndcg@5": "NDCG@5",
        "ndcg@10": "NDCG@10",
        "mrr@10": "MRR@10",
    },
}


def lines(results: list[dict]) -> list[str]:
    """A markdown table, one line per model; all runs must be of one task."""
    (task,) = {result["task"] for result in results}
    first, *others = (m for m in COLUMNS[task] if m in results[0]["intervals"]["models"]["model"])
    titles = [COLUMNS[task][metric] for metric in (first, *others)]
    table = [
        f"| model | {' | '.join(titles)} | {titles[0]} - its lens | minutes |",
        "|" + "---|" * (len(titles) + 3),
    ]
    seen = set()
    for result in results:
        for key in ("popularity", "zero_shot", "lens", "model"):
            found = result["intervals"]["models"].get(key)
            if found is None:
                continue
            label = result["names"][key]
            if key == "lens" and result["config"]["lens_rows"] != "all":
                label += f", {result['config']['lens_rows']}"
            difference = result["intervals"]["differences"].get(f"{key} - lens", {}).get(first)
            minutes = (
                f"{sum(result['seconds'][k] for k in ('fit', 'test')) / 60:.1f}" if key == "model" else ""
            )
            line = " | ".join(
                [
                    label,
                    cell(found[first]),
                    *(f"{found[metric]['value']:.4f}" for metric in others),
                    cell(difference, "+") if difference else "",
                    minutes,
                ]
            )
            if line not in seen:
                seen.add(line)
                table.append(f"| {line} |")
    return table


def with_compared(run: Path) -> list[Path]:
    """A run's folder, and those of the models that it was compared with."""
    return [run, *sorted(path.parent for path in run.glob("compare/*/result.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--json", type=Path, help="write the results, without paths, to this file")
    arguments = parser.parse_args()
    if (arguments.runs[0] / "plan.json").is_file():
        (folder,) = arguments.runs
        print((folder / "compare.md").read_text())
        if arguments.json:
            compared = json.loads((folder / "compare.json").read_text())
            kept = {key: value for key, value in compared.items() if key not in ("gates", "prompts")}
            # Local paths are of no use to others.
            kept["command"] = re.sub(r" --data_path=\S+", "", compared["command"])
            for model in kept["models"]:
                model["paths"] = [Path(path).name for path in model["paths"]]
            write(arguments.json, kept)
        return
    folders = [folder for run in arguments.runs for folder in with_compared(run)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    print("\n".join(lines(results)))
    if arguments.json:
        kept = [{key: result[key] for key in KEPT if key in result} for result in results]
        for run, result in zip(folders, kept, strict=True):
            if (run / "compare.json").is_file():
                compared = json.loads((run / "compare.json").read_text())
                result["comparison"] = {key: compared[key] for key in ("subject", "differences", "failed")}
        write(arguments.json, kept)


def write(path: Path, content: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
