"""Text that every terminal and log file can take."""

from __future__ import annotations

import functools
import io
import logging
import sys
from collections.abc import Iterable
from typing import Any

from recbole.utils import init_logger

FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with in a spreadsheet; the last four are the same signs in full width."""


def write_any_text(streams: Iterable[Any]) -> None:
    """Let streams write characters that their encoding lacks as escapes, such as ``\\u2192`` for an arrow.

    Windows terminals (cp1252) and ``LANG=C`` cannot show every title, and a run must not end because of one. Streams
    that are no text files of their own (a test's capture, a notebook's) are left alone.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def spreadsheet_text(text: str) -> str:
    """A text for a cell of a csv file: spreadsheets run what begins like a formula, an apostrophe makes it text.

    >>> spreadsheet_text("=1+1"), spreadsheet_text("-1.5"), spreadsheet_text("Alien")
    ("'=1+1", '-1.5', 'Alien')
    """
    if not text.lstrip().startswith(FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def start_log(config: Any) -> None:
    """RecBole's ``init_logger``, with handlers that can write any text."""
    init_logger(config)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    write_any_text(handler.stream for handler in handlers)
    for handler in handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(_stop_log, handler)  # type: ignore[method-assign]


def _stop_log(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    """Say once that the log file cannot be written; logging itself prints a traceback for every line."""
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    why = sys.exc_info()[1]
    print(
        f"the log file {handler.baseFilename} cannot be written ({why}): no more is logged there",
        file=sys.stderr,
    )
