"""On a GPU the models are those of the CPU.

    RECBOLE_LLM_TEST_GPU=1 python -m pytest tests/model/test_cuda.py

Without that variable, or without a GPU, these tests are skipped, and all others run on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.llm_trainer import LLMTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

STREAM = {
    "layout": "stream",
    "max_prompt_tokens": 128,
    "stream_lead": 2,
    "stream_context": 5,
    "train_batch_size": 40,
    "few_shot": 200,
    "residual_rows": None,
}
DIN = {"lens": "DIN", "lens_residual": True}
MODELS = {
    "TALLRec, prompts": ("TALLRec", {}),
    "TALLRec, streams": ("TALLRec", STREAM),
    "RecLoRA, prompts": ("RecLoRA", {}),
    "RecLoRA, streams": ("RecLoRA", {**STREAM, **DIN}),
    "RecLoRA, streams, strict": ("RecLoRA", {**STREAM, **DIN, "history_ties": "strict"}),
    "RecLoRA, streams, output": ("RecLoRA", {**STREAM, **DIN, "mixer": "output"}),
    "RecLoRA, streams, dense": ("RecLoRA", {**STREAM, **DIN, "mixer": "dense"}),
    "RecLoRA, streams, shuffled": ("RecLoRA", {**STREAM, **DIN, "gate": "shuffled"}),
    "CoLLM, streams": ("CoLLM", {**STREAM, "stage_one_share": 0.0}),
    "LensPrompt, streams": ("LensPrompt", STREAM),
    "ReLLaX, prompts": ("ReLLaX", {}),
}


def both(parts_of, name: str, options: dict, **cuda):
    """The same model on the CPU and on the GPU, with the same trained parameters."""
    here = parts_of(name, **options, gate_dropout=0.0, device="cpu", dtype="float32")
    there = parts_of(name, **options, gate_dropout=0.0, device="cuda", **({"dtype": "float32"} | cuda))
    generator = torch.Generator().manual_seed(3)
    groups = there.model.parameter_groups()
    with torch.no_grad():
        for group, parameters in here.model.parameter_groups().items():
            assert groups[group].keys() == parameters.keys()
            for key, parameter in parameters.items():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
                groups[group][key].copy_(parameter)
    return here, there


def gradients(parts) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first optimizer step's batch."""
    data = parts.train_data
    first = data.epoch_batches(0)[0] if hasattr(data, "epoch_batches") else list(range(8))
    loss = parts.model.calculate_loss(data.collate_fn(first))
    loss.backward()
    found = {
        f"{group}.{key}": parameter.grad.cpu()
        for group, parameters in parts.model.parameter_groups().items()
        for key, parameter in parameters.items()
        if parameter.grad is not None
    }
    return loss.item(), found


@pytest.mark.parametrize("case", MODELS)
def test_scores_and_gradients_are_those_of_the_cpu(parts_of, case):
    here, there = both(parts_of, *MODELS[case])
    assert all(p.device.type == "cuda" for g in there.model.parameter_groups().values() for p in g.values())
    samples = here.test[:]
    with torch.no_grad():
        expected, found = here.model.predict(samples), there.model.predict(there.test[:])
    assert expected.std() > 1e-3
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=1e-4, rtol=0)
    loss, of_cpu = gradients(here)
    other_loss, of_cuda = gradients(there)
    assert of_cuda.keys() == of_cpu.keys() != set()
    assert other_loss == pytest.approx(loss, abs=1e-4)
    for key, gradient in of_cpu.items():
        size = gradient.norm()
        assert (of_cuda[key] - gradient).norm() <= 1e-3 * size + 1e-5, key


@pytest.mark.parametrize("case", ["RecLoRA, prompts", "RecLoRA, streams", "RecLoRA, streams, strict"])
def test_scores_in_bfloat16_are_near_those_in_float32(parts_of, case):
    here, there = both(parts_of, *MODELS[case], dtype="bfloat16")
    with torch.no_grad():
        expected, found = here.model.predict(here.test[:]), there.model.predict(there.test[:])
    assert 1e-7 < (found.cpu() - expected.cpu()).abs().max() < 0.05


@pytest.mark.parametrize("case", ["RecLoRA, prompts", "RecLoRA, streams"])
def test_scores_do_not_depend_on_the_batch(parts_of, case):
    _, there = both(parts_of, *MODELS[case])
    samples = there.test[:]
    with torch.no_grad():
        whole = there.model.predict(samples)
        alone = torch.cat([there.model.predict(samples[torch.tensor([i])]) for i in range(len(samples))])
    torch.testing.assert_close(alone, whole, atol=1e-4, rtol=0)


RUNS = {
    "RecLoRA, prompts": ("RecLoRA", {}),
    "RecLoRA, streams": ("RecLoRA", {**STREAM, **DIN, "residual_rows": 20}),
    "iLoRA, streams": ("iLoRA", {"layout": "stream", "few_shot": 60, "lens_config": {"epochs": 1}}),
    "LLaRA, prompts": ("LLaRA", {"lens_config": {"epochs": 1}}),
}
CONVENTIONAL = {
    "Stream, labels": ("Stream", {"task": "ctr"}),
    "Stream, next item": ("Stream", {"task": "next_item", "eval_mode": "full"}),
    "HLLM": ("HLLM", {"task": "ctr"}),
    "HLLM, user model of the LLM": ("HLLM", {"user_model": "backbone", "backbone_layers": 1}),
    "SASRec": ("SASRec", {}),
    "SIM": ("SIM", {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_whole_runs_and_their_saved_scores(ctr, rows_of, case):
    model, options = RUNS[case]
    settings = {**ctr, **options, "device": "cuda"}
    result = run_recbole_llm(model, "toy", config_dict=settings)
    assert result["device"].startswith("cuda")
    loaded = load_data_and_model(Path(result["path"]).parent)
    assert all(p.device.type == "cuda" for g in loaded.model.parameter_groups().values() for p in g.values())
    if model == "RecLoRA":
        samples, rows = loaded.test_data._dataset, rows_of(result)
        with torch.no_grad():
            found = loaded.model.predict(samples[:]).cpu().numpy()
        order = np.argsort(samples.inter_feat["row_id"].numpy())
        expected = rows["model_score"][np.argsort(rows["row_id"])]
        np.testing.assert_allclose(found[order], expected, atol=2e-2)


@pytest.mark.parametrize("case", CONVENTIONAL)
def test_whole_runs_without_prompts(toy_settings, case):
    model, options = CONVENTIONAL[case]
    settings = {**toy_settings, **options, "device": "cuda", "epochs": 1}
    if model in ("Stream", "SASRec"):  # no text is read
        del settings["backbone"], settings["text"]
    result = run_recbole_llm(model, "toy", config_dict=settings)
    assert result["device"].startswith("cuda")


@pytest.mark.parametrize("case", ["RecLoRA, prompts", "RecLoRA, streams"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(ctr, broken_and_resumed, rows_of, case):
    model, options = MODELS[case]
    options = {**options, "device": "cuda", "dtype": "float32", "epochs": 2}
    uninterrupted = rows_of(run_recbole_llm(model, "toy", config_dict={**ctr, **options}))
    resumed = rows_of(broken_and_resumed(model, 2, **options))
    np.testing.assert_allclose(resumed["model_score"], uninterrupted["model_score"], atol=1e-4)


def test_memory_that_does_not_suffice_halves_the_micro_batch(parts_of, caplog):
    _, there = both(parts_of, "RecLoRA", {**STREAM, **DIN, "micro_batch_size": 64, "train_batch_size": 2000})
    data = there.train_data
    batch = data.collate_fn(data.epoch_batches(0)[0])
    with torch.no_grad():
        expected = there.model.predict(there.test[:])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    there.model.train()
    loss = there.model.calculate_loss(batch)
    loss.backward()
    del loss
    there.model.zero_grad(set_to_none=True)
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.7 * needed) / total)
    try:
        trainer = LLMTrainer(there.config, there.model, run_folder=Path("."), identities=there.identities)
        trainer._backward(batch, 0)
        there.model.eval()
        with torch.no_grad():
            found = there.model.predict(there.test[:])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert there.model.micro_batch_size < 64
    assert "continuing with" in caplog.text
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
