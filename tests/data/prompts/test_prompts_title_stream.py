"""The stream of titles: exact text, each title predicted by its own places, and never more tokens than asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from atomic_files import write_atomic
from recbole.data.interaction import Interaction
from toy_tokenizers import PRE_TOKENIZERS, train_tokenizer

from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.prompts.title_stream import TITLE_STREAM_TEMPLATE, TitleStreamPrompts
from recbole_llm.data.streams import Chunk

TITLES = ["Fargo", "The Matrix", "Heat", "Oh! Calcutta!", "(500) Days"]
HEADER = "Films chosen, in order:"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("smollm2", [*TITLES, HEADER + "\n"] * 3)


@pytest.fixture
def dataset(tmp_path) -> NextItemDataset:
    """Users 1 and 2 choose the five films twice in turn, user 3 one film; built, with its splits beside it."""
    write_atomic(tmp_path, "toy", "item", "item_id:token movie_title:token_seq", enumerate(TITLES, start=1))
    rows = [(user, 1 + step % 5, 100 * user + step) for user in (1, 2) for step in range(10)]
    write_atomic(
        tmp_path, "toy", "inter", "user_id:token item_id:token timestamp:float", [*rows, (3, 2, 999)]
    )
    keys = {
        "data_path": str(tmp_path),
        "checkpoint_dir": str(tmp_path),
        "text": {"noun": "film", "user": "viewer"},
    }
    keys["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
    found = NextItemDataset(
        Config("SASRec", "toy", config_dict={"task": "next_item", "min_history": 1, **keys})
    )
    found.splits = found.build()
    return found


def prompts_of(dataset, tokenizer, *, hybrid=False, tokens=60, history=3, **changes) -> TitleStreamPrompts:
    name = "stream_next_item_hybrid" if hybrid else "stream_next_item"
    config = {**TITLE_STREAM_TEMPLATE.load(name), **changes}
    return TitleStreamPrompts(
        dataset, tokenizer, config, max_prompt_tokens=tokens, lead=1, history_length=history
    )


def last_of(dataset, user: str):
    """The test sample of a user."""
    test, number = dataset.splits[2], dataset.token2id("user_id", user)
    return test[np.flatnonzero(test.inter_feat["user_id"].numpy() == number)]


def test_a_sample_is_scored_behind_its_last_titles(dataset, tokenizer):
    lines = [HEADER, "The Matrix", "Heat", "Oh! Calcutta!", ""]
    assert prompts_of(dataset, tokenizer).text(last_of(dataset, "1"), 0) == "\n".join(lines)
    hybrid = prompts_of(dataset, tokenizer, hybrid=True)
    shown = [HEADER, "The Matrix[item vector]", "Heat[item vector]", "Oh! Calcutta![item vector]", ""]
    assert hybrid.text(last_of(dataset, "1"), 0) == "\n".join(shown)
    assert hybrid.text(last_of(dataset, "1"), 0, slots=False) == "\n".join(lines)
    hidden = prompts_of(dataset, tokenizer, obfuscate_titles=True).text(last_of(dataset, "1"), 0)
    assert "Heat" not in hidden and hidden.count("\n") == 4


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
@pytest.mark.parametrize("hybrid", [False, True], ids=["text", "hybrid"])
def test_each_title_and_line_break_is_predicted_once_from_the_place_before(dataset, hybrid, kind):
    tokenizer = train_tokenizer(kind, [*TITLES, HEADER, "a\n\nb\n", "\nFargo \nHeat"] * 3)
    try:
        prompts = prompts_of(dataset, tokenizer, hybrid=hybrid, tokens=200)
    except ValueError as error:  # a tokenizer that has no line break
        assert kind == "sentencepiece" and "line break to be one token" in str(error)
        return
    start = int(dataset.history.user_start[1])
    chunk = Chunk(1, start, start + np.array([0, 2, 3]))
    (stream,) = prompts.encode_chunks([chunk], slots=hybrid).streams
    end = prompts.stop_ids, int(prompts.answers[0][0])
    assert end[1] in end[0]
    answers = np.split(stream.answers, np.cumsum(stream.sizes)[:-1])
    read_at = np.split(stream.read_at, np.cumsum(stream.sizes)[:-1])
    assert len(answers) == 3
    for place, item, answer, places in zip((0, 2, 3), (1, 3, 4), answers, read_at, strict=True):
        assert np.array_equal(answer, prompts.answers[item]) and answer[-1] == end[1]
        assert tokenizer.decode(answer[:-1]).strip() == TITLES[item - 1]
        assert stream.input_ids[places[0]] == end[1]
        assert np.array_equal(
            stream.input_ids[places[1:]], answer[:-1]
        )  # the title itself follows, token by token
        assert (stream.places[places] == place).all()
        before, own = np.flatnonzero(stream.places < place), np.flatnonzero(stream.places == place)
        assert before.max() < own.min() == places[0]
        slots = stream.input_ids[own][stream.input_ids[own] < 0]
        assert slots.tolist() == ([-item] if hybrid and place < 3 else [])
    assert len(stream.input_ids) == stream.read_at[-1] + 1  # ends with the last title's last token


def test_a_chunk_of_one_target_is_the_prompt_and_its_answer(dataset, tokenizer):
    prompts = prompts_of(dataset, tokenizer, hybrid=True)
    sample = last_of(dataset, "2")
    (prompt,) = prompts.encode(sample, slots=True).streams
    (stream,) = prompts.encode_chunks(prompts.own_chunks(sample), slots=True).streams
    answer = prompts.answers[int(sample["item_id"][0])]
    assert np.array_equal(stream.input_ids, np.concatenate([prompt.input_ids, answer[:-1]]))
    assert np.array_equal(stream.positions, [*prompt.positions, int(sample[HISTORY_END][0])])
    assert prompt.places[-1] == len(prompt.positions) == 3


def test_a_sample_still_to_come_is_behind_all_of_its_user(dataset, tokenizer):
    prompts = prompts_of(dataset, tokenizer)
    user = dataset.token2id("user_id", "2")
    ends = dataset.history.user_start[[user + 1]]
    sample = Interaction({"user_id": torch.tensor([user]), HISTORY_END: torch.from_numpy(ends)})
    assert prompts.text(sample, 0) == "\n".join([HEADER, "Heat", "Oh! Calcutta!", "(500) Days", ""])


def test_a_user_of_one_interaction_has_no_sample_and_harms_no_one(dataset, tokenizer):
    user = dataset.token2id("user_id", "3")
    assert all((split.inter_feat["user_id"].numpy() != user).all() for split in dataset.splits)
    prompts = prompts_of(dataset, tokenizer)
    start = int(dataset.history.user_start[user])
    (stream,) = prompts.encode_chunks([Chunk(user, start, np.array([start]))], slots=False).streams
    assert tokenizer.decode(stream.input_ids) == f"{HEADER}\nThe Matrix"


@pytest.mark.parametrize("hybrid", [False, True], ids=["text", "hybrid"])
def test_no_text_is_longer_than_asked_for(dataset, tokenizer, hybrid):
    whole = prompts_of(dataset, tokenizer, hybrid=hybrid, tokens=500, history=9)
    sample = last_of(dataset, "1")
    assert whole.encode(sample, slots=hybrid).n_shortened == 0
    full = len(whole.encode(sample, slots=hybrid).input_ids[0])
    for tokens in range(full - 12, full + 1):
        prompts = prompts_of(dataset, tokenizer, hybrid=hybrid, tokens=tokens, history=9)
        found = prompts.encode(sample, slots=hybrid)
        assert len(found.input_ids[0]) <= tokens and found.n_shortened == (tokens < full)
        targets = dataset.splits[0].inter_feat[HISTORY_END].numpy()
        chunks = prompts.cutter.training_chunks(targets, 1, 0)
        assert max(map(len, prompts.encode_chunks(chunks, slots=hybrid).input_ids)) <= tokens
        assert sorted(np.concatenate([chunk.targets for chunk in chunks])) == sorted(targets)


def test_what_cannot_be_a_stream_of_titles(dataset, tokenizer):
    with pytest.raises(
        ValueError, match=r"chunk of 16 tokens .* too small: .* allow longer chunks or shorter titles"
    ):
        prompts_of(
            dataset,
            tokenizer,
            tokens=16,
            header="The films that this one viewer has chosen, one after the other, in order:",
        )
    with pytest.raises(ValueError, match="have no slots"):
        prompts_of(dataset, tokenizer).encode(last_of(dataset, "1"), slots=True)
    with pytest.raises(ValueError, match="title must hold {title}"):
        prompts_of(dataset, tokenizer, title="film")
    for name, message in (("stream_ctr", "unknown key"), ("nowhere", "neither a yaml file nor one of")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TITLE_STREAM_TEMPLATE.load(name)
