"""Turn finished runs into the table of a results page, and into one json file that can be committed.

    python benchmarks/summarise.py saved/RecLoRA-ml-1m-* --json benchmarks/results/ml-1m-ctr.json

Every run contributes itself, and once each the lens and the untrained language model it was compared with. Nothing is
computed here: all numbers are those of the runs' ``result.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KEPT = (
    "name", "model", "dataset", "seed", "device", "backbone", "lens", "rows", "metrics", "intervals", "zero_shot",
    "names", "residual", "trained_parameters", "seconds", "tokens_per_second", "peak_memory", "versions", "machine",
    "identities", "finished",
)  # fmt: skip


def cell(interval: dict | None, sign: str = "") -> str:
    """``0.7412 [0.7301, 0.7520]``, or as much of it as there is."""
    if interval is None or interval["value"] is None:
        return "-"
    if interval["low"] is None:
        return f"{interval['value']:{sign}.4f}"
    return f"{interval['value']:{sign}.4f} [{interval['low']:{sign}.4f}, {interval['high']:{sign}.4f}]"


def lines(results: list[dict]) -> list[str]:
    """A markdown table, one line per model."""
    table = [
        "| model | AUC | LogLoss | ACC | GAUC | AUC - its lens | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for result in results:
        for key in ("zero_shot", "lens", "model"):
            found = result["intervals"]["models"].get(key)
            if found is None:
                continue
            label = result["names"][key]
            if key == "lens" and result["config"]["lens_rows"] != "all":
                label += f", {result['config']['lens_rows']}"
            difference = result["intervals"]["differences"].get(f"{key} - lens", {}).get("auc")
            minutes = (
                f"{sum(result['seconds'][k] for k in ('fit', 'test')) / 60:.0f}" if key == "model" else ""
            )
            line = " | ".join(
                [
                    label,
                    cell(found["auc"]),
                    *(f"{found[metric]['value']:.4f}" for metric in ("logloss", "acc", "gauc")),
                    cell(difference, "+") if difference else "",
                    minutes,
                ]
            )
            if line not in seen:
                seen.add(line)
                table.append(f"| {line} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--json", type=Path, help="write the results, without paths, to this file")
    arguments = parser.parse_args()
    results = [json.loads((run / "result.json").read_text()) for run in arguments.runs]
    print("\n".join(lines(results)))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        kept = [{key: result[key] for key in KEPT if key in result} for result in results]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
