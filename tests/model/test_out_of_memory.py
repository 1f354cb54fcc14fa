"""A micro-batch that does not fit into memory is halved; the optimizer step and the scores stay what they were."""

from __future__ import annotations

import pytest
import torch

from recbole_llm.trainer.llm_trainer import LLMTrainer

CPU = "DefaultCPUAllocator: not enough memory: you tried to allocate 123 bytes."
LAYOUTS = [
    {},
    {
        "layout": "stream",
        "lens": "DIN",
        "lens_residual": False,
        "max_prompt_tokens": 64,
        "train_batch_size": 60,
    },
]


def limit(model, name: str, most: int) -> None:
    """Let ``model.name(batch)`` fail for more than ``most`` sequences; and a second time in the middle of a batch."""
    run, calls = getattr(model, name), []

    def limited(batch, *args, **kwargs):
        calls.append(len(batch.input_ids))
        if len(batch.input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if len(batch.input_ids) > 1 and calls.count(most) == 2:
            raise RuntimeError(CPU)
        return run(batch, *args, **kwargs)

    setattr(model, name, limited)


def first_step(parts, folder) -> tuple[float, dict, dict]:
    """Loss, gradients and counts of the first optimizer step."""
    folder.mkdir(exist_ok=True)
    trainer = LLMTrainer(parts.config, parts.model, run_folder=folder, identities=parts.identities)
    batch = parts.train_data.collate_fn(trainer._epoch_batches(parts.train_data, 0)[0])
    parts.model.train()
    torch.manual_seed(5)
    loss = trainer._backward(batch, 0)
    groups = parts.model.parameter_groups().values()
    return loss, {n: p.grad for group in groups for n, p in group.items()}, dict(parts.model.counts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_that_of_smaller_micro_batches(parts_of, disturb, tmp_path, caplog, layout):
    options = {**layout, "lens_residual": True}
    parts = parts_of("RecLoRA", **options, micro_batch_size=4)
    small = parts_of("RecLoRA", **options, micro_batch_size=1)
    disturb(parts.model)
    disturb(small.model)
    limit(parts.model, "loss", 2)
    loss, found, counts = first_step(parts, tmp_path / "halved")
    expected_loss, expected, expected_counts = first_step(small, tmp_path / "small")
    assert parts.model.micro_batch_size == 1
    assert (loss, counts) == (expected_loss, expected_counts)
    assert all(gradient.any() for name, gradient in expected.items() if name.endswith("lora_A"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "continuing with 2" in caplog.text and "continuing with 1" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_stay(parts_of, disturb, layout):
    parts = parts_of("RecLoRA", **layout, micro_batch_size=4)
    disturb(parts.model)
    batch = parts.test[:]
    expected = parts.model.predict(batch)
    tokens = parts.model.counts.pop("tokens")
    limit(parts.model, "logits", 2)
    torch.testing.assert_close(parts.model.predict(batch), expected, rtol=0, atol=1e-5)
    assert parts.model.micro_batch_size == 1
    assert parts.model.counts["tokens"] == tokens


def test_one_sample_that_does_not_fit_is_a_clear_error(parts_of, tmp_path):
    parts = parts_of("TALLRec", micro_batch_size=4)
    limit(parts.model, "loss", 0)
    with pytest.raises(
        ValueError, match="single sample .micro_batch_size: 1.: CUDA out of memory.*max_prompt_tokens"
    ):
        first_step(parts, tmp_path)


def test_other_errors_are_not_taken_for_it(parts_of, tmp_path):
    parts = parts_of("TALLRec", micro_batch_size=4)

    def fails(batch):
        raise RuntimeError("shapes do not fit")

    parts.model.loss = fails
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        first_step(parts, tmp_path)
    assert parts.model.micro_batch_size == 4
