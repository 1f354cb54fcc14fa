"""The trainer's small parts: schedules, and Ctrl-C held back while parameters change."""

from __future__ import annotations

import signal

import pytest
import torch

from recbole_llm.trainer.llm_trainer import deferred_interrupt, learning_rate_factor


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_is_that_of_torch(schedule):
    total, warmup = 40, 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    if schedule == "linear":
        fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total - warmup)
    else:
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for step in range(total):
        assert learning_rate_factor(step, total, warmup, schedule) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-6
        )
        optimizer.step()
        both.step()


def test_constant_learning_rate_without_warmup():
    assert {learning_rate_factor(step, 10, 0, "constant") for step in range(10)} == {1.0}


@pytest.fixture
def interruptible():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_an_interrupt_waits_for_the_end_of_the_block(interruptible):
    finished = False
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        finished = True
    assert finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
