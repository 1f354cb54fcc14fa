"""Training, caching and freezing a lens."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from recbole.trainer import Trainer
from sklearn.metrics import roc_auc_score

from recbole_llm.config.configurator import Config
from recbole_llm.data.ctr import CTRDataset
from recbole_llm.data.retriever import SemanticRetriever
from recbole_llm.lens import fit as fit_module
from recbole_llm.lens.fit import fit_lens, lens_identity, resolve_scope, without_rows
from recbole_llm.lens.lens import Lens, LensError
from recbole_llm.lens.settings import lens_settings

ROWS = [0, 5, 50, 200]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lens(configure, train, valid, cache) -> Lens:
    return fit_lens(configure(), train, valid, cache_dir=cache)


def identity(config: Config, train: CTRDataset, valid: CTRDataset) -> str:
    return lens_identity(lens_settings(config, train), train, valid)


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_represents_rows_in_float32_whatever_is_around_it(lens, train) -> None:
    batch = train[ROWS]
    state, logit = lens.represent(batch)
    assert state.shape == (4, lens.width) and logit.shape == (4,)
    assert not state.requires_grad and not any(p.requires_grad for p in lens.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, again_logit = lens.represent(batch)
    assert again.dtype == again_logit.dtype == torch.float32
    assert torch.equal(state, again) and torch.equal(logit, again_logit)


def test_a_run_s_lens_is_never_trained_again_and_what_changed_is_said(
    lens, configure, train, valid, cache, tmp_path
):
    lens_of_less = {"lens_config": {"epochs": 1, "embedding_size": 4}}
    for folder, message in (
        (cache, r"not those that its DIN-\w+ was trained with"),
        (tmp_path, "copied without"),
    ):
        with pytest.raises(LensError, match=message):
            fit_lens(configure(**lens_of_less), train, valid, cache_dir=folder, saved=True)


def test_a_tunable_copy_alone_has_gradients_and_leaves_the_lens_as_it_is(lens, train) -> None:
    copy, batch = lens.tunable(), train[ROWS]
    state, logit = lens.represent(batch)
    tuned_state, tuned_logit = copy.represent(batch)
    assert torch.equal(state, tuned_state) and torch.equal(logit, tuned_logit)
    (tuned_state.sum() + tuned_logit.sum()).backward()
    with torch.no_grad():
        assert not copy.represent(batch)[1].requires_grad
        for parameter in copy.parameters():
            parameter.add_(1.0)
    assert torch.equal(lens.represent(batch)[1], logit)
    assert not any(p.requires_grad or p.grad is not None for p in lens.parameters())


def test_never_leaves_evaluation_mode(lens, train) -> None:
    around = torch.nn.Sequential(lens).train()
    assert around.training and not any(module.training for module in lens.modules())
    assert lens.train() is lens and not lens.training
    batch = train[ROWS]
    assert torch.equal(lens.represent(batch)[0], lens.represent(batch)[0])  # dropout_prob is 0.1


def test_scores_do_not_depend_on_the_batch(lens, train) -> None:
    together = lens.represent(train[list(range(64))])
    alone = lens.represent(train[[7]])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[7:8], b, rtol=1e-5, atol=1e-6)


def test_info_and_item_vectors(lens, train, valid) -> None:
    assert lens.info["rows"] == {"train": len(train), "valid": len(valid)}
    assert lens.info["epochs"] == 2 and lens.info["valid"]["auc"] == max(lens.info["valid_auc_by_epoch"])
    json.dumps(lens.info)
    scores = lens.represent(valid[list(range(len(valid)))])[1]
    auc = roc_auc_score(valid.inter_feat["label"].numpy(), scores.numpy())
    assert auc == pytest.approx(
        lens.info["valid"]["auc"], abs=1e-5
    )  # the best epoch's weights are the ones kept
    vectors = lens.item_vectors()
    assert vectors.shape == (train.item_num, 8 * 4) and vectors.dtype == torch.float32


def test_a_cache_hit_is_bit_identical_and_trains_nothing(
    lens, configure, train, valid, cache, monkeypatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = fit_lens(configure(), train, valid, cache_dir=cache)
    assert again.identity == lens.identity and again.info["from_cache"] and not lens.info["from_cache"]
    for a, b in zip(lens.represent(train[ROWS]), again.represent(train[ROWS]), strict=True):
        assert torch.equal(a, b)


def test_the_other_state_of_a_din_comes_from_the_same_cache(
    lens, configure, train, valid, cache, monkeypatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: pytest.fail("trained again"))
    user = fit_lens(configure(gate_scope="user"), train, valid, cache_dir=cache)
    assert (lens.gate_scope, user.gate_scope) == ("user_item", "user")
    assert user.width == 8 + 8 * 5 and lens.width == 12
    assert torch.equal(user.represent(train[ROWS])[1], lens.represent(train[ROWS])[1])


@pytest.mark.parametrize("damaged", ["lens.json", "lens.safetensors"])
def test_a_damaged_cache_is_trained_again_with_a_warning(
    lens, configure, train, valid, cache, caplog, damaged: str
) -> None:
    (folder,) = (path for path in (cache / "lens").iterdir() if path.is_dir())  # its lock stays beside it
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        again = fit_lens(configure(), train, valid, cache_dir=cache)
    assert any(damaged in r.getMessage() and "damaged" in r.getMessage() for r in caplog.records)
    assert torch.equal(
        again.represent(train[ROWS])[0], lens.represent(train[ROWS])[0]
    )  # training is deterministic
    assert sorted(p.name for p in folder.iterdir()) == ["lens.json", "lens.safetensors"]
    assert fit_lens(configure(), train, valid, cache_dir=cache).info["from_cache"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_training_that_was_cut_off_goes_on(
    configure, train, valid, tmp_path, monkeypatch, caplog, damaged: bool
) -> None:
    config = configure(lens_config={**configure()["lens_config"], "epochs": 3})
    whole = fit_lens(config, train, valid, cache_dir=tmp_path / "whole")
    epochs, train_epoch = [], Trainer._train_epoch

    def cut_off_in_the_third(self, data, epoch, **rest):
        epochs.append(epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt
        return train_epoch(self, data, epoch, **rest)

    monkeypatch.setattr(Trainer, "_train_epoch", cut_off_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit_lens(config, train, valid, cache_dir=tmp_path / "cut")
    (kept,) = (tmp_path / "cut" / "lens").glob("*.training.safetensors")
    if damaged:
        kept.write_bytes(kept.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        lens = fit_lens(config, train, valid, cache_dir=tmp_path / "cut")
    assert epochs[3:] == ([0, 1, 2] if damaged else [2])
    assert ("trained from the start" in caplog.text) == damaged
    assert not kept.exists()
    for name in ("epochs", "best_epoch", "valid", "valid_auc_by_epoch"):
        assert lens.info[name] == whole.info[name], name
    assert torch.equal(lens.represent(train[ROWS])[0], whole.represent(train[ROWS])[0])


def test_random_states_of_the_caller_stay(configure, train, valid, tmp_path) -> None:
    torch.manual_seed(11), np.random.seed(11), random.seed(11)
    before = random_states()
    config = configure(lens_config={"embedding_size": 4, "mlp_hidden_size": [4], "epochs": 1})
    fit_lens(config, train, valid, cache_dir=tmp_path)
    assert random_states() == before
    fit_lens(config, train, valid, cache_dir=tmp_path)  # from the cache
    assert random_states() == before
    torch.manual_seed(12)
    other = fit_lens(config, train, valid, cache_dir=tmp_path / "other")
    assert torch.equal(
        other.represent(train[ROWS])[0],
        fit_lens(config, train, valid, cache_dir=tmp_path).represent(train[ROWS])[0],
    )


def test_writes_nothing_but_the_cache(configure, train, valid, tmp_cwd) -> None:
    fit_lens(
        configure(lens_config={"embedding_size": 4, "mlp_hidden_size": [4], "epochs": 1}),
        train,
        valid,
        cache_dir=tmp_cwd / "cache",
    )
    assert [p.name for p in tmp_cwd.iterdir()] == ["cache"]
    assert {p.suffix for p in (tmp_cwd / "cache").rglob("*") if p.is_file()} == {
        ".json",
        ".lock",
        ".safetensors",
    }


def test_identity_is_of_data_configuration_seed_and_rows(configure, train, valid) -> None:
    base = identity(configure(), train, valid)
    assert identity(configure(), train, valid) == base
    assert identity(configure(gate_scope="user", learning_rate=0.01, few_shot=7), train, valid) == base
    row_ids = train.inter_feat["row_id"].numpy()
    different = {
        "seed": identity(configure(seed=4), train, valid),
        "lens": identity(configure(lens="SASRec", lens_config={}), train, valid),
        "ratings": identity(configure(lens_ratings=False), train, valid),
        "key": identity(configure(lens_config={"embedding_size": 9}), train, valid),
        "excluded": identity(configure(), without_rows(train, row_ids[:3]), valid),
        "valid": identity(configure(), train, valid.subset(np.arange(len(valid) - 1))),
    }
    other = CTRDataset(configure(threshold={"rating": 3})).build()
    different["labels"] = identity(configure(), other[0], other[1])
    other = CTRDataset(configure(min_history=4)).build()
    different["rows"] = identity(configure(), other[0], other[1])
    other = CTRDataset(configure()).build()
    vectors = np.random.default_rng(0).normal(size=(train.item_num, 4))
    other[0].set_id_retriever(SemanticRetriever(other[0].history, 8, vectors))
    different["retriever"] = identity(configure(), other[0], other[1])
    assert len({base, *different.values()}) == 1 + len(different)


def test_excluded_rows_are_not_trained_on(configure, train, valid, tmp_path, monkeypatch) -> None:
    seen = []
    original = fit_module.Trainer._train_epoch

    def watch(self, data, *args, **kwargs):
        seen.append(np.concatenate([batch["row_id"].numpy() for batch in data]))
        return original(self, data, *args, **kwargs)

    monkeypatch.setattr(fit_module.Trainer, "_train_epoch", watch)
    config = configure(lens_config={"embedding_size": 4, "mlp_hidden_size": [4], "epochs": 1})
    row_ids = train.inter_feat["row_id"].numpy()
    excluded = row_ids[10:40]
    lens = fit_lens(config, train, valid, cache_dir=tmp_path, exclude_rows=excluded)
    assert sorted(seen[0]) == sorted(set(row_ids) - set(excluded))
    assert lens.info["rows"]["train"] == len(train) - 30
    assert fit_lens(config, train, valid, cache_dir=tmp_path).identity != lens.identity
    with pytest.raises(ValueError, match="exclude_rows: 1 of 2 are not training samples"):
        outside = int(valid.inter_feat["row_id"][0])
        fit_lens(config, train, valid, cache_dir=tmp_path, exclude_rows=np.array([row_ids[0], outside]))


def test_saved_beside_a_run(lens, configure, train, tmp_path) -> None:
    lens.save(tmp_path / "run")
    back = Lens.load(tmp_path / "run", configure(), train)
    assert (back.identity, back.name, back.gate_scope, back.width) == (lens.identity, "DIN", "user_item", 12)
    assert torch.equal(back.represent(train[ROWS])[0], lens.represent(train[ROWS])[0])
    with pytest.raises(LensError, match="does not fit.*shape"):
        Lens.load(tmp_path / "run", configure(lens_config={"embedding_size": 6}), train)
    with pytest.raises(LensError, match="is a DIN"):
        Lens.load(tmp_path / "run", configure(lens="SASRec", lens_config={}), train)
    with pytest.raises(LensError, match="no lens at"):
        Lens.load(tmp_path / "nowhere", configure(), train)


def test_a_dry_run_trains_nothing(configure, train, valid, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: pytest.fail("trained"))
    lens = fit_lens(configure(), train, valid, cache_dir=tmp_path, fit=False)
    assert lens.width == 12 and lens.identity == "untrained" and not list(tmp_path.iterdir())


def test_scope_is_what_the_state_depends_on(configure, train, valid, tmp_path) -> None:
    def scope(**given) -> str:
        return fit_lens(configure(**given), train, valid, cache_dir=tmp_path, fit=False).gate_scope

    assert scope() == "user_item" and scope(gate_scope="user") == "user"
    assert scope(lens="SASRec", lens_config={}) == "user"
    # A semantic history is chosen by the target: even SASRec's state then depends on it.
    assert scope(lens="SASRec", lens_config={}, id_retrieval="semantic") == "user_item"
    model = fit_lens(configure(), train, valid, cache_dir=tmp_path, fit=False).model
    assert resolve_scope("DIN", model, "auto", "recent") == "user_item"
    with pytest.raises(ValueError, match="gate_scope: user needs id_retrieval: recent"):
        resolve_scope("DIN", model, "user", "semantic")
    model.spec = replace(model.spec, gate_scopes=("user",))
    with pytest.raises(ValueError, match="gate_scope: user_item is not possible with the lens X.*lens: DIN"):
        resolve_scope("X", model, "user_item", "recent")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embeding_size": 8}, "no key 'embeding_size': did you mean embedding_size"),
        ({"epochs": 0}, "at least one epoch"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 .*lens_config"),
        ({"item_fields": ["genre"]}, "item_fields: genre cannot be embedded.*class"),
        ({"item_fields": "none"}, "at least one item field"),
        ({"pooling_mode": "median"}, "pooling_mode must be mean, max or sum"),
    ],
)
def test_wrong_keys_are_named(configure, train, valid, tmp_path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_lens(configure(lens_config=given), train, valid, cache_dir=tmp_path)


def test_one_class_is_an_error(configure, train, valid, tmp_path) -> None:
    negative = np.flatnonzero(train.inter_feat["label"].numpy() == 0)
    with pytest.raises(ValueError, match=r"training samples have the labels \[0.0\]"):
        fit_lens(configure(), train.subset(negative), valid, cache_dir=tmp_path)
    rows = train.inter_feat["row_id"].numpy()
    with pytest.raises(ValueError, match="the 0 training samples"):
        fit_lens(configure(), train, valid, cache_dir=tmp_path, exclude_rows=rows)


def test_learns_on_ml_100k(tmp_path) -> None:
    config = Config(
        model="RecLoRA",
        dataset="ml-100k",
        config_dict={
            "device": "cpu",
            "layout": "prompt",
            "show_progress": False,
            "id_history_length": 20,
            "lens_config": {
                "epochs": 2,
                "embedding_size": 8,
                "mlp_hidden_size": [32],
                "attention_hidden_size": [8],
                "learning_rate": 0.003,
                "train_batch_size": 512,
            },
        },
    )
    train, valid, _ = CTRDataset(config).build()
    train, valid = train.subset(np.arange(len(train))[-24_000:]), valid.subset(np.arange(4000))
    lens = fit_lens(config, train, valid, cache_dir=tmp_path)
    assert lens.info["valid"]["auc"] > 0.7
