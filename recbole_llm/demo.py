"""``make demo``: RecLoRA on RecBole's packaged ml-100k with a real language model, in one table.

Trains the lens (DIN, the frozen conventional recommender) once, then RecLoRA as published and RecLoRA with
``lens_residual`` on the same few-shot samples, and compares them with the lens and the untrained language model on the
same test samples.
"""

from __future__ import annotations

import os
import sys

# Read when torch is loaded. A thread that waits for another one must not keep the processor busy: beside other work
# that costs most of the speed (docs/performance.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from recbole_llm.experiment.table import result_table
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.utils.text_output import write_any_text

# Chosen by time alone: a quarter of an hour on two CPU cores.
ON_CPU = {"few_shot": 256, "eval_rows": 300, "train_batch_size": 8, "micro_batch_size": 8}
ON_GPU = {"few_shot": 8192, "eval_rows": None, "train_batch_size": 64, "micro_batch_size": 64}


def main() -> int:
    """Run both forms and print the table; returns the exit status."""
    write_any_text((sys.stdout, sys.stderr))
    size = ON_GPU if torch.cuda.is_available() else ON_CPU
    results = [
        run_recbole_llm("RecLoRA", "ml-100k", config_dict={**size, "run_name": name, **option})
        for name, option in (
            ("RecLoRA as published", {}),
            ("RecLoRA + lens_residual", {"lens_residual": True}),
        )
    ]
    print(result_table(results))
    for result in results:
        print(f"result: {result['path']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
