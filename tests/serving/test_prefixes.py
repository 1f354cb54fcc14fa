"""Scores with shared prefixes are those of whole prompts, and prefixes go through the language model once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_llm.serving.kept import Kept
from recbole_llm.serving.prefixes import PrefixScorer, bytes_of, why_not
from recbole_llm.serving.run import ServedRun

SHARED = [
    "TALLRec",
    "RecLoRA user",
    "RecLoRA expert",
    "TALLRec stream",
    "RecLoRA stream",
    "LensPrompt stream",
]
USERS, ITEMS = ["4", "2", "4", "1", "4", "2"], ["1", "9", "30", "3", "12", "12"]


def ids(run: ServedRun, users=USERS, items=ITEMS) -> tuple[np.ndarray, np.ndarray]:
    return run.ids("user_id", users).known, run.ids("item_id", items).known


def whole(run: ServedRun, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Scores of whole prompts, one after another."""
    return run.model.predict(run.samples(users, items)).double().numpy()


def stir(run: ServedRun) -> ServedRun:
    """Make the adapter's part of a score large enough to see."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.adapter.lora_parameters().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return run


@pytest.mark.parametrize("name", SHARED)
def test_scores_are_those_of_whole_prompts_and_prefixes_are_kept(name, served):
    run = stir(served(name))
    users, items = ids(run)
    expected = whole(run, users, items)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(run.score(users, items), expected, atol=1e-6)
    assert run.prefixes.passes == {"prefixes": 1, "branches": 1}  # of three users with six pairs
    np.testing.assert_allclose(run.score(users[::-1], items[::-1]), expected[::-1], atol=1e-6)
    assert run.prefixes.passes == {"prefixes": 1, "branches": 2}
    assert run.prefixes.kept.found == run.prefixes.kept.missed == len(run.prefixes.kept) >= 3
    others = ids(run, ["2", "4"], ["40", "41"])
    np.testing.assert_allclose(run.score(*others), whole(run, *others), atol=1e-6)


@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA stream"])
def test_a_prefix_that_has_changed_is_not_found(name, served):
    run = stir(served(name))
    users, items = ids(run)
    before = run.score(users, items)
    run.append(
        pd.DataFrame([("4", "7", 5, 990_000_000)], columns=["user_id", "item_id", "rating", "timestamp"])
    )
    after = run.score(users, items)
    np.testing.assert_allclose(after, whole(run, users, items), atol=1e-6)
    mine = users == users[0]
    assert (np.abs(after - before)[mine] > 1e-6).all() and np.abs(after - before)[~mine].max() < 1e-6


@pytest.mark.parametrize("memory", [0, 1, 200_000])
@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA stream"])
def test_memory_is_bounded_and_changes_no_score(name, memory, served):
    run = stir(served(name))
    run.prefixes = PrefixScorer(run.model, memory)
    users = np.repeat(np.arange(1, 21), 30)  # more than a pass has rows, and than a row has tokens
    items = np.tile(np.arange(1, 31), 20)
    found = run.score(users, items)
    assert run.prefixes.kept.used <= memory and (len(run.prefixes.kept) > 0) == (memory > 1)
    some = np.arange(0, 600, 37)
    np.testing.assert_allclose(found[some], whole(run, users[some], items[some]), atol=1e-6)


def test_the_prefix_used_longest_ago_goes_first():
    kept, layer = Kept(100, bytes_of), [(torch.zeros(5), torch.zeros(5))]  # 40 bytes
    for user in range(3):
        kept.put((user, 0, b""), layer)
        kept.get((0, 0, b""))
    assert len(kept) == 2 and kept.used == 80 and kept.get((1, 0, b"")) is None
    kept.put((9, 0, b""), [(torch.zeros(99), torch.zeros(99))])  # which would never fit
    assert len(kept) == 2 and kept.get((0, 0, b"")) is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RecLoRA", "the gate has seen the target item"),
        ("iLoRA", "only prompts and streams of the ctr task end with the target"),
        ("DIN", "only prompts and streams of the ctr task"),
    ],
)
def test_what_has_seen_the_target_shares_nothing(name, reason, served):
    run = served(name)
    assert run.prefixes is None and reason in why_not(run.model)
    with pytest.raises(ValueError, match=f"cannot share their beginning: {reason}"):
        served(name, prefix_memory=1000)


def test_interactions_of_one_second_are_scored_whole(served):
    run = stir(served("TALLRec stream"))
    run.dataset.history.ties = "strict"
    users, items = ids(run)
    np.testing.assert_allclose(run.score(users, items), whole(run, users, items), atol=1e-6)
    assert run.prefixes.passes["branches"] == 0
