"""From text-only to hybrid prompts."""

from __future__ import annotations

import pytest

from recbole_llm.model.curriculum import hybrid_probability, is_hybrid

STEPS, EPOCHS = 10, 4


def curve(mode: str) -> list[float]:
    return [hybrid_probability(mode, step, STEPS, EPOCHS) for step in range(STEPS * EPOCHS)]


def test_linear_rises_over_the_whole_training_and_reaches_one():
    values = curve("linear")
    assert values == pytest.approx([(step + 1) / 40 for step in range(40)])
    assert values[-1] == 1.0


def test_as_released_starts_again_in_every_epoch():
    values = curve("as_released")
    assert values[:STEPS] == values[STEPS : 2 * STEPS] == values[-STEPS:]
    assert max(values) == 1 / EPOCHS and sum(values) / len(values) == pytest.approx(0.1375)


def test_constant_curricula():
    assert set(curve("text_only")) == {0.0} and set(curve("hybrid_only")) == {1.0}


@pytest.mark.parametrize("mode", ["linear", "text_only", "hybrid_only", "as_released"])
def test_draws_follow_the_probability_and_depend_on_seed_and_step_alone(mode):
    steps, epochs = 500, 2
    draws = [is_hybrid(mode, step, steps, epochs, seed=1) for step in range(steps * epochs)]
    assert draws == [is_hybrid(mode, step, steps, epochs, seed=1) for step in range(steps * epochs)]
    expected = sum(hybrid_probability(mode, step, steps, epochs) for step in range(steps * epochs))
    assert sum(draws) == pytest.approx(expected, abs=60)  # about four standard deviations
    if 0 < expected < len(draws):
        assert draws != [is_hybrid(mode, step, steps, epochs, seed=2) for step in range(steps * epochs)]


def test_the_last_step_is_hybrid_whatever_the_seed():
    assert all(is_hybrid("linear", 39, STEPS, EPOCHS, seed) for seed in range(200))
