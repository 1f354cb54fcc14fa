"""Stream: causality and independence of its scores on real samples, its losses in plain numpy, its life as a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from synthetic import write_dataset

from recbole_llm import quick_start
from recbole_llm.config.configurator import Config
from recbole_llm.config.model_spec import class_for
from recbole_llm.data.create import create_dataset
from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.stream_batches import TARGETS, VectorStreamLoader
from recbole_llm.model.stream import NextItemStream, Stream, pieces, time_buckets
from recbole_llm.trainer.checkpoint import load_checkpoint

SMALL = {
    "stream_length": 8,
    "stream_context": 3,
    "hidden_size": 8,
    "n_heads": 2,
    "n_layers": 1,
    "inner_size": 8,
    "id_size": 4,
    "train_batch_size": 32,
}


@pytest.fixture
def small(toy_settings) -> dict:
    settings = {key: value for key, value in toy_settings.items() if key != "backbone"}
    return {**settings, **SMALL, "bootstrap_samples": 10, "device": "cpu"}


def model_and_splits(settings: dict, **changes):
    config = Config("Stream", "toy", config_dict={**settings, **changes})
    splits = create_dataset(config).build()
    torch.manual_seed(0)
    model = class_for(Stream, config["task"])(config, splits[0]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model, splits, config


def rated_otherwise(model: Stream, position: int) -> None:
    """Give the interaction at a position of the history other stars."""
    level = int(model.stream_levels[position])
    model.stream_levels[position] = level - 2 if level > 2 else level + 2


@pytest.mark.parametrize("previous_item", [True, False])
def test_stars_reach_later_samples_and_no_earlier_or_own_one(small, previous_item):
    model, (train, *_), _ = model_and_splits(small, previous_item=previous_item)
    batch = train[:]
    users, ends = batch["user_id"].numpy(), batch[HISTORY_END].numpy()
    before = model.predict(batch).detach()
    user = users[0]
    mine = np.sort(ends[users == user])
    position = int(mine[3])
    rated_otherwise(model, position)
    moved = (model.predict(batch).detach() != before).numpy()
    assert set(users[moved]) == {user} and ends[moved].min() > position
    # All samples of the chunks that show the interaction, which are later ones.
    assert position + 1 in ends[moved] and moved.sum() >= 3


def test_a_score_depends_neither_on_the_batch_nor_on_later_samples(small):
    model, (train, *_), _ = model_and_splits(small)
    whole = model.predict(train[:]).detach()
    order = np.random.default_rng(0).permutation(len(train))
    for some in (order[:1], order[:7], order[7:200], order):
        found = model.predict(train[some]).detach()
        torch.testing.assert_close(found, whole[some], rtol=0, atol=1e-10)
    single = model.float().predict(train[order[:7]]).detach()
    torch.testing.assert_close(single.double(), whole[order[:7]], rtol=0, atol=1e-5)


def test_another_item_in_the_place_of_a_sample_s_own(small):
    """As a candidate, and for a user whose next interaction is still to come."""
    model, (train, _, test), _ = model_and_splits(small)
    row = len(test) - 1
    own = test[[row]]
    other = Interaction({name: values.clone() for name, values in own.interaction.items()})
    other["item_id"] = own["item_id"] % (model.n_items - 1) + 1
    both = Interaction({name: torch.cat([own[name], other[name]]) for name in own.columns})
    scores = model.predict(both).detach()
    assert scores[0] != scores[1]
    torch.testing.assert_close(scores[0], model.predict(own).detach()[0])
    end = int(own[HISTORY_END])
    model.history.item_ids[end] = int(other["item_id"])
    model.stream_items[end] = int(other["item_id"])
    torch.testing.assert_close(model.predict(other).detach()[0], scores[1])
    last = model.history.user_start[int(own["user_id"]) + 1]
    other[HISTORY_END] = torch.tensor([last])
    assert torch.isfinite(model.predict(other)).all()


def test_loss_and_probability_are_those_of_the_stars(small):
    model, (train, *_), config = model_and_splits(small)
    batch = next(iter(VectorStreamLoader(config, train)))
    low = batch["stream_low"]
    losses = []
    for row in range(len(low)):
        positions = (low[row] + torch.arange(batch[TARGETS].shape[1]))[batch[TARGETS][row]]
        for position in positions.tolist():
            hidden, items = model.states(batch["user_id"][[row]], low[[row]], torch.tensor([position + 1]))
            logits = model.head.linear(hidden[0, -1]) + model.head.of_item.weight[items[0, -1]]
            stars = int(model.history.ratings[position])
            losses.append(-torch.log_softmax(logits, dim=-1)[stars - 1].item())
    assert model.calculate_loss(batch).item() == pytest.approx(np.mean(losses), rel=1e-9)
    assert model.liked.tolist() == [False, False, False, True, True]

    sample = train[[4]]
    state, logit = model.represent(sample)
    logits = model.head(state, sample["item_id"])
    mass = torch.softmax(logits, dim=-1)[0, 3:].sum().item()
    assert model.predict(sample).item() == pytest.approx(mass) == pytest.approx(torch.sigmoid(logit).item())


def test_training_and_evaluation_see_the_same_state(small):
    """Of a stream that fits into one chunk, whatever was cut."""
    model, (train, *_), config = model_and_splits(small, stream_length=64)
    batch = next(iter(VectorStreamLoader(config, train)))
    states, items, positions = model._target_states(batch, before=False)
    by_position = {int(p): s for p, s in zip(positions, states.detach(), strict=True)}
    rows = [r for r, end in enumerate(train.inter_feat[HISTORY_END].tolist()) if end in by_position]
    found, _ = model.represent(train[rows])
    expected = torch.stack([by_position[int(end)] for end in train[rows][HISTORY_END]])
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)


def test_labels_alone_are_two_levels(small, tmp_path):
    write_dataset(tmp_path / "plain")
    file = tmp_path / "plain" / "toy" / "toy.inter"
    head, *rows = file.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    lines = [f"{u}\t{i}\t{int(int(r) >= 4)}\t{t}" for u, i, r, t in cells]
    file.write_text("\n".join([head.replace("rating", "label"), *lines]) + "\n")
    model, (train, *_), _ = model_and_splits(small, data_path=str(tmp_path / "plain"), threshold=None)
    assert model.history.ratings is None and model.liked.tolist() == [False, True]
    assert model.inputs.stars is not None  # past labels are an input
    assert torch.isfinite(model.predict(train[:])).all()


def test_without_ratings_as_input_stars_change_nothing(small):
    model, (train, *_), _ = model_and_splits(small, lens_ratings=False)
    before = model.predict(train[:])
    model.stream_levels.fill_(1)
    torch.testing.assert_close(model.predict(train[:]), before)


def test_bad_input(small, tmp_path):
    with pytest.raises(ValueError, match="history_ties: strict is not possible with Stream"):
        model_and_splits(small, history_ties="strict")
    with pytest.raises(ValueError, match="history_scope: split"):
        model_and_splits(small, history_scope="split")
    write_dataset(tmp_path / "one", length=1)
    with pytest.raises(ValueError, match="min_history: no sample of toy has 5 earlier interactions"):
        model_and_splits(small, data_path=str(tmp_path / "one"))


def test_time_buckets(small):
    model, (train, *_), _ = model_and_splits(small, time_gaps=True)
    history = train.history
    found = time_buckets(history)
    for position in range(30):
        gap = history.timestamps[position] - history.timestamps[position - 1]
        first = position in history.user_start[1:]
        assert found[position] == (0 if first else 1 + int(np.log2(1 + gap)))
    assert torch.isfinite(model.predict(train[:])).all()


def test_pieces_hold_each_chunk_once_without_much_padding():
    sizes = np.random.default_rng(1).integers(1, 300, 80)
    found = pieces(sizes, 1000)
    assert sorted(np.concatenate(found).tolist()) == list(range(80))
    for piece in found:
        assert len(piece) == 1 or sizes[piece].max() * len(piece) <= 1000
        assert 2 * sizes[piece].min() >= sizes[piece].max()
    assert [piece.tolist() for piece in pieces(np.array([0, 0]), 4)] == [[0, 1]]


# ---------------------------------------------------------------------------------------------------- next item


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("negatives", ["all", "uniform", "in_batch", "both"])
def test_next_item_loss_is_the_plain_sum(small, similarity, negatives):
    options = {"train_negatives": negatives, "similarity": similarity, "num_train_negatives": 7}
    model, (train, *_), config = model_and_splits(small, task="next_item", **options)
    batch = next(iter(VectorStreamLoader(config, train)))
    targets = batch[TARGETS]
    positions = (batch["stream_low"][:, None] + torch.arange(targets.shape[1]))[targets]
    items = model.stream_items[positions]
    state = torch.get_rng_state()
    candidates = set(model.negative_items(items).tolist())
    vectors = model.item_vectors()
    losses = []
    for row, place in targets.nonzero().tolist():
        low = batch["stream_low"][[row]]
        hidden, _ = model.states(batch["user_id"][[row]], low, low + place)
        u, target = hidden[0, place], int(model.stream_items[int(low) + place])

        if similarity == "dot":
            scores = vectors @ u
        else:
            cosines = torch.nn.functional.cosine_similarity(u[None], vectors, dim=1)
            scores = model.similarity.log_scale.exp() * cosines
        weight = scores.detach().exp().tolist()
        others = sum(weight[item] for item in candidates - {target})
        losses.append(-np.log(weight[target] / (weight[target] + others)))
    torch.set_rng_state(state)
    assert model.calculate_loss(batch).item() == pytest.approx(np.mean(losses), rel=1e-6)
    wanted = {"all": model.n_items - 1, "uniform": 7}.get(negatives)
    assert wanted is None or len(candidates) <= wanted
    assert 0 not in candidates


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_whole_catalogue_scores_are_the_scores_of_single_items(small, similarity):
    model, (_, _, test), _ = model_and_splits(small, task="next_item", similarity=similarity)
    batch = test[:6]
    scores = model.full_sort_predict(batch).detach()
    assert scores.shape == (6, model.n_items)
    for item in (1, 7, model.n_items - 1):
        batch["item_id"][:] = item
        torch.testing.assert_close(model.predict(batch).detach(), scores[:, item], rtol=1e-5, atol=1e-5)
    alone = model.full_sort_predict(test[[5]]).detach()
    torch.testing.assert_close(alone[0], scores[5], rtol=1e-5, atol=1e-5)


def test_next_item_state_is_of_the_last_interactions_before_the_target(small):
    model, (_, _, test), _ = model_and_splits(small, task="next_item")
    sample = test[[2]]
    before = model.state(sample).detach()
    end = int(sample[HISTORY_END])
    for offset, changes in ((0, False), (1, True), (7, True), (8, False)):  # stream_length 8: seven of them
        kept = model.stream_items.clone()
        model.stream_items[end - offset] = model.stream_items[end - offset] % (model.n_items - 1) + 1
        assert torch.equal(model.state(sample).detach(), before) != changes
        model.stream_items.copy_(kept)


def test_live_negatives_and_temperature_are_logged(small, caplog):
    model, (train, *_), config = model_and_splits(
        small, task="next_item", similarity="cosine", train_negatives="all"
    )
    model.train()
    for batch in VectorStreamLoader(config, train):
        model.calculate_loss(batch)
    with caplog.at_level("INFO"):
        model.eval()
    live = model.n_items - 2
    assert f"{len(train)} targets, {live:.1f} live negatives each, temperature 0." in caplog.text
    caplog.clear()
    model.eval()
    assert "live" not in caplog.text


# ---------------------------------------------------------------------------------------------------- as a model


@pytest.mark.parametrize("task", ["ctr", "next_item"])
def test_a_killed_training_ends_as_an_unbroken_one(small, tmp_path, monkeypatch, task):
    options = {**small, "task": task, "epochs": 3, "stopping_step": 10}
    options |= {"train_negatives": "uniform", "num_train_negatives": 5}

    def run(folder: str, **changes) -> dict:
        values = {**options, "output_dir": str(tmp_path / folder), **changes}
        return quick_start.run_recbole_llm("Stream", "toy", config_dict=values)

    unbroken = run("unbroken")
    validate, seen = Trainer._valid_epoch, []

    def killed(*args, **kwargs):
        seen.append(True)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return validate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_valid_epoch", killed)
        run("broken")
    resumed = run("broken", resume=True)
    assert resumed["metrics"] == unbroken["metrics"]
    folders = [Path(result["path"]).parent for result in (unbroken, resumed)]
    (there, _), (here, _) = (load_checkpoint(folder / "last.safetensors") for folder in folders)
    torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)
    rows = [np.load(folder / "test_rows.npz") for folder in folders]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0].files)


def test_it_learns_what_users_like(small, tmp_path):
    options = {**small, "hidden_size": 16, "epochs": 25, "stopping_step": 25, "learning_rate": 0.01}
    result = quick_start.run_recbole_llm("Stream", "toy", config_dict={**options, "hidden_dropout_prob": 0.0})
    assert result["metrics"]["valid"]["auc"] > 0.7
    assert result["rows"]["test"] == 80


def test_few_shot_counts_targets(small):
    options = {**small, "train_rows": "few_shot", "few_shot": 40, "epochs": 1}
    result = quick_start.run_recbole_llm("Stream", "toy", config_dict=options)
    assert result["rows"]["few_shot"] == 40


def test_as_a_lens(small, tmp_path):
    lens = {key: SMALL[key] for key in SMALL if key != "train_batch_size"} | {"epochs": 1}
    options = {key: value for key, value in small.items() if key not in SMALL}
    options |= {"lens": "Stream", "lens_config": lens, "few_shot": 16, "backbone": "tiny", "eval_rows": 20}
    result = quick_start.run_recbole_llm("RecLoRA", "toy", config_dict=options)
    saved = json.loads(Path(result["path"]).read_text())
    assert saved["lens"]["name"] == "Stream" and saved["lens"]["metrics"]["test"]["auc"] is not None
    again = quick_start.run_recbole_llm("RecLoRA", "toy", config_dict=options)  # the lens from the cache
    assert again["lens"]["metrics"] == result["lens"]["metrics"]
    with pytest.raises(ValueError, match=r"n_layers=0 \(lens_config\): expected an int >= 1"):
        bad = {**options, "lens_config": {**lens, "n_layers": 0}}
        quick_start.run_recbole_llm("RecLoRA", "toy", config_dict=bad)
    with pytest.raises(ValueError, match="id_retrieval"):
        quick_start.run_recbole_llm("RecLoRA", "toy", config_dict={**options, "id_retrieval": "category"})


def test_as_a_lens_of_the_next_item_task_it_is_refused(small):
    options = {key: value for key, value in small.items() if key not in SMALL}
    with pytest.raises(ValueError, match="Stream"):
        quick_start.run_recbole_llm(
            "iLoRA", "toy", config_dict={**options, "lens": "Stream", "backbone": "tiny"}
        )


def test_the_task_chooses_the_class():
    assert class_for(Stream, "next_item") is NextItemStream and class_for(Stream, "ctr") is Stream
