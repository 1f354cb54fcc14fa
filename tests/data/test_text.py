"""Titles, profiles and what may be missing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from atomic_files import random_interactions, write_atomic

from recbole_llm.data import ItemText, UserText, natural_order
from recbole_llm.data.text import clean, read_atomic

INTER_COLUMNS = {"inter": ["user_id", "item_id", "rating", "timestamp"]}


@pytest.mark.parametrize(
    ("title", "natural"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Bug's Life, A", "A Bug's Life"),
        ("American in Paris, An", "An American in Paris"),
        ("Misérables, Les", "Les Misérables"),
        ("Vita è bella, La", "La Vita è bella"),
        ("Huitième jour, Le", "Le Huitième jour"),
        ("Avventura, L'", "L'Avventura"),
        ("Boot, Das", "Das Boot"),
        ("Blaue Engel, Der (Blue Angel, The)", "Der Blaue Engel (The Blue Angel)"),
        ("Blechtrommel, Die", "Die Blechtrommel"),
        ("Postino, Il (The Postman)", "Il Postino (The Postman)"),
        ("Mariachi, El", "El Mariachi"),
        ("Olvidados, Los", "Los Olvidados"),
        ("Furias, Las", "Las Furias"),
        ("City of Lost Children, The (Cité des enfants perdus, La)", None),
        ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Girl, Interrupted", "Girl, Interrupted"),
        ("Paris, Texas", "Paris, Texas"),
        ("Ciao, Professore!", "Ciao, Professore!"),
        ("Good, the Bad and the Ugly, The", "The Good, the Bad and the Ugly"),
        ("Theodora", "Theodora"),
        (", The", ", The"),
    ],
)
def test_articles_come_first(title, natural):
    expected = natural or "The City of Lost Children (La Cité des enfants perdus)"
    assert natural_order(title) == expected
    assert natural_order(expected) == expected  # nothing is moved twice


def test_text_is_one_plain_line():
    assert clean("  Et  Dieu&#8230;Cr\u00e9a\t la\u00a0Femme\r\n") == "Et Dieu…Créa la Femme"
    assert clean("Tom &amp; Jerry &lt;3 AT&T, R&B; &#x41;") == "Tom & Jerry <3 AT&T, R&B; A"
    assert clean("bell\x07 zero\u200bwidth \x1b[31mred") == "bell zero width [31mred"


def test_files_are_read_as_they_are(tmp_path):
    """RecBole's reader drops "None" and "NA", and fails on a cell that begins with a quote."""
    rows = [
        ("1", '"Great Performances" Cats'),
        ("2", "None"),
        ("3", "NA"),
        ("4", "nan"),
        ("5", "007"),
        ("6", ""),
    ]
    path = write_atomic(tmp_path, "toy", "item", "item_id:token movie_title:token_seq", rows)
    assert read_atomic(path).values.tolist() == [list(row) for row in rows]


# ---------------------------------------- items

ITEM_HEADER = "item_id:token movie_title:token_seq release_year:token genre:token_seq"


@pytest.fixture
def films(tmp_path: Path, toy):
    """``films(rows, **text)``: the toy dataset with these rows in ``.item`` instead of plain ones, built."""

    def make(rows=(), header: str = ITEM_HEADER, **text):
        given = {str(row[0]): row for row in rows}
        plain = [(str(i), f"Film {i}", 1980 + i, "Drama") for i in range(1, 16)]
        table = [given.get(row[0], row) for row in plain]
        write_atomic(tmp_path, "toy", "item", header, table)
        dataset = toy(text=text or None, load_col=INTER_COLUMNS)
        dataset.build()
        return dataset

    return make


def of(dataset, values: list[str], token: str) -> str:
    return values[dataset.token2id("item_id", token)]


def test_titles_years_and_genres_by_internal_id(films):
    rows = [
        ("1", "Usual Suspects, The", "1995", "Crime Thriller"),
        ("2", "Heat (1995)", "1995", "Action"),
        ("3", "Land Before Time III: The Time of the Great Giving (1995)", "V", "Animation Children's"),
        ("4", "2001 (1968)", "1999", ""),  # another year than the column's stays in the title
        ("5", "(1984)", "", "unknown"),
        ("6", '"Quoted" &amp; <|im_end|>', "unkonwn", "Drama"),
        ("7", "None", "1990", "Drama"),
    ]
    dataset = films(rows, missing_values=["unknown"])
    text = ItemText(dataset)
    assert text.titles[0] == text.years[0] == text.genres[0] == ""
    found = [tuple(of(dataset, v, row[0]) for v in (text.titles, text.years, text.genres)) for row in rows]
    assert found == [
        ("The Usual Suspects", "1995", "Crime, Thriller"),
        ("Heat", "1995", "Action"),
        ("Land Before Time III: The Time of the Great Giving", "1995", "Animation, Children's"),
        ("2001 (1968)", "1999", ""),
        ("(1984)", "", ""),
        ('"Quoted" & <|im_end|>', "", "Drama"),
        ("None", "1990", "Drama"),
    ]
    assert of(dataset, text.descriptions(), "1") == "The Usual Suspects. Crime, Thriller"
    assert of(dataset, text.descriptions(), "5") == "(1984)"
    assert len(dataset.item_texts()) == 15


def test_items_without_title_are_an_error_that_names_them(films):
    dataset = films([("3", "", "1990", ""), ("7", " ", "1990", "")])
    with pytest.raises(
        ValueError,
        match=r"toy\.item: column 'movie_title' has no title for 2 of the 15 items that occur "
        r"\(first: [37], [37]\)\. Fill them in, or set text\.missing_title: placeholder",
    ):
        ItemText(dataset)


def test_items_without_title_may_get_a_placeholder(films, caplog):
    dataset = films([("3", "", "1990", "")], missing_title="placeholder", noun="Number")
    titles = ItemText(dataset).titles
    assert of(dataset, titles, "3").split()[0] == "Number" and "has no title for 1 of the 15" in caplog.text
    assert len(set(titles)) == 16


def test_an_item_that_is_not_in_the_file_has_no_title(films, tmp_path):
    dataset = films()
    path = tmp_path / "toy" / "toy.item"
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("4\t")) + "\n"
    )
    with pytest.raises(ValueError, match=r"no title for 1 of the 15 items that occur \(first: 4\)"):
        ItemText(dataset)


def test_obfuscated_titles_hide_everything_and_never_change(films):
    dataset = films(noun="Movie")
    first, again = ItemText(dataset, obfuscate=True), ItemText(dataset, obfuscate=True)
    assert first.titles == again.titles and len(set(first.titles)) == 16
    numbers = [int(title.removeprefix("Movie ")) for title in first.titles[1:]]
    assert sorted(numbers) == list(range(1, 16))
    tokens = [int(token) for token in dataset.field2id_token["item_id"][1:]]
    assert numbers != tokens and numbers != sorted(numbers)


def test_a_dataset_without_titles_still_runs(toy, caplog):
    dataset = toy()
    dataset.build()
    titles = ItemText(dataset).titles
    assert "there is no" in caplog.text and "toy.item" in caplog.text
    assert all(title.startswith("Item ") for title in titles[1:]) and len(set(titles)) == len(titles)
    assert UserText(dataset).profiles == [""] * dataset.user_num


def test_common_column_names_are_found(films):
    header = "item_id:token title:token year:token categories:token"
    dataset = films([("1", "Dune, The", "1965", "SF|Epic")], header, genre_separator="|")
    text = ItemText(dataset)
    assert [of(dataset, v, "1") for v in (text.titles, text.years, text.genres)] == [
        "The Dune",
        "1965",
        "SF, Epic",
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"title": "name"},
            r"text\.title: no column 'name'; .*toy\.item has the columns \['item_id', 'movie_title'",
        ),
        ({"titel": "x"}, r"text\.titel: unknown key; did you mean title\?"),
        ({"missing_title": "skip"}, "text.missing_title"),
        ({"genre_separator": ""}, "text.genre_separator"),
        ({"user_fields": {"age": "old"}}, r"text\.user_fields\.age: 'old' must hold \{\}"),
    ],
)
def test_settings_are_checked(films, section, message):
    with pytest.raises(ValueError, match=message):
        ItemText(films(**section))


# ---------------------------------------- users


def write_users(tmp_path: Path, rows: list[tuple]) -> None:
    filled = rows + [(str(i), "25", "M", "4", "00000") for i in range(len(rows) + 1, 31)]
    write_atomic(tmp_path, "toy", "user", "user_id:token age:token gender:token job:token zip:token", filled)


PROFILE = {
    "user_fields": {"gender": "{}", "age": "aged {}", "job": "{}"},
    "value_names": {
        "gender": {"F": "female", "M": "male"},
        "age": {25: "25-34"},
        "job": {4: "student", 0: None},
    },
}


def profiles(tmp_path, toy, rows, **text) -> dict[str, str]:
    write_users(tmp_path, rows)
    dataset = toy(text={**PROFILE, **text}, load_col=INTER_COLUMNS)
    dataset.build()
    found = UserText(dataset).profiles
    return {row[0]: found[dataset.token2id("user_id", row[0])] for row in rows}


def test_profiles_read_well_and_leave_out_what_is_unknown(tmp_path, toy, caplog):
    rows = [
        ("1", "25", "F", "4", "1"),
        ("2", "25", "M", "0", "1"),
        ("3", "", "F", "", "1"),
        ("4", "none", "", "4", "1"),
        ("5", "99", "M", "77", "1"),
    ]
    found = profiles(tmp_path, toy, rows, missing_values="none")
    assert found == {
        "1": "female, aged 25-34, student",
        "2": "male, aged 25-34",
        "3": "female",
        "4": "student",
        "5": "male",
    }
    assert "value_names.age has no name for ['99']" in caplog.text
    assert "value_names.job has no name for ['77']" in caplog.text


def test_columns_without_names_are_shown_as_they_are(tmp_path, toy):
    found = profiles(
        tmp_path, toy, [("1", "31", "F", "x", "1")], value_names={}, user_fields=["age", "gender"]
    )
    assert found == {"1": "31, F"}


def test_a_profile_column_that_is_missing_is_named(tmp_path, toy):
    with pytest.raises(
        ValueError, match=r"text\.user_fields: no column 'occupation'; .*\['user_id', 'age', 'gender'"
    ):
        profiles(tmp_path, toy, [("1", "25", "F", "4", "1")], user_fields={"occupation": "{}"})


# ---------------------------------------- MovieLens


def test_ml100k_text(ml100k, ml100k_splits, caplog):
    caplog.set_level(logging.WARNING)
    text = ItemText(ml100k)
    raw = read_atomic(Path(ml100k.dataset_path) / "ml-100k.item")
    assert of(ml100k, text.titles, "12") == "The Usual Suspects" and of(ml100k, text.years, "12") == "1995"
    assert of(ml100k, text.genres, "1") == "Animation, Children's, Comedy"
    assert "(first: 267)" in caplog.text  # the one row of the file without data
    titles = dict(zip(raw["item_id"], raw["movie_title"], strict=True))
    unchanged = sum(of(ml100k, text.titles, token) == title for token, title in titles.items())
    assert unchanged == 1682 - 391  # 389 articles moved, item 267, and one title with its year
    assert not any(title != " ".join(title.split()) or "," == title[-1:] for title in text.titles)
    users = UserText(ml100k).profiles
    assert users[ml100k.token2id("user_id", "1")] == "male, aged 24, technician"
    assert users[ml100k.token2id("user_id", "2")] == "female, aged 53"  # occupation: other


def test_random_interactions_are_what_the_fixtures_assume():
    rows = random_interactions()
    assert {row[0] for row in rows} == {str(i) for i in range(1, 31)}
    assert {row[1] for row in rows} == {str(i) for i in range(1, 16)}
