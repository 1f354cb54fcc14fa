"""Fuzzing for a moment; ``run_atheris.py`` does it for hours. What it found is listed as examples here."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parser_targets import TARGETS

# What the parsers give a meaning to, so that random bytes get somewhere.
PIECES = [
    *"\t\n\"':,={}[]|>-&*!%@~#\\ ",
    "\r\n",
    "\0",
    "\ufeff",
    "\u202e",
    "\u200b",
    "user_id:token",
    "item_id:token",
    "title:token_seq",
    "price:float",
    "1e309",
    "nan",
    "0x1F",
    "2011-06-26",
    "99999999999999999999",
    "{title}",
    "{noun!r:>9}",
    "history_item: ",
    "question: ",
    "&amp;",
    "&#0;",
    ", The",
    " (1995)",
    "RecLoRA",
    "--model=",
    "rating_scale: [1, 5]",
    "learning_rate loguniform ",
    "k quniform 1,9,2",
    "gate choice [a, b]",
]
LINES = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=30).map("".join)
FOUND: dict[str, list[bytes]] = {
    "search_space": [
        b"k quniform 0,inf,1",
        b"k quniform 0,1e9,1e-9",
        b"k uniform nan,nan",
        b"k loguniform 0,999",
    ],
    "text_section": [
        b"{no,n: book, verb: [reads, read]}",
        b"{1: a}",
        b"{[a]: b}",
        b"{user_fields: {no: no}}",
    ],
    "template": [b"a: 2011-13-99", b"[" * 3000, b"a: !!int x"],
}
"""Inputs that fuzzing broke a parser with, each now a result or one sentence."""


INPUTS = st.one_of(LINES.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=200))


@pytest.mark.parametrize("target", TARGETS)
def test_any_input_is_read_or_refused_in_one_sentence(target):
    few = settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    few(given(INPUTS)(TARGETS[target]))()


@pytest.mark.parametrize(
    ("target", "data"), [(name, data) for name, found in FOUND.items() for data in found]
)
def test_what_fuzzing_found(target, data):
    TARGETS[target](data)
