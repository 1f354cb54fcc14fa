"""The row collector against RecBole's own, batch by batch and through RecBole's Trainer."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from formulas import rank_metrics
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector, Evaluator
from recbole.trainer import Trainer

from recbole_llm.config.configurator import Config
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.evaluation.metrics import auc, gauc, register_metrics

FIELDS = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LABEL_FIELD": "label"}


@pytest.fixture(autouse=True)
def registered():
    register_metrics()


def config(*metrics: str, mode: str = "labeled", **more) -> dict:
    return {
        "metrics": list(metrics),
        "metric_decimal_place": 12,
        "topk": [1, 3],
        "device": torch.device("cpu"),
        "eval_args": {"mode": {"valid": mode, "test": mode}},
        **FIELDS,
        **more,
    }


def batches(n=50, size=7, seed=0, row_id=True):
    generator = torch.Generator().manual_seed(seed)
    columns = {
        "user_id": torch.randint(1, 9, (n,), generator=generator),
        "item_id": torch.randint(1, 30, (n,), generator=generator),
        "label": torch.randint(0, 2, (n,), generator=generator).float(),
    }
    if row_id:
        columns["row_id"] = torch.arange(n) + 1000
    scores = torch.rand(n, generator=generator)
    for begin in range(0, n, size):
        cut = slice(begin, begin + size)
        yield Interaction({key: value[cut] for key, value in columns.items()}), scores[cut]


def evaluate(collector, **options):
    for interaction, scores in batches(**options):
        collector.eval_batch_collect(scores, interaction, None, None)
    return collector.get_data_struct()


def test_gives_recbole_the_same_as_its_own_collector_and_the_users():
    settings = config("AUC", "LogLoss")
    mine, theirs = evaluate(RowCollector(settings)), evaluate(Collector(settings))
    for key in ("rec.score", "data.label"):
        torch.testing.assert_close(mine.get(key), theirs.get(key), rtol=0, atol=0)
    assert "data.user" not in mine
    assert Evaluator(settings).evaluate(mine) == Evaluator(settings).evaluate(theirs)


def test_rows_are_the_last_evaluation_only():
    collector = RowCollector(config("AUC", "ACC", "LabeledGAUC"))
    evaluate(collector, seed=1)
    struct = evaluate(collector, seed=2, n=40)
    rows = collector.rows()
    joined = [interaction for interaction, _ in batches(seed=2, n=40)]
    for name, field in (("user", "user_id"), ("item", "item_id"), ("row_id", "row_id"), ("label", "label")):
        np.testing.assert_array_equal(rows[name], torch.cat([i[field] for i in joined]).numpy())
    assert rows["score"].dtype == rows["label"].dtype == np.float64 and rows["user"].dtype == np.int64
    assert len(struct.get("data.user")) == 40
    result = Evaluator(config("AUC", "ACC", "LabeledGAUC")).evaluate(struct)
    assert result["auc"] == pytest.approx(auc(rows["score"], rows["label"]), abs=1e-11)
    assert result["gauc"] == pytest.approx(gauc(rows["user"], rows["score"], rows["label"]), abs=1e-11)


def test_rows_do_without_row_id():
    collector = RowCollector(config("AUC"))
    evaluate(collector, row_id=False)
    assert set(collector.rows()) == {"user", "item", "label", "score"}


def test_reused_buffers_column_scores_scalars_and_bfloat16_are_taken():
    collector = RowCollector(config("AUC"))
    buffer = torch.empty(2)
    data = Interaction(
        {"user_id": torch.tensor([1, 2]), "item_id": torch.tensor([1, 2]), "label": torch.ones(2)}
    )
    for value in (0.25, 0.75):
        collector.eval_batch_collect(buffer.fill_(value), data, None, None)
    collector.eval_batch_collect(torch.full((2, 1), 0.5, dtype=torch.float32), data, None, None)
    collector.eval_batch_collect(
        torch.tensor(0.125), data[:1], None, None
    )  # a model that squeezed a batch of one
    collector.get_data_struct()
    assert collector.rows()["score"].tolist() == [0.25, 0.25, 0.75, 0.75, 0.5, 0.5, 0.125]
    collector.eval_batch_collect(torch.tensor([0.5, 0.25], dtype=torch.bfloat16), data, None, None)
    assert collector.get_data_struct().get("rec.score").numpy().tolist() == [0.5, 0.25]
    collector.eval_batch_collect(torch.tensor([0.1, 0.2], dtype=torch.float64), data, None, None)
    assert collector.get_data_struct().get("rec.score").dtype == torch.float64


def test_bad_scores_are_refused_and_leave_nothing_behind():
    collector = RowCollector(config("AUC"))
    data = Interaction(
        {"user_id": torch.tensor([1, 2]), "item_id": torch.tensor([1, 2]), "label": torch.ones(2)}
    )
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 samples"):
        collector.eval_batch_collect(torch.rand(3), data, None, None)
    collector.eval_batch_collect(torch.tensor([0.1, float("nan")]), data, None, None)
    with pytest.raises(ValueError, match="NaN for 1 of 2 samples, the first being sample 1"):
        collector.get_data_struct()
    with pytest.raises(ValueError, match="no samples"):
        collector.rows()
    evaluate(collector)
    assert len(collector.rows()["score"]) == 50
    no_label = Interaction({"user_id": torch.tensor([1]), "item_id": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"\[label\] \(config LABEL_FIELD\)"):
        collector.eval_batch_collect(torch.rand(1), no_label, None, None)


def test_reset_forgets_an_unfinished_evaluation():
    collector = RowCollector(config("AUC"))
    for interaction, scores in list(batches())[:2]:
        collector.eval_batch_collect(scores, interaction, None, None)
    collector.reset()
    evaluate(collector, n=20)
    assert len(collector.rows()["score"]) == 20


def test_whole_evaluation_at_once():
    collector = RowCollector(config("AUC"))
    collector.eval_collect(torch.tensor([0.2, 0.8]), torch.tensor([0.0, 1.0]))
    assert Evaluator(config("AUC")).evaluate(collector.get_data_struct()) == {"auc": 1.0}
    assert set(collector.rows()) == {"label", "score"}


def test_ranking_works_as_in_recbole_and_resources_stay():
    settings = config("Hit", "Recall", "ItemCoverage", "AveragePopularity", mode="full")

    class Train:
        class dataset:
            item_counter = collections.Counter({1: 3, 2: 1})

            @staticmethod
            def num(field):
                return 6

    mine, theirs = RowCollector(settings), Collector(config("Hit", "Recall", mode="full"))
    mine.data_collect(Train)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(3):
            scores = torch.rand(4, 6, generator=generator)
            positive = (torch.tensor([0, 0, 1, 3]), torch.randint(0, 6, (4,), generator=generator))
            users = Interaction({"user_id": torch.arange(4)})
            for collector in (mine, theirs):
                collector.eval_batch_collect(scores, users, *positive)
        struct, expected = mine.get_data_struct(), theirs.get_data_struct()
        torch.testing.assert_close(struct.get("rec.topk"), expected.get("rec.topk"), rtol=0, atol=0)
        result = Evaluator(settings).evaluate(struct)
        assert result["hit@3"] == Evaluator(config("Hit")).evaluate(expected)["hit@3"]
        assert 0 < result["itemcoverage@3"] <= 1 and result["averagepopularity@1"] >= 0
    with pytest.raises(ValueError, match="no samples: a ranking of the last evaluation had several targets"):
        mine.rows()


def ranking_batches(seed=0, n_items=9, sizes=(4, 4, 2)):
    """Rankings of all items but the first, as in a full-sort evaluation of a sequential model."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        scores = torch.randint(0, 6, (size, n_items), generator=generator).float()
        scores[:, 0] = -torch.inf
        target = torch.randint(1, n_items, (size,), generator=generator)
        rows = Interaction(
            {
                "user_id": torch.randint(1, 4, (size,), generator=generator),
                "item_id": target,
                "row_id": torch.randint(0, 99, (size,), generator=generator),
            }
        )
        yield scores, rows, target


def test_ranking_rows_are_the_targets_and_their_ranks():
    collector = RowCollector(config("Hit", "NDCG", mode="full"))
    for seed in (1, 2):  # only the last evaluation stays
        for scores, rows, target in ranking_batches(seed):
            collector.eval_batch_collect(scores, rows, torch.arange(len(target)), target)
        collector.get_data_struct()
    expected = {"user": [], "item": [], "row_id": [], "rank": [], "candidates": []}
    for scores, rows, target in ranking_batches(2):
        for i, item in enumerate(target.tolist()):
            others = [s for j, s in enumerate(scores[i].tolist()) if j not in (0, item)]
            expected["user"].append(int(rows["user_id"][i]))
            expected["item"].append(item)
            expected["row_id"].append(int(rows["row_id"][i]))
            expected["rank"].append(1 + sum(s >= float(scores[i, item]) for s in others))
            expected["candidates"].append(8)
    assert {key: value.tolist() for key, value in collector.rows().items()} == expected
    assert {value.dtype for value in collector.rows().values()} == {np.dtype(np.int64)}


def test_rows_of_drawn_candidates_are_read_from_the_first_of_each_ranking():
    collector = RowCollector(config("Hit", mode="uni3"))
    scores = torch.full((3, 9), -torch.inf)
    items = torch.tensor([[1, 5, 6, 8], [2, 3, 4, 5], [8, 7, 7, 1]])  # a candidate may have been drawn twice
    scores[torch.arange(3)[:, None], items] = torch.tensor([[3.0, 1, 2, 4], [1, 1, 1, 1], [0, 9, 9, 5]])
    flat = Interaction(
        {
            "user_id": torch.tensor([7, 7, 4]).repeat_interleave(4),
            "item_id": items.flatten(),
            "row_id": torch.tensor([30, 31, 20]).repeat_interleave(4),
        }
    )
    target = torch.tensor([6, 2, 1])
    collector.eval_batch_collect(scores, flat, torch.arange(3), target)
    collector.get_data_struct()
    assert {key: value.tolist() for key, value in collector.rows().items()} == {
        "user": [7, 7, 4],
        "item": [6, 2, 1],
        "row_id": [30, 31, 20],
        "candidate_items": items.tolist(),
        "candidate_scores": [[3.0, 1.0, 2.0, 4.0], [1.0] * 4, [0.0, 9.0, 9.0, 5.0]],
        "rank": [3, 4, 2],
        "candidates": [4, 4, 3],
    }
    collector.reset()
    with pytest.raises(ValueError, match="12 pairs were scored for 3 rankings"):
        collector.eval_batch_collect(scores, flat[torch.randperm(12)], torch.arange(3), target)


def test_a_nan_in_a_ranking_is_refused_and_an_unfinished_ranking_forgotten():
    collector = RowCollector(config("Hit", mode="full"))
    (scores, rows, target), *_ = ranking_batches()
    collector.eval_batch_collect(scores, rows, torch.arange(4), target)
    bad = scores.clone()
    bad[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN scores in 1 of 4 samples, the first being sample 2"):
        collector.eval_batch_collect(bad, rows, torch.arange(4), target)
    collector.reset()
    collector.eval_batch_collect(scores, rows, torch.zeros(4, dtype=torch.long), target)
    collector.reset()  # with it, the several targets of the batch are forgotten
    collector.eval_batch_collect(scores, rows, torch.arange(4), target)
    collector.get_data_struct()
    assert len(collector.rows()["rank"]) == 4


@pytest.mark.parametrize(
    ("model", "mode", "split", "candidates"),
    [
        ("SASRec", "full", {"LS": "test_only"}, 20),
        ("SASRec", "uni5", {"LS": "test_only"}, None),
        ("BPR", "full", {"LS": "valid_and_test"}, 6),  # all but the 14 of the history
        ("BPR", "full", {"RS": [5, 1, 4]}, "several"),
    ],
)
def test_through_recbole_trainer(atomic_data, tmp_path, model, mode, split, candidates):
    settings = Config(
        model,
        "small",
        config_dict={
            "data_path": str(atomic_data),
            "checkpoint_dir": str(tmp_path),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": split, "order": "TO", "group_by": "user", "mode": mode},
            "eval_batch_size": 50,
            "metrics": ["Hit", "NDCG", "MRR"],
            "valid_metric": "MRR@5",
            "topk": [1, 5],
            "metric_decimal_place": 12,
            "use_gpu": False,
            "threshold": None,
            **({"train_neg_sample_args": None, "loss_type": "CE"} if model == "SASRec" else {}),
        },
    )
    torch.manual_seed(0)
    train, _, test = data_preparation(settings, create_dataset(settings))
    trainer = Trainer(settings, settings.model_class(settings, train._dataset).to("cpu"))
    trainer.eval_collector = RowCollector(settings)
    result = trainer.evaluate(test, load_best_model=False)
    if candidates == "several":
        with pytest.raises(ValueError, match="several targets"):
            trainer.eval_collector.rows()
        return
    rows = trainer.eval_collector.rows()
    dataset = test._dataset.inter_feat
    known = {(int(u), int(i)) for u, i in zip(dataset["user_id"], dataset["item_id"], strict=True)}
    assert set(zip(rows["user"].tolist(), rows["item"].tolist(), strict=True)) == known
    assert len(rows["user"]) == 12 and len(set(rows["rank"])) > 1
    if candidates is None:
        assert 2 <= rows["candidates"].min() <= rows["candidates"].max() <= 6
    else:
        assert (rows["candidates"] == candidates).all()
    mine = rank_metrics(rows["rank"], ["hr@1", "hr@5", "ndcg@5", "mrr@5"])
    for key, value in mine.items():
        assert value == pytest.approx(result[key.replace("hr", "hit")], abs=1e-11)
