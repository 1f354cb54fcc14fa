"""answers.py: the logits read are those of the model's own full forward of each prompt alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)

from recbole_llm.backbone.answers import answer_logits, answer_token_ids, mean_pooled_vectors, pad_right
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.backbone.tiny import tiny_backbone

WORDS = (" Yes", " No")


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny", dtype="float32")


def draw_prompts(vocabulary: int, lengths, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, size=length) for length in lengths]


@torch.no_grad()
def own_logits(model, prompts, token_ids) -> torch.Tensor:
    """The slow truth: one unpadded prompt at a time, all logits at all positions."""
    rows = [model(input_ids=torch.as_tensor(prompt)[None]).logits[0, -1, token_ids] for prompt in prompts]
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    seed=st.integers(0, 2**31),
)
def test_equals_the_full_forward_of_each_prompt_alone(tiny, lengths, seed):
    ids = answer_token_ids(tiny.tokenizer, WORDS)
    prompts = draw_prompts(len(tiny.tokenizer), lengths, seed)
    with torch.no_grad():
        got = answer_logits(tiny.model, *pad_right(prompts, tiny.tokenizer.pad_token_id), ids)
    expected = own_logits(tiny.model, prompts, ids)
    assert got.shape == (len(prompts), 2) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(got.argmax(1), expected.argmax(1))


def test_padding_token_does_not_matter(tiny):
    prompts = draw_prompts(len(tiny.tokenizer), [3, 11, 30])
    with torch.no_grad():
        one, other = (answer_logits(tiny.model, *pad_right(prompts, pad), [5, 9]) for pad in (0, 17))
    assert torch.equal(one, other)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
ARCHITECTURES = {
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA_LIKE, head_dim=8, final_logit_softcapping=0.5)
    ),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**LLAMA_LIKE, logit_scale=0.125)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**LLAMA_LIKE, logits_scaling=8.0)),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_what_architectures_do_behind_the_head_is_honoured(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    prompts = draw_prompts(300, [1, 9, 20])
    with torch.no_grad():
        got = answer_logits(model, *pad_right(prompts, 0), [7, 250])
    torch.testing.assert_close(got, own_logits(model, prompts, [7, 250]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "head too"])
def test_peft_models_are_read_through_their_adapters(targets):
    model, tokenizer, _ = tiny_backbone()
    peft_model = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    ).eval()
    prompts = draw_prompts(len(tokenizer), [2, 8, 5])
    batch = pad_right(prompts, 0)
    with torch.no_grad():
        adapted = answer_logits(peft_model, *batch, [3, 4])
        with peft_model.disable_adapter():
            plain = answer_logits(peft_model, *batch, [3, 4])
    torch.testing.assert_close(adapted, own_logits(peft_model, prompts, [3, 4]), atol=1e-5, rtol=0)
    assert not torch.allclose(adapted, plain)
    assert torch.equal(adapted, answer_logits(model, *batch, [3, 4]).detach())


def test_gradients_are_those_of_the_full_forward():
    model, tokenizer, _ = tiny_backbone()
    prompts = draw_prompts(len(tokenizer), [6, 13])
    weight = model.model.layers[0].self_attn.q_proj.weight
    input_ids, lengths = pad_right(prompts, 0)
    (got,) = torch.autograd.grad(answer_logits(model, input_ids, lengths, [3, 4]).square().sum(), weight)
    full = model(input_ids=input_ids).logits[torch.arange(2), lengths - 1][:, [3, 4]]
    (expected,) = torch.autograd.grad(full.square().sum(), weight)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_answers_are_not_rounded_to_half_precision():
    backbone = load_backbone("tiny", dtype="bfloat16")
    with torch.no_grad():
        batch = pad_right(draw_prompts(len(backbone.tokenizer), [4] * 8), 0)
        got = answer_logits(backbone.model, *batch, [3, 4])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = answer_logits(tiny_backbone()[0], *batch, [3, 4])
    for logits in (got, autocast):
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_no_hook_is_left_behind(tiny):
    head = tiny.model.get_output_embeddings()
    with pytest.raises(IndexError):
        answer_logits(tiny.model, *pad_right([np.array([10**6])], 0), [0])
    with torch.no_grad():
        answer_logits(tiny.model, *pad_right([np.array([1])], 0), [0])
    mean_pooled_vectors(tiny.model, [np.array([1])])
    assert not head._forward_hooks and not head._forward_pre_hooks


@pytest.mark.parametrize("lengths", [[0, 2], [2, 3], [2]])
def test_wrong_lengths_are_refused(tiny, lengths):
    with pytest.raises(ValueError, match="lengths"):
        answer_logits(tiny.model, torch.zeros(2, 2, dtype=torch.int64), torch.tensor(lengths), [0, 1])


def test_pad_right():
    input_ids, lengths = pad_right([np.array([1, 2, 3]), np.array([4])], pad_id=9)
    assert input_ids.tolist() == [[1, 2, 3], [4, 9, 9]] and lengths.tolist() == [3, 1]
    assert input_ids.dtype == lengths.dtype == torch.int64
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pad_right([np.array([1]), np.array([], dtype=np.int64)], 0)
    with pytest.raises(ValueError, match="no sequence"):
        pad_right([], 0)


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words 'Yes' and 'Yeah' only by their common beginning 'Ye'."""
    vocabulary = {"?": 0, "Ye": 1, "s": 2, "a": 3, "h": 4, "N": 5, "o": 6, "Y": 7, "e": 8}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Y", "e")], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_answer_words_with_the_same_first_token_are_refused():
    with pytest.raises(ValueError, match="'Yes' and 'Yeah' begin with the same token 'Ye'"):
        answer_token_ids(bare_tokenizer(), ["Yes", "Yeah"])
    with pytest.raises(ValueError, match="same token"):
        answer_token_ids(bare_tokenizer(), ["No", "No"])


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a blank before every text that stands alone, then one before each word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["Answer: Yes No Will the viewer like it? Nothing"] * 9, trainer)
    tokenizer.pre_tokenizer = None
    blank = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_answers_are_tokenised_behind_the_question():
    tokenizer = llama2_tokenizer()
    assert [tokenizer.tokenize(word)[0] for word in WORDS] == ["\u2581", "\u2581"]  # alone: a blank each
    question = "\nWill the viewer like it? Answer:"
    for behind in (question, tokenizer.encode(question, add_special_tokens=False)):
        ids = answer_token_ids(tokenizer, WORDS, behind=behind)
        assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581Yes", "\u2581No"]
        assert ids == [tokenizer.encode(f"{question}{word}")[-1] for word in WORDS]
    with pytest.raises(ValueError, match="begin with the same token"):
        answer_token_ids(tokenizer, [" No", " No No"], behind=question)


def test_byte_level_tokens_are_the_same_behind_a_question(tiny):
    alone = answer_token_ids(tiny.tokenizer, WORDS)
    assert answer_token_ids(tiny.tokenizer, WORDS, behind="\nWill the user like it? Answer:") == alone


def test_an_answer_that_joins_the_end_of_the_question_is_logged(caplog):
    assert answer_token_ids(bare_tokenizer(), ["es", "o"], behind="Y") == [1, 6]
    assert "joins the end of the prompt 'Y' and the answer word 'es' into one token 'Ye'" in caplog.text


def test_answer_words_of_several_tokens_use_the_first(caplog):
    with caplog.at_level("INFO", logger="recbole_llm.backbone.answers"):
        assert answer_token_ids(bare_tokenizer(), ["Yes", "No"]) == [1, 5]
    assert "'Yes' is 2 tokens" in caplog.text


@pytest.mark.parametrize("word", ["", "  "])
def test_empty_answer_words_are_refused(tiny, word):
    with pytest.raises(ValueError, match="empty"):
        answer_token_ids(tiny.tokenizer, [" Yes", word])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12), batch_tokens=st.sampled_from([1, 40, 4096])
)
def test_mean_pooled_vectors_are_the_mean_of_the_last_states(tiny, lengths, batch_tokens):
    texts = draw_prompts(len(tiny.tokenizer), lengths)
    got = mean_pooled_vectors(tiny.model, texts, batch_tokens=batch_tokens)
    assert got.shape == (len(texts), 32) and got.dtype == np.float32
    with torch.no_grad():
        for vector, text in zip(got, texts, strict=True):
            states = tiny.model.model(input_ids=torch.as_tensor(text)[None]).last_hidden_state[0]
            np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-5)


def test_mean_pooled_vectors_refuse_empty_texts(tiny):
    with pytest.raises(ValueError, match="text 1 is empty"):
        mean_pooled_vectors(tiny.model, [np.array([1]), np.array([], dtype=np.int64)])
