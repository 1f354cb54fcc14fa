"""Ten architectures, tiny and random, trained and evaluated in both tasks, and on streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import TEXT, write_dataset
from tiny_architectures import TOKENIZER, architectures, build

from recbole_llm.quick_start import load_data_and_model, run_recbole_llm

CASES = architectures(positions=640)
LENSES = {
    "RecLoRA": {"epochs": 1, "embedding_size": 4, "mlp_hidden_size": [8], "attention_hidden_size": [8]},
    "iLoRA": {"epochs": 1, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1},
}
KINDS = {
    "CTR": ("RecLoRA", {"layout": "prompt"}),
    "next item": ("iLoRA", {"num_negatives": 3, "compare_with": None}),
    "streams": ("RecLoRA", {"lens": "DIN", "stream_context": 5, "zero_shot": True}),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with a dataset, and a cache of lenses, for all architectures."""
    folder = tmp_path_factory.mktemp("architectures")
    write_dataset(folder / "data", n_users=12, n_items=20, length=10)
    return folder


@pytest.fixture(scope="module", params=CASES)
def backbone(request, shared) -> str:
    folder = shared / request.param.replace(" ", "-")
    build(CASES[request.param]).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_evaluated_and_read_back(kind, backbone, shared, tmp_cwd):
    model, options = KINDS[kind]
    settings = {
        "data_path": str(shared / "data"),
        "cache_dir": str(shared / "cache"),
        "backbone": backbone,
        "dtype": "float32",
        "device": "cpu",
        "text": TEXT,
        "text_history_length": 3,
        "max_prompt_tokens": 600,
        "few_shot": 8,
        "eval_rows": 8,
        "epochs": 1,
        "learning_rate": 0.01,
        "num_experts": 4,
        "bootstrap_samples": 0,
        "show_progress": False,
        "lens_config": LENSES[model],
    }
    result = run_recbole_llm(model, "toy", config_dict={**settings, **options})
    folder = Path(result["path"]).parent
    with np.load(folder / "test_rows.npz", allow_pickle=False) as rows:
        found, untrained = rows["model_rank" if model == "iLoRA" else "model_score"], None
        if model == "RecLoRA":
            untrained = rows["zero_shot_score"]
            assert ((found >= 0) & (found <= 1)).all() and len(np.unique(found)) > 1
            assert not np.array_equal(
                found, untrained
            )  # the adapter of this architecture is in its forward pass
        else:
            assert np.isfinite(rows["candidate_scores"]).all()
            assert len(np.unique(rows["candidate_scores"])) > 8
    loaded = load_data_and_model(folder, device="cpu")
    again = [loaded.model.predict(batch[0]).double().numpy() for batch in loaded.test_data]
    with np.load(folder / "test_rows.npz", allow_pickle=False) as rows:
        kept = rows["candidate_scores"].ravel() if model == "iLoRA" else found
    np.testing.assert_allclose(np.concatenate(again), kept, rtol=1e-5)
