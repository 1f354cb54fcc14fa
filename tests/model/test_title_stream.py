"""Next-item models on streams: no title sees itself or what comes later, and nothing depends on the batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.cli import report as printed
from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.streams import Chunk, StreamBatch, interactions_at
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm

STREAM = {
    "task": "next_item",
    "layout": "stream",
    "few_shot": 300,
    "eval_rows": None,
    "max_prompt_tokens": 128,
    "text_history_length": 6,
    "stream_lead": 2,
    "train_batch_size": 40,
    "micro_batch_size": 4,
    "num_negatives": 9,
    "topk": [1, 5],
    "valid_metric": "NDCG@5",
    "lens_config": {"epochs": 2, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1},
    "compare_with": None,
}
MODELS = {
    "TALLRecNext": {},
    "LLaRA": {},
    "iLoRA": {},
    "iLoRA factor": {"mixer": "factor"},
    "iLoRA dense": {"mixer": "dense"},
    "iLoRA random": {"gate": "random"},
    "iLoRA shuffled": {"gate": "shuffled"},
}
TIES = pytest.mark.parametrize("ties", ["order", "strict"])


@pytest.fixture
def streams_of(parts_of, disturb):
    """``streams_of(name, **options)``: the parts of a run, trained parameters changed, slots holding item vectors.

    They are changed a little only: all seven projections are adapted, and attention that is certain of one token would
    hide the others, and make much of rounding.
    """

    def build(name: str, **options):
        parts = parts_of(name.split()[0], **{**STREAM, **MODELS.get(name, {}), **options})
        disturb(parts.model, 0.05)
        parts.model._hybrid_step = parts.model.slots
        return parts

    return build


def chunk_of(parts, user: int = 3, first: int = 0, targets=None) -> StreamBatch:
    """Interactions of a user from the ``first`` on as a chunk, all of them targets unless given."""
    start, end = parts.dataset.history.user_start[user : user + 2]
    places = np.arange(first, end - start) if targets is None else np.asarray(targets)
    chunk = Chunk(user, int(start) + first, start + places)
    return StreamBatch([chunk], interactions_at(parts.dataset, chunk.targets))


@torch.no_grad()
def titles_in(parts, batch: StreamBatch) -> torch.Tensor:
    """Mean log-likelihood of each target's title, ``[k]``."""
    (micro,) = parts.model.micro_batches(batch)
    return parts.model.title_log_likelihood(micro)


@torch.no_grad()
def logits_of(parts, batch: StreamBatch) -> tuple[torch.Tensor, np.ndarray]:
    """All logits of one chunk ``[T, V]`` by the whole model, and the place of each token."""
    model = parts.model
    (micro,) = model.micro_batches(batch)
    model.title_log_likelihood(micro)  # sets the instances
    embedded = model.embed(micro.input_ids, hybrid=model._hybrid_step)
    logits = model.adapter.peft_model(inputs_embeds=embedded, use_cache=False, **micro.attention).logits[0]
    return logits, micro.streams[0].places


# ------------------------------------------------------------------ exactness


@TIES
@pytest.mark.parametrize("name", MODELS)
def test_an_item_changes_no_logit_before_its_own_tokens_and_all_later_titles(streams_of, name, ties):
    parts = streams_of(name, max_prompt_tokens=256, history_ties=ties)
    history = parts.dataset.history
    before, places = logits_of(parts, chunk_of(parts))
    starts = np.unique(places, return_index=True)[1][
        1:
    ]  # the line breaks that predict the titles' first tokens
    for t in (0, 3, 10):
        position = history.user_start[3] + t
        old = history.item_ids[position]
        history.item_ids[position] = 1 + old % 40
        after, now = logits_of(parts, chunk_of(parts))
        n = starts[t] + 1
        assert np.array_equal(places[:n], now[:n])
        torch.testing.assert_close(after[:n], before[:n], rtol=0, atol=1e-5)
        differs = (after[np.unique(now, return_index=True)[1][1:]] - before[starts]).abs().max(dim=1).values
        sees = np.arange(len(starts)) > t
        if ties == "strict":
            sees = history.tie_start[history.user_start[3] + np.arange(len(starts))] > position
        assert sees.any() and (differs[sees] > 1e-5).all() and (differs[~sees] < 1e-5).all()
        history.item_ids[position] = old


@TIES
@pytest.mark.parametrize("name", MODELS)
def test_a_target_is_worth_the_same_alone_and_among_others_and_as_a_prompt(streams_of, name, ties):
    parts = streams_of(name, history_ties=ties)
    whole = titles_in(parts, chunk_of(parts, first=4, targets=range(6, 11)))
    for i, t in enumerate(range(6, 11)):
        alone = titles_in(parts, chunk_of(parts, first=4, targets=[t]))
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5)
    samples = parts.test[np.arange(12)]
    scores = parts.model.score_items(samples, [[item] for item in samples["item_id"].tolist()])
    losses = [parts.model.calculate_loss(samples[i : i + 1]).item() for i in range(12)]
    np.testing.assert_allclose(losses, [-score.item() for score in scores], atol=1e-5)
    assert parts.model.calculate_loss(samples).item() == pytest.approx(np.mean(losses), abs=1e-5)


@TIES
@pytest.mark.parametrize("name", MODELS)
def test_scores_depend_neither_on_the_batch_nor_on_what_comes_later(streams_of, name, ties):
    parts = streams_of(name, history_ties=ties)
    model, history = parts.model, parts.dataset.history
    samples = parts.full_train[np.arange(5, 60, 7)]
    items = [[1, 7, 30]] * len(samples)
    together = torch.stack(model.score_items(samples, items))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(samples)))
    torch.testing.assert_close(
        torch.stack(model.score_items(samples[order], items)), together[order], rtol=0, atol=1e-5
    )
    model.scoring_batch_size = 1
    torch.testing.assert_close(torch.stack(model.score_items(samples, items)), together, rtol=0, atol=1e-5)
    for end, user in zip(samples[HISTORY_END].tolist(), samples["user_id"].tolist(), strict=True):
        later = slice(end, history.user_start[user + 1])
        if name == "iLoRA shuffled":  # its states are those of others, at any time
            continue
        kept = history.item_ids[later].copy()
        history.item_ids[later] = 1 + kept % 40
        one = samples[samples[HISTORY_END] == end]
        torch.testing.assert_close(
            model.score_items(one, items[:1])[0], together[samples[HISTORY_END] == end][0], rtol=0, atol=1e-5
        )
        history.item_ids[later] = kept


def test_no_history_at_all(streams_of):
    parts = streams_of("iLoRA", text_history_length=0)
    samples = parts.test[np.arange(3)]
    scores = parts.model.score_items(samples, [[item] for item in samples["item_id"].tolist()])
    assert parts.prompts.text(samples, 0).count("\n") == 1
    assert parts.model.calculate_loss(samples).item() == pytest.approx(
        -torch.cat(scores).mean().item(), abs=1e-5
    )


def test_the_catalogue_and_listed_items_have_the_same_scores(streams_of):
    parts = streams_of("iLoRA", eval_mode="full", trie_nodes=16)
    samples = parts.test[np.arange(3)]
    everything = parts.model.full_sort_predict(samples)
    listed = torch.stack(parts.model.score_items(samples, [[2, 9, 33]] * 3))
    torch.testing.assert_close(everything[:, [2, 9, 33]], listed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["iLoRA", "iLoRA factor", "iLoRA dense"])
def test_one_state_for_all_interactions_is_the_form_with_one_instance_per_sequence(streams_of, name):
    parts = streams_of(name)
    model, batch = parts.model, chunk_of(parts, first=2, targets=range(5, 15))
    z = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    model.lens.represent = lambda rows: (z.expand(len(rows), -1), torch.zeros(len(rows)))
    found, _ = logits_of(parts, batch)
    (micro,) = model.micro_batches(batch)
    model.adapter.set_instance(z)
    embedded = model.embed(micro.input_ids, hybrid=True)
    with torch.no_grad():
        per_row = model.adapter.peft_model(inputs_embeds=embedded, use_cache=False, **micro.attention).logits[
            0
        ]
    torch.testing.assert_close(found, per_row, rtol=0, atol=1e-5)
    samples = parts.test[np.arange(4)]
    scores = torch.stack(model.score_items(samples, [[3, 4]] * 4))
    model._set_prompt_instances = lambda encoded, rows, *_: model.adapter.set_instance(
        z.expand(len(rows), -1)
    )
    torch.testing.assert_close(
        torch.stack(model.score_items(samples, [[3, 4]] * 4)), scores, rtol=0, atol=1e-5
    )


# ------------------------------------------------------------------ loss


@pytest.mark.parametrize("name", ["TALLRecNext", "iLoRA"])
def test_the_loss_is_the_mean_over_titles_of_the_mean_over_their_tokens(streams_of, name):
    parts = streams_of(name)
    model, prompts = parts.model, parts.prompts
    batch = parts.train_data.collate_fn(parts.train_data.epoch_batches(0)[0])
    losses = []
    for chunk in batch.chunks:
        one = StreamBatch([chunk], interactions_at(parts.dataset, chunk.targets))
        logits, places = logits_of(parts, one)
        for target in chunk.targets:
            answer = prompts.answers[parts.dataset.history.item_ids[target]]
            first = np.flatnonzero(places == target - chunk.start)[0]  # the line break before the title
            found = logits[first : first + len(answer)].log_softmax(-1)
            losses.append(-found[torch.arange(len(answer)), torch.from_numpy(answer)].mean().item())
    assert len(losses) == len(batch) >= 40
    assert model.calculate_loss(batch).item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_gradients_do_not_depend_on_micro_batches_and_reach_what_is_trained(streams_of):
    parts = streams_of("iLoRA")
    batch = parts.train_data.collate_fn(parts.train_data.epoch_batches(0)[0])
    found = []
    for size in (1, 100):
        parts.model.micro_batch_size = size
        parts.model.zero_grad()
        parts.model.calculate_loss(batch).backward()
        found.append({n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-6)
    wanted = {
        name for name, p in parts.model.named_parameters() if p.requires_grad and "empty_slot" not in name
    }
    assert {name for name, grad in found[0].items() if grad.abs().sum() > 0} == wanted


def test_equal_weights_for_all_slices_are_llara(parts_of):
    """So one run is the control of both: iLoRA without a gate's choice, and LLaRA."""
    losses = []
    for name, options in (("iLoRA", {"gate": "uniform"}), ("LLaRA", {})):
        parts = parts_of(name, **STREAM, **options)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in parts.model.adapter.lora_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        losses.append(parts.model.calculate_loss(parts.test[np.arange(5)]).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_text_only_step_shows_no_item_vector(streams_of):
    parts = streams_of("LLaRA")
    batch = chunk_of(parts, first=2, targets=range(5, 12))
    hybrid = titles_in(parts, batch)
    parts.model._hybrid_step = False
    text_only = titles_in(parts, batch)
    parts.model.item_vectors.zero_()
    torch.testing.assert_close(titles_in(parts, batch), text_only, rtol=0, atol=0)
    parts.model._hybrid_step = True
    assert not torch.allclose(titles_in(parts, batch), hybrid)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ["TALLRecNext", "LLaRA", "iLoRA"])
def test_a_run_prints_a_table_of_all_users_and_is_loaded_with_the_same_scores(ctr, name):
    result = run_recbole_llm(name, "toy", config_dict={**ctr, **STREAM, "generate": name == "iLoRA"})
    assert result["rows"]["test"] == result["rows"]["test_available"] == 40
    assert name in printed(result) and "SASRec" in printed(result)
    parts = load_data_and_model(result["path"].removesuffix("/result.json"))
    batch, *_ = next(iter(parts.test_data))
    scores = parts.model.predict(batch)
    expected = parts.model.score_items(parts.test[np.arange(1)], [batch["item_id"][:10].tolist()])
    torch.testing.assert_close(scores[:10], expected[0].float(), rtol=0, atol=1e-6)
    # the last user's next item, behind the end of the data
    user = parts.dataset.user_num - 1
    pairs = Interaction({"user_id": torch.tensor([user, user]), "item_id": torch.tensor([4, 9])})
    to_come = parts.model.predict(pairs)
    shown = parts.dataset.history.item_ids[-6:]
    complete = parts.prompts.encode(
        Interaction(
            {"user_id": torch.tensor([user]), HISTORY_END: torch.tensor([len(parts.dataset.history)])}
        ),
        slots=False,
    ).streams[0]
    assert parts.backbone.tokenizer.decode(complete.input_ids).splitlines()[1:] == [
        parts.prompts.answer_text(item) for item in shown
    ]
    assert torch.isfinite(to_come).all() and to_come[0] != to_come[1]


@pytest.mark.parametrize("name", ["LLaRA", "iLoRA"])
def test_a_broken_run_ends_with_the_same_scores(ctr, rows_of, broken_and_resumed, name):
    options = {**STREAM, "epochs": 2, "zero_shot": False}
    whole = run_recbole_llm(name, "toy", config_dict={**ctr, **options})
    resumed = broken_and_resumed(name, 3, **options)
    scores = [rows_of(result)["candidate_scores"] for result in (whole, resumed)]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)


def test_training_makes_titles_likelier(ctr, parts_of):
    options = {**STREAM, "epochs": 3, "few_shot": None, "learning_rate": 0.02, "zero_shot": False}
    before = parts_of("TALLRecNext", **options)
    result = run_recbole_llm("TALLRecNext", "toy", config_dict={**ctr, **options})
    after = load_data_and_model(result["path"].removesuffix("/result.json"))
    losses = [parts.model.calculate_loss(parts.test[np.arange(40)]).item() for parts in (before, after)]
    assert losses[1] < losses[0] - 0.5


def test_candidates_are_those_of_the_prompt_layout(parts_of):
    stream = parts_of("TALLRecNext", **STREAM)
    prompt = parts_of("TALLRecNext", **{**STREAM, "layout": "prompt"})
    for name in ("valid candidates", "test candidates"):
        assert stream.identities[name] == prompt.identities[name]


# ------------------------------------------------------------------ settings, and what is refused


def test_defaults_of_the_layout_follow_the_task(ctr):
    plain = {key: ctr[key] for key in ("data_path", "cache_dir", "text", "backbone")} | {"layout": "stream"}
    config = Config("iLoRA", "toy", config_dict=plain)
    assert config["prompt"] == "stream_next_item_hybrid" and config["few_shot_by"] == "user"
    assert config["eval_rows"] is None and config["text_history_length"] == 20
    assert Config("TALLRecNext", "toy", config_dict=plain)["prompt"] == "stream_next_item"
    again = Config.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again["layout"] == "stream" and again["text_history_length"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "token"}, r"gate='token' .* set gate: linear, or layout: prompt"),
        ({"history_scope": "split"}, "set history_scope: all, or layout: prompt"),
        ({"shuffle_history": True}, "set shuffle_history: False"),
    ],
)
def test_what_cannot_be_streamed(ctr, options, message):
    with pytest.raises(ValueError, match=message):
        Config("iLoRA", "toy", config_dict={**ctr, **STREAM, **options})


def test_models_that_need_another_template_say_so(parts_of):
    with pytest.raises(ValueError, match="read as a template of the next_item with layout: stream task"):
        parts_of("TALLRecNext", **STREAM, prompt="next_item_text")
