"""Many short runs in one process, without growing memory, files or threads:  make soak

Models take turns. After every run the garbage is collected and the process's resident memory, open files and threads
are read. The first ten runs warm up: libraries load, caches fill.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from runs import COMMON, SCENARIOS, SEQUENTIAL
from synthetic import TEXT, write_dataset

from recbole_llm.quick_start import run_recbole_llm

WARM_UP = 10
SMALL = {key: value for key, value in COMMON.items() if key != "checkpoint_seconds"} | {
    "epochs": 1,
    "text": TEXT,
}
MODELS = {
    "RecLoRA": {**SCENARIOS["CTR"].values, **SMALL},
    "iLoRA": {**SCENARIOS["next item"].values, **SMALL},
    "TALLRec": {**SMALL, "lens": None, "layout": "stream"},
    "DIN": {"task": "ctr", "epochs": 1, "bootstrap_samples": 20, "embedding_size": 4, "mlp_hidden_size": [8]},
    "SASRec": {"task": "next_item", "bootstrap_samples": 20, "num_negatives": 4, **SEQUENTIAL, "epochs": 1},
}


def main() -> int:
    """Print the table; 1 if something grew."""
    parser = argparse.ArgumentParser(description="Many short runs in one process.")
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    process, seen = psutil.Process(), []
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        data = write_dataset(Path(scratch) / "data", n_users=20, n_items=30, length=12)
        print(f"{'run':>4} {'model':8} {'memory MB':>10} {'files':>6} {'threads':>8}")
        for number in range(arguments.runs):
            model = list(MODELS)[number % len(MODELS)]
            values = {
                "data_path": str(data),
                "cache_dir": f"{scratch}/cache",
                "show_progress": False,
                "device": "cpu",
            }
            if model not in ("DIN", "SASRec"):
                values["backbone"] = "tiny"
            with contextlib.redirect_stderr(io.StringIO()):
                run_recbole_llm(model, "toy", config_dict={**MODELS[model], **values})
            gc.collect()
            seen.append((process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()))
            if number < 3 or (number + 1) % 5 == 0:
                print(
                    f"{number + 1:4} {model:8} {seen[-1][0]:10.1f} {seen[-1][1]:6} {seen[-1][2]:8}",
                    flush=True,
                )
        os.chdir("/")
    memory, files, threads = np.array(seen[WARM_UP:]).T
    slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0])
    grown = int(files[-5:].max() - files[:5].max()), int(threads[-5:].max() - threads[:5].max())
    print(
        f"after the first {WARM_UP} runs: {slope:+.2f} MB, {grown[0]:+} files, {grown[1]:+} threads in all",
        end="",
    )
    print(f" over {len(memory)} runs (memory: a run, by least squares)")
    return int(slope > 1.0 or max(grown) > 0)


if __name__ == "__main__":
    sys.exit(main())
