"""tiny.py: deterministic, self-contained, and shaped like the real default."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from recbole_llm.backbone.answers import answer_token_ids
from recbole_llm.backbone.tiny import tiny_backbone

TITLES = [
    f"{title} ({year})"
    for title in ("Usual Suspects, The", "Yentl", "Nosferatu", "Amélie")
    for year in (1995, 2001)
]


def test_same_texts_and_seed_same_model_whatever_ran_before():
    torch.manual_seed(1)
    first = tiny_backbone(TITLES)
    torch.rand(3)
    state = torch.random.get_rng_state()
    second = tiny_backbone(iter(TITLES))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first[2] == second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert first[1].get_vocab() == second[1].get_vocab()


def test_seed_and_texts_change_the_identity():
    assert len({tiny_backbone(TITLES)[2], tiny_backbone(TITLES, seed=1)[2], tiny_backbone()[2]}) == 3


def test_same_identity_in_another_process():
    code = f"from recbole_llm.backbone.tiny import tiny_backbone; print(tiny_backbone({TITLES!r})[2])"
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.getcwd(),
    }
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == tiny_backbone(TITLES)[2]


@pytest.mark.parametrize(
    "texts", [None, TITLES, ["Y" * 500 + " N" * 500] * 50, []], ids=["none", "titles", "odd", "empty"]
)
@pytest.mark.parametrize("words", [(" Yes", " No"), (" Ja", " Nein"), (" likes", " loves")])
def test_answer_words_can_be_told_apart(texts, words):
    _, tokenizer, _ = tiny_backbone(texts, words=words)
    assert len(set(answer_token_ids(tokenizer, words))) == 2


def test_tokenizer_writes_any_text_back_and_has_special_tokens():
    model, tokenizer, _ = tiny_backbone(TITLES)
    for text in ("Amélie (2001)", "七人の侍 \n\t 1954", " Yes", "🎬"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
    assert len(tokenizer) == model.config.vocab_size
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_too_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size 200 is too small"):
        tiny_backbone(vocab_size=200)
