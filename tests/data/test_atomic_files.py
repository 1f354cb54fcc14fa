"""Atomic files as other people write them: each is read as it is meant, or refused by file, line, column and value."""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from atomic_files import INTER_HEADER, random_interactions, write_atomic
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.config import configurator
from recbole_llm.data.atomic_files import AtomicFiles, match_ids, read_atomic, read_types
from recbole_llm.data.ctr import CTRDataset

PLAIN_CELL = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='"\t'), min_size=1, max_size=8
)


def one_column(folder: Path, kind: str, cells: list[str], name: str = "timestamp"):
    return read_atomic(write_atomic(folder, "toy", "inter", f"item_id:token {name}:{kind}", enumerate(cells)))


# ---------------------------------------- headers


@given(
    names=st.lists(st.text("abcxyz_1", min_size=1, max_size=6), min_size=1, max_size=5, unique=True),
    blanks=st.tuples(st.sampled_from(["", " "]), st.sampled_from(["", " "])),
    mark=st.booleans(),
    crlf=st.booleans(),
)
def test_a_header_survives_blanks_and_a_byte_order_mark(tmp_path_factory, names, blanks, mark, crlf):
    before, behind = blanks
    header = "\t".join(f"{before}{name}{behind}:{before}token{behind}" for name in names)
    path = tmp_path_factory.mktemp("header") / "toy.inter"
    text = ("\ufeff" if mark else "") + header + ("\r\n" if crlf else "\n")
    path.write_bytes(text.encode())
    for encoding in (None, "utf-8"):
        assert read_types(path, encoding=encoding) == dict.fromkeys(names, "token")


@given(header=st.text(max_size=30))
def test_any_first_line_gives_columns_or_one_error(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("header") / "toy.inter"
    path.write_bytes(header.encode("utf-8", "surrogatepass"))
    try:
        assert all(name and name == name.strip() for name in read_types(path))
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("ends", ["", '7\t"two ""quoted"" words"\n8\tplain\n', "7\n\n8\tplain\n"])
def test_many_lines_are_read_piece_by_piece(tmp_path, monkeypatch, ends):
    """Cells that are quoted or missing may come after pieces without any; equal cells are one object."""
    path = tmp_path / "toy.inter"
    path.write_text("user_id:token\titem_id:token\n" + "".join(f"u{n % 3}\ti{n}\n" for n in range(7)) + ends)
    whole = read_atomic(path)
    monkeypatch.setattr("recbole_llm.data.atomic_files.LINES_AT_ONCE", 2)
    monkeypatch.setattr("recbole_llm.data.atomic_files.MOST_DIFFERENT", 3)
    found = read_atomic(path)
    pd.testing.assert_frame_equal(found.table, whole.table)
    np.testing.assert_array_equal(found.lines, whole.lines)
    assert found.table["item_id"][:7].tolist() == [f"i{n}" for n in range(7)]
    if not ends:
        assert found.table["user_id"][0] is found.table["user_id"][6]
    else:
        assert found.table["item_id"].iloc[-1] == "plain"


@given(rows=st.lists(st.tuples(PLAIN_CELL, PLAIN_CELL), min_size=1, max_size=6))
def test_plain_cells_are_read_as_they_are_written(tmp_path_factory, rows):
    path = write_atomic(tmp_path_factory.mktemp("cells"), "toy", "item", "item_id:token title:token", rows)
    file = read_atomic(path)
    assert file.table.to_numpy().tolist() == [list(row) for row in rows]
    assert file.lines.tolist() == list(range(2, 2 + len(rows)))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("item_id:token item_id:token", "has the column 'item_id' more than once"),
        ("item_id:token price:double", "column 'price' has the type 'double', which is none of token"),
        ("item_id,title", "must be name:type cells"),
        (":token", "must be name:type cells"),
        ("user_id item_id", r"has \['user_id', 'item_id'\]; write user_id:token and so on"),
        ("item_id:token,title:token", "look separated by ',', so set field_separator to ','"),
        ("item_id:token;title:token", "look separated by ';'"),
        ("item_id:token::title:token", "look separated by '::'"),
        ("item_id:token ", r"it ends in a '\\t' too many"),
        ("", "but it is empty"),
        ("item_id:token\r1\r2", r"its lines end in \\r alone"),
        (" ".join(["x" * 500] * 99), r"…', .* and 94 more"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        read_atomic(write_atomic(tmp_path, "toy", "item", header, []))


@pytest.mark.parametrize("encoding", [None, "utf-8"])
def test_a_file_that_says_it_is_utf_16_is_read_so(tmp_path, encoding):
    path = tmp_path / "toy.item"
    for written in ("utf-16", "utf-16-le", "utf-16-be"):
        mark = "" if written == "utf-16" else "\ufeff"
        path.write_bytes(f"{mark}item_id:token\ttitle:token\r\n1\tAmélie\r\n".encode(written))
        assert read_atomic(path, encoding=encoding).table.to_numpy().tolist() == [["1", "Amélie"]]


@pytest.mark.parametrize("kind", ["gzip", "zip", "bzip2", "xz"])
def test_a_compressed_file_is_named_as_such(tmp_path, kind):
    path = tmp_path / "toy.item"
    text = b"item_id:token\n1\n"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("toy.item", text)
    else:
        path.write_bytes({"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind].compress(text))
    with pytest.raises(ValueError, match=rf"toy\.item is compressed \({kind}\)"):
        read_atomic(path)


def test_a_header_may_be_quoted(tmp_path):
    path = tmp_path / "toy.item"
    path.write_text('"item_id:token"\t"title:token"\n"1"\t"Heat"\n')
    assert read_atomic(path).table.to_dict("list") == {"item_id": ["1"], "title": ["Heat"]}


# ---------------------------------------- numbers


@pytest.mark.parametrize("missing", ["", "NA", "nan", "NULL", " N/A "])
def test_missing_numbers(tmp_path, missing):
    found = one_column(tmp_path, "float", ["1.5", missing, " 2 "], "price").numbers("price")
    np.testing.assert_array_equal(found, [1.5, np.nan, 2.0])


@pytest.mark.parametrize("text", ["-", "9,99", "$3", "inf", "1e999", "free"])
def test_text_in_a_column_of_numbers_is_named(tmp_path, text):
    file = one_column(tmp_path, "float", ["1", text, "-"], "price")
    with pytest.raises(
        ValueError, match=r"toy\.inter, line 3, column 'price': .* is not a finite number \(and 1"
    ):
        file.numbers("price")


# ---------------------------------------- times


@pytest.mark.parametrize("kind", ["token", "float", "token_seq"])
@pytest.mark.parametrize(
    "cells",
    [
        ["1309083394", "1306395545.5"],
        ["1309083394000", "1306395545500"],
        ["1309083394000000", "1306395545500000"],
        ["1309083394000000000", "1306395545500000000"],
        ["2011-06-26 10:16:34", "2011-05-26 07:39:05.5"],
        ["2011-06-26T12:16:34+02:00", "2011-05-26T07:39:05.500Z"],
    ],
)
def test_times_become_seconds(tmp_path, kind, cells):
    found = one_column(tmp_path, kind, [*cells, ""]).times("timestamp")
    np.testing.assert_allclose(found, [1309083394.0, 1306395545.5, np.nan])


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["20110626", "20110526"], ["2011-06-26", "2011-05-26"]),
        (["20110626.0", "", "19991231"], ["2011-06-26", "", "1999-12-31"]),
        (["201106261016", "201105260739"], ["2011-06-26 10:16", "2011-05-26 07:39"]),
        (["20110626101634", "20110526073905"], ["2011-06-26 10:16:34", "2011-05-26 07:39:05"]),
    ],
)
def test_dates_of_digits_become_seconds(tmp_path, caplog, cells, expected):
    found = one_column(tmp_path, "float", cells).times("timestamp")
    seconds = [pd.Timestamp(date, tz="UTC").timestamp() if date else np.nan for date in expected]
    np.testing.assert_array_equal(found, seconds)
    assert f"holds dates such as '{cells[0]}', read as seconds since 1970" in caplog.text


@pytest.mark.parametrize(
    "cells",
    [
        ["1", "2", "3"],
        ["0", "20110626"],
        ["20110626", "20111326"],
        ["20110626.5", "20110627"],
        ["-86400", "99999999999"],
    ],
)
def test_small_numbers_stay_as_they_are(tmp_path, cells):
    np.testing.assert_array_equal(
        one_column(tmp_path, "float", cells).times("timestamp"), list(map(float, cells))
    )


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["26/06/2011", "2011-05-26"], r"line 2, column 'timestamp': '26/06/2011' is not a time \(1 of 2"),
        (
            ["2011-05-26", "1309083394"],
            r"line 3, .* is not a time .*header timestamp:float.*2011-06-26 10:16:34",
        ),
        (["yesterday"] * 3, r"3 of 3 cells"),
        (
            ["1309083394", "1306395545000"],
            r"line 2.*in seconds, but line 3 has '1306395545000', in milliseconds",
        ),
    ],
)
def test_other_times_are_refused(tmp_path, cells, message):
    with pytest.raises(ValueError, match=message):
        one_column(tmp_path, "token", cells).times("timestamp")


def test_dates_declared_as_tokens_order_the_history(toy):
    rows = [("1", str(i), 1 + i % 5, f"2011-0{1 + (5 * i) % 9}-11 10:00:00") for i in range(9)]
    rows += [("2", str(i), 1 + i % 5, f"2012-01-0{1 + i}") for i in range(9)]
    header = INTER_HEADER.replace("timestamp:float", "timestamp:token")
    dataset = toy(rows, header, eval_args={"split": {"RS": [1, 0, 0]}, "order": "TO", "mode": "labeled"})
    dataset.build()
    start, end = dataset.history.user_start[dataset.token2id("user_id", "1")] + np.array([0, 9])
    found = dataset.id2token("item_id", dataset.history.item_ids[start:end]).tolist()
    assert found == [row[1] for row in sorted(rows[:9], key=lambda row: row[3])]


# ---------------------------------------- ids


def read_pair(folder: Path, used: list[str], known: list[str], item_type: str = "token") -> tuple:
    write_atomic(folder, "toy", "inter", "user_id:token item_id:token", [("u", item) for item in used])
    write_atomic(
        folder, "toy", "item", f"item_id:{item_type} title:token", [(item, f"Film {item}") for item in known]
    )
    files = AtomicFiles(folder / "toy", ["toy.inter"], {"toy.item": "item_id"}, "\t", "utf-8")
    files.read(("user_id", "item_id"))
    return tuple(
        files[folder / "toy" / f"toy.{name}"].table["item_id"].tolist() for name in ("inter", "item")
    )


@pytest.mark.parametrize(
    ("used", "known", "expected"),
    [
        (["13.0", "2.0"], ["13", "2", "5"], ["13.0", "2.0", "5"]),
        (["13", "2"], ["13.0", "2.0"], ["13", "2"]),
        (["007", "12"], ["7", "12"], ["007", "12"]),
        ([" 7", "12 "], ["7 ", " 12"], ["7", "12"]),
        (["b00a", "x"], ["B00A", "x"], ["b00a", "x"]),
        (["NA", "null", "nan"], ["NA", "null", "nan"], ["NA", "null", "nan"]),
        (["\u00e9", "7"], ["e\u0301", "\uff17"], ["\u00e9", "7"]),
    ],
)
def test_ids_that_only_differ_in_spelling_are_one(tmp_path, used, known, expected):
    inter, item = read_pair(tmp_path, used, known)
    assert inter == [token.strip() for token in used] and item == expected


def test_the_repair_is_logged_with_both_files(tmp_path, caplog):
    read_pair(tmp_path, ["13.0"], ["13"])
    assert (
        "toy.item spells 1 of its item_id otherwise than" in caplog.text
        and "toy.inter ('13' for '13.0')" in caplog.text
    )


def test_ids_that_could_be_several_are_left_alone(tmp_path):
    assert read_pair(tmp_path, ["7", "007", "1"], ["7.0", "1"])[1] == ["7.0", "1"]
    assert read_pair(tmp_path, ["7", "1"], ["7.0", "007", "1"])[1] == ["7.0", "007", "1"]


def test_files_without_a_common_id_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no item_id of .*toy\.inter is in .*toy\.item: .*'a', the other 'x'"
    ):
        read_pair(tmp_path, ["a", "b"], ["x", "y"])


def test_ids_declared_as_numbers_are_text(tmp_path, toy):
    assert read_pair(tmp_path, ["13", "2"], ["13.0", "2.0"], "float") == (["13", "2"], ["13", "2"])
    header = INTER_HEADER.replace("user_id:token", "user_id:float")
    assert toy(header=header).token2id("user_id", "1") > 0
    with pytest.raises(ValueError, match="'user_id' holds ids, one per line; write user_id:token"):
        toy(header=INTER_HEADER.replace("user_id:token", "user_id:token_seq"))


def test_matching_nothing_to_match_changes_nothing(tmp_path):
    inter = read_atomic(write_atomic(tmp_path, "toy", "inter", "item_id:token", [("a",)]))
    item = read_atomic(write_atomic(tmp_path, "toy", "item", "item_id:token", []))
    match_ids([inter], item, "item_id")
    assert not len(item)


def test_of_several_lines_of_an_item_the_first_counts(toy, tmp_path, caplog):
    """RecBole would give every item behind the second line the features of the one before it."""
    items = [(i, f"Film {i}", 10 * i) for i in range(1, 16)]
    items.insert(4, (2, "Film 2 once more", -1))
    write_atomic(tmp_path, "toy", "item", "item_id:token title:token price:float", items)
    dataset = toy(normalize_field=None, load_col=None)
    dataset.build()
    assert len(dataset.item_feat) == dataset.item_num == 16
    tokens = dataset.id2token("item_id", np.arange(1, 16))
    assert dataset.item_feat["price"][1:].tolist() == [10 * int(token) for token in tokens]
    assert dataset.item_text().titles[1:] == [f"Film {token}" for token in tokens]
    assert "toy.item: 1 lines repeat the item_id of an earlier line (first: line 6, '2')" in caplog.text


# ---------------------------------------- what is dropped


def write_features(folder: Path, users: int, items: int) -> None:
    write_atomic(folder, "toy", "user", "user_id:token age:token", [(u, 20 + u) for u in range(1, users + 1)])
    write_atomic(
        folder, "toy", "item", "item_id:token title:token", [(i, f"Film {i}") for i in range(1, items + 1)]
    )


def test_interactions_without_features_are_kept_and_counted(toy, tmp_path, caplog):
    rows = random_interactions()
    write_features(tmp_path, users=20, items=10)
    dataset = toy(rows)
    lost = {
        "user_id not in .user": sum(int(row[0]) > 20 for row in rows),
        "item_id not in .item": sum(int(row[1]) > 10 for row in rows),
    }
    assert len(dataset) == len(rows) and dataset.dropped == {} and dataset.unmatched == lost
    assert "are kept, without its features and text" in caplog.text
    dataset.build()
    assert dataset.facts()["data"] == {"interactions": len(rows), "dropped": {}, "unmatched": lost}


def test_a_user_may_ask_to_drop_them(toy, tmp_path):
    rows = random_interactions()
    write_features(tmp_path, users=20, items=15)
    dataset = toy(rows, filter_inter_by_user_or_item=True)
    lost = sum(int(row[0]) > 20 for row in rows)
    assert dataset.dropped == {"filter_inter_by_user_or_item": lost} and len(dataset) == len(rows) - lost


def test_exact_duplicates_are_one_event(toy, caplog):
    rows = random_interactions()
    dataset = toy([*rows, *rows[:7]])
    assert dataset.dropped == {"exact duplicate": 7} and len(dataset) == len(rows)
    assert "7 of" in caplog.text and "exact duplicate" in caplog.text
    again = [
        (*rows[0][:3], rows[0][3] + 1),
        (*rows[1][:2], 6 - rows[1][2] if rows[1][2] != 3 else 1, rows[1][3]),
    ]
    assert len(toy([*rows, *again])) == len(rows) + 2


def test_without_times_lines_may_repeat(toy):
    rows = [row[:3] for row in random_interactions()]
    assert len(toy([*rows, *rows[:7]], "user_id:token item_id:token rating:float")) == len(rows) + 7


def test_too_many_dropped_interactions_are_an_error(toy):
    rows = random_interactions()
    with pytest.raises(ValueError, match=r"max_dropped: of .*'exact duplicate'.* more than the share 0\.5"):
        toy(rows * 3)
    assert len(toy(rows * 3, max_dropped=0.9)) == len(rows)
    unnamed = [("", *row[1:]) if i < 5 else row for i, row in enumerate(rows)]
    assert toy(unnamed).dropped == {"no user or item id": 5}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"user_inter_num_interval": 5}, r"user_inter_num_interval: 5 is no interval; write '\[4,inf\)'"),
        ({"item_inter_num_interval": ""}, "item_inter_num_interval: '' is no interval"),
        ({"val_interval": {"rating": 4}}, "val_interval.rating: 4 is no interval"),
        ({"val_interval": {"rating": "[a,b]"}}, "no interval"),
        ({"val_interval": {"rating": "[5,4]"}}, "no interval"),
        ({"val_interval": {"stars": "[4,5]"}}, "no column 'stars' is loaded, but .*'rating'"),
        ({"val_interval": {"user_id": "1"}}, "val_interval.user_id: '1' must be a list"),
    ],
)
def test_filters_that_cannot_be_read_are_refused(toy, keys, message):
    with pytest.raises(ValueError, match=message):
        toy(**keys)


def test_interactions_go_with_the_items_that_are_filtered(toy, tmp_path):
    write_atomic(tmp_path, "toy", "item", "item_id:token year:float", [(i, 1990 + i) for i in range(1, 16)])
    rows = random_interactions()
    dataset = toy(rows, load_col=None, val_interval={"year": "[1996,inf)"})
    left = [row for row in rows if int(row[1]) >= 6]
    assert len(dataset) == len(left) and dataset.dropped == {"val_interval": len(rows) - len(left)}


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, r"toy\.inter has a header and no lines below it"),
        (
            None,
            {"val_interval": {"rating": "[9,inf)"}},
            r"no interaction is left; dropped were {'val_interval'",
        ),
        (
            None,
            {"user_inter_num_interval": "[99,inf)"},
            "no interaction is left; dropped were {'user_inter_num",
        ),
    ],
)
def test_nothing_left_is_said_with_the_cause(toy, rows, keys, message):
    with pytest.raises(ValueError, match=message):
        toy(rows, **keys)


def test_a_feature_file_without_lines_is_as_none(toy, tmp_path, caplog):
    write_atomic(tmp_path, "toy", "item", "item_id:token title:token", [])
    dataset = toy()
    dataset.build()
    assert dataset.item_feat is None and "toy.item has a header and no lines below it" in caplog.text


# ---------------------------------------- labels and ratings


def labelled(with_rating: bool) -> tuple[list[tuple], str]:
    rows = [(u, i, r, int(r >= 3), t) for u, i, r, t in random_interactions()]
    if with_rating:
        return rows, INTER_HEADER.replace("timestamp", "label:float timestamp")
    return [(u, i, label, t) for u, i, _, label, t in rows], INTER_HEADER.replace("rating", "label")


def test_labels_of_the_data_are_used_where_there_is_no_rating(toy, caplog):
    rows, header = labelled(with_rating=False)
    dataset = toy(rows, header)
    assert dataset.threshold is None and "the column 'label' holds the labels" in caplog.text
    assert dataset.inter_feat["label"].tolist() == [row[2] for row in rows]


def test_labels_and_ratings_need_a_choice(toy, make_config, caplog):
    rows, header = labelled(with_rating=True)
    with pytest.raises(ValueError, match=r"the columns 'label' and 'rating', .*threshold: ~ to take 'label'"):
        toy(rows, header)
    assert toy(rows, header, threshold=None).inter_feat["label"].tolist() == [row[3] for row in rows]
    made = toy(rows, header, threshold={"rating": 5})
    assert made.inter_feat["label"].tolist() == [float(row[2] == 5) for row in rows]
    assert "has a column 'label', which is not used" in caplog.text


def test_the_default_threshold_warns_of_ratings_beyond_five(toy, caplog, monkeypatch, tmp_path):
    rows = [(u, i, 2 * r, t) for u, i, r, t in random_interactions()]
    toy(rows)
    assert (
        "rating >= 4, with rating from 2 to 10, gives 79%" in caplog.text and "set threshold" in caplog.text
    )
    caplog.clear()
    toy(rows, threshold={"rating": 4})
    toy([(u, i, r / 2, t) for u, i, r, t in rows])
    assert "set threshold" not in caplog.text


def test_the_threshold_of_a_datasets_yaml_is_meant(toy, caplog, monkeypatch, tmp_path):
    properties = shutil.copytree(configurator.PROPERTIES, tmp_path / "properties")
    (properties / "dataset" / "toy.yaml").write_text("ctr: {threshold: {rating: 4}}\n")
    monkeypatch.setattr(configurator, "PROPERTIES", properties)
    rows, header = labelled(with_rating=True)
    assert toy(rows, header).threshold == {"rating": 4} and "which is not used" in caplog.text
    toy([(u, i, 2 * r, t) for u, i, r, t in random_interactions()])
    assert "set threshold" not in caplog.text


def test_ratings_declared_as_tokens_are_numbers(toy, caplog):
    caplog.set_level(logging.WARNING)
    dataset = toy(header=INTER_HEADER.replace("rating:float", "rating:token"))
    assert dataset.inter_feat["rating"].tolist() == [row[2] for row in random_interactions()]
    assert "column 'rating' is read as numbers, not as token" in caplog.text
    with pytest.raises(ValueError, match=r"line 2, column 'rating': 'good' is not a finite number"):
        toy([("1", "2", "good", 5)], INTER_HEADER.replace("rating:float", "rating:token"))


# ---------------------------------------- plain interactions in given files


@pytest.fixture
def given_files(tmp_path, make_config):
    """``given_files(rows, names, parts, cls)``: an unbuilt dataset of rows spread over files by ``parts``."""

    def make(rows, names, parts, cls=CTRDataset, **keys):
        for number, name in enumerate(names):
            mine = [row for row, part in zip(rows, parts, strict=True) if part == number]
            write_atomic(tmp_path, "toy", f"{name}.inter", INTER_HEADER, mine)
        model = "DIN" if cls is CTRDataset else "SASRec"
        task = "ctr" if cls is CTRDataset else "next_item"
        return cls(
            make_config(model, task=task, benchmark_filename=list(names), **{"min_history": 1, **keys})
        )

    return make


def own(split) -> set[tuple]:
    batch = split.inter_feat
    users, items = (split.id2token(f, batch[f].numpy()).tolist() for f in ("user_id", "item_id"))
    return set(zip(users, items, strict=True))


@pytest.mark.parametrize("task", ["ctr", "next_item"])
def test_given_files_are_the_splits(given_files, task, caplog):
    from recbole_llm.data.next_item import NextItemDataset

    rows = random_interactions(users=60)
    parts = np.random.default_rng(1).choice(3, len(rows), p=[0.6, 0.2, 0.2])
    dataset = given_files(
        rows, ("train", "valid", "test"), parts, CTRDataset if task == "ctr" else NextItemDataset
    )
    splits = dataset.build()
    part_of = {(row[0], row[1]): part for row, part in zip(rows, parts, strict=True)}
    for number, split in enumerate(splits):
        assert own(split) and all(part_of[pair] == number for pair in own(split))
        batch = split[np.arange(len(split))]
        for row in range(len(split)):
            user = split.id2token("user_id", batch["user_id"][row].item())
            shown = batch["item_id_list"][row, : batch["item_length"][row]].numpy()
            seen = [part_of[user, item] for item in split.id2token("item_id", shown)]
            assert seen == sorted(seen) and seen[-1] <= number  # nothing of a later split
    assert "histories hold the earlier splits first" in caplog.text


def test_split_files_need_the_same_columns(given_files, tmp_path, make_config):
    rows = random_interactions(users=60)
    names, parts = ("train", "valid", "test"), [number % 3 for number in range(len(rows))]
    given_files(rows, names, parts)
    write_atomic(tmp_path, "toy", "test.inter", "user_id:token item_id:token rating:float", [("1", "2", 3)])
    with pytest.raises(
        ValueError, match=r"test\.inter has no column \['timestamp'\], but .*train\.inter has"
    ):
        CTRDataset(make_config(benchmark_filename=list(names)))


def test_split_files_without_their_key_are_told(given_files, tmp_path, make_config):
    rows = random_interactions(users=60)
    given_files(rows, ("train", "test"), [number % 2 for number in range(len(rows))])
    with pytest.raises(FileNotFoundError, match=r"named by benchmark_filename, of \['test', 'train'\]"):
        CTRDataset(make_config())


def test_a_file_to_validate_on_may_be_missing(given_files, caplog):
    rows = random_interactions(users=60)
    times = sorted(row[3] for row in rows)
    parts = [int(row[3] > times[int(0.8 * len(rows))]) for row in rows]
    train, valid, test = given_files(rows, ("train", "test"), parts).build()
    assert min(len(train), len(valid), len(test)) > 0 and "no file to validate on" in caplog.text
    assert train.inter_feat["row_id"].max() < valid.inter_feat["row_id"].min()
    with pytest.raises(ValueError, match="must hold three names"):
        given_files(rows, ("train",), [0] * len(rows))


def test_an_event_in_two_files_counts_once(given_files):
    rows = random_interactions(users=60)
    times = sorted(row[3] for row in rows)
    parts = [int(np.searchsorted([times[int(0.6 * len(rows))], times[-1] - 1], row[3])) for row in rows]
    double = next(row for row, part in zip(rows, parts, strict=True) if part == 0)
    dataset = given_files([*rows, double], ("train", "valid", "test"), [*parts, 2])
    assert dataset.dropped == {"exact duplicate": 1}


def test_splits_without_samples_are_named(toy):
    from recbole_llm.data.loading import build_splits

    eval_args = {"split": {"RS": [0.8, 0.0, 0.2]}, "order": "TO", "mode": "labeled"}
    with pytest.raises(ValueError, match="toy has no samples in the valid split"):
        build_splits(toy(eval_args=eval_args))
