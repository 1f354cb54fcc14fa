"""Parquet tables: the same samples as from text, and one clear error for what cannot be read."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from atomic_files import INTER_HEADER, random_interactions, write_atomic
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.config.configurator import Config
from recbole_llm.config.sources import data_folder
from recbole_llm.data.atomic_files import AtomicFiles, read_atomic
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.recbole_files import check_files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ITEMS = [(f"{i}", f"Film {i}", 10.5 * i, "Drama Crime" if i % 2 else "") for i in range(1, 16)]
ITEM_HEADER = "item_id:token title:token price:float class:token_seq"
USERS = [(f"{u}", 20 + u) for u in range(1, 31)]


def arrow(header: str, rows) -> pa.Table:
    """Rows as Spark would type them: numbers as numbers, everything else as strings."""
    names = header.split(" ")
    return pa.table({name: list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)})


def write_parts(folder: Path, table: pa.Table, parts: int = 3, row_group_size: int = 40) -> Path:
    """A folder of part files, with what Spark leaves beside them."""
    folder.mkdir(parents=True)
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.crc").write_bytes(b"x")
    size = -(-len(table) // parts)
    for part in range(parts):
        piece = table.slice(part * size, size)
        pq.write_table(piece, folder / f"part-{part:05}.parquet", row_group_size=row_group_size)
    return folder


def write_both(folder: Path, rows=None, items=ITEMS) -> tuple[Path, Path]:
    """The same dataset as text and as parquet, in two data folders."""
    rows = random_interactions() if rows is None else rows
    for suffix, header, cells in (
        ("inter", INTER_HEADER, rows),
        ("item", ITEM_HEADER, items),
        ("user", "user_id:token age:token", USERS),
    ):
        write_atomic(folder / "text", "toy", suffix, header, cells)
        path = folder / "parquet" / "toy" / f"toy.{suffix}.parquet"
        if suffix == "inter":
            write_parts(path, arrow(header, cells))
        else:
            pq.write_table(arrow(header, cells), path)
    return folder / "text", folder / "parquet"


def built(make_config, data: Path, task: str, **keys):
    keys = {"text": {"user_fields": {"age": "aged {}"}, "genre": "class"}, **keys}
    config = make_config("DIN" if task == "ctr" else "SASRec", task=task, data_path=str(data), **keys)
    dataset = (CTRDataset if task == "ctr" else NextItemDataset)(config)
    return dataset, dataset.build()


@pytest.mark.parametrize("task", ["ctr", "next_item"])
@pytest.mark.parametrize("keys", [{}, {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}])
def test_samples_histories_and_text_are_those_of_text_files(tmp_path, make_config, task, keys):
    found = [built(make_config, data, task, **keys) for data in write_both(tmp_path)]
    (text, text_splits), (parquet, parquet_splits) = found
    for one, other in zip(text_splits, parquet_splits, strict=True):
        # Run identity: samples, histories, the ids' meaning and the features.
        assert one.content_hash() == other.content_hash()
        a, b = one[np.arange(len(one))], other[np.arange(len(other))]
        assert sorted(a.columns) == sorted(b.columns)
        for name in a.columns:
            np.testing.assert_array_equal(a[name].numpy(), b[name].numpy())
    assert text.item_text().titles == parquet.item_text().titles
    assert text.item_text().genres == parquet.item_text().genres
    assert text.user_text().profiles == parquet.user_text().profiles
    assert "aged 21" in parquet.user_text().profiles
    assert text.facts() == parquet.facts()


@pytest.mark.parametrize("task", ["ctr", "next_item"])
def test_the_identity_covers_parquet_files(tmp_path, make_config, task):
    rows = random_interactions()
    changed = [(*rows[0][:2], 6 - rows[0][2] if rows[0][2] != 3 else 5, rows[0][3]), *rows[1:]]
    hashes = []
    for name, mine in (("a", rows), ("b", changed)):
        _, parquet = write_both(tmp_path / name, mine)
        hashes.append(built(make_config, parquet, task)[1][0].content_hash())
    assert hashes[0] != hashes[1]


CELLS = st.sampled_from(["a", "b", " a", "13", "013", "", "ä ö"])
NUMBERS = st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(-1000, 1000).map(float))


@given(
    rows=st.lists(st.tuples(CELLS, CELLS, NUMBERS, st.integers(0, 10**12)), min_size=1, max_size=12),
    parts=st.integers(1, 3),
    group=st.integers(1, 4),
)
def test_cells_are_those_of_the_text_file(tmp_path_factory, rows, parts, group):
    folder = tmp_path_factory.mktemp("cells")
    header = "user_id:token item_id:token rating:float timestamp:float"
    lines = [["" if cell is None else cell for cell in row] for row in rows]
    text = read_atomic(write_atomic(folder, "toy", "inter", header, lines))
    path = folder / "toy" / "toy.later.parquet"
    write_parts(path, arrow(header, rows).cast(schema(rows)), parts, group)
    parquet = files_of(folder, "toy.inter").read_table(path)
    assert parquet.types == text.types and len(parquet) == len(text)
    for column in ("user_id", "item_id"):
        assert parquet.cells(column).tolist() == text.cells(column).tolist()
        assert parquet.tokens(column).tolist() == text.tokens(column).tolist() or "" in text.cells(column)
        text.clean_ids(column)
        parquet.clean_ids(column)
        assert parquet.cells(column).tolist() == text.cells(column).tolist()
    for column in ("rating", "timestamp"):
        np.testing.assert_array_equal(parquet.numbers(column), text.numbers(column))
    assert parquet.cells("timestamp").tolist() == text.cells("timestamp").tolist()


def schema(rows) -> pa.Schema:
    return pa.schema(
        [
            ("user_id:token", pa.string()),
            ("item_id:token", pa.string()),
            ("rating:float", pa.float64()),
            ("timestamp:float", pa.int64()),
        ]
    )


def files_of(folder: Path, *names: str, **keys) -> AtomicFiles:
    others = {"toy.user": "user_id", "toy.item": "item_id"}
    return AtomicFiles(folder / "toy", list(names), others, "\t", None, **keys)


def read_one(folder: Path, table: pa.Table, columns=None, **keys):
    """``toy.inter.parquet`` of a table, read."""
    (folder / "toy").mkdir(exist_ok=True)
    pq.write_table(table, folder / "toy" / "toy.inter.parquet", row_group_size=2)
    files = files_of(folder, "toy.inter", **keys)
    return files.read_table(files.interactions[0], columns)


# ---------------------------------------- types


def test_types_follow_from_the_schema_where_the_names_have_none(tmp_path):
    plain = {
        "user_id": pa.array([1, 2], pa.int64()),
        "item_id": pa.array(["a", "b"]).dictionary_encode(),
        "rating": pa.array([3.5, None]),
        "label": pa.array([True, False]),
        "timestamp": pa.array([1_000_000_000_123_456, 1_000_000_001_000_000], pa.timestamp("us")),
        "place": pa.array(["x", None], pa.large_string()),
        "tags": pa.array([["x", "y"], None]),
        "vector": pa.array([[1.5, 2.0], [0.25]]),
        "empty": pa.nulls(2),
        "day": pa.array([0, None], pa.date32()),
    }
    file = read_one(tmp_path, pa.table(plain), numbers=["rating", "label", "timestamp"])
    kinds = "token token float float float token token_seq float_seq token token"
    assert list(file.types.values()) == kinds.split()
    assert file.cells("user_id").tolist() == ["1", "2"] and file.cells("item_id").tolist() == ["a", "b"]
    np.testing.assert_array_equal(file.numbers("rating"), [3.5, np.nan])
    np.testing.assert_array_equal(file.numbers("label"), [1, 0])
    np.testing.assert_array_equal(file.times("timestamp"), [1_000_000_000.123456, 1_000_000_001])
    assert file.cells("place").tolist() == ["x", ""] and file.cells("empty").tolist() == ["", ""]
    assert file.cells("tags").tolist() == ["x y", ""] and file.cells("vector").tolist() == ["1.5 2.0", "0.25"]
    assert file.cells("day").tolist() == ["1970-01-01", ""]


def test_times_are_those_of_iso_dates_in_text(tmp_path):
    dates = ["2011-06-26 10:16:34.123456", "1969-07-20 20:17:40"]
    header = "user_id:token timestamp:float"
    text = read_atomic(write_atomic(tmp_path, "text", "inter", header, [("u", date) for date in dates]))
    for stored in (pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("us", "UTC")):
        times = pa.array(np.array(dates, dtype="datetime64[us]")).cast(stored)
        file = read_one(tmp_path, pa.table({"user_id:token": ["u", "u"], "timestamp:float": times}))
        np.testing.assert_array_equal(file.times("timestamp"), text.times("timestamp"))


def test_only_the_columns_asked_for_are_read(tmp_path):
    table = pa.table({"user_id": ["a"], "item_id": ["b"], "note": [["two words"]]})
    with pytest.raises(ValueError, match="holds ' '"):
        read_one(tmp_path, table)
    file = read_one(tmp_path, table, ["user_id", "item_id"])
    assert list(file.types) == list(file.table) == ["user_id", "item_id"]


def test_ids_are_kept_once(tmp_path):
    file = read_one(tmp_path, pa.table({"user_id": ["a", "b"] * 50, "item_id": ["x"] * 100}))
    assert list(file.table["user_id"].cat.categories) == ["a", "b"]
    assert file.table["user_id"].cat.codes.dtype == np.int8


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"user_id": ["u"], "age": [3]},
            "column 'age' is int64, which may be a category or a number; name it age:token",
        ),
        ({"user_id": [{"a": 1}]}, "column 'user_id' is struct.* which no column may be"),
        ({"user_id:token": [{"a": 1}]}, "column 'user_id:token' is struct.* which no column may be"),
        ({"user_id:int": ["u"]}, "column 'user_id' has the type 'int', which is none of token"),
        ({"a:b:c": ["u"]}, "column 'a:b:c' must be named name:type"),
        ({"user_id": ["u"], "user_id:token": ["u"]}, "the schema has the column 'user_id' more than once"),
        ({"user_id": ["u"], "tags": [["a b"]]}, "row group 0, row 0, column 'tags': 'a b' holds ' '"),
    ],
)
def test_a_wrong_schema_is_refused(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        read_one(tmp_path, pa.table(table))


def test_a_column_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two columns of one name"):
        read_one(tmp_path, pa.table([["a"], ["b"]], names=["user_id", "user_id"]))


def test_dates_beyond_nanoseconds_are_refused(tmp_path):
    times = pa.array([10**17], pa.timestamp("us"))
    with pytest.raises(ValueError, match="row group 0, column 'timestamp:float' cannot be read"):
        read_one(tmp_path, pa.table({"user_id": ["u"], "timestamp:float": times}))


# ---------------------------------------- cells


@pytest.mark.parametrize(
    ("rating", "time", "message"),
    [
        (
            "-",
            5,
            r"toy\.inter\.parquet, part-00001\.parquet, row group 1, row 1, column 'rating': '-' is not a finite",
        ),
        (
            float("inf"),
            5,
            r"part-00001\.parquet, row group 1, row 1, column 'rating': 'inf' is not a finite number",
        ),
        (3.0, "26/06/2011", r"row group 1, row 1, column 'timestamp': '26/06/2011' is not a time"),
    ],
)
def test_a_wrong_cell_is_named_by_part_row_group_and_row(tmp_path, make_config, rating, time, message):
    usual = "2011-06-26" if isinstance(time, str) else 5
    rows = [(f"u{n % 4}", f"i{n}", 3.0, usual) for n in range(12)]
    rows[9] = (*rows[9][:2], rating, time)
    columns = dict(zip(INTER_HEADER.split(), map(list, zip(*rows, strict=True)), strict=True))
    for name, cells in columns.items():
        if any(isinstance(cell, str) for cell in cells):
            columns[name] = list(map(str, cells))
    write_parts(tmp_path / "toy" / "toy.inter.parquet", pa.table(columns), parts=2, row_group_size=2)
    with pytest.raises(ValueError, match=message):
        CTRDataset(make_config())


def test_a_missing_rating_is_refused_as_in_text(tmp_path, make_config):
    rows = [
        (*row[:2], None if n == 7 else float(row[2]), row[3]) for n, row in enumerate(random_interactions())
    ]
    write_parts(tmp_path / "toy" / "toy.inter.parquet", arrow(INTER_HEADER, rows))
    with pytest.raises(ValueError, match="'rating' is empty in 1 lines"):
        CTRDataset(make_config())


def test_repairs_are_those_of_text(tmp_path, make_config, caplog):
    """Missing ids, blanks around ids, repeated interactions, ids spelt otherwise, items listed twice, milliseconds."""
    rows = random_interactions()
    rows = [(f" {u} " if n == 3 else u, i, r, t * 1000) for n, (u, i, r, t) in enumerate(rows)]
    rows += [("", "1", 3, rows[0][3]), rows[5]]
    items = [(f"0{i}", *rest) for i, *rest in ITEMS] + [("01", "Again", 1.0, "")]
    found = [built(make_config, data, "ctr") for data in write_both(tmp_path, rows, items)]
    assert found[0][1][0].content_hash() == found[1][1][0].content_hash()
    assert found[1][0].dropped == {"no user or item id": 1, "exact duplicate": 1}
    for said in ("part-00000.parquet, row group 0, row 3)", "spells 15 of its item_id", "is in milliseconds"):
        assert said in caplog.text
    assert (
        "toy.item.parquet: 1 lines repeat the item_id of an earlier line (first: row group 0, row 15"
        in caplog.text
    )


def test_ready_made_splits_may_be_parquet(tmp_path, make_config):
    rows, hashes = random_interactions(), []
    for kind in ("text", "parquet"):
        for part, name in enumerate(("train", "valid", "test")):
            mine = rows[part::3]
            if kind == "text":
                write_atomic(tmp_path / kind, "toy", f"{name}.inter", INTER_HEADER, mine)
            else:
                write_parts(tmp_path / kind / "toy" / f"toy.{name}.inter.parquet", arrow(INTER_HEADER, mine))
        names = {"benchmark_filename": ["train", "valid", "test"]}
        splits = built(make_config, tmp_path / kind, "ctr", **names)[1]
        hashes.append([split.content_hash() for split in splits])
    assert hashes[0] == hashes[1]


def test_an_empty_part_counts_nothing_and_an_empty_table_is_refused(tmp_path):
    table = arrow(INTER_HEADER, random_interactions())
    path = write_parts(tmp_path / "toy" / "toy.inter.parquet", table.slice(0, 10), parts=2)
    pq.write_table(table.slice(0, 0), path / "part-00000b.parquet")
    files = files_of(tmp_path, "toy.inter")
    files.read(["user_id", "item_id"])
    assert len(files[files.interactions[0]]) == 10
    shutil.rmtree(path)
    write_parts(path, table.slice(0, 0), parts=1)
    with pytest.raises(ValueError, match="no lines below it"):
        files_of(tmp_path, "toy.inter").read(["user_id", "item_id"])


# ---------------------------------------- files


def test_text_and_parquet_for_one_table_are_refused(tmp_path):
    _, parquet = write_both(tmp_path)
    write_atomic(parquet, "toy", "item", ITEM_HEADER, ITEMS)
    with pytest.raises(ValueError, match=r"toy\.item and .*toy\.item\.parquet are both there"):
        files_of(parquet, "toy.inter")


def test_what_is_no_parquet_file_is_named(tmp_path):
    path = write_parts(tmp_path / "toy" / "toy.inter.parquet", arrow(INTER_HEADER, random_interactions()))
    part = path / "part-00001.parquet"
    whole = part.read_bytes()
    for wrong in (whole[: len(whole) // 2], b"user_id:token\titem_id:token\n", b""):
        part.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"part-00001\.parquet is no parquet file, or truncated"):
            _ = files_of(tmp_path, "toy.inter").types
    part.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    files = files_of(tmp_path, "toy.inter")
    with pytest.raises(ValueError, match=r"part-00001\.parquet, row group 0, column .* cannot be read"):
        files.read(["user_id", "item_id"])


def test_parts_of_different_schemas_are_refused(tmp_path):
    table = arrow(INTER_HEADER, random_interactions())
    path = write_parts(tmp_path / "toy" / "toy.inter.parquet", table)
    pq.write_table(
        table.rename_columns(["user_id:token", "item:token", *table.column_names[2:]]), path / "z.parquet"
    )
    with pytest.raises(ValueError, match=r"z\.parquet has the columns .*item:token.*part-00000\.parquet has"):
        _ = files_of(tmp_path, "toy.inter").types


def test_folders_without_parts_and_partitioned_ones_are_refused(tmp_path):
    path = tmp_path / "toy" / "toy.inter.parquet"
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no part files"):
        _ = files_of(tmp_path, "toy.inter").types
    write_parts(path / "year=2001", arrow(INTER_HEADER, random_interactions()))
    with pytest.raises(
        ValueError, match="holds the folder 'year=2001'; write its part files without partitioning"
    ):
        _ = files_of(tmp_path, "toy.inter").types


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    _, parquet = write_both(tmp_path)
    files = files_of(parquet, "toy.inter")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        _ = files.types


def test_recbole_s_own_protocol_cannot_read_parquet(tmp_path):
    _, parquet = write_both(tmp_path)
    config = Config("SASRec", "toy", config_dict={"task": None, "data_path": str(parquet)})
    with pytest.raises(ValueError, match="RecBole's own protocol reads text only; set task: ctr"):
        check_files(config)


def test_a_dataset_of_parquet_files_is_found(tmp_path):
    _, parquet = write_both(tmp_path)
    folder = parquet / "toy"
    assert data_folder("toy", str(folder), "packaged") == (str(folder), False)
    (folder / "toy.inter.parquet").rename(folder / "toy.train.inter.parquet")
    with pytest.raises(FileNotFoundError, match=r"toy\.inter does not exist; .*splits .* of \['train'\]"):
        files_of(parquet, "toy.inter")
