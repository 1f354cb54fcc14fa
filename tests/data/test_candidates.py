"""Candidates: what may be drawn, with which probability, for whom the same, and what RecBole's Trainer makes of it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from atomic_files import INTER_HEADER, random_interactions, write_atomic
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR
from recbole.model.sequential_recommender import GRU4Rec, SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

from recbole_llm.config.configurator import Config
from recbole_llm.data import candidates
from recbole_llm.data.candidates import CandidateSet, draw_candidates
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.ranking_loaders import CandidateDataLoader, RankedItemsDataLoader
from recbole_llm.data.retriever import SemanticRetriever
from recbole_llm.utils.fields import ROW_ID


class Rows:
    """The part of a dataset that candidates need: interactions in time order, all of them rows."""

    uid_field, iid_field, dataset_name = "user_id", "item_id", "made_up"

    def __init__(self, users, items, *, n_items, ties="order", times=None, keep=None):
        users, items = np.asarray(users), np.asarray(items)
        times = np.arange(len(users)) if times is None else np.asarray(times)
        self.item_num = n_items
        self.history, position = HistoryIndex.from_time_order(
            users, items, None, times, None, n_users=int(users.max()) + 1, ties=ties
        )
        keep = np.arange(len(users)) if keep is None else np.asarray(keep)
        columns = {"user_id": users, "item_id": items, HISTORY_END: position, ROW_ID: np.arange(len(users))}
        self.inter_feat = Interaction({name: torch.from_numpy(v[keep]) for name, v in columns.items()})

    def __len__(self):
        return len(self.inter_feat)

    def __getitem__(self, index):
        return self.inter_feat[torch.from_numpy(np.asarray(index))]

    def id2token(self, field, number):
        return f"user-{number}"

    def allowed(self, row: int) -> set[int]:
        """By the definition: the catalogue without the target and everything the history's slice holds."""
        feat = self.inter_feat
        user, target, end = (int(feat[name][row]) for name in ("user_id", "item_id", HISTORY_END))
        (start,), (stop,) = self.history.bounds(np.array([user]), np.array([end]))
        return (
            set(range(1, self.item_num))
            - {target}
            - {int(self.history.item_ids[i]) for i in range(start, stop)}
        )


def single_rows(count: int, n_items: int) -> Rows:
    """One first interaction with item 1 for each of ``count`` users."""
    return Rows(np.arange(1, count + 1), np.ones(count, dtype=np.int64), n_items=n_items)


def draw(rows, **keys) -> CandidateSet:
    return draw_candidates(
        rows, **{"num_negatives": 3, "kind": "uniform", "seed": 7, "purpose": "test", **keys}
    )


def negatives(found: CandidateSet) -> list[set[int]]:
    return [set(items.tolist()) - {target} for items, target in zip(found.items, found.targets, strict=True)]


def some_rows(seed: int = 0, n: int = 60, n_items: int = 30, **keys) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(rng.integers(1, 9, n), rng.integers(1, n_items, n), n_items=n_items, **keys)


# ---------------------------------------------------------------------- what may be drawn


@st.composite
def interactions(draw_):
    n_items = draw_(st.integers(8, 40))
    n = draw_(st.integers(1, 40))
    rng = np.random.default_rng(draw_(st.integers(0, 2**32)))
    rows = Rows(
        rng.integers(1, 5, n),
        rng.integers(1, max(3, n_items // 2), n),
        n_items=n_items,
        ties=draw_(st.sampled_from(["order", "strict"])),
        times=np.sort(rng.integers(0, 12, n)),
    )
    if draw_(st.booleans()):  # history_scope: split
        first = rows.history.user_start[np.repeat(np.arange(5)[: len(rows.history.user_start) - 1],
                                                  np.diff(rows.history.user_start))]  # fmt: skip
        rows.history.row_start = first + (np.arange(n) - first) // 2
    return rows


@settings(max_examples=60, deadline=None)
@given(
    rows=interactions(),
    kind=st.sampled_from(candidates.KINDS),
    spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_draws_are_distinct_items_that_are_allowed(rows, kind, spare, seed):
    allowed = [rows.allowed(row) for row in range(len(rows))]
    fewest = min(map(len, allowed))
    keys = {
        "kind": kind,
        "seed": seed,
        "item_counts": np.arange(rows.item_num) % 7 + 1,
        "item_scores": lambda batch: torch.randn(len(batch), rows.item_num),
    }
    count = max(1, fewest - spare)
    found = draw(rows, num_negatives=count, **keys)
    assert found.items.shape == (len(rows), 1 + count) and found.items.dtype == np.int64
    assert np.array_equal(found.row_ids, rows.inter_feat[ROW_ID])
    assert np.array_equal(found.targets, rows.inter_feat["item_id"])
    for row, items in enumerate(found.items.tolist()):
        assert items.count(found.targets[row]) == 1
        others = set(items) - {found.targets[row]}
        assert len(others) == count and others <= allowed[row]
    with pytest.raises(
        ValueError, match=rf"made_up: num_negatives asks for {fewest + 1}, .* only {fewest} can be"
    ):
        draw(rows, num_negatives=fewest + 1, **keys)


def test_error_names_the_row_and_what_to_do():
    rows = Rows([1, 1, 2], [1, 2, 1], n_items=5)
    message = (
        r"of the 4 items only 2 can be drawn \(uniform\) for user user-1 \(row_id 1\), whose history holds 1 "
    )
    with pytest.raises(ValueError, match=message + "interactions; set it lower"):
        draw(rows, num_negatives=3)


def test_items_without_counts_are_never_drawn():
    rows = single_rows(500, n_items=8)
    counts = np.array([99, 0, 5, 0, 1, 1, 0, 1])
    assert set().union(*negatives(draw(rows, kind="popularity", item_counts=counts))) == {2, 4, 5, 7}
    with pytest.raises(ValueError, match="only 4 can be drawn"):
        draw(rows, kind="popularity", item_counts=counts, num_negatives=5)
    assert counts[0] == 99  # the caller's array is left alone


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"num_negatives": 0}, "num_negatives: 0 is not a count"),
        ({"num_negatives": True}, "num_negatives: True is not a count"),
        ({"kind": "random"}, "'random' is none of uniform, popularity, hard"),
        ({"kind": "popularity"}, "item_counts is missing"),
        ({"kind": "popularity", "item_counts": np.ones(3)}, r"shape \(3,\) do not fit 30 items"),
        ({"kind": "popularity", "item_counts": -np.ones(30)}, "negative or infinite"),
        ({"kind": "popularity", "item_counts": np.full(30, np.nan)}, "or NaN"),
        ({"kind": "hard"}, "item_scores is missing"),
        (
            {"kind": "hard", "item_scores": lambda batch: torch.zeros(len(batch), 4)},
            r"\(60, 4\), expected .* \(60, 30",
        ),
        ({"kind": "hard", "item_scores": lambda batch: torch.full((len(batch), 30), torch.nan)}, "gave NaN"),
        ({"kind": "hard", "item_scores": len, "cache_dir": "here"}, "scores_identity, which is missing"),
    ],
)
def test_bad_arguments(keys, message):
    with pytest.raises(ValueError, match=message):
        draw(some_rows(), **keys)


def test_hard_negatives_are_the_best_allowed_items():
    rows = some_rows(3, n=50)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 6, (9, 30), generator=generator).float()  # many ties
    table[:, [4, 11]] = -torch.inf
    asked = []

    def scores(batch):
        asked.append(len(batch))
        return table[batch["user_id"]]

    found = draw(rows, kind="hard", item_scores=scores, num_negatives=5)
    assert sum(asked) == len(rows)
    for row, drawn in enumerate(negatives(found)):
        mine = table[rows.inter_feat["user_id"][row]].tolist()
        free = [item for item in rows.allowed(row) if mine[item] > -np.inf]
        assert drawn == set(sorted(free, key=lambda item: (-mine[item], item))[:5])


# ---------------------------------------------------------------------- with which probability


def successive(weights: list[float], count: int) -> np.ndarray:
    """Exact probability that each item is among ``count`` drawn without replacement.

    Items of one weight are alike, so the state is how many of each weight have been drawn.
    """
    classes = sorted(set(weights))
    there = np.array([weights.count(weight) for weight in classes])
    states = {(0,) * len(classes): 1.0}
    for _ in range(count):
        after = defaultdict(float)
        for drawn, probability in states.items():
            left = (there - drawn) * classes
            for index in np.flatnonzero(left):
                following = (*drawn[:index], drawn[index] + 1, *drawn[index + 1 :])
                after[following] += probability * left[index] / left.sum()
        states = after
    expected = sum(probability * np.array(drawn) for drawn, probability in states.items()) / there
    return np.array([expected[classes.index(weight)] for weight in weights])


@pytest.mark.parametrize(
    "weights, count",
    [
        ([1, 1, 1, 1, 1], 3),
        ([5, 3, 2, 1, 1], 3),
        ([2000, 1, 2, 3, 4], 3),  # nearly every row is finished by the race
        ([0.5, 60, 60, 0.25, 1], 3),
        ([900, *[9] * 12, *[1] * 27], 16),  # rows enter the race with one to fifteen items missing
    ],
    ids=["uniform", "mild", "one dominates", "two dominate", "long race"],
)
def test_probabilities_are_those_of_drawing_without_replacement(weights, count):
    n = 20_000
    rows = single_rows(n, n_items=2 + len(weights))
    counts = np.array([50, 1000, *weights])  # neither padding nor the target (item 1) may matter
    kind = "uniform" if len(set(weights)) == 1 else "popularity"
    found = draw(rows, kind=kind, item_counts=counts, num_negatives=count)
    seen = np.bincount(found.items.ravel(), minlength=2 + len(weights))
    assert seen[0] == 0 and seen[1] == n
    chance = successive(weights, count)
    assert (abs(seen[2:] - n * chance) <= 4.5 * np.sqrt(n * chance * (1 - chance)) + 1e-6).all()


def test_order_is_random_and_without_a_pattern():
    found = draw(single_rows(20_000, n_items=7), kind="popularity", item_counts=[0, 1, 50, 9, 1, 1, 1])
    for item in range(1, 7):
        places = (found.items == item).sum(axis=0)
        assert abs(places - places.mean()).max() < 4.5 * np.sqrt(places.mean())


def test_rows_draw_independently_of_each_other():
    found = draw(single_rows(20_000, n_items=101), num_negatives=1)
    drawn = found.items.sum(axis=1) - 1
    for lag in (1, 2, 256):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4.5 / np.sqrt(20_000)


def test_random_numbers_are_those_of_splitmix64():
    """First outputs for seed 0, as published with the reference implementation."""
    states = np.array([0, 0x9E3779B97F4A7C15, (2 * 0x9E3779B97F4A7C15) % 2**64], dtype=np.uint64)
    assert candidates._mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


# ---------------------------------------------------------------------- the same for whom


@pytest.mark.parametrize("kind", candidates.KINDS)
def test_a_row_has_the_same_candidates_in_any_subset_and_batch(kind, monkeypatch):
    table = torch.rand(9, 2000, generator=torch.Generator().manual_seed(1))
    keys = {
        "kind": kind,
        "item_counts": np.array([0, *[9000] * 9, *[1] * 1990]),
        "item_scores": lambda batch: table[batch["user_id"]],
        "num_negatives": 300,
    }
    whole = draw(some_rows(n_items=2000), **keys)
    keep = np.random.default_rng(1).permutation(60)[:23]
    part = draw(some_rows(n_items=2000, keep=keep), **keys)
    assert np.array_equal(part.items, whole.items[keep])
    assert np.array_equal(part.items, whole.of(part.row_ids))
    for cells in (1, 20_000):
        monkeypatch.setattr(candidates, "CELLS", cells)
        assert draw(some_rows(n_items=2000), **keys).sha256 == whole.sha256
    monkeypatch.undo()
    assert (draw(some_rows(n_items=2000), **{**keys, "seed": 8}).items != whole.items).any()
    assert (draw(some_rows(n_items=2000), **{**keys, "purpose": "valid"}).items != whole.items).any()


def test_draws_are_the_same_on_every_machine():
    rows = Rows([1, 1, 2], [3, 4, 5], n_items=1000)
    uniform, popular = (
        [[338, 3, 768, 915], [69, 585, 4, 32], [121, 24, 731, 5]],
        [[839, 3, 551, 1], [932, 1, 4, 990], [782, 180, 1, 5]],
    )
    assert draw(rows, seed=2024).items.tolist() == uniform
    weighted = draw(rows, seed=2024, kind="popularity", item_counts=[0, 10**6, *[1] * 998])
    assert weighted.items.tolist() == popular  # of the race


# ---------------------------------------------------------------------- sets and files


def test_of_answers_in_the_order_asked():
    found = CandidateSet(np.array([30, 10, 20]), np.array([[1, 2], [3, 4], [5, 6]]), np.array([1, 4, 5]))
    assert found.of(np.array([20, 30, 20])).tolist() == [[5, 6], [1, 2], [5, 6]]
    assert found.of(np.array([], dtype=np.int64)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"no candidates for row_id 31 \(nor for 1 others of the 3"):
        found.of(np.array([10, 31, 5]))


@pytest.mark.parametrize(
    "row_ids, items, targets, message",
    [
        ([1, 1], [[1, 2], [3, 4]], [1, 3], "a row_id comes more than once"),
        (
            [1, 2],
            [[1, 2], [3, 4]],
            [1, 1],
            r"candidates of row_id 2: \[3, 4\] are not distinct items with the target 1",
        ),
        ([1, 2], [[1, 2, 2], [3, 4, 5]], [1, 3], "candidates of row_id 1"),
        ([1, 2], [[1, 2], [3, 0]], [1, 3], "candidates of row_id 2"),
        ([1, 2], [[1, 2]], [1, 3], "do not fit 2 samples"),
        ([1], [1], [1], "do not fit 1 samples"),
    ],
)
def test_sets_that_contradict_themselves(row_ids, items, targets, message):
    with pytest.raises(ValueError, match=message):
        CandidateSet(np.array(row_ids), np.array(items), np.array(targets))


def test_saved_sets_come_back_and_damage_is_noticed(tmp_path):
    found, path = draw(some_rows()), tmp_path / "deep" / "set.npz"
    found.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["set.npz"]
    again = CandidateSet.load(path)
    assert again.sha256 == found.sha256 and np.array_equal(again.items, found.items)
    reordered = CandidateSet(found.row_ids, found.items[:, ::-1], found.targets)
    assert reordered.sha256 != found.sha256

    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"set.npz is damaged .*; delete it"):
        CandidateSet.load(path)
    np.savez(path, row_ids=found.row_ids, items=reordered.items, targets=found.targets, sha256=found.sha256)
    with pytest.raises(ValueError, match="SHA-256 is not the one"):
        CandidateSet.load(path)
    np.savez(path, row_ids=np.array([{}], dtype=object), items=found.items, targets=found.targets)
    with pytest.raises(ValueError, match="damaged or no file of candidates"):
        CandidateSet.load(path)
    with pytest.raises(FileNotFoundError):
        CandidateSet.load(tmp_path / "none.npz")


def test_cache_is_named_by_what_determines_the_draw(tmp_path):
    rows, counts, calls = some_rows(), np.arange(30) + 1, []

    def scores(batch):
        calls.append(len(batch))
        return torch.rand(9, 30, generator=torch.Generator().manual_seed(1))[batch["user_id"]]

    def files():
        return set((tmp_path / "candidates").glob("*.npz"))

    first = draw(rows, cache_dir=tmp_path)
    assert len(files()) == 1
    marked = CandidateSet(first.row_ids, first.items[:, ::-1], first.targets)
    marked.save(files().pop())
    assert draw(rows, cache_dir=tmp_path).sha256 == marked.sha256  # read, not drawn again
    draw(rows, cache_dir=tmp_path, item_counts=counts)
    assert len(files()) == 1  # uniform draws do not look at counts
    others = [
        (rows, {"seed": 8}),
        (rows, {"purpose": "valid"}),
        (rows, {"num_negatives": 4}),
        (rows, {"kind": "popularity", "item_counts": counts}),
        (rows, {"kind": "popularity", "item_counts": counts[::-1]}),
        (rows, {"kind": "hard", "item_scores": scores, "scores_identity": "lens a"}),
        (rows, {"kind": "hard", "item_scores": scores, "scores_identity": "lens b"}),
        (some_rows(keep=np.arange(40)), {}),
        (some_rows(1), {}),
        (some_rows(n_items=31), {}),
        (some_rows(ties="strict", times=np.arange(60) // 9), {}),
    ]
    for number, (data, keys) in enumerate(others, start=2):
        draw(data, cache_dir=tmp_path, **keys)
        assert len(files()) == number, keys
    asked = len(calls)
    draw(rows, cache_dir=tmp_path, kind="hard", item_scores=scores, scores_identity="lens a")
    assert asked and len(calls) == asked


# ---------------------------------------------------------------------- with RecBole


@pytest.fixture
def next_items(tmp_path):
    """``next_items(model, **keys)``: configuration and the train, valid and test rows of a small data set."""
    write_atomic(tmp_path, "toy", "inter", INTER_HEADER, random_interactions(users=25, items=15))
    cells = [(item, f"{item % 4 + 0.5}") for item in range(1, 41)]
    write_atomic(tmp_path, "toy", "item", "item_id:token weight:float", cells)

    def make(model: str = "SASRec", **keys):
        chosen = {
            "data_path": str(tmp_path),
            "checkpoint_dir": str(tmp_path / "saved"),
            "load_col": {
                "inter": ["user_id", "item_id", "rating", "timestamp"],
                "item": ["item_id", "weight"],
            },
            "normalize_all": False,
            "MAX_ITEM_LIST_LENGTH": 6,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "metrics": ["Hit", "NDCG", "MRR"],
            "topk": [1, 3, 5],
            "valid_metric": "NDCG@5",
            "metric_decimal_place": 9,
            "train_neg_sample_args": None,
            "device": "cpu",
            "show_progress": False,
            **keys,
        }
        if model == "BPR":
            chosen["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}
        config = Config(model, "toy", config_dict=chosen)
        return config, *NextItemDataset(config).build()

    return make


def test_batches_hold_each_row_with_all_its_candidates(next_items):
    config, _, _, test = next_items(eval_batch_size=33)
    found = draw(test, num_negatives=9)
    loader = CandidateDataLoader(config, test, found)
    batches = list(loader)
    assert len(loader) == len(batches) == -(-len(test) // 3)
    seen = 0
    for interaction, row_idx, positive_u, positive_i in batches:
        count = len(positive_u)
        assert count == min(3, len(test) - seen)
        rows = test[np.arange(seen, seen + count)]
        mine = found.items[seen : seen + count]
        assert len(interaction) == count * 10
        assert row_idx.tolist() == [i for i in range(count) for _ in range(10)]
        assert positive_u.tolist() == list(range(count)) and torch.equal(positive_i, rows["item_id"])
        assert interaction["item_id"].view(count, 10).tolist() == mine.tolist()
        assert torch.equal(interaction["weight"], test.item_feat["weight"][interaction["item_id"]])
        is_target = interaction["item_id"] == positive_i[row_idx]
        assert is_target.sum() == count and torch.equal(interaction["label"], is_target.float())
        for field in ("user_id", ROW_ID, HISTORY_END, "item_length", "item_id_list", "timestamp_list"):
            assert torch.equal(interaction[field], rows[field][row_idx]), field
        seen += count
    assert seen == len(test)
    assert "label" not in test.inter_feat.columns  # the rows themselves are left alone


def test_a_batch_has_at_least_one_row(next_items):
    config, _, _, test = next_items(eval_batch_size=4)
    batches = list(CandidateDataLoader(config, test, draw(test, num_negatives=9)))
    assert len(batches) == len(test) and all(len(batch[0]) == 10 for batch in batches)


def test_retrieved_histories_are_those_of_the_candidate(next_items):
    """Histories retrieved for the target would tell a model which candidate it is."""
    config, _, _, test = next_items()
    vectors = np.random.default_rng(0).normal(size=(test.item_num, 4))
    test.set_id_retriever(SemanticRetriever(test.history, 6, vectors))
    interaction, *_ = next(iter(CandidateDataLoader(config, test, draw(test))))
    columns = (interaction[name].numpy() for name in ("user_id", "item_id", HISTORY_END))
    positions = test.id_retriever.positions(*columns)
    expected = np.where(positions >= 0, test.history.item_ids[positions], 0)
    assert np.array_equal(interaction["item_id_list"], expected)
    width = 4
    assert any(len({tuple(row) for row in block}) > 1 for block in expected.reshape(-1, width, 6))


def test_candidates_of_other_rows_are_refused(next_items):
    config, _, valid, test = next_items()
    found = draw(test)
    with pytest.raises(ValueError, match="no candidates for row_id"):
        CandidateDataLoader(config, valid, found)
    swapped = CandidateSet(found.row_ids, found.items, np.where(
        found.items[:, 0] == found.targets, found.items[:, 1], found.items[:, 0]))  # fmt: skip
    with pytest.raises(ValueError, match=rf"another target item now \({len(test)} of {len(test)} samples\)"):
        CandidateDataLoader(config, test, swapped)


def by_hand(model, data, found: CandidateSet) -> dict[str, float]:
    """Metrics from ``predict``, row by row, with the row's own history beside each candidate."""
    ranks = []
    for row in range(len(data)):
        items = found.items[row]
        batch = data[np.full(len(items), row)]
        target = batch["item_id"][0]
        batch.interaction["item_id"] = torch.from_numpy(items)
        with torch.no_grad():
            scores = model.predict(batch).double()
        assert len(scores.unique()) == len(items)
        ranks.append(1 + int((scores > scores[batch["item_id"] == target]).sum()))
    ranks, result = np.array(ranks), {}
    for k in (1, 3, 5):
        inside = ranks <= k
        result[f"hit@{k}"] = inside.mean()
        result[f"ndcg@{k}"] = (inside / np.log2(ranks + 1)).mean()
        result[f"mrr@{k}"] = (inside / ranks).mean()
    return result


@pytest.mark.parametrize("model_class", [SASRec, GRU4Rec, BPR])
def test_the_trainer_of_recbole_evaluates_on_them(next_items, model_class):
    config, train, _, test = next_items(model_class.__name__)
    init_seed(5, True)
    model = model_class(config, train)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found = draw(test, num_negatives=7)
    expected = by_hand(model.eval(), test, found)
    assert 0 < expected["hit@3"] < expected["hit@5"] < 1
    for eval_batch_size in (4096, 24, 5):
        config = config.override(eval_batch_size=eval_batch_size)
        loader = CandidateDataLoader(config, test, found)
        result = Trainer(config, model).evaluate(loader, load_best_model=False)
        assert result == pytest.approx(expected, abs=1e-7)


def test_candidates_do_not_depend_on_the_model_or_the_run(next_items):
    drawn = []
    for model, seed in (("SASRec", 1), ("GRU4Rec", 2), ("BPR", 3)):
        init_seed(seed, True)
        drawn.append(draw(next_items(model, seed=seed)[3], num_negatives=9))
    assert len({found.sha256 for found in drawn}) == 1


# ---------------------------------------- items that nobody met


@pytest.mark.parametrize("kind", ["uniform", "popularity", "hard"])
def test_only_allowed_items_are_drawn(tmp_path, kind):
    rows = single_rows(40, n_items=30)
    allowed = np.arange(30) < 12
    keys = {
        "kind": kind,
        "item_counts": np.ones(30),
        "item_scores": lambda batch: torch.arange(30.0).expand(len(batch), -1),
        "scores_identity": "a",
        "cache_dir": tmp_path,
    }
    few = draw(rows, allowed=allowed, **keys)
    assert few.items.max() < 12 and few.items.min() > 0
    every = draw(rows, **keys)
    assert every.items.max() >= 12 and len(list((tmp_path / "candidates").iterdir())) == 2
    assert draw(rows, allowed=np.ones(30, dtype=bool), **keys).sha256 == every.sha256
    with pytest.raises(ValueError, match="only 10 can be drawn"):
        draw(rows, allowed=allowed, **{**keys, "num_negatives": 11})
    with pytest.raises(ValueError, match=r"allowed: a mask of shape \(3,\) does not fit 30 items"):
        draw(rows, allowed=np.ones(3, dtype=bool), **keys)


@pytest.mark.parametrize("which", ["seen", "all"])
def test_the_items_that_are_ranked(tmp_path, make_config, which):
    write_atomic(tmp_path, "toy", "inter", INTER_HEADER, random_interactions())
    write_atomic(
        tmp_path, "toy", "item", "item_id:token title:token", [(i, f"Film {i}") for i in range(1, 101)]
    )
    dataset = NextItemDataset(make_config("SASRec", task="next_item", min_history=1, candidate_items=which))
    test = dataset.build()[2]
    ranked = 15 if which == "seen" else 100
    assert dataset.ranked_items.sum() == ranked and not dataset.ranked_items[0]
    assert dataset.facts()["candidate_items"] == {"which": which, "items": ranked, "catalogue": 100}
    interaction, excluded, _, targets = next(iter(RankedItemsDataLoader(dataset.config, test)))
    scores = torch.zeros(len(interaction), dataset.item_num)
    scores[excluded] = -torch.inf
    assert ((scores > -torch.inf).sum(dim=1) == ranked).all()
    assert (scores[torch.arange(len(targets)), targets] == 0).all()


@pytest.mark.parametrize("ties", ["order", "strict"])
@pytest.mark.parametrize("which", ["seen", "all"])
def test_without_their_history_targets_are_ranked_among_the_items_that_users_have_not_met(
    tmp_path, make_config, which, ties
):
    rows = random_interactions()
    rows += [
        (user, item, 5, time + 20) for user, item, _, time in rows[:60]
    ]  # met once more, some at the very end
    write_atomic(tmp_path, "toy", "inter", INTER_HEADER, rows)
    write_atomic(
        tmp_path, "toy", "item", "item_id:token title:token", [(i, f"Film {i}") for i in range(1, 101)]
    )
    settings = {"task": "next_item", "min_history": 1, "candidate_items": which, "history_ties": ties}
    dataset = NextItemDataset(make_config("SASRec", **settings, eval_mode="full", rank_history=False))
    test = dataset.build()[2]
    assert dataset.facts()["candidate_items"]["rank_history"] is False
    repeats = 0
    for interaction, excluded, _, targets in RankedItemsDataLoader(dataset.config, test):
        scores = torch.zeros(len(interaction), dataset.item_num)
        scores[excluded] = -torch.inf
        history = dataset.history
        for row, (user, target, end) in enumerate(
            zip(
                interaction["user_id"].tolist(),
                targets.tolist(),
                interaction[HISTORY_END].tolist(),
                strict=True,
            )
        ):
            earlier = range(int(history.user_start[user]), end)
            if ties == "strict":
                earlier = [at for at in earlier if history.timestamps[at] < history.timestamps[end]]
            met = {int(history.item_ids[at]) for at in earlier}
            repeats += target in met
            expected = set(np.flatnonzero(dataset.ranked_items).tolist()) - met | {target}
            assert set(torch.nonzero(scores[row] > -torch.inf).flatten().tolist()) == expected
    assert repeats  # a target that was met before stays
