"""Running out of memory: telling it from other errors, and trying again with less at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_SAID = ("not enough memory", "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left. On a CPU torch has no class for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _SAID)
    )


def within_memory(run: Callable[[], T], ask_less: Callable[[str], None]) -> T:
    """What ``run()`` gives, called again after ``ask_less(reason)`` whenever memory does not suffice.

    Args:
        run: must leave nothing behind where it fails, or put it right when it is called again.
        ask_less: makes the next ``run()`` need less, or raises what the user is told.
    """
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
        # Not before here: the traceback of an error that is being handled holds the tensors that did not fit.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ask_less(reason)
