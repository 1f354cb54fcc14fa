"""Which errors mean that memory is missing, and what is done then."""

from __future__ import annotations

import pytest
import torch

from recbole_llm.utils.memory import is_out_of_memory, within_memory

CPU = "err == 0. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."


def test_torchs_own_error_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU), MemoryError()]
)
def test_asked_for_less_until_it_fits(error):
    size = [8]

    def run() -> int:
        if size[0] > 2:
            raise error
        return size[0]

    assert within_memory(run, lambda reason: size.append(size.pop() // 2)) == 2


def test_other_errors_pass():
    def run():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(run, lambda reason: pytest.fail("asked for less"))
