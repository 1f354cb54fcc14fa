"""Runs in RecBole's own protocol: what RecBole would misread in files is refused, with file, line and value."""

from __future__ import annotations

import pytest
from atomic_files import INTER_HEADER, random_interactions, write_atomic

from recbole_llm.config.configurator import Config
from recbole_llm.data.recbole_files import check_files

ITEMS = [(i, f"Film {i}", 10 * i) for i in range(1, 16)]


@pytest.fixture
def check(tmp_path):
    """``check(rows, items, **keys)``: what checking these files gives; by default they are right."""

    def call(rows=None, items=ITEMS, header=INTER_HEADER, model="SASRec", **keys):
        write_atomic(tmp_path, "toy", "inter", header, random_interactions() if rows is None else rows)
        write_atomic(tmp_path, "toy", "item", "item_id:token title:token price:float", items)
        check_files(Config(model, "toy", config_dict={"task": None, "data_path": str(tmp_path), **keys}))

    return call


def test_right_files_pass(check, caplog):
    check()
    assert "RecBole drops" not in caplog.text
    check(items=ITEMS[:9], load_col={"inter": ["user_id", "item_id", "timestamp"]})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"items": [*ITEMS, (3, "Again", 1)]}, r"item, line 17, column 'item_id': '3' has a line already"),
        ({"items": [*ITEMS[:4], (5, "x", "-")]}, r"item, line 6, column 'price': '-' is not a finite number"),
        ({"items": [(f"x{i}", "x", 1) for i in range(5)]}, r"no item_id of .*toy\.inter is in .*toy\.item"),
        (
            {"rows": [("1", "2", 3, "2011-06-26")]},
            r"inter, line 2, column 'timestamp': '2011-06-26' is not a finite number\. Write seconds, or set task",
        ),
        (
            {"header": INTER_HEADER.replace("timestamp:float", "timestamp:token")},
            "is token, so RecBole orders times as they first appear",
        ),
        ({"header": "user_id item_id rating timestamp"}, "must be name:type cells"),
        ({"rows": []}, "has a header and no lines below it"),
        (
            {"rows": [("1", "2")], "header": "user_id:token item_id:token"},
            r"no column 'timestamp' \(TIME_FIELD, eval_args.order being TO\) is loaded",
        ),
    ],
)
def test_what_recbole_would_misread_is_refused(check, keys, message):
    with pytest.raises(ValueError, match=message):
        check(**keys)


def test_interactions_that_recbole_drops_are_told(check, caplog):
    check(items=ITEMS[:9])
    lost = sum(int(row[1]) > 9 for row in random_interactions())
    assert f"{lost} of" in caplog.text and "RecBole drops them" in caplog.text


def test_models_that_need_no_times_need_no_column_of_them(check, caplog):
    rows = [row[:2] for row in random_interactions()]
    check(rows, header="user_id:token item_id:token", model="BPR")
    assert "RecBole drops" not in caplog.text
