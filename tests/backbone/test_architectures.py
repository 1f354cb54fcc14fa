"""Ten architectures, tiny and random: prompts, titles and adapters are exact in each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from formulas import export_instance
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_architectures import CASES, DEFAULT, TOKENIZER, Case, build
from torch import Tensor

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.personalized import PersonalizedAdapter, attach_adapter
from recbole_llm.adapter.targets import LLAMA_PROJECTIONS, resolve_targets
from recbole_llm.backbone.answers import answer_logits, answer_token_ids, mean_pooled_vectors, pad_right
from recbole_llm.backbone.title_trie import TitleTrie
from recbole_llm.backbone.titles import answer_log_likelihood, generate_titles, score_titles
from recbole_llm.utils.causal_lm import check_length, decoder_layers, layer_sizes, position_limit, projections

TITLES = [TOKENIZER.encode(title) for title in (" Heat\n", " Toy Story\n", " Toy Story 2\n", " Toy\n", "\n")]
TITLES = [np.array(title) for title in TITLES]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case) -> hf.PreTrainedModel:
    """In float32; not to be changed."""
    return build(case)


def prompts_of(lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, len(TOKENIZER), size=length) for length in lengths]


def embedded(model: hf.PreTrainedModel, prompts: list[np.ndarray]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Each prompt's embeddings, and all of them right-padded with something loud."""
    with torch.no_grad():
        rows = [model.get_input_embeddings()(torch.as_tensor(prompt)) for prompt in prompts]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=50.0)
    return rows, batch, torch.tensor([len(row) for row in rows])


@torch.no_grad()
def written_out(model: torch.nn.Module, prompt: np.ndarray, title: np.ndarray) -> float:
    """The slow truth: the whole text alone, as token ids, without cache or mask."""
    text = torch.as_tensor(np.concatenate([prompt, title[:-1]]))[None]
    log_p = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
    return float(log_p[torch.arange(len(title)), torch.as_tensor(title)].sum())


# ---------------------------------------------------------------------- what the modules show


def test_sizes_come_from_the_modules(case, model):
    sizes = layer_sizes(model)
    assert (sizes.layers, sizes.hidden, sizes.intermediate) == (2, 32, case.intermediate)
    assert len(decoder_layers(model)) == 2
    assert position_limit(model) == case.positions
    attached = attach_adapter(build(case), AdapterConfig("identity", 1, r=2), strict=False)
    assert layer_sizes(attached.model) == sizes and position_limit(attached.model) == case.positions


def test_default_targets(case, model, caplog):
    assert resolve_targets(model, DEFAULT, strict=False) == case.targets
    assert bool(caplog.records) == (case.targets != DEFAULT)
    # The papers that adapt all seven projections of a Llama layer get all of the layer at hand.
    everywhere = {name for name in projections(model) if any(part.isdigit() for part in name.split("."))}
    found = resolve_targets(model, LLAMA_PROJECTIONS, strict=False)
    assert {name for name in everywhere if name.endswith(tuple(f".{end}" for end in found))} == everywhere


def test_names_that_the_user_chose_are_not_replaced():
    model = build(CASES["GPT-2"])
    with pytest.raises(
        ValueError, match=r"'q_proj' matches no layer of GPT2LMHeadModel.*c_attn.*c_fc.*c_proj"
    ):
        resolve_targets(model, DEFAULT)
    with pytest.raises(ValueError, match="'query' matches no layer"):
        resolve_targets(model, ["query"], strict=False)
    unknown = build(CASES["GPT-2"])
    unknown.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="'q_proj' matches no layer"):
        resolve_targets(unknown, DEFAULT, strict=False)


# ---------------------------------------------------------------------- answers


def test_answers_do_not_depend_on_the_batch(model):
    prompts = prompts_of([3, 20, 1, 9])
    ids = answer_token_ids(TOKENIZER, (" Yes", " No"), behind="\nAnswer:")
    with torch.no_grad():
        together = answer_logits(model, *pad_right(prompts, TOKENIZER.pad_token_id), ids)
        alone = torch.stack(
            [model(input_ids=torch.as_tensor(prompt)[None]).logits[0, -1, ids] for prompt in prompts]
        )
        _, batch, lengths = embedded(model, prompts)
        by_embeddings = answer_logits(model, batch, lengths, ids)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_embeddings, alone, atol=1e-4, rtol=0)
    assert alone.std(dim=0).min() > 1e-2  # the prompt matters


def test_text_vectors_do_not_depend_on_the_batch(model):
    prompts = prompts_of([3, 11])
    together = mean_pooled_vectors(model, prompts)
    alone = [mean_pooled_vectors(model, [prompt])[0] for prompt in prompts]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


# ---------------------------------------------------------------------- titles


def test_titles_behind_a_shared_prompt_equal_full_prompts(model):
    prompts = prompts_of([2, 17, 9])
    expected = torch.tensor(
        [[written_out(model, prompt, title) for title in TITLES] for prompt in prompts], dtype=torch.float64
    )
    rows, batch, lengths = embedded(model, prompts)
    for tries in (TitleTrie(TITLES), [TitleTrie(TITLES)] * 3):
        for max_nodes in (6, 512):
            scores = score_titles(model, batch, lengths, tries, max_nodes=max_nodes)
            got = torch.stack(scores.log_likelihood).double()
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    own = [TitleTrie(TITLES[:1]), TitleTrie(TITLES), TitleTrie(TITLES[2:4])]
    different = score_titles(model, batch, lengths, own).log_likelihood
    for row, part in enumerate((slice(0, 1), slice(None), slice(2, 4))):
        torch.testing.assert_close(different[row].double(), expected[row, part], atol=1e-4, rtol=0)
    answers = [TITLES[2], TITLES[0], TITLES[4]]
    with torch.no_grad():
        inputs = [
            torch.cat([row, model.get_input_embeddings()(torch.as_tensor(answer[:-1]))])
            for row, answer in zip(rows, answers, strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=50.0)
        one = answer_log_likelihood(model, padded, lengths, answers)
    wanted = torch.stack([expected[0, 2], expected[1, 0], expected[2, 4]])
    torch.testing.assert_close(one.double(), wanted, atol=1e-4, rtol=0)


def test_titles_written_in_a_batch_equal_each_alone(model):
    prompts = prompts_of([2, 9])
    _, batch, lengths = embedded(model, prompts)
    for prompt, got in zip(
        prompts, generate_titles(model, batch, lengths, stop_ids=[], max_new_tokens=7), strict=True
    ):
        text = list(prompt)
        for _ in range(7):
            with torch.no_grad():
                text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        assert got.tolist() == text[len(prompt) :]


@pytest.mark.parametrize("name", ["OPT", "GPT-2"])
def test_prompts_beyond_the_table_of_positions_are_refused(name):
    model = build(CASES[name])
    check_length(model, 96)
    refusal = f"{type(model).__name__} has 96 learned positions, but prompt and answer have"
    with pytest.raises(ValueError, match=f"{refusal} 97: set max_prompt_tokens"):
        answer_logits(model, *pad_right(prompts_of([97]), 0), [3, 4])
    _, batch, lengths = embedded(model, prompts_of([95]))
    longest = max(map(len, TITLES))
    with pytest.raises(ValueError, match=f"{refusal} {95 + longest - 1}:"):
        score_titles(model, batch, lengths, TitleTrie(TITLES))
    with pytest.raises(ValueError, match=f"{refusal} 104:"):
        generate_titles(model, batch, lengths, stop_ids=[], max_new_tokens=10)
    score_titles(model, *embedded(model, prompts_of([97 - longest]))[1:], TitleTrie(TITLES))


# ---------------------------------------------------------------------- adapters


def adapted(case: Case, mixer: str, targets: list[str] | None = None, **settings) -> PersonalizedAdapter:
    """An adapter in float64; B is zero, as at the start of training."""
    config = AdapterConfig(
        mixer, instance_size=6, num_experts=4, r=4, target_modules=targets or DEFAULT, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return attach_adapter(build(case, torch.float64), config, strict=targets is not None)


def trained(adapter: PersonalizedAdapter) -> PersonalizedAdapter:
    """As if after some training: B and the last layers of dense gates are zero at the start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in (adapter.lora_parameters() | adapter.gate_parameters()).items():
            if not name.endswith("lora_A"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    adapter.peft_model.eval()
    return adapter


INSTANCES = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("mixer", ["identity", "expert", "output", "factor", "dense"])
def test_adapters_start_as_the_base_model_and_learn(case, mixer):
    plain = build(case, torch.float64)
    adapter = adapted(case, mixer)
    adapter.set_instance(INSTANCES)
    batch = pad_right(prompts_of([4, 9, 6]), 0)
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(adapter.peft_model, *batch, [3, 4]), answer_logits(plain, *batch, [3, 4])
        )
    assert {name.rsplit(".", 2)[-2] for name in adapter.lora_parameters()} == set(case.targets)
    trained(adapter).peft_model.train()
    adapter.set_instance(INSTANCES)
    answer_logits(adapter.peft_model, *batch, [3, 4]).square().sum().backward()
    for name, parameter in (adapter.lora_parameters() | adapter.gate_parameters()).items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for n, p in adapter.model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("targets", [None, "all"], ids=["default", "all projections"])
@pytest.mark.parametrize("mixer", ["expert", "factor", "dense"])
def test_gated_projections_equal_the_formula(case, mixer, targets):
    """Every adapted projection: ``y = W0 x + s B M(z) A x``, in float64, from the weights themselves."""
    chosen = resolve_targets(build(case), LLAMA_PROJECTIONS, strict=False) if targets else None
    adapter = trained(adapted(case, mixer, chosen))
    seen = {}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        seen[name] = x.clone(), y.clone()  # Falcon adds to a projection's output in place

    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: see(name, args[0], out))
        for name, module in adapter.model.named_modules()
        if hasattr(module, "lora_gate")
    ]
    adapter.set_instance(INSTANCES)
    with torch.no_grad():
        adapter.peft_model(input_ids=pad_right(prompts_of([9, 9, 9]), 0)[0])
    for handle in handles:
        handle.remove()
    assert len(seen) == len(adapter.lora_parameters()) // 2
    for name, (x, y) in seen.items():
        layer = adapter.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        gate = layer.lora_gate["default"](INSTANCES)
        k, r = 4, 4
        if mixer == "expert":
            m = torch.diag_embed(gate.repeat_interleave(r // k, dim=1))
        elif mixer == "factor":
            m = torch.stack([torch.kron(torch.outer(g, g), torch.eye(r, dtype=g.dtype)) for g in gate])
        else:
            m = gate
        x, y = (t.reshape(3, 9, -1) for t in (x, y))
        expected = layer.base_layer(x) + adapter.config.scale * x @ a.T @ m.transpose(1, 2) @ b.T
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)


def test_plain_lora_is_pefts_own(case):
    adapter = trained(adapted(case, "identity"))
    model = get_peft_model(
        build(case, torch.float64),
        LoraConfig(r=4, lora_alpha=16, target_modules=case.targets, task_type="CAUSAL_LM"),
    ).eval()
    with torch.no_grad():
        for name, parameter in adapter.lora_parameters().items():
            model.get_parameter(f"base_model.model.{name}.default.weight").copy_(parameter)
        batch = pad_right(prompts_of([4, 9]), 0)
        torch.testing.assert_close(
            answer_logits(adapter.peft_model, *batch, [3, 4]), answer_logits(model, *batch, [3, 4])
        )


@pytest.mark.parametrize("name", ["GPT-2", "BLOOM", "OPT"])
def test_one_instance_is_exported_as_a_lora_that_peft_merges(name, tmp_path):
    case = CASES[name]
    adapter = trained(adapted(case, "factor"))
    batch = pad_right(prompts_of([4, 9]), 0)
    adapter.set_instance(INSTANCES[:1].expand(2, -1))
    with torch.no_grad():
        expected = answer_logits(adapter.peft_model, *batch, [3, 4])
        export_instance(adapter, INSTANCES[:1], tmp_path)
        loaded = PeftModel.from_pretrained(build(case, torch.float64), tmp_path).eval()
        torch.testing.assert_close(answer_logits(loaded, *batch, [3, 4]), expected, atol=1e-5, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(answer_logits(merged, *batch, [3, 4]), expected, atol=1e-5, rtol=0)


def test_adapters_give_each_row_its_own_titles(case):
    adapter = trained(adapted(case, "expert"))
    prompts = prompts_of([2, 9, 5])
    _, batch, lengths = embedded(adapter.model, prompts)
    adapter.set_instance(INSTANCES)
    got = score_titles(adapter.peft_model, batch, lengths, TitleTrie(TITLES)).log_likelihood
    for row, prompt in enumerate(prompts):
        adapter.set_instance(INSTANCES[row : row + 1])
        expected = [written_out(adapter.peft_model, prompt, title) for title in TITLES]
        torch.testing.assert_close(got[row], torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)
