"""The demo, with a tiny backbone in the place of the real one."""

from __future__ import annotations

from pathlib import Path

import torch

from recbole_llm import demo


def test_one_table_has_the_untrained_llm_the_lens_and_both_forms(tmp_cwd: Path, monkeypatch, capsys):
    small = {
        "backbone": "tiny",
        "few_shot": 16,
        "eval_rows": 40,
        "train_batch_size": 8,
        "bootstrap_samples": 20,
        "show_progress": False,
        "cache_dir": str(tmp_cwd / "cache"),
        "lens_config": {
            "epochs": 1,
            "embedding_size": 4,
            "mlp_hidden_size": [8],
            "attention_hidden_size": [4],
        },
    }
    monkeypatch.setattr(demo, "ON_CPU", small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main() == 0
    told = capsys.readouterr().out
    for line in ("untrained LLM", "lens DIN", "RecLoRA as published", "RecLoRA + lens_residual"):
        assert f"\n{line} " in told
    assert told.count("result: ") == 2
    # Nothing is written beside the cache but what a run leaves in the folder it is started in.
    assert {path.name for path in tmp_cwd.iterdir()} <= {"cache", "saved", "log", "log_tensorboard"}
