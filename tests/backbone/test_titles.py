"""titles.py: scores are those of each title written out behind its prompt, alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.personalized import attach_adapter
from recbole_llm.backbone import titles
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.backbone.tiny import tiny_backbone
from recbole_llm.backbone.title_trie import TitleTrie
from recbole_llm.backbone.titles import answer_log_likelihood, generate_titles, score_titles

END = 10  # any token can be the terminator
# Common beginnings, titles that are the beginning of others (with and without the terminator), equal ones.
TITLES = [
    np.array(title)
    for title in (
        [5, 6, 7, END],
        [5, 6, END],
        [5, 6, 8, 9, 11, END],
        [20, END],
        [5, 6, END],
        [END],
        [5, 6, END, END],
        [5, 6, 7],
        [30, 31, 32, 33, 34, 35, 36, END],
    )
]


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny", dtype="float32")


@pytest.fixture(scope="module")
def tiny64():
    return load_backbone("tiny", dtype="float64")


def draw_prompts(model, lengths, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Prompts [length, d] whose every third position is no token, and their right-padded batch."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for length in lengths:
        prompt = embedding(torch.randint(0, 300, (length,), generator=generator)).detach()
        slots = torch.randn(prompt[::3].shape, generator=generator).to(prompt.dtype)
        prompt[::3] = slots * prompt.std()
        prompts.append(prompt)
    # Loud padding: whoever looks at it is found out.
    batch = torch.full((len(prompts), max(lengths) + 2, prompts[0].shape[1]), 50.0, dtype=prompts[0].dtype)
    for row, prompt in zip(batch, prompts, strict=True):
        row[: len(prompt)] = prompt
    return prompts, batch, torch.tensor(lengths)


@torch.no_grad()
def written_out(model, prompt: torch.Tensor, title: np.ndarray) -> float:
    """The slow truth: one prompt with one title behind it, all logits at all positions."""
    title = torch.as_tensor(title)
    embeds = torch.cat([prompt, model.get_input_embeddings()(title[:-1]).to(prompt.dtype)])
    logits = model(inputs_embeds=embeds[None]).logits[0, len(prompt) - 1 :].double()
    return float(logits.log_softmax(-1)[torch.arange(len(title)), title].sum())


def all_written_out(model, prompts, candidates) -> list[torch.Tensor]:
    return [
        torch.tensor([written_out(model, prompt, title) for title in own], dtype=torch.float64)
        for prompt, own in zip(prompts, candidates, strict=True)
    ]


def assert_scores(got, expected, tolerance: float) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=0)


def paths(trie: TitleTrie) -> list[list[int]]:
    """Each node's tokens from the first one on."""
    found: list[list[int]] = []
    for token, parent in zip(trie.tokens, trie.parents, strict=True):
        assert parent < len(found), "a parent comes before its children"
        found.append(([] if parent < 0 else found[parent]) + [int(token)])
    return found


# ---------------------------------------------------------------------- the tree

some_titles = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(titles=some_titles)
def test_trie_holds_every_beginning_once(titles):
    trie = TitleTrie([np.array(title) for title in titles])
    beginnings = {tuple(title[: end + 1]) for title in titles for end in range(len(title))}
    found = paths(trie)
    assert trie.n_edges == len(found) == len(beginnings) and {tuple(path) for path in found} == beginnings
    assert trie.n_titles == len(titles)
    assert [found[leaf] for leaf in trie.leaf] == titles
    assert trie.lengths.tolist() == [len(title) for title in titles]
    assert trie.depth.tolist() == [len(path) - 1 for path in found]
    for node, path in enumerate(found):
        below = {other for other, longer in enumerate(found) if longer[: len(path)] == path}
        assert below == set(range(node, trie.ends[node]))
    seen = trie.sees(np.arange(trie.n_edges))
    for q, query in enumerate(found):
        assert seen[q].tolist() == [query[: len(key)] == key for key in found]
    assert sorted(np.concatenate(trie.levels()).tolist()) == list(range(trie.n_edges))


@settings(max_examples=50, deadline=None)
@given(titles=some_titles, max_nodes=st.integers(5, 12))
def test_pieces_compute_each_node_once_with_its_ancestors(titles, max_nodes):
    trie = TitleTrie([np.array(title) for title in titles])
    pieces = trie.chunks(max_nodes)
    owned = [node for piece in pieces for node in piece.nodes[piece.n_ancestors :].tolist()]
    assert owned == sorted(set(trie.parents.tolist()) - {-1})
    for piece in pieces:
        assert piece.n_ancestors < len(piece.nodes) <= max_nodes
        assert (np.diff(piece.nodes) > 0).all()
        assert set(trie.parents[piece.nodes].tolist()) - {-1} <= set(piece.nodes.tolist())
        children = trie.children(piece.nodes[piece.n_ancestors :])
        mine = np.isin(trie.parents, piece.nodes[piece.n_ancestors :])
        assert sorted(children.tolist()) == np.flatnonzero(mine).tolist()


@settings(max_examples=50, deadline=None)
@given(titles=some_titles)
def test_chains_are_paths_that_own_each_node_once(titles):
    trie = TitleTrie([np.array(title) for title in titles])
    pieces = trie.chains()
    owned = [node for piece in pieces for node in piece.nodes[piece.n_ancestors :].tolist()]
    assert owned == sorted(set(trie.parents.tolist()) - {-1})
    for piece in pieces:
        assert piece.n_ancestors < len(piece.nodes)
        assert trie.parents[piece.nodes].tolist() == [-1, *piece.nodes[:-1].tolist()]


def test_pieces_of_a_real_catalogue_compute_little_twice():
    with open(
        Path(recbole.__file__).parent / "dataset_example/ml-100k/ml-100k.item", encoding="utf-8"
    ) as file:
        names = [row["movie_title:token_seq"] for row in csv.DictReader(file, delimiter="\t")]
    tokenizer = tiny_backbone(names)[1]
    trie = TitleTrie([np.array(tokenizer.encode(f" {name}\n", add_special_tokens=False)) for name in names])
    assert trie.n_titles > 1600
    pieces = trie.chunks(512)
    computed = sum(len(piece.nodes) for piece in pieces)
    assert len(pieces) > 5 and computed <= 1.1 * trie.n_edges
    assert trie.n_edges < 0.9 * trie.lengths.sum()  # worth a tree


def test_titles_that_make_no_tree_are_refused():
    with pytest.raises(ValueError, match="at least one title"):
        TitleTrie([])
    with pytest.raises(ValueError, match="title 1 has no tokens"):
        TitleTrie([np.array([1]), np.array([], dtype=np.int64)])
    for wrong in (np.array([1.0, 2.0]), np.array([[1]]), np.array([3, -1])):
        with pytest.raises(ValueError, match="title 0 must be a list of token ids"):
            TitleTrie([wrong])
    with pytest.raises(ValueError, match="max_nodes 6 is too small.*needs 7"):
        TitleTrie(TITLES).chunks(6)
    assert len(TitleTrie(TITLES).chunks(7)) > 1


# ---------------------------------------------------------------------- scoring

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = {
    **SMALL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SLIDING = {**LLAMA_LIKE, "sliding_window": 5}
ARCHITECTURES = {
    "llama": lambda: tiny_backbone()[0],
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    ),
    "normed keys, eager": lambda: eager(Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE))),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SLIDING)),
    "two kinds of layers, soft caps": lambda: eager(
        Gemma2ForCausalLM(
            Gemma2Config(
                **SLIDING, final_logit_softcapping=2.0, layer_types=["sliding_attention", "full_attention"]
            )
        )
    ),
}


def eager(model):
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[request.param]().float().eval()


def test_scores_are_those_of_titles_written_out(architecture):
    prompts, batch, lengths = draw_prompts(architecture, [9, 1])
    expected = all_written_out(architecture, prompts, [TITLES] * 2)
    for max_nodes in (8, 512):
        scores = score_titles(architecture, batch, lengths, TitleTrie(TITLES), max_nodes=max_nodes)
        assert all(total.dtype == torch.float32 for total in scores.log_likelihood)
        assert_scores(scores.log_likelihood, expected, 1e-4)
        assert all(count.tolist() == [len(title) for title in TITLES] for count in scores.lengths)
    assert torch.stack(scores.log_likelihood).std(dim=0).min() > 1e-3  # the prompt matters


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    titles=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    max_nodes=st.integers(4, 12),
)
def test_scores_agree_to_float64(tiny64, lengths, titles, seed, max_nodes):
    prompts, batch, counts = draw_prompts(tiny64.model, lengths, seed)
    titles = [np.array(title) for title in titles]
    scores = score_titles(tiny64.model, batch, counts, TitleTrie(titles), max_nodes=max_nodes)
    expected = all_written_out(tiny64.model, prompts, [titles] * len(prompts))
    assert all(total.dtype == torch.float64 for total in scores.log_likelihood)
    assert_scores(scores.log_likelihood, expected, 1e-11)


def test_each_row_can_have_its_own_titles(tiny64):
    prompts, batch, lengths = draw_prompts(tiny64.model, [4, 12, 7, 7])
    candidates = [TITLES, TITLES[3:4], TITLES[::2], [np.array([END])]]
    tries = [TitleTrie(own) for own in candidates]
    for max_nodes in (8, 512):
        scores = score_titles(tiny64.model, batch, lengths, tries, max_nodes=max_nodes)
        assert_scores(scores.log_likelihood, all_written_out(tiny64.model, prompts, candidates), 1e-11)
        assert [count.tolist() for count in scores.lengths] == [trie.lengths.tolist() for trie in tries]
    with pytest.raises(ValueError, match="3 tries for 4 prompts"):
        score_titles(tiny64.model, batch, lengths, tries[:3])


def test_equal_titles_have_equal_scores(tiny):
    _, batch, lengths = draw_prompts(tiny.model, [4, 6])
    for row in score_titles(tiny.model, batch, lengths, TitleTrie(TITLES)).log_likelihood:
        assert row[1] == row[4] and row[1] != row[0]


def test_neighbours_and_padding_do_not_matter(tiny64):
    prompts, batch, lengths = draw_prompts(tiny64.model, [5, 30, 2])
    together = score_titles(tiny64.model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    for number, prompt in enumerate(prompts):
        (alone,) = score_titles(
            tiny64.model, prompt[None], lengths[number : number + 1], TitleTrie(TITLES)
        ).log_likelihood
        torch.testing.assert_close(together[number], alone, atol=1e-11, rtol=0)


def test_every_computed_position_is_counted_and_no_other_is_run(tiny):
    _, batch, lengths = draw_prompts(tiny.model, [5, 9])
    trie = TitleTrie(TITLES)
    sizes = []
    handle = tiny.model.model.layers[0].register_forward_hook(
        lambda _, args, output: sizes.append(args[0].shape[1])
    )
    one = score_titles(tiny.model, batch, lengths, trie)
    assert sizes == [9, 15]  # the longest prompt; then the nodes with children, counted by hand
    assert one.tokens == 5 + 9 + 2 * 15
    sizes.clear()
    many = score_titles(tiny.model, batch, lengths, trie, max_nodes=8)
    handle.remove()
    assert sizes[0] == 9 and max(sizes[1:]) <= 8 and many.tokens == 5 + 9 + 2 * sum(sizes[1:])
    own = score_titles(tiny.model, batch, lengths, [TitleTrie(TITLES[:1]), TitleTrie(TITLES[3:4])])
    assert own.tokens == 5 + 9 + 3 + 1


def test_logits_taken_in_slices_are_the_same(tiny, monkeypatch):
    _, batch, lengths = draw_prompts(tiny.model, [5, 9])
    whole = score_titles(tiny.model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    monkeypatch.setattr(titles, "LOGITS_AT_ONCE", 1)
    sliced = score_titles(tiny.model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    assert all(torch.equal(one, other) for one, other in zip(whole, sliced, strict=True))


def personalised(mixer: str = "expert", targets: tuple[str, ...] = ("q_proj", "v_proj")):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = attach_adapter(
            tiny_backbone()[0].double(),
            AdapterConfig(mixer, instance_size=6, num_experts=4, r=8, target_modules=list(targets)),
        )
        for parameter in adapter.lora_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.peft_model.eval()
    return adapter


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head")], ids=["body", "head too"])
def test_personalised_adapters_give_each_row_its_own_scores(targets):
    adapter = personalised(targets=targets)
    prompts, batch, lengths = draw_prompts(adapter.model, [4, 9, 6])
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    adapter.set_instance(z)
    got = score_titles(adapter.peft_model, batch, lengths, TitleTrie(TITLES), max_nodes=8).log_likelihood
    own = score_titles(adapter.peft_model, batch, lengths, [TitleTrie(TITLES)] * 3).log_likelihood
    inner = score_titles(adapter.model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    expected = []
    for row, prompt in enumerate(prompts):
        adapter.set_instance(z[row : row + 1])
        expected += all_written_out(adapter.peft_model, [prompt], [TITLES])
    for scores in (got, own, inner):
        assert_scores(scores, expected, 1e-10)
    adapter.set_instance(z.flip(0))
    other = score_titles(adapter.peft_model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    assert (other[0] - got[0]).abs().max() > 1e-3
    with adapter.disabled():
        plain = score_titles(adapter.peft_model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    assert (plain[0] - got[0]).abs().max() > 1e-3


def test_half_precision_scores_are_not_rounded_to_half_precision():
    model = load_backbone("tiny", dtype="bfloat16").model
    (prompt,), _, lengths = draw_prompts(model, [9])
    one_token = [np.array([token]) for token in range(100)]
    (got,) = score_titles(model, prompt[None], lengths, TitleTrie(one_token)).log_likelihood
    with torch.no_grad():
        state = model.model(inputs_embeds=prompt[None]).last_hidden_state[0, -1]  # the same bits: no padding
        logits = state.float() @ model.get_output_embeddings().weight.float().T
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits.log_softmax(-1)[:100], atol=1e-4, rtol=0)
    assert (got - logits.bfloat16().float().log_softmax(-1)[:100]).abs().max() > 1e-3
    with torch.no_grad():
        one = answer_log_likelihood(model, prompt[None], lengths, one_token[7:8])
    torch.testing.assert_close(one, got[7:8], atol=1e-4, rtol=0)


def test_a_sliding_window_closes_at_the_right_token():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**SLIDING)).double().eval()  # a window of 5
    for length in range(1, 5):  # three inputs of the title behind it: the last sees 4, 5, 6 or 7 tokens
        prompts, batch, lengths = draw_prompts(model, [length])
        scores = score_titles(model, batch, lengths, TitleTrie(TITLES[:1])).log_likelihood
        assert_scores(scores, all_written_out(model, prompts, [TITLES[:1]]), 1e-11)


def test_checkpointing_in_train_mode_scores_alike_or_is_refused(tiny):
    """Transformers below 5.24 drops the cache then; later ones keep it where no gradient is wanted."""
    _, batch, lengths = draw_prompts(tiny.model, [4, 9])
    model = tiny_backbone()[0]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    try:
        got = score_titles(model.train(), batch, lengths, TitleTrie(TITLES)).log_likelihood
    except ValueError as error:
        assert "call model.eval()" in str(error)
        return
    expected = score_titles(tiny.model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_what_cannot_be_scored_is_refused(tiny):
    _, batch, lengths = draw_prompts(tiny.model, [4, 9])
    trie = TitleTrie(TITLES)
    with pytest.raises(ValueError, match=r"prompt_lengths must lie between 1 and .* 11, got \[0, 12\]"):
        score_titles(tiny.model, batch, torch.tensor([0, 12]), trie)
    with pytest.raises(ValueError, match="prompt_embeds"):
        score_titles(tiny.model, batch, lengths[:1], trie)
    with pytest.raises(ValueError, match="token 5000, but the model's vocabulary"):
        score_titles(tiny.model, batch, lengths, TitleTrie([np.array([5000, END])]))
    alibi = MptForCausalLM(MptConfig(vocab_size=300, d_model=32, n_layers=1, n_heads=4))
    with pytest.raises(ValueError, match="MptForCausalLM: it takes no position_ids"):
        score_titles(alibi, batch, lengths, trie)
    model = tiny_backbone()[0]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2': load it with attn_implementation"):
        score_titles(model, batch, lengths, trie)
    head = tiny.model.get_output_embeddings()
    assert not head._forward_hooks and not head._forward_pre_hooks


# ---------------------------------------------------------------------- one answer, for training


def with_answers(model, prompts, answers) -> torch.Tensor:
    """Each prompt with its answer (but the last token) behind it, right-padded with something loud."""
    inputs = [
        torch.cat([prompt, model.get_input_embeddings()(torch.as_tensor(answer[:-1])).to(prompt.dtype)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=50.0)


def test_likelihood_of_one_answer_is_that_of_the_trie_and_of_the_truth(architecture):
    prompts, batch, lengths = draw_prompts(architecture, [3, 9, 6])
    answers = [TITLES[2], TITLES[5], TITLES[8]]
    with torch.no_grad():
        got = answer_log_likelihood(
            architecture, with_answers(architecture, prompts, answers), lengths, answers
        )
    assert got.shape == (3,) and got.dtype == torch.float32
    expected = [written_out(architecture, *pair) for pair in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
    in_tree = score_titles(architecture, batch, lengths, TitleTrie(TITLES)).log_likelihood
    torch.testing.assert_close(
        got, torch.stack([in_tree[0][2], in_tree[1][5], in_tree[2][8]]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_one_answer_are_those_of_the_full_forward(checkpointing):
    adapter = personalised("factor")
    if checkpointing:
        adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter.peft_model.train()
        for module in adapter.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    prompts, _, lengths = draw_prompts(adapter.model, [3, 9])
    answers = [TITLES[2], TITLES[0]]
    embeds = with_answers(adapter.model, prompts, answers).detach().requires_grad_()
    adapter.set_instance(torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    weights = [embeds, *adapter.lora_parameters().values(), *adapter.gate_parameters().values()]
    weights = [weight for weight in weights if weight.requires_grad]
    got = torch.autograd.grad(
        answer_log_likelihood(adapter.peft_model, embeds, lengths, answers).square().sum(), weights
    )
    logits = adapter.peft_model(inputs_embeds=embeds, use_cache=False).logits.log_softmax(-1)
    sums = [
        sum(logits[row, length - 1 + t, token] for t, token in enumerate(answer))
        for row, (length, answer) in enumerate(zip(lengths.tolist(), answers, strict=True))
    ]
    expected = torch.autograd.grad(torch.stack(sums).square().sum(), weights)
    assert len(weights) > 5 and all(gradient.abs().max() > 0 for gradient in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    assert (got[0][0, 3 + 6 - 1 :] == 0).all()  # padding


def test_answers_that_do_not_fit_are_refused(tiny):
    embeds = torch.zeros(2, 6, 32)
    answers = [np.array([1, 2, 3]), np.array([1])]
    answer_log_likelihood(tiny.model, embeds, torch.tensor([4, 6]), answers)
    for lengths in ([5, 6], [4, 7], [0, 2]):
        with pytest.raises(ValueError, match="do not fit into embeds of width 6"):
            answer_log_likelihood(tiny.model, embeds, torch.tensor(lengths), answers)
    with pytest.raises(ValueError, match="B answers expected"):
        answer_log_likelihood(tiny.model, embeds, torch.tensor([4, 6]), answers[:1])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        answer_log_likelihood(tiny.model, embeds, torch.tensor([4, 6]), [answers[0], np.array([])])


# ---------------------------------------------------------------------- writing


@torch.no_grad()
def greedy(model, prompt: torch.Tensor, stop_ids, max_new_tokens: int) -> list[int]:
    """The slow truth: the whole text again for each token."""
    written: list[int] = []
    while len(written) < max_new_tokens:
        behind = model.get_input_embeddings()(torch.tensor(written, dtype=torch.int64)).to(prompt.dtype)
        logits = model(inputs_embeds=torch.cat([prompt, behind])[None]).logits[0, -1]
        if (token := int(logits.argmax())) in stop_ids:
            break
        written.append(token)
    return written


def test_writing_in_a_batch_is_writing_each_alone(architecture):
    prompts, batch, lengths = draw_prompts(architecture, [3, 7])
    free = [greedy(architecture, prompt, [], 7) for prompt in prompts]
    got = generate_titles(architecture, batch, lengths, stop_ids=[], max_new_tokens=7)
    assert [text.tolist() for text in got] == free and all(text.dtype == np.int64 for text in got)
    # A token that one row writes late and one that another writes at once: rows stop at different times.
    stops = [free[0][5], free[1][0]]
    got = generate_titles(architecture, batch, lengths, stop_ids=stops, max_new_tokens=7)
    cut = [next((t for t, token in enumerate(text) if token in stops), 7) for text in free]
    assert [text.tolist() for text in got] == [text[:end] for text, end in zip(free, cut, strict=True)]
    assert len(got[1]) == 0 and len(got[0]) <= 5


def test_writing_ignores_what_the_model_would_like_to_generate_with():
    model = tiny_backbone()[0].double().eval()
    _, batch, lengths = draw_prompts(model, [3, 9])
    calm = generate_titles(model, batch, lengths, stop_ids=[END], max_new_tokens=8)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, suppress_tokens=[int(calm[0][0])]
    )
    again = generate_titles(model, batch, lengths, stop_ids=[END], max_new_tokens=8)
    assert [text.tolist() for text in again] == [text.tolist() for text in calm]


def test_writing_with_personalised_adapters():
    adapter = personalised()
    prompts, batch, lengths = draw_prompts(adapter.model, [4, 9])
    z = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    adapter.set_instance(z)
    got = generate_titles(adapter.peft_model, batch, lengths, stop_ids=[END], max_new_tokens=8)
    for row, prompt in enumerate(prompts):
        adapter.set_instance(z[row : row + 1])
        assert got[row].tolist() == greedy(adapter.peft_model, prompt, [END], 8)


def test_writing_nothing_is_refused(tiny):
    _, batch, lengths = draw_prompts(tiny.model, [3])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        generate_titles(tiny.model, batch, lengths, stop_ids=[], max_new_tokens=0)
    (text,) = generate_titles(tiny.model, batch, lengths, stop_ids=[], max_new_tokens=1)
    assert len(text) == 1
