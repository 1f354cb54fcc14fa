"""Checkpoints: round trips are exact, damage and misfits are named."""

from __future__ import annotations

import itertools
import multiprocessing
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recbole_llm.trainer.checkpoint import (
    CheckpointError,
    check_identity,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)


def test_round_trip_is_exact(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(2.5)}
    save_checkpoint(tmp_path / "c.safetensors", tensors, {"epoch": 3, "score": 0.25, "none": None})
    loaded, meta = load_checkpoint(tmp_path / "c.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    assert (meta["epoch"], meta["score"], meta["none"]) == (3, 0.25, None)


def test_saving_replaces_the_file_at_once_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.zeros(2)}, {})
    save_checkpoint(path, {"a": torch.ones(2)}, {})
    assert torch.equal(load_checkpoint(path)[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def save_again_and_again(path):
    for number in itertools.count(1):
        save_checkpoint(path, {"a": torch.full((1000,), float(number))}, {"number": number})


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.zeros(1000)}, {"number": 0})
    writer = multiprocessing.get_context("fork").Process(
        target=save_again_and_again, args=(path,), daemon=True
    )
    writer.start()
    seen = set()
    try:
        for _ in range(5000):
            tensors, meta = load_checkpoint(path)
            seen.add(meta["number"])
            assert torch.equal(tensors["a"], torch.full((1000,), float(meta["number"])))
    finally:
        writer.kill()
        writer.join()
    assert len(seen) > 10


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    save_checkpoint(damaged, {"a": torch.zeros(1000)}, {})
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(damaged)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(CheckpointError, match="not a checkpoint of recbole_llm"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_every_differing_identity_is_named(tmp_path):
    saved = {"backbone": "x", "lens": "l", "data": "d"}
    check_identity(saved, dict(saved), tmp_path)
    with pytest.raises(CheckpointError) as error:
        check_identity(saved, {"backbone": "y", "lens": "l", "data": "e"}, tmp_path)
    assert "backbone: checkpoint x, this run y" in str(error.value)
    assert "data: checkpoint d, this run e" in str(error.value)
    assert "lens" not in str(error.value)


def draw() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.rand(1), np.random.rand(1), random.gauss(0, 1)  # gauss keeps a second number back
    save_checkpoint(tmp_path / "c.safetensors", rng_state(), {})
    expected = draw()
    draw()
    set_rng_state(load_checkpoint(tmp_path / "c.safetensors")[0])
    assert draw() == expected


@pytest.mark.parametrize("learner", [torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizer_goes_on_where_it_was(tmp_path, learner):
    def start():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, learner(model.parameters(), lr=0.1), {id(p): n for n, p in model.named_parameters()}

    def step(model, optimizer, i):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(i + 1))).square().sum().backward()
        optimizer.step()

    model, optimizer, names = start()
    for i in range(3):
        step(model, optimizer, i)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_checkpoint(tmp_path / "o.safetensors", optimizer_tensors(optimizer, names), {})
    for i in range(3, 6):
        step(model, optimizer, i)

    other, other_optimizer, names = start()
    other.load_state_dict(weights)
    load_optimizer_tensors(other_optimizer, load_checkpoint(tmp_path / "o.safetensors")[0], names)
    for i in range(3, 6):
        step(other, other_optimizer, i)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
