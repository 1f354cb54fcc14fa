"""ReLLa: retrieved text, and rows that are trained with both of their histories."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.data.retriever import RecentRetriever
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.llm_trainer import LLMTrainer


def both_prompts(parts, rows) -> tuple[list[bytes], list[bytes]]:
    """The prompts of ``rows`` with their recent, and with their retrieved history."""
    retrieved, kept = parts.prompts.encode(rows).input_ids, parts.prompts.retriever
    parts.prompts.retriever = RecentRetriever(parts.dataset.history, kept.k)
    recent = parts.prompts.encode(rows).input_ids
    parts.prompts.retriever = kept
    return [ids.tobytes() for ids in recent], [ids.tobytes() for ids in retrieved]


def test_an_epoch_has_every_row_with_its_recent_and_with_its_retrieved_history(parts_of, tmp_path):
    parts = parts_of("ReLLa")
    few_shot = parts_of("TALLRec").train
    recent, retrieved = both_prompts(parts, few_shot[np.arange(len(few_shot))])
    assert sum(a != b for a, b in zip(recent, retrieved, strict=True)) > len(few_shot) / 2
    seen, labels = [], []
    encode = parts.prompts.encode

    def spy(interaction, **options):
        encoded = encode(interaction, **options)
        seen.extend(ids.tobytes() for ids in encoded.input_ids)
        labels.extend(zip(interaction["row_id"].tolist(), interaction["label"].tolist(), strict=True))
        return encoded

    parts.prompts.encode = spy
    trainer = LLMTrainer(parts.config, parts.model, run_folder=tmp_path, identities=parts.identities)
    trainer._train_epoch(parts.train_data, 0)
    assert Counter(seen) == Counter(recent + retrieved)
    own = few_shot.inter_feat
    assert Counter(labels) == Counter(
        2 * list(zip(own["row_id"].tolist(), own["label"].tolist(), strict=True))
    )
    assert trainer.trained_on == {"rows": 48, "steps": 6}


def test_rows_to_be_predicted_show_the_retrieved_history_alone(parts_of):
    parts = parts_of("ReLLa")
    rows = parts.test[np.arange(len(parts.test))]
    recent, retrieved = both_prompts(parts, rows)
    shown = [ids.tobytes() for batch in parts.test_data for ids in parts.model.encode(batch[0]).input_ids]
    assert shown == retrieved and shown != recent


def test_without_mixing_only_the_retrieved_history_is_trained(parts_of):
    parts = parts_of("ReLLa", mixed_training=False)
    assert len(parts.train) == parts.sizes["few_shot"] == 24
    rows = parts.train[np.arange(24)]
    assert [ids.tobytes() for ids in parts.model.encode(rows).input_ids] == both_prompts(parts, rows)[1]


def test_the_update_is_a_plain_lora(parts_of, disturb):
    parts = parts_of("ReLLa")
    disturb(parts.model)
    parts.model.double()
    layer = parts.model.adapter.model.get_decoder().layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, a.shape[1], dtype=torch.float64)
    expected = x @ layer.base_layer.weight.T + 16 / 8 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)


def test_run_is_written_read_and_says_what_it_was_trained_on(ctr, rows_of, capsys):
    result = run_recbole_llm("ReLLa", "toy", config_dict=ctr)
    saved = json.loads(Path(result["path"]).read_text())
    assert saved["trained_on"] == {"rows": 48, "steps": 6} and saved["rows"]["few_shot"] == 24
    parts = load_data_and_model(Path(result["path"]).parent)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    rows = rows_of(result)
    np.testing.assert_array_equal(scores.numpy(), rows["model_score"])
    assert not np.array_equal(rows["model_score"], rows["zero_shot_score"])


def test_a_resumed_run_ends_as_an_unbroken_one(ctr, broken_and_resumed, rows_of):
    unbroken = run_recbole_llm("ReLLa", "toy", config_dict={**ctr, "zero_shot": False})
    resumed = broken_and_resumed("ReLLa", 4, zero_shot=False)
    assert resumed["trained_on"] == unbroken["trained_on"] == {"rows": 48, "steps": 6}
    assert np.array_equal(rows_of(resumed)["model_score"], rows_of(unbroken)["model_score"])


def test_dry_run_shows_three_prompts_and_the_rows_of_an_epoch(ctr):
    text = run_recbole_llm("ReLLa", "toy", config_dict={**ctr, "dry_run": True})["dry_run"]
    assert text.count("--- prompt of few_shot sample") == 3
    assert "an epoch: 48 samples (each of few_shot with its recent and its retrieved history) in 6 " in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_retrieval": "recent"}, "mixed_training.*set text_retrieval: semantic"),
        ({"mixed_training": "both"}, "mixed_training.*true or false"),
        ({"semantic_vectors": "lens", "lens": None, "lens_config": None}, "semantic_vectors.*needs a lens"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message, ctr):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("ReLLa", "toy", config_dict={**ctr, **options})


def test_the_next_item_task_has_no_retrieved_text_to_mix(ctr):
    options = {key: ctr[key] for key in ("data_path", "cache_dir", "text", "backbone")}
    with pytest.raises(ValueError, match="mixed_training.*not possible in the next_item task"):
        run_recbole_llm("LLaRA", "toy", config_dict={**options, "mixed_training": True})
