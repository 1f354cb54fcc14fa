"""Interactions that came after the training: the same as preparing from scratch; new users and items; bad files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import TEXT

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.run import experiment_class
from recbole_llm.lens.lens import Lens
from recbole_llm.serving.recommend import recommend
from recbole_llm.serving.run import ServedRun
from recbole_llm.serving.score import score
from recbole_llm.trainer.checkpoint import load_checkpoint
from recbole_llm.trainer.conventional_trainer import EpochTraining

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
LATER = [
    ("4", "7", 5, 990_000_000),
    ("2", "9", 1, 990_000_000),
    ("2", "3", 4, 990_000_000),  # a tie, put in order by item
    ("4", "2", 2, 880_900_000),  # before the end of the training
]


def write(path: Path, rows, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return path


def from_scratch(run: ServedRun, tmp_path: Path, rows) -> ServedRun:
    """The run's weights on data that was prepared with the later interactions in its file."""
    shutil.copytree(run.dataset.dataset_path, tmp_path / "again" / "toy")
    with (tmp_path / "again" / "toy" / "toy.inter").open("a") as file:
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    saved = json.loads((run.folder / "config.json").read_text())
    config = Config.from_dict({**saved, "data_path": str(tmp_path / "again"), "resume": None})
    parts = experiment_class(config).assemble(config, fit=False)
    tensors, _ = load_checkpoint(run.folder / "best.safetensors")
    if config.spec.is_llm:
        if parts.lens is not None:
            saved_lens = next(run.folder.rglob("lens.json")).parent
            lens = Lens.load(saved_lens, config, parts.full_train, gate_scope=run.lens.gate_scope)
            parts.lens.model.load_state_dict(lens.model.state_dict())
            if parts.model.slots:
                parts.model.item_vectors.copy_(lens.item_vectors())
        parts.model.load_trained_state(tensors)
    else:
        EpochTraining.load_best(parts.model, tensors)
    parts.model.eval()
    return ServedRun(parts, run.folder)


def split_openings(run: ServedRun) -> set[tuple[int, float]]:
    """Items and times of the interactions that begin a split of their user."""
    history = run.dataset.history
    opens = history.opens_split
    return set(zip(history.item_ids[opens].tolist(), history.timestamps[opens].tolist(), strict=True))


STREAMS = ["TALLRec stream", "RecLoRA stream", "LensPrompt stream", "Stream", "HLLM"]
APPENDED = ["RecLoRA", "RecLoRA user", "TALLRec", "iLoRA", "SASRec", "DIN", "TitleKNN", "MoRec", *STREAMS]


@pytest.mark.parametrize("name", APPENDED)
def test_appending_equals_preparing_from_scratch(name, served, tmp_path):
    run = served(name)
    pairs = pd.DataFrame({"user_id": ["4", "2", "1", "4"], "item_id": ["1", "8", "3", "30"]})
    before = score(run, pairs)["score"].to_numpy()
    splits = split_openings(run)
    counts = run.append(write(tmp_path / "later.inter", LATER))
    assert counts == {"interactions": 4, "new_users": 0, "new_items": 0, "late": 1}
    assert split_openings(run) == splits
    scratch = from_scratch(run, tmp_path, LATER)
    a, b = run.dataset.history, scratch.dataset.history
    b.opens_split = a.opens_split  # with more interactions the splits begin elsewhere
    if name.endswith("stream"):
        scratch.parts.prompts.refresh()
    for column in ("item_ids", "labels", "ratings", "timestamps", "user_start"):
        found, expected = getattr(a, column), getattr(b, column)
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(found, expected)
    after, expected = score(run, pairs, explained=True), score(scratch, pairs, explained=True)
    # Kept prefixes were computed in another batch, which moves float32 sums a little.
    np.testing.assert_allclose(after["score"], expected["score"], atol=1e-6 if run.prefixes else 0, rtol=0)
    assert after["prompt"].tolist() == expected["prompt"].tolist()
    assert after["history"].tolist() == expected["history"].tolist() == [27, 27, 25, 27]
    # User 1 has nothing new; sharing a batch with others moves float32 sums a little.
    assert abs(after["score"][2] - before[2]) < 1e-6
    assert np.abs(after["score"] - before)[[0, 1, 3]].max() > 1e-5
    own, other = recommend(run, ["4", "2"], top=3), recommend(scratch, ["4", "2"], top=3)
    pd.testing.assert_frame_equal(own, other)


@pytest.mark.parametrize("name", ["RecLoRA", "iLoRA", "SASRec"])
def test_appending_twice_is_appending_once_and_the_loaders_keep_their_samples(name, served, tmp_path):
    once, twice = served(name), served(name)
    test = [batch[0] for batch in twice.parts.test_data]
    once.append(write(tmp_path / "all.inter", LATER))
    twice.append(write(tmp_path / "a.inter", LATER[:2]))
    twice.append(pd.DataFrame(LATER[2:], columns=["user_id", "item_id", "rating", "timestamp"]))
    for column in ("item_ids", "ratings", "timestamps"):
        np.testing.assert_array_equal(
            getattr(once.dataset.history, column), getattr(twice.dataset.history, column)
        )
    again = [batch[0] for batch in twice.parts.test_data]
    for a, b in zip(test, again, strict=True):
        assert torch.equal(a["user_id"], b["user_id"]) and torch.equal(a["item_id"], b["item_id"])


NEW_USER = [("new", "7", 5, 990_000_001), ("new", "8", 1, 990_000_002)]


@pytest.mark.parametrize(
    "name",
    ["RecLoRA", "RecLoRA user", "TALLRec", "iLoRA", "TALLRecNext", "SASRec", "TitleKNN", "MoRec", *STREAMS],
)
def test_a_new_user_gets_recommendations_from_the_new_history(name, served, tmp_path):
    run = served(name)
    table = recommend(run, ["new", "4"], top=3, interactions=write(tmp_path / "new.inter", NEW_USER))
    assert table["user"].tolist() == ["new"] * 3 + ["4"] * 3
    assert np.isfinite(table["score"]).all() and not {"7", "8"} & set(table["item"][:3])
    run.append(write(tmp_path / "more.inter", [("new", "9", 5, 990_000_003)]))
    assert score(run, pd.DataFrame({"user": ["new"], "item": ["1"]}), explained=True)["history"][0] == 3


@pytest.mark.parametrize("name", ["DIN", "BPR"])
def test_a_model_with_a_vector_per_user_names_the_new_users(name, served, tmp_path):
    run = served(name)
    with pytest.raises(ValueError, match="every user, and none for new|task: ctr or task: next_item"):
        recommend(run, ["new"], interactions=write(tmp_path / "new.inter", NEW_USER))


NEW_ITEM = [("4", "900", 5, 990_000_001), ("2", "7", 5, 990_000_001)]
ITEMS = [
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    "900\tSilver Harbour\t1999\tDrama",
]


@pytest.fixture
def new_item(tmp_path):
    (tmp_path / "new.item").write_text("\n".join(ITEMS) + "\n")
    return {"interactions": write(tmp_path / "new.inter", NEW_ITEM), "items": tmp_path / "new.item"}


@pytest.mark.parametrize("name", ["TALLRec", "TALLRecNext", "TALLRec stream"])
def test_a_text_model_scores_a_new_item_by_its_title(name, served, new_item):
    run = served(name, **new_item)
    pairs = pd.DataFrame({"user": ["2", "4"], "item": ["900", "1"]})
    table = score(run, pairs, explained=True)
    assert table["title"][0] == "Silver Harbour (1999)" and np.isfinite(table["score"]).all()
    if name != "TALLRecNext":
        assert "Silver Harbour" in table["prompt"][0]
    assert "Silver Harbour" in table["prompt"][1]  # it is in the history of user 4
    best = recommend(run, ["2"], top=50, retrieve=0)
    assert "900" in set(best["item"])


@pytest.mark.parametrize("name", ["TitleKNN", "MoRec", "HLLM"])
def test_a_vector_model_knows_a_new_item_by_its_title(name, served, new_item, tmp_path):
    """A new item that has the title and the genres of an item of the training is that item."""
    run = served(name, text={**TEXT, "disambiguate": False})
    twin = next(
        i for i in run.scorable() if i not in run.seen(run.ids("user_id", ["4"]).known[0])
    )  # one that user 4 has not met
    texts = run.dataset.item_text()
    genres = " ".join(texts.genre_lists[twin])
    (tmp_path / "new.item").write_text(f"{ITEMS[0]}\n900\t{texts.titles[twin]}\t\t{genres}\n")
    run.append(new_item["interactions"], tmp_path / "new.item")
    if name == "MoRec":  # whose labelled form has a bias of every item, 0 for new ones
        with torch.no_grad():
            run.model.item_bias.weight[twin] = 0
    pairs = pd.DataFrame({"user": ["2", "2"], "item": ["900", run.tokens("item_id", [twin])[0]]})
    found = score(run, pairs)["score"]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    other = score(run, pd.DataFrame({"user": ["2"], "item": [str(twin % 50 + 1)]}))["score"][0]
    assert abs(found[0] - other) > 1e-6
    assert "900" in set(recommend(run, ["2"], top=50, retrieve=0)["item"])
    plain = served(name)  # the item is in the history of user 4, too
    plain.append(pd.DataFrame(NEW_ITEM[1:], columns=["user_id", "item_id", "rating", "timestamp"]))
    before, after = (score(one, pd.DataFrame({"user": ["4"], "item": ["1"]})) for one in (plain, run))
    assert abs(before["score"][0] - after["score"][0]) > 1e-7


@pytest.mark.parametrize("name", ["TitleKNN", "MoRec", "HLLM"])
def test_a_vector_model_needs_the_title(name, served, tmp_path):
    run = served(name)
    with pytest.raises(ValueError, match="the new items 900 have no titles"):
        run.append(write(tmp_path / "new.inter", NEW_ITEM))
    assert run.dataset.item_num == 51 and len(recommend(run, ["4"], top=2)) == 2


@pytest.mark.parametrize("name", ["Stream", "RecLoRA stream"])
def test_a_stream_with_something_trained_per_item_names_new_ones(name, served, new_item):
    run = served(name, **new_item)
    assert np.isfinite(recommend(run, ["4", "2"], top=3)["score"]).all()
    with pytest.raises(ValueError, match="every item, and none for 900"):
        score(run, pd.DataFrame({"user": ["4"], "item": ["900"]}))


def test_a_star_that_no_answer_stands_for_is_refused(served, tmp_path):
    run = served("TALLRec stream")
    with pytest.raises(ValueError, match=r"none of 1, 2, 3, 4, 5, .*: 2\.5"):
        run.append(write(tmp_path / "half.inter", [("4", "7", 2.5, 990_000_000)]))
    assert len(run.dataset.history) == 1000


@pytest.mark.parametrize("name", ["RecLoRA", "RecLoRA user", "iLoRA", "SASRec"])
def test_a_new_item_is_no_part_of_what_a_lens_reads(name, served, new_item):
    run, plain = served(name, **new_item), served(name)
    plain.append(pd.DataFrame(NEW_ITEM[1:], columns=["user_id", "item_id", "rating", "timestamp"]))
    users = run.ids("user_id", ["4", "2"]).known
    items = run.ids("item_id", ["1", "3"]).known
    with torch.no_grad():
        a, b = (one.samples(users, items)["item_id_list"] for one in (run, plain))
    assert torch.equal(a, b)
    assert recommend(run, ["4"], top=3)["item"].ne("900").all()
    if name in ("RecLoRA", "SASRec"):
        with pytest.raises(ValueError, match="every item, and none for 900"):
            score(run, pd.DataFrame({"user": ["4"], "item": ["900"]}))
        with pytest.raises(ValueError, match="none for 900"):
            recommend(run, ["4"], candidates=["900"])


def test_a_new_item_without_a_title_is_named_and_nothing_is_changed(served, tmp_path):
    run = served("TALLRec")
    with pytest.raises(ValueError, match="900"):
        run.append(write(tmp_path / "new.inter", NEW_ITEM))
    assert run.dataset.item_num == 51 and len(run.dataset.history) == 1000
    assert run.ids("item_id", ["900"]).unknown == ["900"]
    assert len(recommend(run, ["4"], top=2)) == 2


def test_interactions_that_the_data_has_are_left_out(served, tmp_path, caplog):
    run = served("TALLRec")
    counts = run.append(write(tmp_path / "later.inter", [*LATER, LATER[0]]))
    assert counts["interactions"] == 4 and len(run.dataset.history) == 1004
    assert "1 of the interactions are in the data already" in caplog.text
    counts = run.append(write(tmp_path / "again.inter", LATER))
    assert counts == {"interactions": 0, "new_users": 0, "new_items": 0, "late": 0}
    assert len(run.dataset.history) == 1004


def test_dates_and_milliseconds_are_read_as_seconds(served, tmp_path):
    run, dates, milliseconds = (served("TALLRec") for _ in range(3))
    run.append(write(tmp_path / "a.inter", LATER))
    times = [str(pd.Timestamp(time, unit="s")) for *_, time in LATER]
    dates.append(write(tmp_path / "b.inter", [(*row, t) for (*row, _), t in zip(LATER, times, strict=True)]))
    milliseconds.append(write(tmp_path / "c.inter", [(*row, time * 1000) for *row, time in LATER]))
    for other in (dates, milliseconds):
        np.testing.assert_array_equal(other.dataset.history.timestamps, run.dataset.history.timestamps)
        np.testing.assert_array_equal(other.dataset.history.item_ids, run.dataset.history.item_ids)


def test_a_new_item_renames_no_item_whose_title_is_hidden(served, new_item):
    run, before = served("TALLRec hidden"), served("TALLRec hidden")
    names = list(run.parts.prompts._items.titles)
    run.append(**new_item)
    pairs = pd.DataFrame({"user": ["1", "4"], "item": ["5", "900"]})
    table = score(run, pairs, explained=True)
    assert run.parts.prompts._items.titles[:-1] == names
    assert run.parts.prompts._items.titles[-1] == "Item 51" and "Item 51" not in names
    assert "Silver Harbour" not in table["prompt"][1] and "Item 51" in table["prompt"][1]
    expected = score(before, pairs[:1], explained=True)
    assert table["prompt"][0] == expected["prompt"][0]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("user_id:token\titem_id:token\ttimestamp:float", ("4", "7", 1), "no column rating"),
        ("who:token\titem_id:token\trating:float\ttimestamp:float", ("4", "7", 1, 1), "no column user_id"),
        (HEADER, ("4", "7", "many", 1), "line 2, column 'rating': 'many' is not a finite number"),
        (HEADER, ("4", "7", 3, ""), "line 2, column 'timestamp': '' is empty"),
        (HEADER, ("4", "7", 3, "soon"), "'soon' is not a time"),
        (HEADER, ("", "7", 3, 1), "line 2, column 'user_id': '' is empty"),
    ],
)
def test_files_with_other_columns_or_cells_are_refused(header, row, message, served, tmp_path):
    run = served("TALLRec")
    with pytest.raises(ValueError, match=message):
        run.append(write(tmp_path / "bad.inter", [row], header))
    with pytest.raises(FileNotFoundError, match=r"none\.inter"):
        run.append(tmp_path / "none.inter")
    assert len(run.dataset.history) == 1000


def test_parquet_is_appended_as_text_is(served, tmp_path):
    pytest.importorskip("pyarrow")
    users, items, ratings, times = zip(*LATER, strict=True)
    columns = {
        "user_id:token": users,
        "item_id:token": items,
        "rating:float": ratings,
        "timestamp:float": times,
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "later.inter.parquet")
    pairs = pd.DataFrame({"user_id": ["4", "2"], "item_id": ["1", "8"]})
    scores = []
    for source in (tmp_path / "later.inter.parquet", write(tmp_path / "later.inter", LATER)):
        run = served("TALLRec")
        assert run.append(source)["interactions"] == 4
        scores.append(score(run, pairs)["score"].to_numpy())
    assert np.array_equal(*scores)


def test_a_folder_that_is_no_table_is_named(served, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        served("TALLRec").append(tmp_path)
