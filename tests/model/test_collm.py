"""CoLLM: which parameters move in which stage, what prompts show in it, and that a stage survives a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.checkpoint import load_checkpoint
from recbole_llm.trainer.llm_trainer import LLMTrainer, learning_rate_factor

STEPS = 6  # 48 rows in batches of 8
ROWS = {"few_shot": 48, "weight_decay": 0.1}


def trainer_of(parts, folder: Path) -> LLMTrainer:
    return LLMTrainer(parts.config, parts.model, run_folder=folder, identities=parts.identities)


def watched(parts, trainer) -> list[dict]:
    """For each optimizer step of an epoch: the stage, slots and learning rates, and which parameters it moved."""
    seen, update = [], trainer._update

    def look() -> None:
        before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
        update()
        moved = {name for name, p in parts.model.named_parameters() if not torch.equal(p, before[name])}
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        seen.append({"stage": parts.model.stage, "moved": moved, "rates": rates})

    trainer._update = look
    encode = parts.prompts.encode

    def spy(interaction, **options):
        encoded = encode(interaction, **options)
        slots.append(any((ids < 0).any() for ids in encoded.input_ids))
        return encoded

    slots: list[bool] = []
    parts.prompts.encode = spy
    trainer._train_epoch(parts.train_data, 0)
    assert len(slots) == len(seen)
    return [step | {"slots": shown} for step, shown in zip(seen, slots, strict=True)]


def test_each_stage_moves_its_own_parameters_and_nothing_else(parts_of, tmp_path):
    parts = parts_of("CoLLM", **ROWS)
    lora = {n for n, _ in parts.model.named_parameters() if ".lora_" in n}
    projectors = {n for n, _ in parts.model.named_parameters() if n.startswith("projectors.")}
    assert lora and len(projectors) == 8
    steps = watched(parts, trainer_of(parts, tmp_path))
    assert [step["stage"] for step in steps] == [1, 1, 1, 2, 2, 2]
    assert [step["slots"] for step in steps] == [False] * 3 + [True] * 3
    for step in steps[:3]:
        assert step["moved"] and step["moved"] <= lora
    assert lora == set.union(*(step["moved"] for step in steps[:3]))
    assert all(step["moved"] == projectors for step in steps[3:])


def test_each_stage_has_its_own_schedule(parts_of, tmp_path):
    parts = parts_of("CoLLM", projector_learning_rate=0.5, **ROWS)
    steps = watched(parts, trainer_of(parts, tmp_path))
    expected = [learning_rate_factor(step, 3, 0, "linear") for step in range(3)]
    assert [step["rates"]["lora"] for step in steps[:3]] == pytest.approx([0.01 * f for f in expected])
    assert [step["rates"]["projector"] for step in steps[3:]] == pytest.approx([0.5 * f for f in expected])


@pytest.mark.parametrize(("share", "stages"), [(0.0, [2] * 6), (0.2, [1] + [2] * 5), (0.9, [1] * 5 + [2])])
def test_the_share_of_stage_one(share, stages, parts_of, tmp_path):
    parts = parts_of("CoLLM", stage_one_share=share, **ROWS)
    assert [step["stage"] for step in watched(parts, trainer_of(parts, tmp_path))] == stages


def test_stages_go_over_all_epochs_and_the_stage_is_saved_with_the_best_one(parts_of, tmp_path):
    parts = parts_of("CoLLM", epochs=2, **ROWS)
    trainer = trainer_of(parts, tmp_path)
    trainer._train_epoch(parts.train_data, 0)
    assert parts.model.stage == 1
    trainer._save_checkpoint(0)
    text_only = parts.model.predict(parts.test[np.arange(6)])
    trainer._train_epoch(parts.train_data, 1)
    assert parts.model.stage == 2
    assert not torch.equal(parts.model.predict(parts.test[np.arange(6)]), text_only)
    trainer.load_best()
    assert parts.model.stage == 1 and not parts.model.hybrid
    assert torch.equal(parts.model.predict(parts.test[np.arange(6)]), text_only)


def test_stage_one_is_a_tallrec(parts_of, tmp_path):
    """The same rows, prompts and LoRA: after stage 1 both are the same model."""
    parts, plain = parts_of("CoLLM", epochs=2, **ROWS), parts_of("TALLRec", **ROWS)
    for name, folder in ((parts, tmp_path / "a"), (plain, tmp_path / "b")):
        folder.mkdir()
        trainer_of(name, folder)._train_epoch(name.train_data, 0)
    rows = parts.test[np.arange(10)]
    assert torch.equal(parts.model.predict(rows), plain.model.predict(rows))


@pytest.mark.parametrize("broken_at", [2, 4])
def test_a_resumed_run_is_in_its_stage_and_ends_as_an_unbroken_one(
    broken_at, ctr, broken_and_resumed, rows_of, tmp_path
):
    options = {**ROWS, "zero_shot": False}
    unbroken = run_recbole_llm("CoLLM", "toy", config_dict={**ctr, **options})
    resumed = broken_and_resumed("CoLLM", broken_at, **options)
    assert resumed["stage"] == unbroken["stage"] == 2
    assert np.array_equal(rows_of(resumed)["model_score"], rows_of(unbroken)["model_score"])


def test_a_checkpoint_holds_its_stage_and_resuming_restores_it(parts_of, tmp_path):
    parts = parts_of("CoLLM", **ROWS)
    trainer = trainer_of(parts, tmp_path)
    trainer._train_epoch(parts.train_data, 0)
    assert load_checkpoint(tmp_path / "last.safetensors")[0]["model/stage"].item() == 2
    again = parts_of("CoLLM", **ROWS)
    assert again.model.stage == 1
    trainer_of(again, tmp_path).resume_checkpoint(tmp_path)
    assert again.model.stage == 2 and again.model.hybrid
    assert not any(p.requires_grad for p in again.model.adapter.lora_parameters().values())
    assert all(p.requires_grad for p in again.model.projectors.parameters())
    rows = parts.test[np.arange(6)]
    assert torch.equal(again.model.predict(rows), parts.model.predict(rows))


def test_a_finished_tallrec_in_place_of_stage_one(ctr, parts_of, rows_of, tmp_path):
    result = run_recbole_llm("TALLRec", "toy", config_dict={**ctr, "zero_shot": False})
    parts = parts_of("CoLLM", lora_from=str(Path(result["path"]).parent), **ROWS)
    assert set(parts.model.parameter_groups()) == {"projector"}
    steps = watched(parts, trainer_of(parts, tmp_path))
    projectors = {n for n, _ in parts.model.named_parameters() if n.startswith("projectors.")}
    assert all(step["stage"] == 2 and step["slots"] and step["moved"] == projectors for step in steps)


def test_a_run_on_a_finished_tallrec_is_read(ctr, rows_of):
    source = run_recbole_llm("TALLRec", "toy", config_dict={**ctr, "zero_shot": False})
    options = {**ctr, **ROWS, "zero_shot": False, "lora_from": str(Path(source["path"]).parent)}
    result = run_recbole_llm("CoLLM", "toy", config_dict=options)
    parts = load_data_and_model(Path(result["path"]).parent)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    np.testing.assert_array_equal(scores.numpy(), rows_of(result)["model_score"])


@pytest.mark.parametrize("lens", ["DIN", "SASRec"])
def test_run_is_written_and_read(lens, ctr, rows_of):
    sequence = {"epochs": 2, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}
    options = {**ctr, **ROWS, "lens": lens} | ({"lens_config": sequence} if lens == "SASRec" else {})
    result = run_recbole_llm("CoLLM", "toy", config_dict=options)
    assert result["stage"] == 2 and result["trained_parameters"].keys() == {"lora", "projector"}
    parts, rows = load_data_and_model(Path(result["path"]).parent), rows_of(result)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data])
    np.testing.assert_array_equal(scores.numpy(), rows["model_score"])
    assert {"zero_shot_score", "lens_score"} <= rows.keys()


def test_the_users_slot_has_not_seen_the_target(parts_of):
    parts = parts_of("CoLLM")
    assert parts.lens.gate_scope == "user"
    rows = parts.test[np.arange(2)]
    other = parts.test[np.arange(2)]
    other["item_id"][:] = (other["item_id"] % (parts.dataset.item_num - 1)) + 1
    states = [parts.lens.represent(batch)[0] for batch in (rows, other)]
    assert torch.equal(*states)


def test_dry_run_shows_three_hybrid_prompts(ctr):
    text = run_recbole_llm("CoLLM", "toy", config_dict={**ctr, "dry_run": True})["dry_run"]
    assert text.count("--- prompt of few_shot sample") == 3
    assert text.count("[user vector]\n") == text.count("[item vector]\n") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "tallrec"}, "prompt: tallrec has no slots"),
        ({"lens": None, "lens_config": None}, "need a lens"),
        ({"stage_one_share": 1.0}, r"stage_one_share.*expected a number in \[0, 1\)"),
        ({"train_batch_size": 64}, "0.5 of 1 optimizer steps leave one of the two stages without any"),
        ({"lora_from": "somewhere", "stage_one_share": 0.3}, "leave one of them out"),
        ({"lora_from": "somewhere"}, "somewhere is no finished run"),
    ],
)
def test_bad_input_gets_one_clear_error(options, message, ctr):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("CoLLM", "toy", config_dict={**ctr, **options})
