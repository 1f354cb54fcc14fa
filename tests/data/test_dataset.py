"""CTRDataset against brute force, against RecBole's own dataset, and on MovieLens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from atomic_files import INTER_HEADER, REPOSITORY, data_folder, random_interactions, write_atomic
from recbole.data.dataloader import NegSampleEvalDataLoader, TrainDataLoader
from recbole.data.dataset import SequentialDataset
from recbole.utils import FeatureType, get_trainer, init_seed

from recbole_llm.config.configurator import Config
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.loading import draw_rows
from recbole_llm.data.retriever import RecentRetriever, SemanticRetriever
from recbole_llm.registry import get_model


def tokens(dataset, rows, field):
    return dataset.id2token(field, rows[field].numpy()).tolist()


def everything(dataset):
    """All rows of a dataset with their histories."""
    return dataset[np.arange(len(dataset))]


# ---------------------------------------- rows and histories


ORDERS = {
    "id": lambda row: (row[3], int(row[0]), int(row[1])),
    "file": lambda row: row[3],  # Python's sort is stable
}


@pytest.mark.parametrize("tie_order", ORDERS)
@pytest.mark.parametrize("seed", range(5))
def test_rows_order_labels_and_histories_against_brute_force(toy, seed, tie_order):
    interactions = random_interactions(seed)
    assert sorted(interactions, key=ORDERS["id"]) != sorted(interactions, key=ORDERS["file"])
    splits = toy(interactions, tie_order=tie_order).build()
    ordered = sorted(interactions, key=ORDERS[tie_order])
    earlier, expected = defaultdict(list), []
    for rank, (user, item, rating, time) in enumerate(ordered):
        if len(earlier[user]) >= 3:
            expected.append((rank, user, item, rating, time, list(earlier[user])[-5:]))
        earlier[user].append((item, rating))
    n_valid = int(0.1 * len(expected))
    cut = [len(expected) - 2 * n_valid, len(expected) - n_valid]
    assert [len(split) for split in splits] == [cut[0], n_valid, n_valid]
    for split, rows in zip(splits, np.split(np.array(expected, dtype=object), cut), strict=True):
        batch = everything(split)
        assert batch["row_id"].tolist() == [row[0] for row in rows]
        assert tokens(split, batch, "user_id") == [row[1] for row in rows]
        assert tokens(split, batch, "item_id") == [row[2] for row in rows]
        assert batch["rating"].tolist() == [row[3] for row in rows]
        assert batch["label"].tolist() == [float(row[3] >= 4) for row in rows]
        for i, (*_, history) in enumerate(rows):
            length = int(batch["item_length"][i])
            assert length == len(history)
            assert split.id2token("item_id", batch["item_id_list"][i, :length].numpy()).tolist() == [
                item for item, _ in history
            ]
            assert batch["rating_list"][i, :length].tolist() == [rating for _, rating in history]
            assert batch["label_list"][i, :length].tolist() == [float(rating >= 4) for _, rating in history]
            for field in ("item_id_list", "rating_list", "label_list", "timestamp_list"):
                assert not batch[field][i, length:].any()


def test_histories_equal_those_of_recboles_sequential_dataset(toy):
    """Without ties, and with times that float32 can tell apart, RecBole's own lists are right."""
    rows = [(u, i, r, t - 1_000_000_000) for u, i, r, t in random_interactions(3, ties=False)]
    ours = toy(rows, min_history=1)
    whole = SequentialDataset(ours.config)
    ours.build()
    whole._change_feat_format()
    mine, theirs = everything(ours), whole.inter_feat
    assert len(mine) == len(theirs) > 50
    key = [f"{u} {t}" for u, t in zip(mine["user_id"].tolist(), mine["timestamp"].tolist(), strict=True)]
    other = [
        f"{u} {t}" for u, t in zip(theirs["user_id"].tolist(), theirs["timestamp"].tolist(), strict=True)
    ]
    assert sorted(key) == sorted(other) and len(set(key)) == len(key)
    order = [other.index(k) for k in key]
    for field in ("item_id", "item_length", "item_id_list", "label_list", "timestamp_list"):
        assert torch.equal(mine[field].float(), theirs[field][order].float()), field
    for field in ("item_id_list", "label_list", "timestamp_list", "item_length"):
        assert ours.field2type[field] == whole.field2type[field]
        assert ours.field2seqlen[field] == whole.field2seqlen[field]
    assert ours.item_id_list_field == whole.item_id_list_field
    assert (ours.inter_matrix().toarray() == whole.inter_matrix().toarray()).all()


def test_tokens_that_are_no_numbers_are_ordered_as_text(toy):
    # The last in this order has a time of its own: one time in all lines would be no time.
    rows = [
        (f"u{u}", f"i{i}", 1 + (u + i) % 5, 8 if u == i == 9 else 7) for u in range(12) for i in range(12)
    ]
    dataset = toy(
        rows[::-1], min_history=0, eval_args={"split": {"RS": [1, 0, 0]}, "order": "TO", "mode": "labeled"}
    )
    dataset.build()
    batch = everything(dataset)
    found = list(zip(tokens(dataset, batch, "user_id"), tokens(dataset, batch, "item_id"), strict=True))
    assert found == sorted((row[0], row[1]) for row in rows)


@pytest.mark.parametrize(
    "eval_args",
    [
        {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "labeled"},
        {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "labeled"},
        {"split": {"TS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "labeled"},
    ],
)
def test_other_splits_keep_each_users_order(toy, eval_args):
    train, valid, test = toy(random_interactions(1, users=30), eval_args=eval_args).build()
    last = {}
    for split in (train, valid, test):
        for user, row in zip(*(split.inter_feat[f].tolist() for f in ("user_id", "row_id")), strict=True):
            assert last.get(user, -1) < row
            last[user] = row


def test_strict_ties_leave_out_the_targets_own_timestamp(toy):
    dataset = toy(history_ties="strict")
    dataset.build()
    batch, history = everything(dataset), dataset.history
    exact = history.timestamps[batch["history_end"].numpy()]
    for i in range(len(batch)):
        shown = batch["item_id_list"][i][batch["item_id_list"][i] > 0]
        start, end = history.user_start[batch["user_id"][i]], batch["history_end"][i]
        before = [p for p in range(start, end) if history.timestamps[p] < exact[i]][-5:]
        assert shown.tolist() == history.item_ids[before].tolist()
        assert batch["item_length"][i] == max(1, len(before))


@pytest.mark.parametrize("group_by", [None, "user"])
def test_the_index_knows_where_the_splits_of_a_user_begin(toy, group_by):
    eval_args = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": group_by, "mode": "labeled"}
    dataset = toy(random_interactions(2), eval_args=eval_args)
    expected = set()
    for split in dataset.build()[1:]:
        first: dict[int, int] = {}
        for user, end in zip(
            split.inter_feat["user_id"].tolist(), split.inter_feat["history_end"].tolist(), strict=True
        ):
            first[user] = min(end, first.get(user, end))
        expected |= set(first.values())
    assert set(np.flatnonzero(dataset.history.opens_split).tolist()) == expected and len(expected) > 20


@pytest.mark.parametrize("group_by", [None, "user"])
def test_split_scope_hides_the_interactions_of_earlier_splits(toy, group_by):
    eval_args = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": group_by, "mode": "labeled"}
    dataset = toy(random_interactions(2), history_scope="split", eval_args=eval_args)
    splits = dataset.build()
    first_split = {}
    for number, split in enumerate(splits):
        for user in split.inter_feat["user_id"].tolist():
            first_split.setdefault(user, number)
    for number, split in enumerate(splits):
        batch, seen = everything(split), defaultdict(list)
        for i in range(len(batch)):
            user, end = int(batch["user_id"][i]), int(batch["history_end"][i])
            start = int(dataset.history.user_start[user])
            opening = (
                dataset.history.item_ids[start : start + 3].tolist() if first_split[user] == number else []
            )
            expected = (opening + seen[user])[-5:]
            shown = batch["item_id_list"][i][batch["item_id_list"][i] > 0].tolist()
            assert shown == expected, (number, i)
            seen[user].append(int(dataset.history.item_ids[end]))


def test_rows_without_history_get_one_padding_item(toy):
    dataset = toy(min_history=0)
    dataset.build()
    batch = everything(dataset)
    assert len(batch) == len(dataset.history)
    first = batch["history_end"].numpy() == dataset.history.user_start[batch["user_id"].numpy()]
    assert first.sum() == 30
    assert (batch["item_length"][first] == 1).all() and not batch["item_id_list"][first].any()


def test_item_features_are_joined_and_text_is_not(tmp_path, toy):
    write_atomic(
        tmp_path, "toy", "item", "item_id:token movie_title:token_seq", [(i + 1, "T") for i in range(15)]
    )
    write_atomic(tmp_path, "toy", "user", "user_id:token age:token", [(i + 1, 20 + i) for i in range(30)])
    dataset = toy(
        load_col={"inter": ["user_id", "item_id", "rating", "timestamp"], "user": ["user_id", "age"]}
    )
    dataset.build()
    batch = everything(dataset)
    assert [int(t) - 19 for t in tokens(dataset, batch, "age")] == [
        int(t) for t in tokens(dataset, batch, "user_id")
    ]
    assert "movie_title" not in batch


def test_subsets_share_history_and_retriever(toy):
    dataset = toy()
    train, valid, _ = dataset.build()
    few = train.subset(np.array([3, 1]))
    assert few.inter_feat["row_id"].tolist() == train.inter_feat["row_id"][[3, 1]].tolist()
    assert few.history is valid.history is dataset.history
    vectors = np.random.default_rng(0).normal(size=(dataset.item_num, 4))
    dataset.set_id_retriever(SemanticRetriever(dataset.history, 5, vectors))
    assert few.id_retriever is valid.id_retriever is dataset.id_retriever
    with pytest.raises(ValueError, match="MAX_ITEM_LIST_LENGTH"):
        train.set_id_retriever(RecentRetriever(dataset.history, 4))
    assert few.label_balance()["rows"] == 2
    assert len({d.content_hash() for d in (dataset, train, valid, few)}) == 4


def test_semantic_retrieval_follows_a_replaced_target(toy):
    """A loader that samples negatives joins again with another item: its history is wanted."""
    dataset = toy(min_history=6, id_history_length=2)
    dataset.build()
    vectors = np.zeros((dataset.item_num, dataset.item_num))
    np.fill_diagonal(vectors, 1)
    dataset.set_id_retriever(SemanticRetriever(dataset.history, 2, vectors))
    rows = dataset.inter_feat[np.array([0])]
    start, end = dataset.history.user_start[int(rows["user_id"])], int(rows["history_end"])
    rows["item_id"] = torch.tensor([dataset.history.item_ids[start]])
    assert end - start > 2
    assert dataset.join(rows)["item_id_list"][0, 0] == dataset.history.item_ids[start]


def test_the_same_data_has_the_same_hash_and_other_data_another(toy):
    rows = random_interactions()
    first = toy(rows).build()[0].content_hash()
    assert toy(rows).build()[0].content_hash() == first
    user, item, rating, time = rows[0]
    changed = [(user, item, 6 - rating if rating != 3 else 1, time), *rows[1:]]
    assert toy(changed).build()[0].content_hash() != first


def test_building_twice_gives_the_same_rows(toy):
    dataset = toy()
    first, second = dataset.build(), dataset.build()
    assert [a.content_hash() for a in first] == [b.content_hash() for b in second]


# ---------------------------------------- RecBole's models


@pytest.mark.parametrize("model", ["DIN", "SASRec", "GRU4Rec"])
def test_recboles_sequential_models_train_and_evaluate(toy, tmp_cwd, model):
    init_seed(1, True)
    sizes = {"DIN": {"mlp_hidden_size": [8]}, "SASRec": {"n_heads": 1}, "GRU4Rec": {}}[model]
    small = {"hidden_size": 8, "embedding_size": 8, "epochs": 1, "metrics": ["AUC"], "valid_metric": "AUC"}
    known = {
        "DIN": ("embedding_size",),
        "SASRec": ("hidden_size",),
        "GRU4Rec": ("hidden_size", "embedding_size"),
    }
    keys = {k: v for k, v in small.items() if k in known[model] or k in ("epochs", "metrics", "valid_metric")}
    dataset = toy(random_interactions(1, users=30), model=model, device="cpu", **keys, **sizes)
    config = dataset.config
    train, valid, test = dataset.build()
    loaders = [TrainDataLoader(config, train, None, shuffle=True)]
    loaders += [NegSampleEvalDataLoader(config, split, None) for split in (valid, test)]
    network = get_model(model)(config, train).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], model)(config, network)
    before = [p.detach().clone() for p in network.parameters()]
    trainer.fit(loaders[0], loaders[1], saved=False, show_progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    result = trainer.evaluate(loaders[2], load_best_model=False)
    assert 0 <= result["auc"] <= 1


# ---------------------------------------- MovieLens


def test_ml100k_has_no_user_in_wrong_order(ml100k, ml100k_splits):
    """RecBole's float32 timestamps put 908 of the 943 users into a wrong order."""
    rows = [line.split("\t") for line in open(f"{ml100k.dataset_path}/ml-100k.inter").read().splitlines()[1:]]
    per_user = defaultdict(list)
    for user, item, _, time in rows:
        per_user[user].append((float(time), int(item)))
    history, wrong = ml100k.history, 0
    for user, expected in per_user.items():
        u = ml100k.token2id("user_id", user)
        items = history.item_ids[history.user_start[u] : history.user_start[u + 1]]
        wrong += ml100k.id2token("item_id", items).tolist() != [str(item) for _, item in sorted(expected)]
    assert len(per_user) == 943 and wrong == 0


def test_ml100k_rows_and_split_in_global_time_order(ml100k, ml100k_splits):
    assert [len(split) for split in ml100k_splits] == [76_229, 9_528, 9_528]  # 100,000 - 5 * 943
    ids = np.concatenate([split.inter_feat["row_id"].numpy() for split in ml100k_splits])
    assert (np.diff(ids) > 0).all()
    exact = [ml100k.history.timestamps[split.inter_feat["history_end"].numpy()] for split in ml100k_splits]
    assert (np.diff(np.concatenate(exact)) >= 0).all()
    batch = ml100k_splits[2][np.arange(50)]
    assert set(batch["rating"].tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert ((batch["rating"] >= 4).float() == batch["label"]).all()
    assert ml100k.field2type["class"] is FeatureType.TOKEN_SEQ and "movie_title" not in batch


ML_1M = """
import json, resource, sys
from recbole_llm.config.configurator import Config
from recbole_llm.data.ctr import CTRDataset
import numpy as np, torch
torch.set_num_threads(2)
keys = {"task": "ctr", "train_neg_sample_args": None, "data_path": sys.argv.pop(), "id_history_length": 60}
config = Config("DIN", "ml-1m", config_dict=keys)
bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
dataset = CTRDataset(config)
splits = dataset.build()
for split in splits:
    split[np.arange(2048)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bare
ids = np.concatenate([split.inter_feat["row_id"].numpy() for split in splits])
ends = np.concatenate([split.inter_feat["history_end"].numpy() for split in splits])
times = dataset.history.timestamps[ends]
print(json.dumps({
    "rows": len(dataset), "splits": [len(split) for split in splits], "peak": peak,
    "seconds": dataset.preparation["seconds"], "reported": dataset.preparation["peak_bytes"],
    "ordered": bool((np.diff(ids) > 0).all() and (np.diff(times) >= 0).all()),
    "positive": [split.label_balance()["positive"] for split in splits],
}))
"""


@pytest.mark.skipif(
    not (data_folder() / "ml-1m").is_dir(), reason="no ml-1m: set RECBOLE_LLM_DATA to its parent"
)
def test_ml1m_follows_the_paper_in_bounded_memory_and_time():
    """1,000,209 - 5 * 6,040 rows; the rounding remainder goes to train, as RecBole does it."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ML_1M, str(data_folder())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rows"] == 970_009
    assert found["splits"] == [776_009, 97_000, 97_000]
    assert found["ordered"]
    assert found["peak"] < 1.5e9 and found["reported"] <= found["peak"]
    assert found["seconds"] < 60
    assert sum(found["positive"]) == 449_894 + 56_097 + 52_739


# ---------------------------------------- few-shot draw


def test_draws_are_seeded_nested_and_of_the_asked_size():
    few, more = draw_rows(1000, 50, 7, "few_shot"), draw_rows(1000, 100, 7, "few_shot")
    assert len(set(few)) == 50 and (np.diff(few) > 0).all() and 0 <= few.min() and few.max() < 1000
    assert set(few) <= set(more)
    assert (few == draw_rows(1000, 50, 7, "few_shot")).all()
    assert set(few) != set(draw_rows(1000, 50, 8, "few_shot"))
    assert set(few) != set(draw_rows(1000, 50, 7, "valid"))
    assert len(draw_rows(1000, 0.25, 7, "few_shot")) == 250
    assert len(draw_rows(3, 0.01, 7, "few_shot")) == 1
    assert (
        draw_rows(5, None, 7, "few_shot").tolist()
        == draw_rows(5, 5, 7, "few_shot").tolist()
        == [0, 1, 2, 3, 4]
    )


def test_draws_are_uniform():
    counts = Counter(int(i) for seed in range(400) for i in draw_rows(10, 3, seed, "few_shot"))
    assert all(abs(counts[i] / 400 - 0.3) < 0.1 for i in range(10))


@pytest.mark.parametrize("size", [1001, 0, -1, 1.0, 0.0, 1.5, True, "many"])
def test_impossible_draws_are_refused(size):
    with pytest.raises(ValueError, match="few_shot: .*(only 1,000|neither)"):
        draw_rows(1000, size, 7, "few_shot")


# ---------------------------------------- bad input


def test_a_missing_folder_is_named_with_what_is_there(tmp_path, make_config):
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"toy does not exist \(.* holds \['other'.*data_path"):
        CTRDataset(make_config())


def test_a_missing_interaction_file_is_named(tmp_path, make_config):
    write_atomic(tmp_path, "toy", "item", "item_id:token", [])
    with pytest.raises(FileNotFoundError, match=r"toy\.inter does not exist; .* holds \['toy\.item'\]"):
        CTRDataset(make_config())


@pytest.mark.parametrize(
    ("header", "keys", "message"),
    [
        ("user_id:token item_id:token timestamp:float", {}, r"toy\.inter: column 'rating' \(threshold\)"),
        (
            "user_id:token item_id:token score:float",
            {},
            r"'rating' \(threshold\).*\['user_id', 'item_id', 'score'\]",
        ),
        ("user_id:token movie:token rating:float", {}, r"'item_id' \(ITEM_ID_FIELD\)"),
        (
            "user_id:token item_id:token rating:float",
            {"threshold": None},
            r"'label' \(LABEL_FIELD, threshold",
        ),
        (
            INTER_HEADER,
            {"load_col": {"inter": ["user_id", "item_id"]}},
            r"'rating'.*load_col and unload_col keep",
        ),
        (
            INTER_HEADER,
            {"load_col": {"inter": ["user_id", "item_id", "stars"]}},
            r"has no column \['stars'\]",
        ),
        ("user_id item_id rating", {}, "must be name:type cells"),
    ],
)
def test_a_missing_column_is_named(toy, header, keys, message):
    rows = [row[: header.count(" ") + 1] for row in random_interactions()]
    with pytest.raises(ValueError, match=message):
        toy(rows, header, **keys)


def test_a_threshold_that_leaves_one_class_is_refused(toy):
    with pytest.raises(ValueError, match=r"rating >= 6, with rating from 1 to 5, gives all .* the label 0"):
        toy(threshold={"rating": 6})
    rows = [
        (u, i, 5 if i < 8 or (i == 10 and u % 2) else 1, 100 * i + u) for u in range(10) for i in range(12)
    ]
    with pytest.raises(ValueError, match="the test split of toy has 9 samples and all have the label 0"):
        toy(rows).build()


def test_a_rating_that_is_empty_is_refused(toy):
    rows = random_interactions()
    rows[3] = (*rows[3][:2], "", rows[3][3])
    with pytest.raises(
        ValueError, match=f"'rating' is empty in 1 lines .first: user {rows[3][0]}, item {rows[3][1]}"
    ):
        toy(rows)


def test_labels_may_come_from_the_file(toy):
    rows = [(*row[:2], int(row[2] > 3), row[3]) for row in random_interactions()]
    header = INTER_HEADER.replace("rating", "label")
    dataset = toy(rows, header, threshold=None)
    dataset.build()
    assert dataset.history.ratings is None and "rating_list" not in everything(dataset)
    with pytest.raises(ValueError, match="'label' of toy.inter holds other values than 0 and 1"):
        toy(random_interactions(), header, threshold=None)


def test_without_timestamps_the_order_of_the_file_counts(toy, caplog):
    rows = [row[:3] for row in random_interactions()]
    dataset = toy(rows, "user_id:token item_id:token rating:float")
    dataset.build()
    assert "no loaded column 'timestamp'" in caplog.text
    user = rows[0][0]
    u = dataset.token2id("user_id", user)
    items = dataset.history.item_ids[dataset.history.user_start[u] : dataset.history.user_start[u + 1]]
    assert dataset.id2token("item_id", items).tolist() == [row[1] for row in rows if row[0] == user]


def test_one_time_in_all_lines_is_as_none(toy, caplog):
    rows = [(*row[:3], 0) for row in random_interactions()]
    splits = toy(rows).build()
    assert "toy.inter has one timestamp in all lines: the order of the file" in caplog.text
    mine = [row[1] for row in rows if row[0] == "1"]
    users = tokens(splits[0], splits[0].inter_feat, "user_id")
    batch = splits[0][[users.index("1")]]
    shown = splits[0].id2token("item_id", batch["item_id_list"][0, : batch["item_length"][0]].numpy())
    assert shown.tolist() == mine[: len(shown)]


def test_too_short_histories_are_refused(toy):
    with pytest.raises(
        ValueError, match="min_history: no sample of toy has 50 earlier interactions .the longest"
    ):
        toy(min_history=50).build()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"normalize_all": True}, "normalize_all"),
        ({"normalize_field": ["rating"]}, r"normalize_field: \['rating'\]"),
        ({"numerical_features": ["timestamp"]}, r"numerical_features: \['timestamp'\]"),
        ({"benchmark_filename": ["a"]}, "benchmark_filename"),
    ],
)
def test_settings_that_would_spoil_ratings_or_times_are_refused(toy, keys, message):
    with pytest.raises(ValueError, match=message):
        toy(**keys)


def test_our_yaml_files_leave_recboles_own_runs_alone():
    stock = Config("SASRec", "ml-100k", config_dict={})
    assert stock["normalize_all"] is True and stock["threshold"] is None
    assert stock["load_col"] == {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    ours = Config("SASRec", "ml-100k", config_dict={"task": "ctr"})
    assert ours["normalize_all"] is False and "class" in ours["load_col"]["item"]
