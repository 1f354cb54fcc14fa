"""A random Llama of some ten thousand weights with a tokenizer made on the spot, for tests and dry runs.

It has what the real default has, at 1/1000 of its size: byte-level BPE with single digits and ChatML special
tokens, grouped key-value heads, tied embeddings. The same texts and seed give the same model, whatever ran
before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recbole_llm.utils.hashing import hash_tensors

UNKNOWN, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "The user has watched these movies and rated them with one to five stars.",
    "Toy Story (1995), 4 stars. The Usual Suspects (1995), 5 stars. Heat (1995), 2 stars.",
    "Will the user like the movie? Answer with one word.",
)


def tiny_tokenizer(
    texts: Iterable[str] | None, words: Sequence[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``texts``; every byte is in its alphabet, so any text can be written.

    Args:
        texts: What to learn merges from, beside a few built-in sentences.
        words: Answer words that must begin with different tokens, such as ``(" Yes", " No")``.
        vocab_size: Upper bound of the vocabulary.

    Raises:
        ValueError: ``vocab_size`` has no room for the 256 bytes, the special tokens and the answer words.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 3 + sum(len(word.encode()) for word in words)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small for the tiny backbone: at least {smallest}")
    answers = "".join(words)

    def corpus() -> Iterator[str]:
        for text in itertools.chain(SENTENCES, () if texts is None else texts):
            yield text
            # BPE merges the most frequent pairs. One set of answers per 16 characters makes theirs frequent
            # enough to be merged among the first few dozen, whatever the texts are.
            yield answers * (1 + len(text) // 16)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_backbone(
    texts: Iterable[str] | None = None,
    *,
    words: Sequence[str] = (" Yes", " No"),
    vocab_size: int = 1024,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    """Builds the tiny model in float32 on the CPU.

    Returns:
        Model, tokenizer and the SHA-256 of weights and vocabulary.
    """
    tokenizer = tiny_tokenizer(texts, words, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        # Far above the usual 0.02: with so few channels the answers must visibly depend on the prompt.
        initializer_range=32**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers neither matter nor change
        torch.manual_seed(seed)
        with torch.device("cpu"):
            model = LlamaForCausalLM(config)
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return model, tokenizer, hash_tensors(weights, tokenizer.backend_tokenizer.to_str())
