"""Ten architectures and two more, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf

from recbole_llm.backbone.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(None, (" Yes", " No"), 1024)
SPECIAL = {
    "vocab_size": len(TOKENIZER),
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "initializer_range": 0.2,  # ten times the usual one: answers visibly depend on the prompt
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {
    **SPECIAL,
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DEFAULT = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    """An architecture: how to build it, what the default targets become, its feed-forward width, its positions."""

    build: Callable[[], hf.PreTrainedModel]
    targets: list[str]
    intermediate: int = 48
    positions: int | None = None


def architectures(positions: int = 96) -> dict[str, Case]:
    """The cases by name; OPT and GPT-2 have so many learned positions."""
    return {
        "Llama 2": Case(
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=False)
            ),
            DEFAULT,
        ),
        "Llama 3": Case(
            lambda: hf.LlamaForCausalLM(
                hf.LlamaConfig(
                    **LLAMA,
                    rope_parameters={
                        "rope_type": "llama3",
                        "rope_theta": 500000.0,
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32,
                    },
                )
            ),
            DEFAULT,
        ),
        "Qwen2": Case(
            lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA, tie_word_embeddings=True)), DEFAULT
        ),
        "Qwen3": Case(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=16)), DEFAULT, 64),
        "Gemma 3": Case(
            lambda: hf.Gemma3ForCausalLM(
                hf.Gemma3TextConfig(
                    **LLAMA,
                    head_dim=8,
                    query_pre_attn_scalar=8,
                    sliding_window=5,
                    layer_types=["sliding_attention", "full_attention"],
                )
            ),
            DEFAULT,
        ),
        "Mistral": Case(lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=5)), DEFAULT),
        "Phi-3": Case(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA)), ["qkv_proj"]),
        "OPT": Case(
            lambda: hf.OPTForCausalLM(
                hf.OPTConfig(
                    **SPECIAL,
                    **SIZES,
                    ffn_dim=48,
                    word_embed_proj_dim=16,
                    max_position_embeddings=positions,
                    init_std=0.2,
                )
            ),
            DEFAULT,
            48,
            positions,
        ),
        "GPT-2": Case(
            lambda: hf.GPT2LMHeadModel(
                hf.GPT2Config(**SPECIAL, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=positions)
            ),
            ["c_attn"],
            48,
            positions,
        ),
        "GPT-NeoX": Case(
            lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SPECIAL, **SIZES, intermediate_size=48)),
            ["query_key_value"],
        ),
        "BLOOM": Case(
            lambda: hf.BloomForCausalLM(hf.BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4)),
            ["query_key_value"],
            128,
        ),
        "Falcon": Case(
            lambda: hf.FalconForCausalLM(hf.FalconConfig(**SPECIAL, **SIZES, ffn_hidden_size=48)),
            ["query_key_value"],
        ),
        "Falcon with ALiBi": Case(
            lambda: hf.FalconForCausalLM(hf.FalconConfig(**SPECIAL, **SIZES, ffn_hidden_size=48, alibi=True)),
            ["query_key_value"],
        ),
    }


CASES = architectures()


def build(case: Case, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """The model of a case, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build().to(dtype).eval()
