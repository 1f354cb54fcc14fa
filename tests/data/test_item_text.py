"""Titles, profiles and what may be missing."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from atomic_files import random_interactions, write_atomic

from recbole_llm.data.atomic_files import read_atomic
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.item_text import ItemText, UserText
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.text_cleaning import clean, natural_order, shorten
from recbole_llm.data.text_settings import TextSettings

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
    assert read_atomic(path).table.values.tolist() == [list(row) for row in rows]


def test_scripts_that_join_letters_keep_their_marks():
    assert clean("می\u200cخواهم") == "می\u200cخواهم"  # Persian: without the joiner another word
    assert clean("\u202bשלום\u200f עולם\u202c") == "שלום עולם"  # marks of direction say nothing here
    assert clean("Zauber\u00adflöte\ufeff") == "Zauberflöte"
    assert clean("Ame\u0301lie") == "Amélie" and len(clean("Ame\u0301lie")) == 6
    assert clean("千と千尋の神隠し\u3000（2001）") == "千と千尋の神隠し （2001）"
    assert clean("Sid Meier&amp;#39;s &amp;amp; &#x5343;") == "Sid Meier's & 千"


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("The quick brown fox", 19, "The quick brown fox"),
        ("The quick brown fox", 18, "The quick brown…"),
        ("The quick brown fox", 16, "The quick brown…"),
        ("The quick brown fox", 15, "The quick…"),
        ("A" + "b" * 30, 10, "A" + "b" * 8 + "…"),
        ("千と千尋の神隠し", 5, "千と千尋…"),
    ],
)
def test_long_text_is_cut_between_words(text, limit, expected):
    assert shorten(text, limit) == expected and len(expected) <= limit


NAMED = "item_id:token name:token tag:token"


def raw_file(tmp_path: Path, lines: str, header: str = NAMED, **kwargs) -> list[list[str]]:
    path = tmp_path / "toy.item"
    path.write_bytes((header.replace(" ", "\t") + "\n" + lines).encode(kwargs.pop("written", "utf-8")))
    return read_atomic(path, **kwargs).table.to_numpy().tolist()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('1\t"Two\nlines"\tx\n2\tb\ty\n', [["1", "Two\nlines", "x"], ["2", "b", "y"]]),
        ('1\t"Three\n\nlines, ""q"""\tx\n', [["1", 'Three\n\nlines, "q"', "x"]]),
        ('1\ta\t"x\ny"\n2\tb\ty\n', [["1", "a", "x\ny"], ["2", "b", "y"]]),
        ('1\t"tab\there"\tx\n2\tb\ty\n', [["1", "tab\there", "x"], ["2", "b", "y"]]),
        ('1\t"say ""hi"""\tx\n', [["1", 'say "hi"', "x"]]),
        ('1\t"Heat"\t""\n', [["1", "Heat", ""]]),
        # Quotes that belong to the title:
        ('1\t"Open\tx\n2\tb\ty\n', [["1", '"Open', "x"], ["2", "b", "y"]]),
        ('1\ta\t"Open\n2\tb\ty"\n', [["1", "a", '"Open'], ["2", "b", 'y"']]),
        ('1\t"Weird Al" sings "Live"\tx\n', [["1", '"Weird Al" sings "Live"', "x"]]),
        ('1\t7" Single "A"\tx\n2\t"B\ty\n', [["1", '7" Single "A"', "x"], ["2", '"B', "y"]]),
        # Rows that end early, an empty line, line ends of Windows, and line ends that only Python knows:
        ("1\ta\n2\n\n3\tc\tz\n", [["1", "a", ""], ["2", "", ""], ["3", "c", "z"]]),
        ('1\t"a\n2\tb\n3\tc"\tz\n', [["1", '"a', ""], ["2", "b", ""], ["3", 'c"', "z"]]),
        ("1\ta\tx\r\n2\tb\ty\r\n", [["1", "a", "x"], ["2", "b", "y"]]),
        ("1\ta\u2028b\x85c\x0bd\re\tx\n", [["1", "a\u2028b\x85c\x0bd\re", "x"]]),
        ("", []),
    ],
)
def test_no_row_of_a_raw_file_is_lost(tmp_path, lines, expected):
    assert raw_file(tmp_path, lines) == expected


def test_lines_that_do_not_fit_the_header_are_told(tmp_path, caplog):
    raw_file(tmp_path, "1\ta\tx\n2\tb\n3\tc\n")
    assert "2 lines have fewer cells than the header (first: line 3)" in caplog.text
    with pytest.raises(ValueError, match=r"toy\.item: line 3 has 4 cells, but the header has 3"):
        raw_file(tmp_path, "1\ta\tx\n2\tb\ty\tz\n")


def test_the_encoding_of_a_file_may_be_set(tmp_path):
    assert raw_file(tmp_path, "1\tAmélie\tx\n", written="latin-1", encoding="latin-1") == [
        ["1", "Amélie", "x"]
    ]
    assert raw_file(tmp_path, "1\tAmélie\tx\n", written="utf-8-sig") == [["1", "Amélie", "x"]]
    with pytest.raises(ValueError, match=r"toy\.item: .* set encoding to that of the file, e\.g\. latin-1"):
        raw_file(tmp_path, "1\tAmélie\tx\n", written="latin-1")


def test_no_line_is_lost_to_quotes(tmp_path, make_config):
    """RecBole's csv reader makes one line of items 2 to 4 here, and filter_inter_by_user_or_item drops two of them."""
    write_atomic(tmp_path, "toy", "inter", "user_id:token item_id:token rating:float", random_three())
    titles = [(str(i), f"Film {i}", 1980 + i) for i in range(1, 16)]
    titles[1], titles[3] = ("2", '"Open', 1982), ("4", 'The end"', 1984)
    write_atomic(tmp_path, "toy", "item", "item_id:token movie_title:token release_year:token", titles)
    dataset = CTRDataset(make_config())
    assert len(dataset.item_feat) == 16 and len(dataset) == len(random_three())
    dataset.build()
    titles = ItemText(dataset).titles
    assert (of(dataset, titles, "2"), of(dataset, titles, "4")) == ('"Open', 'The end"')


def random_three() -> list[tuple]:
    return [row[:3] for row in random_interactions()]


# ---------------------------------------- items

ITEM_HEADER = "item_id:token movie_title:token_seq release_year:token genre:token_seq"


@pytest.fixture
def films(tmp_path: Path, toy):
    """``films(rows, **text)``: the toy dataset with these rows in ``.item`` instead of plain ones, built."""

    def make(rows=(), header: str = ITEM_HEADER, absent: str | None = None, **text):
        given = {str(row[0]): row for row in rows}
        plain = [(str(i), f"Film {i}", 1980 + i, "Drama") for i in range(1, 16)]
        table = [given.get(row[0], row) for row in plain if row[0] != absent]
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


def test_an_item_without_a_line_is_called_by_a_number(films, caplog):
    dataset = films(absent="4")
    assert dataset.unmatched == {"item_id not in .item": sum(row[1] == "4" for row in random_interactions())}
    assert re.fullmatch(r"Item \d+", of(dataset, ItemText(dataset).titles, "4"))
    assert "has no line for 1 of the 15 items that occur (first: 4)" in caplog.text


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


def test_common_column_names_are_found_in_any_case(films):
    text = ItemText(films([("1", "Dune", "1965", "SF")], "item_id:token Title:token Year:token Genres:token"))
    assert [of(films(), v, "1") for v in (text.titles, text.years)] == ["Dune", "1965"]


@pytest.mark.parametrize("year", ["1965", "1965.0", "1965-08-01", "1965-08"])
def test_years_may_be_numbers_and_dates(films, year):
    dataset = films([("1", "Dune", year, "SF")])
    assert of(dataset, ItemText(dataset).years, "1") == "1965"


def test_titles_that_look_missing_are_told(films, caplog):
    rows = [("1", "nan", "1965", ""), ("2", "nan", "1966", ""), ("3", "None", "1967", "")]
    ItemText(films(rows))
    assert "the titles 'nan' (2 times), 'None' (1 times), taken as they are" in caplog.text
    caplog.clear()
    dataset = films(rows, missing_values=["nan", "None"], missing_title="placeholder")
    assert of(dataset, ItemText(dataset).titles, "1").startswith("Item ")
    assert "taken as they are" not in caplog.text


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
        ({"max_title_length": 1}, r"text\.max_title_length: 1 is neither an int >= 2"),
        ({"disambiguate": "yes"}, r"text\.disambiguate: 'yes' is none of"),
        ({"user_fields": {"age": "old"}}, r"text\.user_fields\.age: 'old' must hold \{\}"),
    ],
)
def test_settings_are_checked(films, section, message):
    with pytest.raises(ValueError, match=message):
        ItemText(films(**section))


EQUAL = [
    ("1", "Heat", "1995", "Crime"),
    ("2", "heat (1986)", "1986", "Drama"),
    ("3", "Chasing Amy", "1997", "Drama"),
    ("4", "Chasing Amy", "1997", "Drama"),
    ("5", "Emma", "1996", "Drama"),
    ("6", "Emma", "1996", "Comedy Romance"),
    ("7", "Emma", "", "Drama"),
    ("8", "Heat and Dust", "1983", "Drama"),  # only begins like another one
    ("9", "", "1999", "Drama"),
]


def test_equal_titles_are_told_apart_by_as_little_as_possible(films, caplog):
    caplog.set_level(logging.INFO)
    dataset = films(EQUAL, disambiguate=True, missing_title="placeholder", noun="Film")
    text = ItemText(dataset)
    found = {row[0]: (of(dataset, text.titles, row[0]), of(dataset, text.years, row[0])) for row in EQUAL[:8]}
    assert found == {
        "1": ("Heat (1995)", ""),
        "2": ("heat (1986)", ""),
        "3": ("Chasing Amy (no. 3)", "1997"),
        "4": ("Chasing Amy (no. 4)", "1997"),
        "5": ("Emma (1996, Drama)", ""),
        "6": ("Emma (1996, Comedy, Romance)", ""),
        "7": ("Emma", ""),
        "8": ("Heat and Dust", "1983"),
    }
    assert len({title.casefold() for title in text.titles}) == 16
    assert (
        "6 items share their title with another one and were told apart by years (4), genres (2), ids (2)"
        in (caplog.text)
    )


def test_equal_titles_stay_in_the_ctr_task_unless_asked(films, tmp_path, make_config):
    dataset = films(EQUAL[:8])
    assert of(dataset, ItemText(dataset).titles, "3") == of(dataset, ItemText(dataset).titles, "4")
    config = make_config("SASRec", task="next_item", min_history=1, load_col=INTER_COLUMNS)
    ranked = NextItemDataset(config)
    ranked.build()
    assert of(ranked, ranked.item_text().titles, "3") == "Chasing Amy (no. 3)"


def test_long_titles_are_cut_and_then_told_apart(films, caplog):
    long = "word " * 30
    rows = [("1", long + "one", "", ""), ("2", long + "two", "", "Drama"), ("3", "short", "", "")]
    dataset = films(rows, max_title_length=42, disambiguate=True)
    titles = [of(dataset, ItemText(dataset).titles, token) for token in "123"]
    assert titles[0].startswith("word word") and titles[0].endswith("word…") and len(titles[0]) <= 42
    assert titles[1:] == [titles[0] + " (Drama)", "short"]
    assert (
        "2 titles are longer than 42 characters (text.max_title_length) and are cut; the longest has 153"
        in (caplog.text)
    )
    uncut = films(rows, max_title_length=None)
    assert of(uncut, ItemText(uncut).titles, "1") == long + "one"


@pytest.mark.parametrize("column", ["name", "game_title", "artist_name"])
def test_titles_may_be_all_there_is(films, column, caplog):
    names = ["千と千尋の神隠し", "Beatles, The", "Björk", "Дельфин", "AC/DC", "!!!", "الليل"]
    header = f"item_id:token {column}:token"
    rows = [(str(i), name) for i, name in enumerate(names, start=1)]
    rows += [(str(i), f"Band {i}") for i in range(len(names) + 1, 16)]
    text = ItemText(dataset := films(rows, header))
    expected = ["The Beatles" if name == "Beatles, The" else name for name in names]
    assert [of(dataset, text.titles, row[0]) for row in rows[:7]] == expected
    assert not any(text.years) and not any(text.genres) and not caplog.text
    assert text.descriptions() == text.titles


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
    raw = read_atomic(Path(ml100k.dataset_path) / "ml-100k.item").table
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


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({False: 3}, "text.False: unknown key"),
        ({"title": [1]}, "text.title: .1. is neither the name of a column nor ~"),
        ({"missing_values": [[1]]}, "text.missing_values: .* must hold cells"),
        ({"value_names": 5}, "text.value_names: 5 must name the values of columns"),
        ({"value_names": {"age": 5}}, "text.value_names: .* must name the values of columns"),
        ({"value_names": {"age": {1: [2]}}}, "text.value_names.age.1: .2. is neither a text nor ~"),
        ({"user_fields": 5}, "text.user_fields: 5 must name columns"),
        ({"user_fields": [["age"]]}, "text.user_fields: .* must name columns"),
        ({"user_fields": {"age": None}}, "text.user_fields.age: None must hold {} exactly once"),
        ({"user_fields": {"age": "{"}}, "text.user_fields.age: '{' must hold {} exactly once"),
        ({"verb": 5}, "text.verb: 5 must hold two forms"),
        ({"genre_separator": 5}, "text.genre_separator: 5 is no text"),
    ],
)
def test_values_of_another_kind_are_one_sentence(section, said):
    with pytest.raises(ValueError, match=said):
        TextSettings.from_config({"text": section})


def test_numbers_name_values_and_cells():
    settings = TextSettings.from_config({"text": {"value_names": {"age": {1: 18}}, "missing_values": 0}})
    assert settings.value_names == {"age": {"1": "18"}} and settings.missing_values == ("", "0")
