"""Which candidate an answer names, and the ratios made of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.evaluation.generation import generation_report, match_title, normalise_title

FILMS = ["Alien", "Alien 3", "The Godfather (1972)", "Seven", "Schindler's List", "Amélie", "Se7en"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Alien", 0),
        ("  alien 3.\n", 1),
        ('"The  Godfather (1972)".', 2),
        ("“The Godfather (1972).”", 2),
        ("Schindler’s List", 4),
        ("AME\u0301LIE", 5),  # the accent as a character of its own
        ("Ｓｅｖｅｎ", 3),  # full-width letters
        ("I would watch Alien 3 next", 1),
        ("Alien, the first one", 0),
        ("(Seven)", 3),
        ("The user will like The Godfather (1972), I think", 2),
        ("Aliens", None),  # no whole word
        ("Alien_3", None),
        ("The Godfather", None),  # less than the title
        ("", None),
        (" . ", None),
        ("Star Wars", None),
        ("Seven or Se7en", None),  # two of the same length
        ("Alien or Se7en, but rather The Godfather (1972)", 2),  # the longest, as documented
    ],
)
def test_matches(text, index):
    assert match_title(text, FILMS) == index


def test_equal_titles_go_to_the_first_and_count_as_one():
    assert match_title("Chasing Amy", ["Heat", "chasing amy.", "Chasing Amy"]) == 1
    assert match_title("I say: Chasing Amy", ["Heat", "chasing amy.", "Chasing Amy"]) == 1


def test_titles_without_text_are_never_named_and_titles_of_signs_are():
    assert match_title("anything", ["", "...", '""']) is None
    assert match_title("", ["", "..."]) is None
    assert match_title("it is (500) Days of Summer", ["Summer", "(500) Days of Summer", "!!!"]) == 1
    assert match_title("by !!! of course", ["Summer", "(500) Days of Summer", "!!!"]) == 2
    assert match_title("C++", ["C", "C++"]) == 1


def test_scripts_without_spaces_and_with_marks():
    assert match_title("私は千と千尋の神隠しを選びます", ["となりのトトロ", "千と千尋の神隠し"]) == 1
    assert match_title("मैं हिनी देखूंगा", ["हिन"]) is None  # the vowel sign belongs to the word
    assert match_title("Буду смотреть Сталкер", ["Солярис", "сталкер"]) == 1


def test_a_later_whole_word_counts_though_an_earlier_one_is_cut():
    assert match_title("Aliens is not Alien", ["Alien"]) == 0


@given(
    st.sampled_from(FILMS), st.sampled_from(["", " ", '"', "«", "'"]), st.sampled_from(["", ".", '."', '".'])
)
def test_every_title_names_itself_in_any_dress(title, before, after):
    for text in (title, title.upper(), f"{before}{title}{after}", f"My choice is {before}{title}{after}"):
        assert match_title(text, FILMS) == FILMS.index(title)
    assert normalise_title(normalise_title(title)) == normalise_title(title)


def test_report_keeps_every_row_in_the_denominator():
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(50), 4)
    targets = generator.integers(0, 20, 200)
    matches = np.where(generator.random(200) < 0.4, targets, generator.integers(0, 20, 200))
    matches[generator.random(200) < 0.3] = -1
    report = generation_report(matches, targets, users, n=200, seed=3)
    valid, hits = int((matches >= 0).sum()), int((matches == targets).sum())
    assert (report["n"], report["users"], report["valid"], report["hits"]) == (200, 50, valid, hits)
    assert report["valid_ratio"] == valid / 200 and report["hit_ratio_all"] == hits / 200
    assert report["hit_ratio_valid"] == pytest.approx(hits / valid, abs=1e-15)
    for key in ("valid_ratio", "hit_ratio_all", "hit_ratio_valid"):
        one = report["intervals"][key]
        assert one["low"] < one["value"] == report[key] < one["high"]
    assert report["intervals"]["samples"] == 200 and report["intervals"]["unit"] == "user"


def test_the_interval_of_the_valid_ratio_redraws_its_denominator():
    # Of 20 users 10 answer validly and rightly: their share varies, the accuracy among valid answers does not.
    users, targets = np.arange(20), np.ones(20, int)
    intervals = generation_report(np.where(users % 2, 1, -1), targets, users, n=300)["intervals"]
    assert intervals["hit_ratio_all"]["low"] < 0.4 and intervals["hit_ratio_all"]["high"] > 0.6
    assert (intervals["hit_ratio_valid"]["low"], intervals["hit_ratio_valid"]["high"]) == (1.0, 1.0)


def test_no_and_few_valid_answers_are_said():
    users, targets = np.arange(30), np.ones(30, int)
    report = generation_report(np.full(30, -1), targets, users, n=50)
    assert (report["valid_ratio"], report["hit_ratio_all"], report["hit_ratio_valid"]) == (0.0, 0.0, None)
    assert "no user with a valid answer" in report["intervals"]["hit_ratio_valid"]["reason"]
    few = generation_report(np.where(users < 4, 1, -1), targets, users, n=50)["intervals"]["hit_ratio_valid"]
    assert few["value"] == 1.0 and few["low"] is None and "only 4 users with a valid answer" in few["reason"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        generation_report(np.zeros(2, int), np.zeros(3, int), np.arange(3))
    with pytest.raises(ValueError, match="one length"):
        generation_report(np.array([]), np.array([]), np.array([]))
    with pytest.raises(ValueError, match="a target is -1"):
        generation_report(np.array([-1, 1]), np.array([-1, 1]), np.arange(2))
    with pytest.raises(ValueError, match="n=-1"):
        generation_report(np.array([1]), np.array([1]), np.arange(1), n=-1)
