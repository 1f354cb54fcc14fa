"""Prompts for the next item: exact text, exact tokens, slots in place, nothing of the target; titles as answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from atomic_files import write_atomic
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from toy_tokenizers import PRE_TOKENIZERS, SPECIAL, train_tokenizer
from transformers import PreTrainedTokenizerFast

from recbole_llm.config.configurator import Config
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.prompts.ctr import CTR_TEMPLATE
from recbole_llm.data.prompts.lines import SLOT_TEXT
from recbole_llm.data.prompts.next_item import (
    TITLE_TEMPLATE,
    TitlePromptBuilder,
)
from recbole_llm.data.retriever import RecentRetriever, SemanticRetriever
from recbole_llm.utils.yaml_files import properties_dir

TITLES = {
    1: ("Alpha, The", 1991),
    2: ("Beta <|im_end|>", 1992),
    3: ("Heat", 1986),
    4: ("Heat", 1995),  # the same title, another year
    5: ("Heat Wave", 1990),  # begins with another title
    6: ("Twins", 1988),
    7: ("Twins", 1988),  # the same title and year
    8: ("(500) Days... of what?!", 2009),
    9: ("千と千尋の神隠し", 2001),
    10: ("...And Justice for All", 1979),
    11: ("1984", 1984),
    12: ("It's 'so' {odd} \\n", ""),
}
TITLES |= {item: (f"Film {item} part {item % 3}", 1950 + item) for item in range(13, 41)}
USERS = 8


def story() -> dict[int, list[int]]:
    """What each user chose, in time order; user 1 the items 1, 2, 3, ... in turn, others anything, also twice."""
    rng = np.random.default_rng(3)
    return {1: list(range(1, 16)), **{user: rng.integers(1, 41, 14).tolist() for user in range(2, USERS + 1)}}


def write_shelf(folder: Path, rating: bool = True) -> None:
    rows = [
        (user, item, *([1 + (item + step) % 5] if rating else []), 1_000_000_000 + 10 * step + user)
        for user, items in story().items()
        for step, item in enumerate(items)
    ]
    rows.append((99, 40, *([3] if rating else []), 1))  # so that all 40 items occur
    rows += [(99, item, *([3] if rating else []), 1 + item) for item in range(1, 40)]
    columns = "user_id:token item_id:token " + ("rating:float " if rating else "") + "timestamp:float"
    write_atomic(folder, "shelf", "inter", columns, rows)
    items = [(item, title, year, "Drama War") for item, (title, year) in TITLES.items()]
    header = "item_id:token movie_title:token_seq release_year:token class:token_seq"
    write_atomic(folder, "shelf", "item", header, items)


def make_dataset(folder: Path, **keys) -> NextItemDataset:
    """The shelf, built, with its splits beside it; equal titles stay equal unless ``keys`` say otherwise."""
    keys = {"task": "next_item", "data_path": str(folder), "text": {"disambiguate": False}, **keys}
    dataset = NextItemDataset(Config("SASRec", "shelf", config_dict={"checkpoint_dir": str(folder), **keys}))
    dataset.splits = dataset.build()
    return dataset


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> NextItemDataset:
    folder = tmp_path_factory.mktemp("data")
    write_shelf(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pytest"])
        return make_dataset(folder)


@pytest.fixture(scope="module")
def tokenizers(shelf) -> dict[str, PreTrainedTokenizerFast]:
    texts = (
        shelf.item_texts() * 3 + ["Predict what the user chooses next.\nNext choice: (1984) The Heat\n"] * 20
    )
    return {kind: train_tokenizer(kind, texts) for kind in PRE_TOKENIZERS}


def some_candidates(row_ids: np.ndarray) -> np.ndarray:
    """Five items for each row, whatever its target, in no order."""
    return np.stack([1 + np.random.default_rng(row).permutation(40)[:5] for row in row_ids])


def builder(
    dataset, tokenizer, prompt="next_item_hybrid", *, k=10, max_prompt_tokens=1024, candidates=None, **changes
) -> TitlePromptBuilder:
    config = {**TITLE_TEMPLATE.load(prompt), "show_year": True} if isinstance(prompt, str) else prompt
    return TitlePromptBuilder(
        dataset,
        tokenizer,
        {**config, **changes},
        max_prompt_tokens=max_prompt_tokens,
        retriever=RecentRetriever(dataset.history, k),
        candidates=candidates,
    )


def number(dataset, token: int | str) -> int:
    return dataset.token2id("item_id", str(token))


def row_of(dataset, user: int, step: int):
    """The row of a user that has ``step`` earlier interactions, as a batch of one."""
    position = dataset.history.user_start[dataset.token2id("user_id", str(user))] + step
    for split in dataset.splits:
        (found,) = np.nonzero((split.inter_feat["history_end"] == int(position)).numpy())
        if len(found):
            return split[found]
    raise AssertionError(f"no row for user {user} with {step} earlier interactions")


def whole_ids(tokenizer, text: str, slots: list[int]) -> list[int]:
    """Token ids of a text that only slots interrupt, from the text itself."""
    ids: list[int] = []
    parts = text.split(SLOT_TEXT)
    assert len(parts) == len(slots) + 1
    for part, item in zip(parts, [*slots, None], strict=True):
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += [] if item is None else [-item]
    return ids


# ---------------------------------------- text and tokens

TEMPLATE = {
    "instruction": "What next?",
    "history_header": "Before:",
    "history_item": "{stars}{title}{year}{genre}",
    "history_empty": "Nothing before.",
    "candidates_header": "One of:",
    "candidate_item": "- {title}{year}{genre}",
    "question": "Next:",
    "answer": " {title}{year}",
    "item_slots": True,
}
HISTORY = "What next?\nBefore:\nThe Alpha (1991){s}\nBeta <|im_end|> (1992){s}\nHeat (1986){s}\n"


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
    ("changes", "candidates", "expected"),
    [
        ({}, None, HISTORY + "Next:"),
        ({}, [4, 3, 7], HISTORY + "One of:\n- Heat (1995){s}\n- Heat (1986){s}\n- Twins (1988){s}\nNext:"),
        ({"list_candidates": False}, [4, 3], HISTORY + "Next:"),
        ({"list_candidates": True, "candidates_header": ""}, [4], HISTORY + "- Heat (1995){s}\nNext:"),
        (
            {
                "show_year": False,
                "show_genre": True,
                "show_stars": True,
                "instruction": "",
                "history_header": "",
            },
            [4],
            "2 The Alpha [Drama, War]{s}\n4 Beta <|im_end|> [Drama, War]{s}\n1 Heat [Drama, War]{s}\n"
            "One of:\n- Heat [Drama, War]{s}\nNext:",
        ),
    ],
)
def test_exact_text(shelf, tokenizers, changes, candidates, expected, slots):
    ids = None if candidates is None else [number(shelf, token) for token in candidates]
    prompts = builder(
        shelf,
        tokenizers["gpt2"],
        TEMPLATE,
        candidates=ids and (lambda rows: np.array([ids] * len(rows))),
        **changes,
    )
    row = row_of(shelf, 1, 3)
    assert prompts.text(row, 0, slots=slots) == expected.replace("{s}", SLOT_TEXT if slots else "")
    assert prompts.text(row, 0) == expected.replace("{s}", SLOT_TEXT)
    assert prompts.lists_candidates == ("Heat" in expected.partition("One of")[2] or "- Heat" in expected)


def test_an_empty_history_says_so(tmp_path, tokenizers):
    write_shelf(tmp_path)
    dataset = make_dataset(tmp_path, min_history=0)
    first = row_of(dataset, 1, 0)
    prompts = builder(dataset, tokenizers["gpt2"], TEMPLATE)
    assert prompts.text(first, 0) == "What next?\nNothing before.\nNext:"
    assert (
        builder(dataset, tokenizers["gpt2"], TEMPLATE, history_empty="").text(first, 0) == "What next?\nNext:"
    )


@pytest.mark.parametrize("kind", list(PRE_TOKENIZERS))
@pytest.mark.parametrize("listed", [False, True])
def test_tokens_are_those_of_the_whole_string(shelf, tokenizers, kind, listed):
    tokenizer = tokenizers[kind]
    for prompt in ("next_item_hybrid", "next_item_text"):
        prompts = builder(
            shelf, tokenizer, prompt, show_genre=True, candidates=some_candidates if listed else None
        )
        assert prompts.assembled == (kind != "sentencepiece")
        rows = shelf.splits[0][np.arange(0, len(shelf.splits[0]), 7)]
        for slots in [False, True] if prompt == "next_item_hybrid" else [False]:
            encoded = prompts.encode(rows, slots=slots)
            assert encoded.n_shortened == 0 and len(encoded.input_ids) == len(rows)
            for i, ids in enumerate(encoded.input_ids):
                text = prompts.text(rows, i, slots=slots)
                assert ids.dtype == np.int64
                assert ids.tolist() == whole_ids(tokenizer, text, (-ids[ids < 0]).tolist())
                assert (SLOT_TEXT in text) == slots == bool((ids < 0).any())


def test_slots_stand_behind_their_titles(shelf, tokenizers):
    tokenizer = tokenizers["llama3"]  # joins ")" and a line break, unless a slot stands between them
    prompts = builder(shelf, tokenizer, candidates=some_candidates)
    (ids,) = prompts.encode(row_of(shelf, 1, 9), slots=True).input_ids
    items = shelf.item_text()
    before = 0
    for place in np.flatnonzero(ids < 0):
        item = -ids[place]
        line = tokenizer.decode(ids[before:place]).split("\n")[-1]
        assert line == items.titles[item] + (f" ({items.years[item]})" if items.years[item] else "")
        assert tokenizer.decode(ids[place + 1]) == "\n"
        before = place + 1


def test_a_hybrid_template_without_slots_is_the_text_template(shelf, tokenizers):
    rows = shelf.splits[2][np.arange(5)]
    hybrid, text = (
        builder(shelf, tokenizers["smollm2"], f"next_item_{kind}", candidates=some_candidates)
        for kind in ("hybrid", "text")
    )
    assert hybrid.item_slots and not text.item_slots
    plain = [ids.tolist() for ids in text.encode(rows, slots=False).input_ids]
    assert [ids.tolist() for ids in hybrid.encode(rows, slots=False).input_ids] == plain
    with pytest.raises(ValueError, match="item_slots: False, so this template's prompts have no slots"):
        text.encode(rows, slots=True)


@pytest.mark.smollm2
def test_tokens_of_smollm2_on_ml_100k():
    from recbole_llm.backbone.loader import load_backbone

    try:
        tokenizer = load_backbone("smollm2-135m-instruct", device="cpu", dtype="float32").tokenizer
    except FileNotFoundError as error:
        pytest.skip(str(error))
    dataset = NextItemDataset(Config("SASRec", "ml-100k", config_dict={"task": "next_item"}))
    test = dataset.build()[2]
    prompts = builder(
        dataset,
        tokenizer,
        candidates=lambda rows: np.stack([1 + (r + 80 * np.arange(20)) % 1682 for r in rows]),
    )
    rows = test[np.arange(0, len(test), 25)]
    assert prompts.assembled
    for slots in (False, True):
        encoded = prompts.encode(rows, slots=slots).input_ids
        for i, ids in enumerate(encoded):
            text = prompts.text(rows, i, slots=slots)
            assert ids.tolist() == whole_ids(tokenizer, text, (-ids[ids < 0]).tolist())
        assert 30 * 5 < np.mean([len(ids) for ids in encoded]) < 450


# ---------------------------------------- which items, and no leak


@pytest.fixture(scope="module")
def shared_builder(shelf, tokenizers) -> TitlePromptBuilder:
    return builder(shelf, tokenizers["smollm2"], candidates=some_candidates)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(0, 14), n_candidates=st.integers(0, 40), seed=st.integers(0, 9))
def test_slots_are_the_last_earlier_items_and_then_the_candidates(
    shelf, shared_builder, data, k, n_candidates, seed
):
    user = data.draw(st.integers(1, USERS))
    step = data.draw(st.integers(1, len(story()[user]) - 1))
    row = row_of(shelf, user, step)
    before = [number(shelf, token) for token in story()[user][:step]]
    listed = 1 + np.random.default_rng(seed).permutation(40)[:n_candidates]
    prompts = shared_builder
    prompts.retriever = RecentRetriever(shelf.history, k)
    prompts.candidates = (lambda rows: listed[None].repeat(len(rows), axis=0)) if n_candidates else None
    (ids,) = prompts.encode(row, slots=True).input_ids
    assert (-ids[ids < 0]).tolist() == before[len(before) - min(k, step) :] + listed.tolist()


@pytest.mark.parametrize("listed", [False, True])
def test_a_prompt_does_not_depend_on_the_target_nor_on_what_comes_later(shelf, tokenizers, tmp_path, listed):
    def encode(dataset, rows):
        prompts = builder(dataset, tokenizers["gpt2"], candidates=some_candidates if listed else None)
        return [ids.tolist() for ids in prompts.encode(rows, slots=True).input_ids]

    row = row_of(shelf, 4, 7)
    truth = encode(shelf, row)
    other = row[:]
    other.update(type(row)({"item_id": row["item_id"] % 40 + 1}))
    assert encode(shelf, other) == truth
    # The same file, in which user 4 chose other items from this row on.
    write_shelf(tmp_path)
    path = tmp_path / "shelf" / "shelf.inter"
    lines = path.read_text(encoding="utf-8").splitlines()
    first = 1 + 15 + 14 * 2  # header, users 1 to 3
    for step in range(7, 14):
        user, item, *rest = lines[first + step].split("\t")
        assert user == "4"
        lines[first + step] = "\t".join([user, str(int(item) % 40 + 1), *rest])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    changed = make_dataset(tmp_path)
    again = row_of(changed, 4, 7)
    assert int(again["item_id"]) != int(row["item_id"])
    # Ids follow the order of the file, so texts are compared.
    texts = [
        builder(dataset, tokenizers["gpt2"], candidates=None).text(r, 0)
        for dataset, r in ((shelf, row), (changed, again))
    ]
    assert texts[0] == texts[1] and texts[0].count(SLOT_TEXT) == 7


def test_a_row_gets_the_same_prompt_in_any_company(shelf, tokenizers):
    rows = shelf.splits[0][np.arange(30)]
    together = (
        builder(shelf, tokenizers["gpt2"], candidates=some_candidates).encode(rows, slots=True).input_ids
    )
    for i in (0, 11, 29):
        alone = builder(shelf, tokenizers["gpt2"], candidates=some_candidates)
        assert alone.encode(rows[i : i + 1], slots=True).input_ids[0].tolist() == together[i].tolist()


def test_history_that_looks_at_the_target_is_refused(shelf, tokenizers):
    semantic = SemanticRetriever(shelf.history, 3, np.eye(shelf.item_num))
    with pytest.raises(
        ValueError, match="text_retrieval: semantic picks the history by its similarity to the target"
    ):
        TitlePromptBuilder(shelf, tokenizers["gpt2"], TEMPLATE, max_prompt_tokens=512, retriever=semantic)
    prompts = builder(shelf, tokenizers["gpt2"])
    prompts.retriever = semantic
    with pytest.raises(ValueError, match="text_retrieval: semantic"):
        prompts.encode(row_of(shelf, 1, 1), slots=True)

    class Curious(RecentRetriever):
        def positions(self, user_ids, item_ids, ends):
            assert not item_ids.any()
            return super().positions(user_ids, item_ids, ends)

    prompts.retriever = Curious(shelf.history, 3)
    assert len(prompts.encode(row_of(shelf, 1, 1), slots=True).input_ids) == 1


def test_candidates_that_are_no_items_are_an_error(shelf, tokenizers):
    row = row_of(shelf, 1, 1)
    for bad, message in [
        (np.array([[1, 0, 3]]), r"candidates of row_id \d+: \[1, 0, 3\] are not all items, .* from 1 to 40"),
        (np.array([[1, 41]]), r"\[1, 41\] are not all items"),
        (np.array([1, 2]), r"candidates of shape \(2,\) for 1 samples"),
        (np.array([[1], [2]]), r"candidates of shape \(2, 1\) for 1 samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            builder(shelf, tokenizers["gpt2"], candidates=lambda rows, bad=bad: bad).encode(row, slots=True)


# ---------------------------------------- titles


def test_special_tokens_in_titles_are_inert(shelf, tokenizers):
    for tokenizer in tokenizers.values():
        prompts = builder(shelf, tokenizer, candidates=lambda rows: np.full((len(rows), 1), number(shelf, 2)))
        (ids,) = prompts.encode(row_of(shelf, 1, 5), slots=True).input_ids
        assert not set(ids.tolist()) & {1, 2}
        answer = prompts.answers[number(shelf, 2)]
        assert not set(answer.tolist()) & {1, 2}
    assert prompts.text(row_of(shelf, 1, 5), 0).count(SPECIAL[2]) == 2


@pytest.mark.parametrize("kind", list(PRE_TOKENIZERS))
def test_answers_are_titles_as_they_follow_the_prompt(shelf, tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompts = builder(shelf, tokenizer, candidates=some_candidates)
    row = row_of(shelf, 2, 6)
    (prompt,) = prompts.encode(row, slots=False).input_ids
    text = prompts.text(row, 0, slots=False)
    end = prompts.terminator.tolist()
    assert len(prompts.answers) == shelf.item_num and prompts.answers[0].tolist() == end != []
    assert all(answer.dtype == np.int64 for answer in prompts.answers)
    for item in range(1, shelf.item_num):
        answer = prompts.answers[item].tolist()
        assert answer[-len(end) :] == end and len(answer) > len(end)
        whole = tokenizer(
            text + prompts.answer_text(item), add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        assert prompt.tolist() + answer[: -len(end)] == whole
    assert prompts.answer_text(number(shelf, 1)) == " The Alpha (1991)"
    assert prompts.answer_text(number(shelf, 12)) == r" It's 'so' {odd} \n"


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3"])
def test_an_answer_is_written_as_its_title_and_one_line_break(shelf, tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompts = builder(shelf, tokenizer)
    line_break = tokenizer("\n")["input_ids"]
    assert prompts.terminator.tolist() == line_break and len(line_break) == 1
    assert prompts.stop_ids == sorted([*line_break, tokenizer.eos_token_id])
    for item in range(1, shelf.item_num):
        assert tokenizer.decode(prompts.answers[item]) == prompts.answer_text(item) + "\n"
        assert prompts.decode(prompts.answers[item]) == prompts.answer_text(item).strip()
    written = tokenizer(" Heat (1995)\nFilm 13", add_special_tokens=False)["input_ids"]
    assert prompts.decode([1, *written, 2]) == "Heat (1995)" and prompts.decode([]) == ""


def test_equal_titles_have_equal_answers_and_no_answer_begins_another(shelf, tokenizers):
    prompts = builder(shelf, tokenizers["smollm2"])
    answers = {item: tuple(ids.tolist()) for item, ids in enumerate(prompts.answers) if item}
    texts = {item: prompts.answer_text(item) for item in answers}
    for a in answers:
        for b in answers:
            assert (answers[a] == answers[b]) == (texts[a] == texts[b])
            assert answers[a] == answers[b] or answers[a] != answers[b][: len(answers[a])]
    heat, remake, wave = (number(shelf, token) for token in (3, 4, 5))
    assert texts[heat] == " Heat (1986)" and texts[remake] == " Heat (1995)"
    plain = builder(shelf, tokenizers["smollm2"], show_year=False)
    assert plain.answer_text(heat) == " Heat" and plain.answer_text(wave) == " Heat Wave"
    short, long = plain.answers[heat].tolist(), plain.answers[wave].tolist()
    assert long[: len(short) - 1] == short[:-1] and long[len(short) - 1] != short[-1]


def test_by_default_equal_titles_are_told_apart(tmp_path, tokenizers):
    write_shelf(tmp_path)
    dataset = make_dataset(tmp_path, text={})
    for show_year in (True, False):
        prompts = builder(dataset, tokenizers["smollm2"], show_year=show_year)
        assert len({prompts.answer_text(item) for item in range(1, dataset.item_num)}) == 40
        assert prompts.answer_text(number(dataset, 4)) == " Heat (1995)"  # not the year twice


def test_titles_can_be_obfuscated(shelf, tokenizers):
    prompts = builder(
        shelf, tokenizers["gpt2"], TEMPLATE, obfuscate_titles=True, show_year=False, item_slots=False
    )
    text = prompts.text(row_of(shelf, 1, 3), 0)
    assert re.fullmatch(r"What next\?\nBefore:\n(Item \d+\n){3}Next:", text)
    shown = re.findall(r"Item \d+", text)
    assert [prompts.answer_text(number(shelf, token)) for token in (1, 2, 3)] == [
        f" {name}" for name in shown
    ]


def test_stars_need_ratings(tmp_path, tokenizers, caplog):
    write_shelf(tmp_path, rating=False)
    dataset = make_dataset(tmp_path)
    prompts = builder(dataset, tokenizers["gpt2"], TEMPLATE, show_stars=True)
    assert "has no ratings: prompts show no stars" in caplog.text
    assert prompts.text(row_of(dataset, 1, 3), 0) == HISTORY.replace("{s}", SLOT_TEXT) + "Next:"


# ---------------------------------------- the tokenizer


def test_the_chat_template_wraps_the_same_prompt(shelf):
    tokenizer = train_tokenizer("smollm2", shelf.item_texts())
    with pytest.raises(ValueError, match="chat_template: True, but the tokenizer has no chat template"):
        builder(shelf, tokenizer, chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = row_of(shelf, 3, 5)
    plain, chat = (
        builder(shelf, tokenizer),
        builder(shelf, tokenizer, chat_template=True, answer="{title}{year}"),
    )
    assert chat.text(row, 0) == f"<|im_start|>user\n{plain.text(row, 0)}<|im_end|>\n<|im_start|>assistant\n"
    (ids,), (inner,) = chat.encode(row, slots=True).input_ids, plain.encode(row, slots=True).input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(inner)].tolist() == inner.tolist())
    assert tokenizer.decode(ids[:start]) == "<|im_start|>user\n"
    assert tokenizer.decode(ids[start + len(inner) :]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat.answers[number(shelf, 3)]) == "Heat (1986)\n"


def test_answers_of_llama_2_have_one_blank(shelf):
    """Its normaliser puts a blank before every text, so that " Heat" alone begins with two."""
    letters = sorted(
        set("".join(shelf.item_texts())) | set(TEMPLATE["question"]) | set("\n\u2581()0123456789a")
    )
    backend = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(["<unk>", *letters])}, [], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    prompts = builder(shelf, tokenizer, TEMPLATE)
    assert not prompts.assembled
    tokens = tokenizer.convert_ids_to_tokens(prompts.answers[number(shelf, 4)])
    assert "".join(tokens) == "\u2581Heat\u2581(1995)\n"
    assert prompts.stop_ids == prompts.terminator.tolist() == [tokenizer.convert_tokens_to_ids("\n")]


def test_a_tokenizer_that_drops_line_breaks_is_refused(shelf):
    words = {word: i for i, word in enumerate(["[UNK]", "a", "b"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match="this tokenizer drops line breaks"):
        builder(shelf, tokenizer)


# ---------------------------------------- length


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
@pytest.mark.parametrize("slots", [False, True])
def test_an_over_long_prompt_loses_its_oldest_history_only(shelf, tokenizers, kind, slots):
    tokenizer, row = tokenizers[kind], row_of(shelf, 1, 10)
    everything = [number(shelf, token) for token in range(1, 11)]
    listed = [number(shelf, token) for token in (20, 11, 30)]  # item 11 is the target
    keys = {"candidates": lambda rows: np.array([listed] * len(rows))}
    full = builder(shelf, tokenizer, TEMPLATE, **keys).encode(row, slots=slots)
    bare = builder(shelf, tokenizer, {**TEMPLATE, "history_empty": ""}, k=0, **keys).encode(row, slots=slots)
    longest, shortest = len(full.input_ids[0]), len(bare.input_ids[0])
    whole = builder(shelf, tokenizer, TEMPLATE, **keys).text(row, 0, slots=slots)
    kept = []
    prompts = builder(shelf, tokenizer, TEMPLATE, **keys)
    for limit in range(longest, shortest - 1, -1):
        prompts.max_prompt_tokens = limit
        encoded, text = prompts.encode(row, slots=slots), prompts.text(row, 0, slots=slots)
        (ids,) = encoded.input_ids
        assert len(ids) <= limit and encoded.n_shortened == (limit < longest)
        tail = text.partition("One of:\n")[2]
        assert tail == whole.partition("One of:\n")[2] and tail.startswith("- Film 20 part 2 (1970)")
        history = text.partition("Before:\n")[2].partition("One of:")[0].splitlines()
        assert (
            history
            == whole.partition("Before:\n")[2].partition("One of:")[0].splitlines()[10 - len(history) :]
        )
        if slots:
            assert (-ids[ids < 0]).tolist() == everything[10 - len(history) :] + listed
        kept.append(len(history))
    assert kept == sorted(kept, reverse=True) and kept[0] == 10 and kept[-1] == 0
    assert set(kept) == set(range(11))  # never more lost than needed
    with pytest.raises(
        ValueError,
        match=f"max_prompt_tokens: {shortest - 1} is too small.*user 1 and 3 candidates needs {shortest}",
    ):
        builder(shelf, tokenizer, TEMPLATE, max_prompt_tokens=shortest - 1, **keys).encode(row, slots=slots)


# ---------------------------------------- templates


@pytest.mark.parametrize("name", ["next_item_hybrid", "next_item_text"])
def test_packaged_templates_are_complete_and_documented(name):
    config = TITLE_TEMPLATE.load(name)
    assert config == TITLE_TEMPLATE.check(config)
    path = properties_dir() / "prompt" / f"{name}.yaml"
    assert TITLE_TEMPLATE.load(path) == config
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    assert {line.split(":")[0] for line in lines} == set(config)
    assert all("# (" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qestion": "x"}, "unknown key 'qestion'; did you mean question"),
        (
            {"answers": [" Yes", " No"]},
            "unknown key 'answers'; did you mean answer.*template of the next_item task",
        ),
        ({"question": ""}, r"\['question'\] must be given"),
        ({"answer": " it"}, r"answer must hold \{title\}"),
        ({"answer": " {title}{genre}"}, r"answer has no value for \['genre'\]"),
        ({"candidate_item": "-"}, r"candidate_item must hold \{title\}"),
        ({"candidate_item": "{stars}{title}"}, r"candidate_item has no value for \['stars'\]"),
        (
            {"history_header": "{n} before"},
            r"history_header has no value for \['n'\]; it may hold none of its own",
        ),
        ({"instruction": "{"}, r"instruction: .*write \{\{ and \}\} for braces"),
        ({"show_year": "history"}, "show_year must be true or false, not 'history'"),
        ({"list_candidates": "always"}, "list_candidates must be true, false or auto, not 'always'"),
        ({"list_candidates": 1}, "list_candidates must be true, false or auto, not 1"),
        ({"item_slots": "yes"}, "item_slots must be true or false"),
        ({"instruction": 3}, "instruction must be text"),
    ],
)
def test_templates_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TITLE_TEMPLATE.check({**TEMPLATE, **changes})


def test_candidates_that_must_be_listed_have_to_exist(shelf, tokenizers):
    with pytest.raises(ValueError, match="list_candidates: True, but every item is ranked"):
        builder(shelf, tokenizers["gpt2"], list_candidates=True)


def test_templates_of_the_other_task_are_told_apart():
    with pytest.raises(FileNotFoundError, match=r"one of \['next_item_hybrid', 'next_item_text'\]"):
        TITLE_TEMPLATE.load("nothing")
    with pytest.raises(ValueError, match=r"movie_ctr\.yaml: .*\(read as a template of the next_item task\)"):
        TITLE_TEMPLATE.load("movie_ctr")
    with pytest.raises(ValueError, match=r"next_item_text\.yaml: .*\(read as a template of the ctr task\)"):
        CTR_TEMPLATE.load("next_item_text")
