"""Ranks and rank metrics against loops, definitions and RecBole's evaluator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import rank_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.evaluator import Collector, Evaluator

from recbole_llm.evaluation.ranking import parse_rank_metric, row_rank_metric, target_ranks
from recbole_llm.utils import recbole_repairs

LEVELS = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 1e30, math.inf])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_ranks_equal_a_loop_with_ties_against_the_model(data):
    n_rows, n_items = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    scores = np.array(
        data.draw(
            st.lists(st.lists(LEVELS, min_size=n_items, max_size=n_items), min_size=n_rows, max_size=n_rows)
        )
    )
    targets = np.array(data.draw(st.lists(st.integers(0, n_items - 1), min_size=n_rows, max_size=n_rows)))
    scores[np.arange(n_rows), targets] = np.maximum(scores[np.arange(n_rows), targets], -1e38)
    expected = [
        1 + sum(row[j] >= row[target] for j in range(n_items) if j != target)
        for row, target in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    ranks = target_ranks(torch.tensor(scores, dtype=torch.float32), torch.tensor(targets))
    assert ranks.tolist() == expected and ranks.dtype == torch.int64
    assert target_ranks(scores, targets).tolist() == expected


def test_a_model_that_gives_every_candidate_one_score_is_last_everywhere():
    scores = torch.zeros(5, 30)
    scores[:, 20:] = -torch.inf
    ranks = target_ranks(scores, torch.tensor([0, 4, 9, 19, 1]))
    assert ranks.tolist() == [20] * 5 and rank_metrics(ranks, ["hr@10", "ndcg@10", "mrr@10"]) == {
        "hr@10": 0.0,
        "ndcg@10": 0.0,
        "mrr@10": 0.0,
    }


def test_bad_scores_and_targets_are_named():
    scores = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"not \(3, 4\) and \(2,\)"):
        target_ranks(scores, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"not \(4,\)"):
        target_ranks(scores[0], torch.tensor([1, 2, 3, 0]))
    with pytest.raises(ValueError, match=r"1\.\.4 leave the 4 columns"):
        target_ranks(scores, torch.tensor([1, 4, 2]))
    with pytest.raises(ValueError, match=r"-1\.\.2 leave"):
        target_ranks(scores, torch.tensor([-1, 0, 2]))
    scores[1, 3] = torch.nan  # of another item than the target
    with pytest.raises(ValueError, match="NaN scores in 1 of 3 samples, the first being sample 1"):
        target_ranks(scores, torch.tensor([1, 2, 0]))
    scores[1, 3] = scores[2, 0] = -torch.inf
    with pytest.raises(ValueError, match="1 of 3 samples has the score -inf.*item 0 in sample 2"):
        target_ranks(scores, torch.tensor([1, 2, 0]))
    assert target_ranks(torch.empty(0, 4), torch.empty(0, dtype=torch.long)).tolist() == []


def test_metrics_equal_recbole_where_there_are_no_ties():
    recbole_repairs.install()  # RecBole's NDCG asks NumPy for np.float
    config = {
        "metrics": ["Hit", "NDCG", "MRR", "Recall"],
        "metric_decimal_place": 12,
        "topk": [1, 3, 5, 10],
        "device": torch.device("cpu"),
        "eval_args": {"mode": {"valid": "full", "test": "full"}},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LABEL_FIELD": "label",
    }
    generator = torch.Generator().manual_seed(3)
    scores = torch.stack([torch.randperm(25, generator=generator) for _ in range(60)]).float()
    scores[:, 0] = -torch.inf
    targets = torch.randint(1, 25, (60,), generator=generator)
    collector = Collector(config)
    collector.eval_batch_collect(scores, None, torch.arange(60), targets)
    expected = Evaluator(config).evaluate(collector.get_data_struct())
    names = [f"{kind}@{k}" for kind in ("HR", "NDCG", "MRR") for k in config["topk"]]
    found = rank_metrics(target_ranks(scores, targets), names)
    assert list(found) == [name.lower() for name in names]
    for name, value in found.items():
        assert value == pytest.approx(expected[name.replace("hr", "hit")], abs=1e-11)
    assert 0 < found["hr@1"] < found["ndcg@5"] < found["hr@5"] < 1


def test_metrics_by_hand():
    ranks = np.array([1, 2, 3, 5, 6, 100])
    assert row_rank_metric("hr@5", ranks).tolist() == [1, 1, 1, 1, 0, 0]
    assert row_rank_metric("NDCG@5", ranks).tolist() == [1, 1 / math.log2(3), 0.5, 1 / math.log2(6), 0, 0]
    assert row_rank_metric("mrr@3", ranks).tolist() == [1, 1 / 2, 1 / 3, 0, 0, 0]
    assert rank_metrics(ranks, ["mrr@3"])["mrr@3"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 6, abs=1e-15)


def test_wrong_metrics_and_ranks_are_named():
    assert parse_rank_metric("NDCG@10") == ("ndcg", 10)
    for name in ("hit@1", "hr", "hr@0", "hr@-1", "ndcg@x", "hr@1.5"):
        with pytest.raises(ValueError, match=f"no rank metric '{name}'"):
            row_rank_metric(name, np.array([1, 2]))
    for ranks in ([0, 1], [1.0, 2.0], [[1]], [np.nan]):
        with pytest.raises(ValueError, match="ranks must be a vector of whole numbers"):
            row_rank_metric("hr@1", np.array(ranks))
