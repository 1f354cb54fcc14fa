"""What fuzzing asks of the parsers: any bytes give either a result that holds together, or one ``ValueError``.

A target takes bytes. ``test_parsers_fuzzed.py`` feeds them by hypothesis for a moment, ``run_atheris.py`` for as long
as one likes, guided by coverage.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable
from pathlib import Path

from recbole_llm.comparison.search import read_space
from recbole_llm.config.command_line import parse_command_line, parse_model, parse_value, split_models
from recbole_llm.data.atomic_files import AtomicFiles
from recbole_llm.data.prompts.ctr import CTR_TEMPLATE
from recbole_llm.data.prompts.next_item import TITLE_TEMPLATE
from recbole_llm.data.prompts.stream import STREAM_TEMPLATE
from recbole_llm.data.text_cleaning import clean, natural_order, shorten
from recbole_llm.data.text_settings import TextSettings
from recbole_llm.utils.yaml_files import load_yaml

MAX_SENTENCE = 4000
"""Characters of an error message: it must not print a whole file."""


def refused(call: Callable, *arguments, **keywords):
    """The result, or ``None`` where it was refused in a sentence of readable length."""
    try:
        return call(*arguments, **keywords)
    except (ValueError, FileNotFoundError) as error:
        assert 0 < len(str(error)) < MAX_SENTENCE, f"{len(str(error))} characters of message"
        return None


def atomic(data: bytes) -> None:
    """Files of interactions and items, cut from the bytes at the first NUL, read as a dataset reads them."""
    inter, _, item = data.partition(b"\0")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "a.inter").write_bytes(
            b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + inter
        )
        if item:
            (folder / "a.item").write_bytes(item)
        files = refused(AtomicFiles, folder, ["a.inter"], {"a.item": "item_id"}, "\t", None)
        columns = refused(lambda: files.types)
        if columns is None:
            return
        refused(files.read, ["user_id", "item_id"])
        for file in (files[path] for path in columns if path in files):
            assert len(file.table) == len(file.lines) == len(file)
            assert list(file.table.columns) == list(file.types)
            for column in file.types:
                assert all(isinstance(cell, str) for cell in file.table[column])
                for reading in (file.numbers, file.times):
                    values = refused(reading, column)
                    assert values is None or values.shape == (len(file),)


def header(data: bytes) -> None:
    """An ``.item`` file of which the first line is fuzzed, too."""
    atomic(b"u1\ti1\t3\t5\0" + (data or b"\n"))


def template(data: bytes) -> None:
    """A prompt's template, for each layout."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mine.yaml"
        path.write_bytes(data)
        refused(load_yaml, path)
        for load in (CTR_TEMPLATE.load, TITLE_TEMPLATE.load, STREAM_TEMPLATE.load):
            config = refused(load, path)
            assert config is None or isinstance(config, dict)


def text_section(data: bytes) -> None:
    """The ``text`` section of a dataset's yaml."""
    value = parse_value(data.decode("utf-8", "replace"), "text")
    settings = refused(TextSettings.from_config, {"text": value}) if isinstance(value, dict) else None
    if settings is not None:
        assert all(isinstance(word, str) and word for word in settings.words().values())


def models(data: bytes) -> None:
    """A list of models with changes, and the arguments of a command line."""
    text = data.decode("utf-8", "replace")
    for model in refused(split_models, text) or ():
        assert model.strip() == model != ""
        found = refused(parse_model, model)
        assert found is None or (found[0] and isinstance(found[1], dict))
    arguments = refused(parse_command_line, text.split("\n"))
    assert arguments is None or all(key.isidentifier() for key in arguments)


def search_space(data: bytes) -> None:
    """A .hyper file of parameters to search."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "mine.hyper"
        path.write_bytes(data)
        space = refused(read_space, path)
        assert space is None or len(space) > 0


def titles(data: bytes) -> None:
    """A title's way from a cell to a prompt: one line, nothing invisible, nothing longer than asked for."""
    title = clean(data.decode("utf-8", "replace"))
    assert clean(title).isprintable() or "\u200c" in title or "\u200d" in title
    assert title == title.strip() and not {"\n", "\r", "\t", "\0"} & set(title)
    named = natural_order(title)
    assert "\n" not in named
    for limit in (1, 2, 20):
        assert len(shorten(named, limit)) <= limit


TARGETS = types.MappingProxyType(
    {
        target.__name__: target
        for target in (atomic, header, template, text_section, models, search_space, titles)
    }
)
