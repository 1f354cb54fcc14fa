"""The text stream: exact text, answers of any scale, and never more tokens than asked for."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from atomic_files import write_atomic
from toy_tokenizers import PRE_TOKENIZERS, train_tokenizer

from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.prompts.lines import bos_ids
from recbole_llm.data.prompts.stream import STREAM_TEMPLATE, StreamPrompts

ITEMS = ["Fargo (1996)", "Matrix, The (1999)", "Heat", "Oh! Calcutta!", "Seven"]
ITEM_ROWS = [(i + 1, title) for i, title in enumerate(ITEMS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("smollm2", [*ITEMS, "Stars from a viewer, female, aged 21:\n1 2 3 4 5 yes no"] * 3)


@pytest.fixture
def small(toy, tmp_path):
    """``small(ratings=..., **keys)``: three users who rate five items each with these, in turn; built."""

    def make(ratings=(4, 5, 1, 3, 2), items=ITEM_ROWS, times=range(5), words=None, **keys) -> CTRDataset:
        write_atomic(tmp_path, "toy", "item", "item_id:token movie_title:token_seq", items)
        users = [(user, "F" if user == 1 else "", 20 + user) for user in (1, 2, 3)]
        write_atomic(tmp_path, "toy", "user", "user_id:token gender:token age:token", users)
        rows = [
            (user, items[step % len(items)][0], ratings[step % len(ratings)], time + 100 * user)
            for user in (1, 2, 3)
            for step, time in enumerate(times)
        ]
        keys.setdefault("threshold", {"rating": 4})
        text = {
            "user": "viewer",
            "rating_unit": "stars",
            **(words or {}),
            "title": "movie_title",
            "user_fields": {"gender": "{}", "age": "aged {}"},
            "value_names": {"gender": {"F": "female"}},
        }
        split = {"split": {"RS": [0.4, 0.3, 0.3]}, "order": "TO", "group_by": None, "mode": "labeled"}
        dataset = toy(rows, min_history=0, eval_args=split, text=text, **keys)
        dataset.build()
        return dataset

    return make


def prompts_of(dataset, tokenizer, *, name="stream_ctr", tokens=200, scale=None, **changes) -> StreamPrompts:
    config = {**STREAM_TEMPLATE.load(name), **changes}
    return StreamPrompts(
        dataset, tokenizer, config, max_prompt_tokens=tokens, lead=1, context=10, rating_scale=scale
    )


def last_of(dataset, user: str):
    """The user's last interaction as a batch of one sample."""
    end = int(dataset.history.user_start[dataset.token2id("user_id", user) + 1]) - 1
    found = np.flatnonzero(dataset.inter_feat[HISTORY_END].numpy() == end)
    return dataset[found]


def test_the_text(small, tokenizer):
    dataset = small()
    prompts = prompts_of(dataset, tokenizer)
    assert prompts.text(last_of(dataset, "1"), 0) == (
        "Stars from a viewer, female, aged 21:\nFargo:4\nThe Matrix:5\nHeat:1\nOh! Calcutta!:3\nSeven:"
    )
    assert prompts.text(last_of(dataset, "2"), 0).startswith("Stars from a viewer, aged 22:\n")
    assert prompts.answer_to(last_of(dataset, "1"), 0) == "2"
    plain = prompts_of(dataset, tokenizer, show_profile=False)
    assert plain.text(last_of(dataset, "1"), 0).startswith("Stars from a viewer:\nFargo:4\n")


def test_answers_places_and_costs(small, tokenizer):
    dataset = small()
    prompts = prompts_of(dataset, tokenizer)
    (stream,) = prompts.encode(dataset[np.flatnonzero(dataset.inter_feat["user_id"].numpy() == 1)]).streams
    assert prompts.answer_words == ("1", "2", "3", "4", "5") and prompts.likes.tolist() == [0, 0, 0, 1, 1]
    following = stream.input_ids[stream.answers_at[:-1] + 1]
    assert [prompts.class_ids[c] for c in prompts.classes[stream.chunk.targets]][:-1] == following.tolist()
    assert stream.answers_at[-1] == len(stream.input_ids) - 1  # the last answer is not shown
    assert np.array_equal(np.unique(stream.places), np.arange(-1, 5))
    header = (stream.places < 0).sum()
    hidden = prompts.cutter.cost(stream.chunk) + header - len(stream.input_ids)
    assert hidden == 2  # the last answer and its line break
    assert len(bos_ids(tokenizer)) == 0


@pytest.mark.parametrize("kind", list(PRE_TOKENIZERS))
def test_lines_do_not_depend_on_what_is_around_them(small, kind):
    dataset = small()
    prompts = prompts_of(
        dataset, train_tokenizer(kind, [*ITEMS, "Stars from a viewer, female, aged 21:\n1 2 3 4 5"] * 3)
    )
    everything = dataset[np.arange(len(dataset))]
    together = {target: s for s in prompts.encode(everything).streams for target in s.chunk.targets.tolist()}
    for i in range(len(everything)):
        (alone,) = prompts.encode(everything[i : i + 1]).streams
        stream = together[int(alone.chunk.targets[0])]
        assert np.array_equal(alone.input_ids, stream.input_ids[: len(alone.input_ids)])
        place = alone.chunk.target_places[0]
        assert alone.answers_at[0] == stream.answers_at[list(stream.chunk.target_places).index(place)]
    assert len(set(prompts.class_ids)) == 5


def test_long_titles_are_cut_and_counted(small, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    long = [*ITEM_ROWS[:4], (5, "Seven " * 30)]
    dataset = small(items=long)
    prompts = prompts_of(dataset, tokenizer, max_title_tokens=4)
    assert "titles are cut to 4 tokens" in caplog.text
    assert max(map(len, prompts._titles)) == 4
    assert prompts.text(last_of(dataset, "1"), 0).endswith(":")


def test_a_line_longer_than_a_chunk_is_an_error(small, tokenizer):
    dataset = small(items=[*ITEM_ROWS[:4], (5, "Seven " * 60)])
    with pytest.raises(ValueError, match=r"a chunk of 40 tokens \(max_prompt_tokens\) is too small"):
        prompts_of(dataset, tokenizer, tokens=40, max_title_tokens=500)


def test_chunks_have_at_most_the_tokens_asked_for(ml100k, ml100k_splits):
    tokenizer = train_tokenizer("smollm2", ml100k.item_texts())
    prompts = prompts_of(ml100k, tokenizer, tokens=128)
    encoded = prompts.encode(ml100k_splits[2][np.arange(2000)])
    longest = max(map(len, encoded.input_ids))
    assert 110 < longest <= 128


# ------------------------------------------------------------------ answers


def test_halves_become_letters(small, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    dataset = small(ratings=(0.5, 4, 4.5, 1, 3.5))
    prompts = prompts_of(dataset, tokenizer)
    assert prompts.answer_words == ("A", "B", "C", "D", "E")
    assert prompts.likes.tolist() == [0, 0, 0, 1, 1]
    assert "letters stand for them, A for 0.5 to E for 4.5" in caplog.text
    assert prompts.text(last_of(dataset, "2"), 0).startswith(
        "Stars from a viewer, aged 22, A the worst and E the best:\nFargo:A\nThe Matrix:D\nHeat:E\nOh! Calcutta!:B\n"
    )


def test_halves_with_first_tokens_of_their_own_stay_numbers(small, tokenizer):
    prompts = prompts_of(small(ratings=(0.5, 4, 4, 1, 2.5)), tokenizer)
    assert prompts.answer_words == ("0.5", "1", "2.5", "4")
    assert len(prompts._answers[0]) > 1  # the line shows all of it, its first token is predicted


def test_a_declared_scale_holds_values_that_nobody_gave(small, tokenizer):
    prompts = prompts_of(small(ratings=(4, 5, 1, 2, 2)), tokenizer, scale=[1, 2, 3, 4, 5])
    assert prompts.answer_words == ("1", "2", "3", "4", "5")
    assert sorted(set(prompts.classes.tolist())) == [0, 1, 3, 4]


def test_ratings_off_the_declared_scale_are_an_error(small, tokenizer):
    with pytest.raises(
        ValueError, match=r"rating_scale: 6 ratings of toy are none of \[1.0, 2.0, 4.0\], e.g. 3, 5"
    ):
        prompts_of(small(), tokenizer, scale=[1, 2, 4])


def test_a_scale_of_too_many_values_is_an_error(small, tokenizer):
    dataset = small(
        ratings=[round(0.1 * k, 1) for k in range(60)],
        times=range(60),
        items=[*ITEM_ROWS * 1],
        threshold={"rating": 3},
    )
    with pytest.raises(
        ValueError, match=r"the 60 ratings 0, 0.1, 0.2, 0.3, 0.4, ..., 5.9 of toy cannot be told apart"
    ):
        prompts_of(dataset, tokenizer)


def test_a_scale_of_one_label_is_an_error(small, tokenizer):
    dataset = small()
    dataset.threshold = {"rating": 6}
    with pytest.raises(ValueError, match="the same label"):
        prompts_of(dataset, tokenizer)


@pytest.mark.parametrize("answer", ["auto", "words"])
def test_labels_alone_become_words(small, tokenizer, answer, caplog):
    caplog.set_level(logging.INFO)
    dataset = small()
    if answer == "auto":  # as of data with a column of labels
        dataset.threshold = None
    prompts = prompts_of(dataset, tokenizer, answer=answer)
    assert prompts.text(last_of(dataset, "1"), 0) == (
        "What a viewer, female, aged 21 likes:\nFargo:yes\nThe Matrix:yes\nHeat:no\nOh! Calcutta!:no\nSeven:"
    )
    assert prompts.answer_to(last_of(dataset, "1"), 0) == "no" and prompts.likes.tolist() == [True, False]
    assert ("labels are no threshold on ratings" in caplog.text) == (answer == "auto")


def test_stars_without_a_threshold_on_them_are_an_error(small, tokenizer):
    dataset = small()
    dataset.threshold = None
    with pytest.raises(ValueError, match="answer: stars needs labels that are a threshold on the ratings"):
        prompts_of(dataset, tokenizer, answer="stars")
    dataset.history.ratings = None
    with pytest.raises(ValueError, match="toy has no ratings; set answer: words"):
        prompts_of(dataset, tokenizer, answer="stars")


def test_words_of_one_first_token_are_an_error(small, tokenizer):
    with pytest.raises(ValueError, match="begin with the same token"):
        prompts_of(small(), tokenizer, answer="words", words=["1a", "1b"])


def test_titles_may_be_missing(small, tokenizer):
    dataset = small()
    hidden = prompts_of(dataset, tokenizer, obfuscate_titles=True).text(last_of(dataset, "1"), 0)
    assert hidden.count("Movie") + hidden.count("Item") == 5


# ------------------------------------------------------------------ slots and the lens's score


def test_slots_stand_behind_titles(small, tokenizer):
    dataset = small()
    prompts = prompts_of(dataset, tokenizer, name="stream_ctr_vectors")
    sample = last_of(dataset, "1")
    assert "Fargo[item vector]:4\n" in prompts.text(sample, 0)
    assert "Fargo:4\n" in prompts.text(sample, 0, slots=False)
    ids = prompts.encode(sample, slots=True).input_ids[0]
    items = dataset.history.item_ids[dataset.history.user_start[1] : dataset.history.user_start[2]]
    assert (-ids[ids < 0]).tolist() == items.tolist()


def test_the_lens_s_score_is_stated(small, tokenizer):
    dataset = small()
    prompts = prompts_of(dataset, tokenizer, name="stream_ctr_lens")
    with pytest.raises(ValueError, match="set lens: DIN"):
        prompts.encode(last_of(dataset, "1"))
    prompts.lens_scores = lambda chunks: np.concatenate([chunk.positions for chunk in chunks]) / 100
    start = int(dataset.history.user_start[dataset.token2id("user_id", "2")])
    text = prompts.text(last_of(dataset, "2"), 0)
    assert f"Fargo (0.{start:02d}):4\nThe Matrix (0.{start + 1:02d}):5\n" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "no title"}, "item must hold {title}"),
        ({"item": "{lens_score} {title}:"}, "behind {title}"),
        ({"answer": "numbers"}, "answer must be auto, stars or words"),
        ({"words": ["yes"]}, "words must be two words"),
        ({"max_title_tokens": 0}, "max_title_tokens must be an int >= 1"),
        ({"headr": "x"}, "did you mean header"),
    ],
)
def test_impossible_templates(change, message):
    with pytest.raises(ValueError, match=message):
        STREAM_TEMPLATE.check({**STREAM_TEMPLATE.load("stream_ctr"), **change})


def test_a_prompt_template_is_no_stream():
    with pytest.raises(ValueError, match="read as a template of the ctr with layout: stream task"):
        STREAM_TEMPLATE.load("movie_ctr")


def test_the_header_has_the_words_of_the_data(small, tokenizer):
    """Neutral where the data says nothing; a library's readers are no viewers."""
    neutral = small(words={"user": "user", "rating_unit": "points"})
    assert (
        prompts_of(neutral, tokenizer)
        .text(last_of(neutral, "2"), 0)
        .startswith("Points from a user, aged 22:\n")
    )
    books = small(words={"user": "reader", "rating_unit": "marks"})
    assert (
        prompts_of(books, tokenizer)
        .text(last_of(books, "2"), 0)
        .startswith("Marks from a reader, aged 22:\n")
    )
