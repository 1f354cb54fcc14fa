"""``make demo``: RecLoRA on RecBole's packaged ml-100k with a real language model, in one table.

One run on user streams, evaluated on all test samples: the untrained language model, the lens (the frozen conventional
recommender), the tuned language model alone, and RecLoRA, which adds the lens's logit to it.
"""

from __future__ import annotations

import os
import sys

# Read when torch is loaded. A thread that waits for another one must not keep the processor busy for long: beside other
# work that costs most of the speed (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000", **os.environ}

import torch

from recbole_llm.experiment.table import result_table
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.utils.text_output import write_any_text

# Chosen by time alone: a quarter of an hour on two CPU cores.
ON_CPU = {"few_shot": 4096, "valid_rows": 1024, "residual_rows": 1024, "zero_shot": True}
ON_GPU = {"few_shot": None, "zero_shot": True}


def main() -> int:
    """Run it and print the table; returns the exit status."""
    write_any_text((sys.stdout, sys.stderr))
    size = ON_GPU if torch.cuda.is_available() else ON_CPU
    result = run_recbole_llm("RecLoRA", "ml-100k", config_dict=size)
    print(result_table(result))
    print(f"result: {result['path']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
