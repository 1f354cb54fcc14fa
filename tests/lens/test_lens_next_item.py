"""RecBole's sequential models as lenses of the next-item task."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer

from recbole_llm.config.configurator import Config
from recbole_llm.data.next_item import NextItemDataset
from recbole_llm.data.retriever import SemanticRetriever
from recbole_llm.lens import fit as fit_module
from recbole_llm.lens.fit import fit_lens, lens_identity, without_rows
from recbole_llm.lens.lens import Lens, LensError
from recbole_llm.lens.next_item import NEXT_ITEM_WORKING
from recbole_llm.lens.settings import build_model, lens_keys, lens_settings
from recbole_llm.utils import recbole_repairs
from recbole_llm.utils.random_state import random_state_kept

ROWS = [0, 5, 50, 200]
SASREC = {"hidden_size": 8, "inner_size": 16, "n_layers": 2, "n_heads": 2}
SMALL = {**SASREC, "n_layers": 1, "epochs": 1}


def configuration(folder: Path, dataset: str, **given) -> Config:
    values = {
        "data_path": str(folder),
        "device": "cpu",
        "show_progress": False,
        "seed": 3,
        "text": {},
        "id_history_length": 6,
        "lens_config": {"epochs": 3, "train_batch_size": 64, **given.pop("lens_config", SASREC)},
        **given,
    }
    return Config(model="iLoRA", dataset=dataset, config_dict=values)


@pytest.fixture(scope="module")
def next_item(toy_folder: Path) -> Callable[..., Config]:
    return lambda **given: configuration(toy_folder, "toy", **given)


@pytest.fixture(scope="module")
def rows(next_item) -> list[NextItemDataset]:
    return NextItemDataset(next_item()).build()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lens(next_item, rows, cache) -> Lens:
    return fit_lens(next_item(), rows[0], rows[1], cache_dir=cache)


@pytest.fixture
def no_training(monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: pytest.fail("trained"))


def all_of(dataset: NextItemDataset) -> Interaction:
    return dataset[np.arange(len(dataset))]


def make(next_item, train, name: str, **given):
    config = next_item(lens=name, lens_config={}, **given)
    with random_state_kept(0):
        return build_model(lens_settings(config, train), train).eval()


# ---------------------------------------------------------------------- what it is


def test_it_is_recboles_model_trained_by_recboles_trainer(lens, next_item, rows, tmp_cwd) -> None:
    train, valid, _ = rows
    settings = lens_settings(next_item(), train).override(checkpoint_dir=str(tmp_cwd))
    with random_state_kept(3), recbole_repairs.no_tensorboard():
        model = SASRec(settings, train)
        trainer = Trainer(settings, model)
        trainer.fit(
            TrainDataLoader(settings, train, None, shuffle=True),
            FullSortEvalDataLoader(settings, valid, None),
            verbose=False,
        )
        trainer.evaluate(FullSortEvalDataLoader(settings, valid, None))  # loads the best epoch
    assert lens.model.state_dict().keys() == model.state_dict().keys()
    batch = all_of(valid)
    expected = model.full_sort_predict(batch)
    assert torch.equal(lens.score_items(batch)[:, 1:], expected[:, 1:])
    assert torch.equal(lens.represent(batch)[1], model.predict(batch))
    assert torch.equal(lens.represent(batch)[0], model(batch["item_id_list"], batch["item_length"]))


def test_state_scores_and_loss_by_the_formula(next_item, rows) -> None:
    train = rows[0]
    model = make(next_item, train, "SASRec").double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch = train[ROWS]
    items, target = model.item_embedding.weight, batch["item_id"]
    state, logit = model.represent(batch)
    scores = model.score_items(batch)
    assert state.shape == (4, 64) and scores.shape == (4, train.item_num)
    assert torch.equal(scores[:, 0], torch.full((4,), -torch.inf, dtype=torch.float64))
    for row in range(4):
        for item in range(1, train.item_num):
            torch.testing.assert_close(scores[row, item], state[row] @ items[item])
        torch.testing.assert_close(logit[row], state[row] @ items[target[row]])
    probabilities = torch.softmax(state @ items.T, dim=-1)
    torch.testing.assert_close(
        model.calculate_loss(batch), -probabilities[torch.arange(4), target].log().mean()
    )


def test_selected_by_ndcg_of_full_ranking_on_validation(lens, rows) -> None:
    train, valid, _ = rows
    scores, target = lens.score_items(all_of(valid)), valid.inter_feat["item_id"]
    own = scores.gather(1, target.unsqueeze(1))
    rank = 1 + (scores > own).sum(dim=1)
    ndcg = torch.where(rank <= 10, 1 / torch.log2(rank + 1.0), 0.0).mean().item()
    assert lens.info["valid"]["ndcg@10"] == pytest.approx(ndcg, abs=1e-5)
    assert lens.info["valid"]["hit@1"] == pytest.approx((rank == 1).double().mean().item(), abs=1e-5)
    curve = lens.info["valid_ndcg@10_by_epoch"]
    assert len(curve) == lens.info["epochs"] == 3
    assert max(curve) == curve[lens.info["best_epoch"] - 1] == lens.info["valid"]["ndcg@10"]
    assert lens.info["rows"] == {"train": len(train), "valid": len(valid)}
    assert lens.info["task"] == "next_item" and not lens.info["ratings"]
    json.dumps(lens.info)


def test_the_target_is_not_seen(lens, rows) -> None:
    batch = rows[2][np.arange(20)]
    other = Interaction(dict(batch.interaction))
    other["item_id"] = batch["item_id"] % (rows[0].item_num - 1) + 1
    assert lens.gate_scope == "user" and lens.width == 8
    assert torch.equal(lens.represent(batch)[0], lens.represent(other)[0])
    assert torch.equal(lens.score_items(batch), lens.score_items(other))
    assert not torch.equal(lens.represent(batch)[1], lens.represent(other)[1])
    del other.interaction["item_id"]
    assert torch.equal(lens.score_items(batch), lens.score_items(other))


# ---------------------------------------------------------------------- frozen


def test_frozen_in_float32_and_independent_of_the_batch(lens, rows) -> None:
    torch.nn.Sequential(lens).train()
    assert not any(module.training for module in lens.modules())
    batch = rows[0][ROWS]
    scores, (state, logit) = lens.score_items(batch), lens.represent(batch)
    assert not scores.requires_grad and not state.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = (lens.score_items(batch), *lens.represent(batch))
    for a, b in zip((scores, state, logit), again, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    torch.testing.assert_close(lens.score_items(rows[0][[50]])[0, 1:], scores[2, 1:])
    assert lens.item_vectors().shape == (rows[0].item_num, 8)
    torch.testing.assert_close(state @ lens.item_vectors().T[:, 1:], scores[:, 1:])


def test_a_cache_hit_is_bit_identical_and_trains_nothing(lens, next_item, rows, cache, no_training) -> None:
    again = fit_lens(next_item(), rows[0], rows[1], cache_dir=cache)
    assert again.identity == lens.identity and again.info["from_cache"] and not lens.info["from_cache"]
    assert torch.equal(again.score_items(rows[0][ROWS]), lens.score_items(rows[0][ROWS]))
    folders = [path for path in (cache / "lens").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == [f"SASRec-{lens.identity[:24]}"]


def test_identity_is_of_task_data_configuration_and_seed(lens, next_item, rows, configure, splits) -> None:
    train, valid, _ = rows

    def identity(config: Config, train=train, valid=valid) -> str:
        return lens_identity(lens_settings(config, train), train, valid)

    assert identity(next_item()) == lens.identity
    assert (
        identity(next_item(few_shot=7, num_negatives=4, learning_rate=0.01, eval_mode="full"))
        == lens.identity
    )
    shorter, as_ctr = next_item(id_history_length=5), next_item().override(task="ctr")
    different = {
        "seed": identity(next_item(seed=4)),
        "key": identity(next_item(lens_config={**SASREC, "hidden_dropout_prob": 0.4})),
        "length": identity(shorter, *NextItemDataset(shorter).build()[:2]),
        "valid": identity(next_item(), train, valid.subset(np.arange(30))),
        "excluded": identity(next_item(), without_rows(train, train.inter_feat["row_id"].numpy()[:3])),
        "task": identity(as_ctr),
        "ctr": lens_identity(lens_settings(configure(lens="SASRec", lens_config={}), splits[0]), *splits[:2]),
    }  # fmt: skip
    assert len({lens.identity, *different.values()}) == 1 + len(different)


def test_random_states_of_the_caller_stay(next_item, rows, tmp_path) -> None:
    def states() -> list:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    torch.manual_seed(11), np.random.seed(11), random.seed(11)
    before = states()
    fit_lens(next_item(lens_config=SMALL), rows[0], rows[1], cache_dir=tmp_path)
    assert states() == before


def test_excluded_rows_are_not_trained_on(next_item, rows, tmp_path, monkeypatch) -> None:
    seen = []
    original = fit_module.Trainer._train_epoch

    def watch(self, data, *args, **kwargs):
        seen.append(np.concatenate([batch["row_id"].numpy() for batch in data]))
        return original(self, data, *args, **kwargs)

    monkeypatch.setattr(fit_module.Trainer, "_train_epoch", watch)
    train, valid, _ = rows
    row_ids = train.inter_feat["row_id"].numpy()
    fit_lens(next_item(lens_config=SMALL), train, valid, cache_dir=tmp_path, exclude_rows=row_ids[10:40])
    assert sorted(seen[0]) == sorted(set(row_ids) - set(row_ids[10:40]))


def test_a_dry_run_trains_nothing(next_item, rows, tmp_path, no_training) -> None:
    lens = fit_lens(next_item(), rows[0], rows[1], cache_dir=tmp_path, fit=False)
    assert lens.score_items(rows[0][ROWS]).shape == (4, rows[0].item_num) and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- it learns


def test_learns_what_follows_from_ids_and_times_alone(tmp_path) -> None:
    """Items in a circle: after item i comes item i + 1. The file has neither ratings nor items' features."""
    n_items, rng = 20, np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(60):
        start = int(rng.integers(n_items))
        lines += [f"{user}\t{(start + step) % n_items}\t{step}" for step in range(12)]
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "circle.inter").write_text("\n".join(lines) + "\n")
    given = {**SASREC, "n_layers": 1, "epochs": 8, "stopping_step": 8, "learning_rate": 0.03}
    config = configuration(tmp_path, "circle", lens_config={**given, "hidden_dropout_prob": 0.0})
    train, valid, test = NextItemDataset(config).build()
    lens = fit_lens(config, train, valid, cache_dir=tmp_path)
    best = lens.score_items(all_of(test)).argmax(dim=1)
    assert (best == test.inter_feat["item_id"]).double().mean() > 0.95


# ---------------------------------------------------------------------- other models


@pytest.mark.parametrize("name", NEXT_ITEM_WORKING)
def test_known_models_work(next_item, rows, name: str) -> None:
    train = rows[0]
    model = make(next_item, train, name)
    batch = train[ROWS]
    model.check(batch)
    other = Interaction(dict(batch.interaction))
    other["item_id"] = batch["item_id"] % (train.item_num - 1) + 1
    state, logit = model.represent(batch)
    scores = model.score_items(batch)
    assert state.shape == (4, model.widths["user"]) and torch.equal(state, model.represent(other)[0])
    torch.testing.assert_close(logit, scores[torch.arange(4), batch["item_id"]])
    assert not torch.isnan(scores).any() and (scores[:, 0] == -torch.inf).all()
    model.train().calculate_loss(batch).backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0


def test_gru4rec_is_trained_cached_and_loaded(next_item, rows, tmp_path) -> None:
    config = next_item(lens="GRU4Rec", lens_config={"embedding_size": 8, "hidden_size": 12, "epochs": 1})
    lens = fit_lens(config, rows[0], rows[1], cache_dir=tmp_path)
    assert lens.width == 8 and lens.score_items(rows[2][[0, 3]]).shape == (2, rows[0].item_num)
    again = fit_lens(config, rows[0], rows[1], cache_dir=tmp_path)
    assert again.info["from_cache"]
    assert torch.equal(again.score_items(rows[0][ROWS]), lens.score_items(rows[0][ROWS]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DIN", "scores labelled samples, it cannot rank items"),
        ("BERT4Rec", r"its forward returns \(2, 6, 64\)"),
        ("RepeatNet", "it has no item_embedding"),
        ("FPMC", "cannot be built from its defaults"),
        ("TransRec", "cannot be run on samples of a history and one item .*neg_item_id"),
        ("CORE", "predict and full_sort_predict give different scores"),
        ("LightGCN", "is not a sequential recommender"),
    ],
)
def test_unsuitable_models_are_refused_before_training(
    next_item, rows, tmp_path, no_training, name: str, reason: str
) -> None:
    # Past the check of the configuration.
    config = next_item(lens_config={}).override(lens=name, lens_config=None)
    with pytest.raises(ValueError, match=rf"lens {name}.*{reason}.*Known to work: SASRec, GRU4Rec"):
        fit_lens(config, rows[0], rows[1], cache_dir=tmp_path)


# ---------------------------------------------------------------------- clear errors


def test_wrong_keys_are_named(next_item, rows, tmp_path) -> None:
    for given, message in (
        ({"hiden_size": 8}, "the lens SASRec has no key 'hiden_size': did you mean hidden_size"),
        ({"valid_metric": "Hit@1"}, "no key 'valid_metric'"),
        ({"epochs": 0}, "at least one epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_lens(next_item(lens_config=given), rows[0], rows[1], cache_dir=tmp_path)


def test_every_task_has_its_own_defaults() -> None:
    ctr, ranking = lens_keys("SASRec"), lens_keys("SASRec", "next_item")
    assert ctr.keys() == ranking.keys()
    assert (ctr["hidden_size"], ranking["hidden_size"]) == (32, 64)
    assert "epochs" in lens_keys("GRU4Rec", "next_item") and "loss_type" not in lens_keys(
        "GRU4Rec", "next_item"
    )


def test_too_few_rows_are_an_error(next_item, rows, tmp_path) -> None:
    train, valid, _ = rows
    with pytest.raises(ValueError, match="no validation samples"):
        fit_lens(next_item(), train, valid.subset(np.arange(0)), cache_dir=tmp_path)
    row_ids = train.inter_feat["row_id"].numpy()
    with pytest.raises(ValueError, match="no training samples"):
        fit_lens(next_item(), train, valid, cache_dir=tmp_path, exclude_rows=row_ids)


def test_a_lens_of_few_items_is_selected_by_the_rank_among_all_of_them(next_item, rows, monkeypatch) -> None:
    assert lens_settings(next_item(), rows[0])["topk"] == [1, 5, 10]
    monkeypatch.setattr(NextItemDataset, "item_num", property(lambda self: 10))
    settings = lens_settings(next_item(), rows[0])
    assert (settings["topk"], settings["valid_metric"]) == ([1, 5, 9], "NDCG@9")


def test_a_history_chosen_by_the_target_is_refused(next_item, tmp_path, no_training) -> None:
    config = next_item()
    train, valid, _ = NextItemDataset(config).build()
    vectors = np.random.default_rng(0).normal(size=(train.item_num, 4))
    train.set_id_retriever(SemanticRetriever(train.history, 6, vectors))
    config = config.override(id_retrieval="semantic")  # past the check of the configuration
    with pytest.raises(ValueError, match="id_retrieval: semantic chooses the history by the target"):
        fit_lens(config, train, valid, cache_dir=tmp_path)


def test_lenses_of_the_two_tasks_are_not_mixed_up(
    lens, next_item, rows, configure, splits, tmp_path, caplog
) -> None:
    given = {"lens": "SASRec", "lens_config": {"hidden_size": 8, "epochs": 1}}
    labelled = fit_lens(configure(**given), *splits[:2], cache_dir=tmp_path)
    with pytest.raises(LensError, match="the lens SASRec was trained on labels"):
        labelled.score_items(splits[0][ROWS])
    labelled.save(tmp_path / "ctr")
    with pytest.raises(LensError, match="a lens of the task ctr, the configuration has task: next_item"):
        Lens.load(tmp_path / "ctr", next_item(), rows[0])
    lens.save(tmp_path / "next")
    with pytest.raises(LensError, match="a lens of the task next_item, the configuration has task: ctr"):
        Lens.load(tmp_path / "next", configure(lens="SASRec", lens_config={}), splits[0])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_lens(next_item(), rows[0], rows[1], cache_dir=tmp_path, fit=False)
    assert not caplog.records  # past ratings are no input of this task, and nobody asked for them
