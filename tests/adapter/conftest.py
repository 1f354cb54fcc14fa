"""A random two-layer Llama, and adapters on it as if trained (at the start B = 0 and they do nothing)."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.personalized import attach_adapter

VOCABULARY = 40
INSTANCE_SIZE = 6


def build_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def build_adapter(mixer, *, seed=0, dtype=torch.float64, **settings):
    settings = {"instance_size": INSTANCE_SIZE, "num_experts": 4, "r": 4, "gate_dropout": 0.0} | settings
    adapter = attach_adapter(build_model(seed, dtype), AdapterConfig(mixer=mixer, **settings))
    randomise(adapter, seed)
    adapter.peft_model.eval()
    return adapter


def randomise(adapter, seed=0):
    """Every B, and the last layers of the gates (zero for dense ones), as if after some training."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in [*adapter.lora_parameters().items(), *adapter.gate_parameters().items()]:
            if not name.endswith("lora_A"):
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.5)


@pytest.fixture
def model():
    """Function ``(seed, dtype) -> LlamaForCausalLM``."""
    return build_model


@pytest.fixture
def adapted():
    """Function ``(mixer, **settings) -> PersonalizedAdapter`` in eval mode, float64 unless told otherwise."""
    return build_adapter


@pytest.fixture
def batch():
    """Three sequences of seven tokens and their instances."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCABULARY, (3, 7), generator=generator)
    return ids, torch.randn(3, INSTANCE_SIZE, generator=generator, dtype=torch.float64)
