"""The demo, with a tiny backbone in the place of the real one."""

from __future__ import annotations

from pathlib import Path

import torch

from recbole_llm import demo


def test_one_table_has_the_untrained_llm_the_lens_the_llm_alone_and_both(tmp_cwd: Path, monkeypatch, capsys):
    small = {
        "backbone": "tiny",
        "few_shot": 64,
        "eval_rows": 200,
        "valid_rows": 100,
        "residual_rows": 100,
        "zero_shot": True,
        "bootstrap_samples": 20,
        "show_progress": False,
        "cache_dir": str(tmp_cwd / "cache"),
        "lens_config": {"epochs": 1, "hidden_size": 8, "inner_size": 8, "id_size": 8, "n_layers": 1},
    }
    monkeypatch.setattr(demo, "ON_CPU", small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main() == 0
    told = capsys.readouterr().out
    for line in ("untrained LLM", "lens Stream", "RecLoRA, LLM alone", "RecLoRA"):
        assert f"\n{line} " in told
    assert told.count("result: ") == 1
    # Nothing is written beside the cache but what a run leaves in the folder it is started in.
    assert {path.name for path in tmp_cwd.iterdir()} <= {"cache", "saved", "log", "log_tensorboard"}
