"""AdapterConfig: the sizes of the formula, and what is refused."""

import pytest

from recbole_llm.adapter.config import AdapterConfig


@pytest.mark.parametrize(
    ("mixer", "rank", "scale"),
    [("identity", 8, 2), ("expert", 8, 8), ("output", 32, 2), ("factor", 32, 2), ("dense", 8, 2)],
)
def test_rank_and_scale(mixer, rank, scale):
    config = AdapterConfig(mixer=mixer, instance_size=5, num_experts=4, r=8, lora_alpha=16)
    assert config.rank == rank
    assert config.scale == scale  # alpha / (R / K)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixer": "mean"}, "mixer is 'mean'"),
        ({"gate": "mlp61"}, "gate is 'mlp61'"),
        ({"r": 6}, "r=6 is not divisible by num_experts=4"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 8.0}, "r must be a whole number"),
        ({"num_experts": 0}, "num_experts"),
        ({"instance_size": 0}, "instance_size"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"gate_dropout": -0.1}, "gate_dropout"),
        ({"target_modules": "q_proj"}, "target_modules must be a non-empty list"),
        ({"target_modules": []}, "target_modules must be a non-empty list"),
        ({"top_k": 5}, "top_k must be between 1 and num_experts=4"),
        ({"top_k": 0}, "top_k must be between"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_k": 2, "gate": "uniform"}, "top_k has no meaning"),
        ({"top_k": 1, "mixer": "dense"}, "top_k has no meaning"),
        ({"top_k": 1, "mixer": "identity"}, "top_k has no meaning"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        AdapterConfig(**({"mixer": "expert", "instance_size": 5, "num_experts": 4, "r": 8} | change))


def test_only_the_expert_mixer_cuts_the_rank():
    assert AdapterConfig(mixer="factor", instance_size=5, num_experts=4, r=6).rank == 24
