"""A process of test_distributed.py, alone or one of several: ``python distributed_worker.py CASES.json``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.trainer.llm_trainer import LLMTrainer

torch.set_num_threads(1)
for case in json.loads(Path(sys.argv[1]).read_text()):
    if case["dies"] and os.environ.get("RANK") == "1":
        update, left = LLMTrainer._update, iter(range(1))

        def die(self, update=update, left=left) -> None:
            if next(left, None) is None:
                os._exit(9)
            update(self)

        LLMTrainer._update = die
    try:
        run_recbole_llm(case["model"], "toy", config_dict=case["settings"])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
