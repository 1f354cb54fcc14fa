"""NextItemDataset against brute force, against RecBole's own dataset, and on MovieLens."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from atomic_files import INTER_HEADER, random_interactions, write_atomic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.utils import get_trainer, init_seed

from recbole_llm.config.configurator import Config
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.registry import get_model

PLAIN_HEADER = "user_id:token item_id:token timestamp:float"
GIVEN_HEADER = "user_id:token item_id_list:token_seq item_id:token"
NAMES = ["train", "valid", "test"]


@pytest.fixture
def next_item(tmp_path: Path, make_config) -> Callable[..., NextItemDataset]:
    """``next_item(rows, header, **keys)``: an unbuilt dataset of the given (or random) interactions."""

    def make(rows=None, header: str = INTER_HEADER, **keys) -> NextItemDataset:
        write_atomic(tmp_path, "toy", "inter", header, random_interactions() if rows is None else rows)
        return NextItemDataset(make_config("SASRec", **{"task": "next_item", "min_history": 1, **keys}))

    return make


@pytest.fixture
def ready_made(tmp_path: Path, make_config) -> Callable[..., NextItemDataset]:
    """``ready_made([train, valid, test], header, **keys)``: an unbuilt dataset of three files of rows."""

    def make(parts, header: str = GIVEN_HEADER, **keys) -> NextItemDataset:
        for name, rows in zip(NAMES, parts, strict=True):
            write_atomic(tmp_path, "toy", f"{name}.inter", header, rows)
        defaults = {"task": "next_item", "min_history": 1, "benchmark_filename": NAMES}
        return NextItemDataset(make_config("SASRec", **{**defaults, **keys}))

    return make


def tokens(dataset, rows, field):
    return dataset.id2token(field, rows[field].numpy()).tolist()


def shown(dataset, batch) -> list[list[str]]:
    """The history of each row of a batch, as tokens of the file."""
    lists = batch["item_id_list"].numpy()
    return [dataset.id2token("item_id", row[row > 0]).tolist() for row in lists]


def everything(dataset):
    return dataset[np.arange(len(dataset))]


# ---------------------------------------- leave-one-out


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_without_ratings_against_brute_force(next_item, seed):
    rows = [(user, item, time) for user, item, _, time in random_interactions(seed)]
    dataset = next_item(rows, PLAIN_HEADER)
    splits = dataset.build()
    expected = [[], [], []]
    by_user = defaultdict(list)
    for user, item, _time in sorted(rows, key=lambda row: (row[2], int(row[0]), int(row[1]))):
        by_user[user].append(item)
    for user, items in by_user.items():
        for at in range(1, len(items)):
            expected[max(0, at - len(items) + 3)].append((user, items[at], items[max(0, at - 5) : at]))
    for split, wanted in zip(splits, expected, strict=True):
        batch = everything(split)
        found = zip(
            tokens(split, batch, "user_id"),
            tokens(split, batch, "item_id"),
            shown(split, batch),
            strict=True,
        )
        assert sorted(found) == sorted(wanted) and len(wanted) >= 30
        assert not {"label_list", "rating_list", "label", "rating"} & set(batch.interaction)
    assert dataset.history.labels is None and dataset.history.ratings is None


def test_ratings_and_times_come_along_and_labels_do_not(next_item):
    dataset = next_item(threshold={"rating": 4})
    dataset.build()
    batch, history = everything(dataset), dataset.history
    assert "label" not in batch and "label_list" not in batch
    for i in range(len(batch)):
        end = int(batch["history_end"][i])
        start = max(int(history.user_start[batch["user_id"][i]]), end - 5)
        length = int(batch["item_length"][i])
        assert length == end - start > 0
        assert batch["rating_list"][i, :length].tolist() == history.ratings[start:end].tolist()
        times = history.timestamps[start:end].astype(np.float32)
        assert batch["timestamp_list"][i, :length].tolist() == times.tolist()
        assert batch["rating"][i] == history.ratings[end]


def test_without_times_the_order_of_the_file_counts(next_item, caplog):
    rows = [(str(u), f"i{(7 * u + k * k) % 11}") for k in range(6) for u in range(1, 5)]
    dataset = next_item(rows, "user_id:token item_id:token")
    _, _, test = dataset.build()
    assert "no loaded column 'timestamp'" in caplog.text
    batch = everything(test)
    for user, target, items in zip(
        tokens(test, batch, "user_id"), tokens(test, batch, "item_id"), shown(test, batch), strict=True
    ):
        assert [*items, target] == [row[1] for row in rows if row[0] == user]


def test_ml100k_leaves_out_the_last_item_of_every_user():
    keys = {"task": "next_item", "train_neg_sample_args": None, "id_history_length": 10}
    dataset = NextItemDataset(Config("SASRec", "ml-100k", config_dict=keys))
    train, valid, test = dataset.build()
    assert [len(train), len(valid), len(test)] == [100_000 - 3 * 943, 943, 943]
    last = defaultdict(list)
    for line in Path(dataset.dataset_path, "ml-100k.inter").read_text().splitlines()[1:]:
        user, item, _, time = line.split("\t")
        last[user].append((float(time), int(item)))
    batch = everything(test)
    found = dict(zip(tokens(test, batch, "user_id"), tokens(test, batch, "item_id"), strict=True))
    assert found == {user: str(max(items)[1]) for user, items in last.items()}
    batch = everything(valid)
    found = dict(zip(tokens(valid, batch, "user_id"), tokens(valid, batch, "item_id"), strict=True))
    assert found == {user: str(sorted(items)[-2][1]) for user, items in last.items()}
    assert len(set(dataset.item_text().titles)) == dataset.item_num == 1683


def test_the_hash_knows_rows_and_histories(next_item):
    rows = random_interactions()
    first = [split.content_hash() for split in next_item(rows).build()]
    assert len(set(first)) == 3
    assert [split.content_hash() for split in next_item(rows).build()] == first
    user, item, rating, time = rows[0]
    assert next_item([(user, item, rating, time + 3), *rows[1:]]).build()[0].content_hash() != first[0]


def test_the_matrix_holds_a_users_interactions_up_to_the_last_row(next_item):
    train, _, _ = next_item().build()
    found = set(zip(*(ids.tolist() for ids in train.inter_matrix().nonzero()), strict=True))
    batch, history = everything(train), train.history
    expected = set()
    for user, end in zip(batch["user_id"].tolist(), batch["history_end"].tolist(), strict=True):
        expected |= {(user, int(item)) for item in history.item_ids[history.user_start[user] : end + 1]}
    assert found == expected


# ---------------------------------------- min_rating


def test_low_ratings_are_removed_before_anything_else(next_item, caplog):
    caplog.set_level(logging.INFO)
    rows = random_interactions(4)
    kept = [row for row in rows if row[2] >= 3]
    filtered = next_item(rows, min_rating=3, user_inter_num_interval="[5,inf)")
    assert f"{len(rows) - len(kept)} of {len(rows)} interactions have rating < 3" in caplog.text
    alone = next_item(kept, user_inter_num_interval="[5,inf)")
    assert 0 < len(kept) < len(rows)
    hashes = [[split.content_hash() for split in dataset.build()] for dataset in (filtered, alone)]
    assert hashes[0] == hashes[1]
    assert len(next_item(rows, user_inter_num_interval="[5,inf)")) != len(alone)


def test_low_ratings_need_ratings(next_item):
    rows = [(user, item, time) for user, item, _, time in random_interactions()]
    with pytest.raises(ValueError, match=r"toy\.inter: column 'rating' \(RATING_FIELD, for min_rating\)"):
        next_item(rows, PLAIN_HEADER, min_rating=3)
    with pytest.raises(
        ValueError, match="min_rating: no interaction of toy has rating >= 6 .the highest is 5"
    ):
        next_item(min_rating=6)
    with pytest.raises(ValueError, match="min_rating: column 'rating' of toy.inter is not of type float"):
        next_item(header=INTER_HEADER.replace("rating:float", "rating:token"), min_rating=3)


# ---------------------------------------- user_split


def drawn_users(splits) -> list[set[str]]:
    return [set(tokens(split, everything(split), "user_id")) for split in splits]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shares=st.tuples(st.integers(1, 8), st.integers(0, 3), st.integers(0, 3)),
    users=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_a_split_by_user_takes_every_user_once(next_item, shares, users, seed):
    rows = random_interactions(users, users=users)
    dataset = next_item(rows, user_split=list(shares), eval_seed=seed)
    train, valid, test = dataset.build()
    groups = drawn_users((train, valid, test))
    assert len(set.union(*groups)) == sum(map(len, groups)) == users
    for group, share in zip(groups[1:], shares[1:], strict=True):
        assert abs(len(group) - users * share / sum(shares)) < 1
    per_user = defaultdict(int)
    for row in rows:
        per_user[row[0]] += 1
    assert len(train) == sum(per_user[user] - 1 for user in groups[0])
    for split in (valid, test):
        assert len(split) == len(drawn_users([split])[0])
        users_of, ends = (split.inter_feat[field].numpy() for field in ("user_id", "history_end"))
        # The last interaction of the user; all earlier ones are its history.
        assert (ends == dataset.history.user_start[users_of + 1] - 1).all()


def test_the_users_depend_on_the_seed_and_not_on_the_order_of_the_file(next_item):
    rows = random_interactions(5, users=30)
    first = drawn_users(next_item(rows, user_split=[8, 1, 1], eval_seed=1).build())
    assert [len(group) for group in first] == [24, 3, 3]
    assert drawn_users(next_item(rows[::-1], user_split=[8, 1, 1], eval_seed=1).build()) == first
    assert drawn_users(next_item(rows, user_split=[0.8, 0.1, 0.1], eval_seed=1).build()) == first
    assert drawn_users(next_item(rows, user_split=[8, 1, 1], eval_seed=2).build()) != first


@pytest.mark.parametrize("shares", [[8, 2], [0, 1, 1], [8, -1, 1], ["8", 1, 1], 8])
def test_shares_that_cannot_be_are_refused(next_item, make_config, shares):
    config = next_item(user_split=[8, 1, 1]).config
    config.final_config_dict["user_split"] = shares
    with pytest.raises(ValueError, match="user_split: .* must hold three shares"):
        NextItemDataset(config)


# ---------------------------------------- ready-made splits

PARTS = [
    [("7", "a b c", "d"), ("8", "x c", "y"), ("7", "a b", "c"), ("9", "", "a")],
    [("7", "b c d", "e"), ("9", "q", "a")],
    [("8", "c y", "z"), ("9", "a b c d e x y", "z")],
]


def test_every_row_has_its_own_history(ready_made, caplog):
    dataset = ready_made(PARTS)
    splits = dataset.build()
    expected = [[row for row in part if row[1]] for part in PARTS]
    for split, rows in zip(splits, expected, strict=True):
        batch = everything(split)
        assert tokens(split, batch, "user_id") == [row[0] for row in rows]
        assert tokens(split, batch, "item_id") == [row[2] for row in rows]
        assert shown(split, batch) == [row[1].split()[-5:] for row in rows]
        assert batch["item_length"].tolist() == [min(5, len(row[1].split())) for row in rows]
        start, end = dataset.history.bounds(batch["user_id"].numpy(), batch["history_end"].numpy())
        whole = [
            dataset.id2token("item_id", dataset.history.item_ids[a:b]).tolist()
            for a, b in zip(start, end, strict=True)
        ]
        assert whole == [row[1].split() for row in rows]
    row_ids = np.concatenate([split.inter_feat["row_id"].numpy() for split in splits])
    assert row_ids.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert dataset.item_num == 1 + len(set("abcdeqxyz"))  # lists and targets share their ids
    assert "1 rows have a history of fewer than 1 items" in caplog.text
    assert "(1 of 4 in train, 0 of 2 in valid, 0 of 2 in test)" in caplog.text
    assert "in their own history" not in caplog.text
    again = ready_made(PARTS).build()
    assert [a.content_hash() for a in again] == [b.content_hash() for b in splits]
    other = [[("7", "a c b", "d"), *PARTS[0][1:]], *PARTS[1:]]
    assert ready_made(other).build()[1].content_hash() != splits[1].content_hash()
    again_from_the_same = dataset.build()
    assert [a.content_hash() for a in again_from_the_same] == [b.content_hash() for b in splits]


def test_short_histories_may_be_left_out(ready_made, caplog):
    splits = ready_made(PARTS, min_history=3).build()
    assert [len(split) for split in splits] == [1, 1, 1]
    assert "4 rows" not in caplog.text and "5 rows have a history of fewer than 3 items" in caplog.text
    splits = ready_made(PARTS, min_history=0).build()
    assert [len(split) for split in splits] == [4, 2, 2]
    batch = everything(splits[0])
    assert batch["item_length"].tolist() == [3, 2, 2, 1] and not batch["item_id_list"][3].any()
    with pytest.raises(ValueError, match="no row of toy has a list of 9 items .the longest has 7"):
        ready_made(PARTS, min_history=9).build()


def test_a_target_in_its_own_history_is_counted(ready_made, caplog):
    parts = [
        [("1", "a b", "b"), ("1", "b a", "b"), ("2", "a c", "b")],
        [("2", "c c", "c")],
        [("1", "a", "c")],
    ]
    ready_made(parts).build()
    assert (
        "3 rows have their target in their own history (2 of 3 in train, 1 of 1 in valid, 0 of 1 in test)"
        in caplog.text
    )
    assert "2 rows have their target as the last item of their own history (1 of 3 in train" in caplog.text


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=7),
                                   st.integers(1, 9)), min_size=1, max_size=6), min_size=3, max_size=3))  # fmt: skip
def test_any_lists_against_recboles_own_dataset(ready_made, parts):
    rows = [[(str(u), " ".join(map(str, items)), str(target)) for u, items, target in part] for part in parts]
    ours = ready_made(rows, id_history_length=7)
    mine = ours.build()
    ours.config.final_config_dict["alias_of_item_id"] = ["item_id_list"]
    theirs = SequentialDataset(ours.config).build()
    for split, other in zip(mine, theirs, strict=True):
        batch = everything(split)
        assert batch["user_id"].tolist() == other.inter_feat["user_id"].tolist()
        assert batch["item_id"].tolist() == other.inter_feat["item_id"].tolist()
        assert batch["item_length"].tolist() == other.inter_feat["item_length"].tolist()
        width = other.inter_feat["item_id_list"].shape[1]
        assert torch.equal(batch["item_id_list"][:, :width], other.inter_feat["item_id_list"])
        assert not batch["item_id_list"][:, width:].any()
    pairs = {
        (ours.token2id("user_id", user), ours.token2id("item_id", item))
        for user, items, target in rows[0]
        for item in (*items.split(), target)
    }
    matrix = mine[0].inter_matrix("csr")
    assert set(zip(*(ids.tolist() for ids in matrix.nonzero()), strict=True)) == pairs and matrix.max() == 1


RATED_HEADER = (
    "user_id:token item_id_list:token_seq item_id:token rating_list:float_seq rating:float "
    "timestamp_list:float_seq timestamp:float"
)
RATED = [
    [("1", "a b c", "d", "1 2 3", 4, "1000000001 1000000002 1000000003", 1_000_000_003)],
    [("2", "b", "a", "5", 1, "1000000007", 1_000_000_009)],
    [("1", "b c d", "a", "2 3 4", 5, "1000000002 1000000003 1000000003", 1_000_000_004)],
]


def test_lists_of_ratings_and_times_are_histories_too(ready_made):
    train, _, test = ready_made(RATED, RATED_HEADER).build()
    batch = everything(test)
    assert batch["rating_list"][0].tolist() == [2, 3, 4, 0, 0] and batch["rating"].tolist() == [5]
    assert train.history.timestamps[: train.inter_feat["history_end"][0] + 1].tolist() == [
        1_000_000_001,
        1_000_000_002,
        1_000_000_003,
        1_000_000_003,
    ]
    train, _, _ = ready_made(RATED, RATED_HEADER, history_ties="strict").build()
    assert shown(train, everything(train)) == [["a", "b"]]


def test_what_the_lists_do_not_hold_is_not_made_up(ready_made):
    header = "user_id:token item_id_list:token_seq item_id:token rating:float timestamp:float"
    rows = [[("1", "a b", "c", 4, 1_000_000_003)]] * 3
    dataset = ready_made(rows, header)
    train, _, _ = dataset.build()
    assert set(everything(train).interaction) == {
        "user_id", "item_id", "rating", "timestamp", "item_length", "row_id", "history_end", "item_id_list"
    }  # fmt: skip
    with pytest.raises(ValueError, match="history_ties: strict .* 'timestamp' and 'timestamp_list'"):
        ready_made(rows, header, history_ties="strict").build()
    with pytest.raises(ValueError, match="value_field: 'rating' is not known"):
        train.inter_matrix(value_field="rating")


def test_lists_of_unequal_length_are_refused(ready_made):
    parts = [[("1", "a b c", "d", "1 2", 4, "1 2 3", 4)], *RATED[1:]]
    with pytest.raises(
        ValueError,
        match="'rating_list' and 'item_id_list' of toy have unequal .* 1 rows .first: 2 and 3, user 1",
    ):
        ready_made(parts, RATED_HEADER).build()


@pytest.mark.parametrize(
    ("header", "keys", "message"),
    [
        (
            GIVEN_HEADER.replace("item_id_list", "items"),
            {},
            r"toy\.train\.inter: column 'item_id_list' \(ITEM_ID",
        ),
        (GIVEN_HEADER.replace("user_id", "user"), {}, r"toy\.train\.inter: column 'user_id'"),
        (
            GIVEN_HEADER.replace("token_seq", "float_seq"),
            {},
            "'item_id_list' of toy must be of type token_seq",
        ),
        (GIVEN_HEADER, {"history_scope": "split"}, "history_scope: split: benchmark_filename brings"),
        (GIVEN_HEADER, {"user_split": [8, 1, 1]}, "user_split: benchmark_filename brings"),
        (GIVEN_HEADER, {"min_rating": 3}, "min_rating: benchmark_filename brings"),
        (GIVEN_HEADER, {"benchmark_filename": ["train", "test"]}, "must hold three names"),
    ],
)
def test_given_files_that_do_not_fit_are_refused(ready_made, header, keys, message):
    parts = [[("1", "1 2", "3")]] * 3
    with pytest.raises(ValueError, match=message):
        ready_made(parts, header, **keys)


def test_a_given_file_that_is_missing_is_named(ready_made):
    with pytest.raises(FileNotFoundError, match=r"toy\.last\.inter does not exist; .*toy\.valid\.inter"):
        ready_made(PARTS, benchmark_filename=["train", "valid", "last"])


def test_a_given_row_without_target_is_refused(ready_made):
    with pytest.raises(ValueError, match=r"toy\.valid\.inter: 'item_id' is empty in 1 rows"):
        ready_made([PARTS[0], [("7", "a b", "")], PARTS[2]]).build()


# ---------------------------------------- RecBole's models


@pytest.mark.parametrize("given_files", [False, True])
def test_recboles_sasrec_learns_and_ranks(next_item, ready_made, tmp_cwd, given_files):
    init_seed(1, True)
    keys = {"hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1, "epochs": 1, "device": "cpu",
            "eval_mode": "full", "topk": [1, 5], "valid_metric": "MRR@5"}  # fmt: skip
    if given_files:
        dataset = ready_made(PARTS, **keys)
    else:
        dataset = next_item(random_interactions(1), **keys)
    config = dataset.config
    train, _, test = dataset.build()
    network = get_model("SASRec")(config, train).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, network)
    before = network.item_embedding.weight.detach().clone()
    trainer.fit(TrainDataLoader(config, train, None, shuffle=True), saved=False, show_progress=False)
    assert not torch.equal(before, network.item_embedding.weight)
    loader = FullSortEvalDataLoader(config, test, None)
    result = trainer.evaluate(loader, load_best_model=False)
    assert 0 < result["mrr@5"] <= 1
