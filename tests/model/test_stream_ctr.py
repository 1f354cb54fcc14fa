"""Models on streams: nothing at or after a target's place is seen, and nothing depends on the batch."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import expit, logit

from recbole_llm.backbone.answers import answer_logits
from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.streams import Chunk, StreamBatch, draw_by_user, others_positions
from recbole_llm.experiment.llm import residual_samples
from recbole_llm.model.stream_ctr import check_histories
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm

STREAM = {
    "layout": "stream",
    "lens": "DIN",
    "lens_residual": False,
    "residual_rows": None,
    "few_shot_by": "sample",
    "zero_shot": True,
    "max_prompt_tokens": 128,
    "stream_lead": 2,
    "stream_context": 5,
    "train_batch_size": 40,
    "few_shot": 300,
    "eval_rows": None,
}
MODELS = {
    "TALLRec": {},
    "RecLoRA": {},
    "RecLoRA output": {"mixer": "output"},
    "RecLoRA expert": {"mixer": "expert", "num_experts": 4},
    "RecLoRA dense": {"mixer": "dense"},
    "RecLoRA user": {"gate_scope": "user"},
    "RecLoRA SASRec": {"lens": "SASRec", "lens_config": {"epochs": 1, "hidden_size": 8, "inner_size": 8}},
    "RecLoRA residual": {"lens_residual": True},
    "RecLoRA uniform": {"gate": "uniform"},
    "RecLoRA random": {"gate": "random"},
    "RecLoRA shuffled": {"gate": "shuffled"},
    "CoLLM": {"stage_one_share": 0.0},
    "LensPrompt": {},
}
TIES = [{"history_ties": "order"}, {"history_ties": "strict"}]


@pytest.fixture
def streams_of(parts_of, disturb):
    """``streams_of(name, **options)``: the parts of a stream run, its trained parameters changed from their start."""

    def build(name: str, **options):
        parts = parts_of(name.split()[0], **{**STREAM, **MODELS.get(name, {}), **options})
        disturb(parts.model)
        return parts

    return build


def whole_chunk(parts, user: int = 3) -> StreamBatch:
    """All interactions of a user as targets of one chunk: also those that the protocol has no samples of."""
    start, end = parts.dataset.history.user_start[user : user + 2]
    chunk = Chunk(user, int(start), np.arange(start, end))
    from recbole_llm.data.streams import interactions_at

    interaction = interactions_at(parts.dataset, chunk.targets)
    labels = torch.from_numpy(parts.dataset.history.labels[chunk.targets])
    interaction.update(type(interaction)({parts.config["LABEL_FIELD"]: labels}))
    return StreamBatch([chunk], interaction)


@torch.no_grad()
def forward(parts, batch: StreamBatch) -> torch.Tensor:
    """The answers' logits of every target, ``[k, K]``, and the model's log-odds as a last column."""
    (micro,) = parts.model.micro_batches(batch)
    total = parts.model.logits(micro)
    return torch.cat([parts.model.answer_logits(micro), total[:, None]], dim=1)


def change_stars(parts, position: int) -> None:
    """Give an interaction other stars, and the label that goes with them, everywhere."""
    history = parts.dataset.history
    new = 1.0 if history.ratings[position] > 3 else 5.0
    history.ratings[position], history.labels[position] = new, float(new > 3)
    parts.prompts.classes[position] = int(np.searchsorted(parts.prompts.values, new))


# ------------------------------------------------------------------ items that may come next


@pytest.mark.parametrize("ties", TIES, ids=["order", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_an_item_appended_where_a_sample_stands_has_its_score(streams_of, name, ties, monkeypatch):
    parts = streams_of(name, **ties)
    samples = parts.test[np.arange(0, len(parts.test), 9)]
    expected = parts.model.predict(samples)
    nothing = lambda history, users, items, ends: np.zeros(len(users), dtype=bool)  # noqa: E731 - none is stored
    for module in ("recbole_llm.data.prompts.stream", "recbole_llm.model.stream_ctr"):
        monkeypatch.setattr(f"{module}.stored", nothing)
    torch.testing.assert_close(parts.model.predict(samples), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA", "LensPrompt"])
def test_the_score_of_another_item_at_a_samples_place_is_its_own(streams_of, name):
    parts = streams_of(name)
    samples = parts.test[np.arange(4)]
    other = samples[torch.arange(4)]
    other.interaction["item_id"] = samples["item_id"] % 50 + 1
    both = type(samples)(
        {n: torch.cat([samples[n], other[n]]) for n in ("user_id", "item_id", HISTORY_END, "label")}
    )
    mixed = parts.dataset.join(both)[torch.tensor([4, 0, 5, 1, 6, 2, 7, 3])]
    found = parts.model.predict(mixed)
    torch.testing.assert_close(found[1::2], parts.model.predict(samples), atol=1e-6, rtol=0)
    assert ((found[::2] - found[1::2]).abs() > 1e-6).all()


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("ties", TIES, ids=["order", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_stars_change_later_logits_and_no_earlier_ones(streams_of, name, ties):
    parts = streams_of(name, **ties, text_history_length=5)
    batch = whole_chunk(parts)
    before = forward(parts, batch)
    first = batch.chunks[0].start
    for place in (0, 3, 10):
        changed = first + place
        old = parts.dataset.history.ratings[changed], parts.dataset.history.labels[changed]
        old_class = parts.prompts.classes[changed]
        change_stars(parts, changed)
        differs = ((forward(parts, whole_chunk(parts)) - before).abs() > 1e-5).any(dim=1).numpy()
        assert not differs[: place + 1].any()
        tie_end = np.flatnonzero(
            parts.dataset.history.tie_start == parts.dataset.history.tie_start[changed]
        ).max()
        sees = tie_end + 1 - first if ties["history_ties"] == "strict" else place + 1
        assert not differs[place + 1 : sees].any() and differs[sees:].all()
        parts.dataset.history.ratings[changed], parts.dataset.history.labels[changed] = old
        parts.prompts.classes[changed] = old_class


@pytest.mark.parametrize("ties", TIES, ids=["order", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_a_score_depends_neither_on_the_batch_nor_on_other_samples(streams_of, name, ties):
    parts = streams_of(name, **ties)
    model = parts.model
    samples = parts.full_train[np.arange(0, len(parts.full_train), 5)]
    together = model.predict(samples)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(samples)))
    torch.testing.assert_close(model.predict(samples[order]), together[order], rtol=0, atol=1e-5)
    for i in (0, 5, 77):
        torch.testing.assert_close(model.predict(samples[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-5)
    twice = samples[torch.tensor([4, 4, 9, 4])]
    torch.testing.assert_close(model.predict(twice), together[[4, 4, 9, 4]], rtol=0, atol=1e-5)
    model.micro_batch_size = 1
    torch.testing.assert_close(model.predict(samples), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_later_interactions_do_not_matter(streams_of, name):
    parts = streams_of(name)
    history, user = parts.dataset.history, 7
    start, end = history.user_start[user : user + 2]
    ends = parts.full_train.inter_feat[HISTORY_END].numpy()
    samples = parts.full_train[np.flatnonzero((ends >= start) & (ends < start + 12))]
    before = parts.model.predict(samples)
    for position in range(start + 12, end):
        change_stars(parts, position)
        history.item_ids[position] = 1 + history.item_ids[position] % 40
    torch.testing.assert_close(parts.model.predict(samples), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["TALLRec", "CoLLM"])
def test_a_stream_of_one_target_is_the_same_text_as_a_prompt(streams_of, name):
    parts = streams_of(name)
    model, prompts = parts.model, parts.prompts
    samples = parts.test[np.arange(len(parts.test))]
    scores = model.predict(samples)
    for i in range(0, len(samples), 9):
        ids = torch.from_numpy(prompts.encode(samples[i : i + 1], slots=model.hybrid).input_ids[0])[None]
        text = prompts.text(samples, i)
        assert text.endswith(":") and text.count("\n") >= 5
        if name == "TALLRec":
            assert parts.backbone.tokenizer.decode(ids[0]) == text
        inputs = model.embed(ids, model.item_vectors) if model.hybrid else ids
        with torch.no_grad():
            logits = answer_logits(
                model.adapter.peft_model, inputs, torch.tensor([ids.shape[1]]), prompts.class_ids
            )
        like = logits.softmax(dim=1)[0, torch.from_numpy(prompts.likes)].sum().double()
        torch.testing.assert_close(scores[i], like, rtol=0, atol=1e-5)


def test_strict_is_the_text_without_what_is_hidden(streams_of):
    """Of a target's own second nothing is seen: the same text without it gives the same logits, positions included."""
    parts = streams_of("TALLRec", history_ties="strict")
    batch = whole_chunk(parts)
    found = forward(parts, batch)
    (chunk,), history = batch.chunks, parts.dataset.history
    (stream,) = parts.prompts.encode_chunks([chunk]).streams
    target = int(
        np.flatnonzero(history.tie_start[chunk.positions] < chunk.positions)[0]
    )  # the first that hides some
    hidden = np.arange(history.tie_start[chunk.start + target] - chunk.start, target)
    ids = stream.input_ids[: stream.answers_at[target] + 1]
    kept = torch.from_numpy(ids[~np.isin(stream.places[: len(ids)], hidden)])[None]
    with torch.no_grad():
        logits = answer_logits(
            parts.model.adapter.peft_model, kept, torch.tensor([kept.shape[1]]), parts.prompts.class_ids
        )
    assert len(hidden) and kept.shape[1] < len(ids)
    torch.testing.assert_close(found[target, :-1], logits[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------ loss and gate


def test_the_loss_is_the_cross_entropy_of_the_answers_by_the_whole_model(streams_of):
    parts = streams_of("TALLRec")
    (steps, *_), model = parts.train_data.epoch_batches(0), parts.model
    batch = parts.train_data.collate_fn(steps)
    losses = []
    for stream in parts.prompts.encode_chunks(batch.chunks).streams:
        with torch.no_grad():
            logits = model.adapter.peft_model(
                torch.from_numpy(stream.input_ids)[None], use_cache=False
            ).logits[0]
        answers = logits[torch.from_numpy(stream.answers_at)][:, parts.prompts.class_ids]
        right = torch.from_numpy(parts.prompts.classes[stream.chunk.targets])
        losses.append(F.cross_entropy(answers, right, reduction="none"))
    torch.testing.assert_close(model.calculate_loss(batch).detach(), torch.cat(losses).mean())


@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA", "RecLoRA residual", "CoLLM"])
def test_gradients_do_not_depend_on_micro_batches(streams_of, name):
    parts = streams_of(name, gate_dropout=0.0)
    batch = parts.train_data.collate_fn(parts.train_data.epoch_batches(0)[0])
    found = []
    for size in (1, 3, 64):
        parts.model.micro_batch_size = size
        parts.model.zero_grad()
        parts.model.calculate_loss(batch).backward()
        trained = [
            p for group in parts.model.parameter_groups().values() for p in group.values() if p.requires_grad
        ]
        found.append([p.grad for p in trained])
    assert all(gradient is not None and bool(gradient.abs().sum()) for gradient in found[0])
    for other in found[1:]:
        for mine, wanted in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-6)


def test_every_interaction_has_the_lens_s_state_of_itself(streams_of):
    parts = streams_of("RecLoRA")
    (micro,) = parts.model.micro_batches(whole_chunk(parts))
    parts.model.logits(micro)
    z = parts.model.adapter._router.instance
    samples = parts.full_train
    ends = samples.inter_feat[HISTORY_END].numpy()
    shown = micro.chunks[0].positions
    inside = np.flatnonzero(np.isin(ends, shown))
    state, _ = parts.lens.represent(samples[inside])
    torch.testing.assert_close(z[ends[inside] - shown[0]], state)
    assert len(z) == len(shown) and torch.isfinite(z).all()  # also with fewer than min_history before


def test_shuffled_gates_read_another_user(streams_of):
    history = streams_of("RecLoRA shuffled").dataset.history
    positions = np.arange(len(history))
    donors = others_positions(history, positions)
    owner = np.searchsorted(history.user_start, positions, side="right") - 1
    assert (np.searchsorted(history.user_start, donors, side="right") - 1 != owner).all()


def test_a_lens_that_sees_the_label_is_refused(streams_of):
    parts = streams_of("RecLoRA")
    retriever = parts.train.id_retriever

    class Late(type(retriever)):
        def positions(self, user_ids, item_ids, ends):
            found = super().positions(user_ids, item_ids, ends)
            found[:, 0] = ends
            return found

    check_histories(parts.train)
    parts.train.set_id_retriever(Late(retriever.history, retriever.k))
    with pytest.raises(ValueError, match="has seen the label"):
        check_histories(parts.train)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA", "CoLLM", "LensPrompt"])
def test_a_run_and_what_it_leaves(ctr, rows_of, name, caplog):
    caplog.set_level(logging.INFO)
    result = run_recbole_llm(name, "toy", config_dict={**ctr, **STREAM})
    rows = rows_of(result)
    assert result["rows"]["test"] == len(rows["row_id"]) == result["rows"]["test_available"]
    assert {"model_score", "lens_score", "zero_shot_score"} <= rows.keys()
    assert "labels of" in caplog.text and "users each" in caplog.text
    assert "labels and" in caplog.text and "tokens a second" in caplog.text
    parts = load_data_and_model(result["path"].removesuffix("/result.json"))
    samples = parts.test[np.arange(len(parts.test))]
    order = np.argsort(rows["row_id"])
    mine = np.argsort(samples["row_id"].numpy())
    np.testing.assert_allclose(
        parts.model.predict(samples).numpy()[mine], rows["model_score"][order], atol=1e-6
    )


def test_scores_are_the_same_with_a_draw_of_the_samples(ctr, rows_of, caplog):
    options = {**ctr, **STREAM, "few_shot": 0, "zero_shot": False, "lens": None, "lens_config": None}
    full = rows_of(run_recbole_llm("TALLRec", "toy", config_dict=options))
    assert "and intervals need" not in caplog.text
    some = rows_of(run_recbole_llm("TALLRec", "toy", config_dict={**options, "eval_rows": 15}))
    users = len(np.unique(some["user"]))
    assert (
        f"test samples of {users} users (eval_rows_by: user), and intervals need at least 10" in caplog.text
    )
    place = {row: i for i, row in enumerate(full["row_id"].tolist())}
    wanted = full["model_score"][[place[row] for row in some["row_id"].tolist()]]
    np.testing.assert_allclose(some["model_score"], wanted, atol=1e-6)


@pytest.mark.parametrize("layout", ["stream", "prompt"])
def test_zero_shot_trains_nothing(ctr, rows_of, layout, caplog):
    caplog.set_level(logging.INFO)
    options = {**ctr, **(STREAM if layout == "stream" else {}), "few_shot": 0}
    result = run_recbole_llm("TALLRec", "toy", config_dict=options)
    rows = rows_of(result)
    assert result["trained_on"] == {"rows": 0, "steps": 0} and "nothing was trained" in caplog.text
    np.testing.assert_allclose(rows["model_score"], rows["zero_shot_score"], atol=1e-6)


@pytest.mark.parametrize("name", ["TALLRec", "RecLoRA"])
def test_a_broken_run_ends_with_the_same_scores(ctr, rows_of, broken_and_resumed, name):
    options = {**STREAM, "epochs": 2, "zero_shot": False}
    whole = run_recbole_llm(name, "toy", config_dict={**ctr, **options})
    resumed = broken_and_resumed(name, 3, **options)
    np.testing.assert_allclose(rows_of(resumed)["model_score"], rows_of(whole)["model_score"], atol=1e-7)


def test_training_learns_a_pattern(ctr, parts_of):
    """What an untrained model cannot know and every label shows: the loss falls."""
    options = {
        **STREAM,
        "epochs": 4,
        "few_shot": None,
        "learning_rate": 0.02,
        "zero_shot": False,
        "lens": None,
        "lens_config": None,
    }
    untrained = parts_of("TALLRec", **options)
    before = untrained.model.calculate_loss(untrained.full_train[np.arange(len(untrained.full_train))])
    result = run_recbole_llm("TALLRec", "toy", config_dict={**ctr, **options})
    parts = load_data_and_model(result["path"].removesuffix("/result.json"))
    after = parts.model.calculate_loss(parts.full_train[np.arange(len(parts.full_train))])
    assert after < before - 0.05


def test_few_layers(parts_of):
    parts = parts_of("TALLRec", **STREAM, backbone_layers=1)
    assert len(parts.backbone.model.get_decoder().layers) == 1
    assert parts.backbone.sha256.endswith("-first-1-layers")
    upper = parts_of("RecLoRA", **STREAM, lora_layers=[1, 1])
    assert {name.split(".")[2] for name in upper.model.adapter.lora_parameters()} == {"1"}
    with pytest.raises(ValueError, match="backbone_layers: 3 of a model with 2 layers"):
        parts_of("TALLRec", **STREAM, backbone_layers=3)


# ------------------------------------------------------------------ what is drawn, and what is refused


def test_draw_by_user_takes_whole_users_and_is_nested():
    users = np.random.default_rng(0).integers(1, 20, 300)
    small, large = draw_by_user(users, 40, 5), draw_by_user(users, 90, 5)
    assert len(small) == 40 and len(large) == 90 and np.isin(small, large).all()
    counts = np.bincount(users[large], minlength=20), np.bincount(users, minlength=20)
    assert (0 < counts[0]).sum() - (counts[0] == counts[1])[counts[1] > 0].sum() <= 1  # one user may be cut
    assert not np.array_equal(small, draw_by_user(users, 40, 6))
    with pytest.raises(ValueError, match="only 300"):
        draw_by_user(users, 301, 5)


def test_few_shot_by_user_in_a_run(parts_of):
    by_sample, by_user = (
        parts_of("TALLRec", **{**STREAM, "few_shot_by": by, "few_shot": 60}) for by in ("sample", "user")
    )
    users = [len(np.unique(parts.train.inter_feat["user_id"].numpy())) for parts in (by_sample, by_user)]
    assert len(by_sample.train) == len(by_user.train) == 60 and users[1] < users[0]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("ReLLa", {}, r"text_retrieval='semantic' .* cannot share a sequence; set text_retrieval: recent"),
        ("ReLLa", {"text_retrieval": "recent"}, "mixed_training"),
        ("TALLRec", {"text_retrieval": "mixed"}, "cannot share a sequence"),
        ("TALLRec", {"history_scope": "split"}, "set history_scope: all, or layout: prompt"),
        ("TALLRec", {"shuffle_history": True}, "set shuffle_history: False"),
        ("TALLRec", {"stream_context": 1}, "shorter histories than training"),
        ("TALLRec", {"lora_layers": [3]}, "first and the last adapted layer"),
        ("TALLRec", {"layout": "river"}, "one of prompt, stream"),
        ("TALLRec", {"few_shot": -1}, "few_shot"),
    ],
)
def test_what_cannot_be_streamed(ctr, model, options, message):
    with pytest.raises(ValueError, match=message):
        Config(model, "toy", config_dict={**ctr, **STREAM, **options})


def test_models_that_need_another_template_say_so(parts_of):
    with pytest.raises(ValueError, match="prompt: stream_ctr has no slots"):
        parts_of("CoLLM", **STREAM, prompt="stream_ctr")
    with pytest.raises(ValueError, match="read as a template of the ctr with layout: stream"):
        parts_of("TALLRec", **STREAM, prompt="movie_ctr")


def test_layouts_have_defaults_of_their_own(ctr):
    plain = {key: value for key, value in ctr.items() if "batch_size" not in key}
    stream = Config("CoLLM", "toy", config_dict={**plain, "layout": "stream"})
    assert (stream["prompt"], stream["train_batch_size"]) == ("stream_ctr_vectors", 256)
    prompt = Config("CoLLM", "toy", config_dict=plain)
    assert (prompt["prompt"], prompt["train_batch_size"]) == ("tallrec_vectors", 32)
    given = Config("TALLRec", "toy", config_dict={**plain, "layout": "stream", "train_batch_size": 7})
    assert given["train_batch_size"] == 7


def test_a_configuration_survives_its_own_json(ctr):
    config = Config("RecLoRA", "toy", config_dict={**ctr, **STREAM, "lora_layers": [0, 1]})
    again = Config.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again["layout"] == "stream" and again["lora_layers"] == [0, 1] and again["prompt"] == "stream_ctr"


# ---------------------------------------------------------------------- lens_residual from the stack


@pytest.mark.parametrize("layout", ["prompt", "stream"])
def test_residual_is_the_logistic_regression_of_both_logits(parts_of, disturb, layout):
    options = STREAM if layout == "stream" else {}
    parts = parts_of("RecLoRA", **{**options, "lens_residual": True, "residual_rows": 50})
    disturb(parts.model)
    valid = residual_samples(parts.config, parts.valid)
    parts.model.fit_residual(valid)
    terms = parts.model.residual_terms()

    lens = parts.lens.represent(valid)[1].double().numpy()
    scores = parts.model.score_rows(valid).numpy()
    alone = parts.model.llm_alone(scores, expit(lens))
    x, y = np.stack([lens, logit(alone)], axis=1), valid[parts.config["LABEL_FIELD"]].numpy()

    def loss(w: np.ndarray) -> float:
        z = x @ w[:2] + w[2]
        return float(np.mean(np.logaddexp(0, z) - y * z))

    own = np.array([terms["lens_scale"], terms["answer_scale"], terms["bias"]])
    found = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7})
    assert loss(own) == pytest.approx(found.fun, abs=1e-6)
    assert loss(own) <= loss(np.array([1.0, 0.0, 0.0])) + 1e-9  # not below the lens on these samples
    assert not parts.model.lens_scale.requires_grad


def test_llm_alone_is_the_margin_without_the_lens(streams_of):
    parts = streams_of("RecLoRA residual")
    lens = parts.lens.probability(parts.test[np.arange(len(parts.test))]).numpy()
    scores = parts.model.score_rows(parts.test[np.arange(len(parts.test))]).numpy()
    parts.model.residual = False
    alone = parts.model.score_rows(parts.test[np.arange(len(parts.test))]).numpy()
    parts.model.residual = True
    np.testing.assert_allclose(parts.model.llm_alone(scores, lens), alone, atol=1e-5)


def test_run_starts_at_the_stack_and_shows_the_llm_alone(ctr, rows_of):
    options = {**ctr, **STREAM, "lens_residual": True, "residual_rows": 60, "zero_shot": False, "few_shot": 0}
    result = run_recbole_llm("RecLoRA", "toy", config_dict={**options, "score_valid": True})
    rows = rows_of(result)
    assert set(result["intervals"]["models"]) == {"model", "lens", "llm", "past_ratings"}
    assert result["names"]["llm"] == "RecLoRA, LLM alone"
    a, b, c = (result["residual"][name] for name in ("lens_scale", "answer_scale", "bias"))
    assert (a, b, c) != pytest.approx((1, 0.1, 0))  # where they would start without validation samples
    total = a * logit(rows["lens_score"]) + b * logit(rows["llm_score"]) + c
    np.testing.assert_allclose(expit(total), rows["model_score"], atol=1e-6)


def test_interrupted_run_with_fitted_residual_ends_as_an_unbroken_one(ctr, broken_and_resumed, rows_of):
    options = {**STREAM, "lens_residual": True, "residual_rows": 60, "zero_shot": False}
    whole = rows_of(run_recbole_llm("RecLoRA", "toy", config_dict={**ctr, **options}))
    resumed = rows_of(broken_and_resumed("RecLoRA", 2, **options))
    np.testing.assert_array_equal(whole["model_score"], resumed["model_score"])


def test_residual_cannot_be_fitted_on_one_class(parts_of):
    parts = parts_of("RecLoRA", **{**STREAM, "lens_residual": True, "residual_rows": 10})
    samples = parts.valid[np.flatnonzero(parts.valid.inter_feat[parts.config["LABEL_FIELD"]].numpy() == 1)]
    with pytest.raises(ValueError, match="one class only"):
        parts.model.fit_residual(samples)
