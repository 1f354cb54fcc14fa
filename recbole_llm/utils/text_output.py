"""Text that every terminal and log file can take."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from typing import Any

from recbole.utils import init_logger


def write_any_text(streams: Iterable[Any]) -> None:
    """Let streams write characters that their encoding lacks as escapes, such as ``\\u2192`` for an arrow.

    Windows terminals (cp1252) and ``LANG=C`` cannot show every title, and a run must not end because of one. Streams
    that are no text files of their own (a test's capture, a notebook's) are left alone.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start_log(config: Any) -> None:
    """RecBole's ``init_logger``, with handlers that can write any text."""
    init_logger(config)
    handlers = logging.getLogger().handlers
    write_any_text(handler.stream for handler in handlers if isinstance(handler, logging.StreamHandler))
