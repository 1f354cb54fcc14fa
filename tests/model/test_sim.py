"""SIM: the DIN network on the history that a search by the target finds; as a baseline and as a lens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import TEXT

from recbole_llm.backbone.answers import mean_pooled_vectors
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.cli import main
from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import CTRDataset
from recbole_llm.data.prompts.lines import item_token_ids
from recbole_llm.data.retriever import RecentRetriever
from recbole_llm.experiment.conventional import llm_arguments
from recbole_llm.lens.din import LensDIN
from recbole_llm.model.sim import SIM
from recbole_llm.quick_start import run_recbole_llm

K = 4
NETWORK = {"embedding_size": 8, "mlp_hidden_size": [16, 8], "attention_hidden_size": [8]}


@pytest.fixture
def settings(toy_settings):
    return {**toy_settings, "id_history_length": K, "bootstrap_samples": 10, "device": "cpu"}


def rows_and_model(settings: dict, **given) -> tuple[CTRDataset, SIM]:
    config = Config("SIM", "toy", config_dict={**settings, **NETWORK, **given})
    train = CTRDataset(config).build()[0]
    assert llm_arguments(config, train)[0] == {}
    torch.manual_seed(0)
    return train, SIM(config, train)


def earlier(train: CTRDataset, row: int) -> list[int]:
    """Positions of what the user of a row did before it, from the sorted interactions alone."""
    end, user = int(train.inter_feat["history_end"][row]), int(train.inter_feat["user_id"][row])
    return list(range(int(train.history.user_start[user]), end))


def test_soft_search_shows_the_items_whose_titles_are_nearest_to_the_target(settings):
    train, _ = rows_and_model(settings)
    backbone = load_backbone("tiny", device="cpu", texts=train.item_texts(), seed=2020)
    vectors = mean_pooled_vectors(backbone.model, item_token_ids(train.item_text(), backbone.tokenizer))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [3, 200, 600]
    batch = train[rows]
    recent = 0
    for row, shown in zip(rows, batch["item_id_list"].tolist(), strict=True):
        target, before = int(train.inter_feat["item_id"][row]), earlier(train, row)
        cosine = {p: round(float(unit[train.history.item_ids[p]] @ unit[target]), 5) for p in before}
        best = sorted(sorted(before, key=lambda p: (-cosine[p], -p))[:K])
        assert shown == train.history.item_ids[best].tolist()
        recent += shown == train.history.item_ids[before[-K:]].tolist()
    assert recent < len(rows)  # it is not the latest items that are shown


def test_hard_search_shows_the_latest_items_of_the_target_s_genre(settings):
    train, _ = rows_and_model(settings, id_retrieval="category")
    genres = train.item_text().genre_lists
    rows = [3, 200, 600]
    for row, shown in zip(rows, train[rows]["item_id_list"].tolist(), strict=True):
        target = int(train.inter_feat["item_id"][row])
        before = [int(train.history.item_ids[p]) for p in earlier(train, row)]
        same = [item for item in before if set(genres[item]) & set(genres[target])][-K:]
        assert shown == [*same, *[0] * (K - len(same))] and same != before[-K:]


def test_the_score_is_that_of_the_lens_din_on_the_retrieved_history(settings):
    train, model = rows_and_model(settings)
    torch.manual_seed(1)
    din = LensDIN(model_config(settings), train).double().eval()
    model = model.double().eval()
    model.load_state_dict(din.state_dict())  # the same parameters, to the last one
    batch = train[[3, 200, 600]]
    torch.testing.assert_close(model.predict(batch), torch.sigmoid(din(batch)), rtol=1e-12, atol=0)
    found = model.predict(batch)
    train.set_id_retriever(RecentRetriever(train.history, K))
    assert not torch.allclose(model.predict(train[[3, 200, 600]]), found)  # the history matters


def test_the_title_is_one_more_field_and_else_it_is_the_din(settings):
    train, din = rows_and_model(settings)
    config = Config("SIM", "toy", config_dict={**settings, **NETWORK, "item_vectors": "add"})
    vectors = np.random.default_rng(0).normal(size=(train.item_num, 5))
    torch.manual_seed(2)
    model = SIM(config, train, item_vectors=vectors).double().eval()
    items = torch.tensor([0, 3, 9])
    known, found = model.fields("item", items), model.embed_items(items)
    torch.testing.assert_close(found, torch.cat([known, model.titles(items)], dim=1))
    assert (found[0, -8:] == 0).all() and (found[1:, -8:] != 0).all()
    # With weights of 0 for what is new, the parameters of a DIN give a DIN's scores.
    width, state = known.shape[1], din.double().eval().state_dict()
    new = {"history_projection.weight": width, "target_projection.weight": width}
    new["dnn_mlp_layers.mlp_layers.1.weight"] = 8 + width  # behind the interest
    for name, at in new.items():
        left, right = state[name][:, :at], state[name][:, at:]
        state[name] = torch.cat([left, torch.zeros(len(left), 8).double(), right], dim=1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"titles"}
    batch = train[[3, 200, 600]]
    torch.testing.assert_close(model.predict(batch), din.predict(batch), rtol=1e-12, atol=0)
    with torch.no_grad():
        model.target_projection.weight[:, width:] = 1
    assert not torch.allclose(model.predict(batch), din.predict(batch))


@pytest.mark.parametrize("how", ["add", "replace"])
def test_run_with_titles(settings, how):
    options = {**settings, **NETWORK, "item_vectors": how, "id_retrieval": "recent", "epochs": 1}
    result = run_recbole_llm("SIM", "toy", config_dict=options)
    assert 0 < result["metrics"]["test"]["auc"] < 1
    config = Config("SIM", "toy", config_dict={**options, "item_fields": ["item_id"]})
    train = CTRDataset(config).build()[0]
    model = SIM(config, train, **llm_arguments(config, train)[0])
    fields = model.fields.field_names["item"]
    assert fields == (["item_id"] if how == "add" else [])
    assert model.embed_items(torch.arange(4)).shape == (4, 8 * (1 + len(fields)))
    model.calculate_loss(train[[0, 5]]).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.titles.projector.parameters())


def model_config(settings: dict) -> Config:
    return Config("SIM", "toy", config_dict={**settings, **NETWORK})


@pytest.mark.parametrize("how", ["semantic", "category", "recent"])
def test_run_as_a_baseline(settings, how, monkeypatch):
    if how != "semantic":  # needs no language model
        monkeypatch.setattr(
            "recbole_llm.experiment.assembly.load_backbone", lambda *a, **k: pytest.fail("loaded")
        )
    options = {**settings, **NETWORK, "id_retrieval": how, "epochs": 2, "train_batch_size": 128}
    result = run_recbole_llm("SIM", "toy", config_dict=options)
    saved = json.loads(Path(result["path"]).read_text())
    assert saved["task"] == "ctr" and saved["rows"]["train"] == 640 and saved["rows"]["few_shot"] is None
    assert {"auc", "logloss", "acc", "gauc"} == set(saved["metrics"]["test"])
    assert saved["config"]["id_retrieval"] == how
    assert (saved["backbone"] or {}).get("name") == ("tiny" if how == "semantic" else None)
    with np.load(Path(result["path"]).with_name("test_rows.npz")) as file:
        assert len(np.unique(file["model_score"])) > 40 and len(file["model_score"]) == 80


def test_it_learns_what_the_labels_say(settings):
    options = {**settings, **NETWORK, "epochs": 12, "train_batch_size": 32, "learning_rate": 0.005}
    result = run_recbole_llm("SIM", "toy", config_dict={**options, "stopping_step": 12})
    assert result["metrics"]["test"]["auc"] > 0.7


def test_run_as_a_lens_and_beside_other_models(settings, capsys):
    arguments = {
        **settings, "few_shot": 24, "lens": "SIM", "lens_config": {**NETWORK, "epochs": 1}, "zero_shot": False,
        "compare_with": ["SIM epochs=1 backbone=tiny", "SIM epochs=1 id_retrieval=category", "DIN epochs=1"],
    }  # fmt: skip
    assert main(["--model=RecLoRA", "--dataset=toy", *(f"--{k}={v}" for k, v in arguments.items())]) == 0
    assert "lens SIM" in capsys.readouterr().out
    (path,) = Path("saved").glob("RecLoRA-toy-*/result.json")
    saved = json.loads(path.read_text())
    assert saved["lens"]["name"] == "SIM" and saved["lens"]["gate_scope"] == "user_item"
    assert saved["config"]["id_retrieval"] == "semantic"
    compared = [json.loads(p.read_text()) for p in sorted(path.parent.glob("compare/*/result.json"))]
    assert [found["config"].get("id_retrieval") for found in compared] == [None, "semantic", "category"]
    differences = json.loads((path.parent / "compare.json").read_text())["differences"]
    assert "SIM epochs=1 backbone=tiny" in {d["b"] for d in differences if d["p_holm"] is not None}


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("SIM", {"task": "next_item"}, "SIM needs task: ctr"),
        ("SIM", {"lens_config": {"epochs": 1}}, "lens_config=.* SIM does not read this"),
        ("SIM", {"lora_r": 5}, "lora_r=5 .*SIM does not read this"),
        ("SIM", {"id_retrieval": "nearest"}, "one of recent, semantic, category"),
        (
            "SIM",
            {"item_vectors": "initialise"},
            "item_vectors='initialise' .*expected one of replace, add or ~",
        ),
        ("RecLoRA", {"lens": "SIM", "lens_config": {"item_vectors": "add"}}, "has no key 'item_vectors'"),
        ("SIM", {"item_fields": "none"}, "at least one item field"),
        ("SIM", {"text": {**TEXT, "title": None}}, "SIM reads the titles of items"),
        (
            "SIM",
            {"text": {**TEXT, "genre": None}, "id_retrieval": "category"},
            "no item of the history has one",
        ),
        ("RecLoRA", {"lens": "SIM", "gate_scope": "user"}, "no state made from it is the user's alone"),
        ("RecLoRA", {"lens": "SIN"}, "is not a sequential model"),
        ("RecLoRA", {"lens": "SIM", "semantic_vectors": "lens"}, "only the trained lens can choose"),
        ("iLoRA", {"lens": "SIM"}, "needs the target item"),
    ],
)
def test_bad_input_gets_one_clear_error(settings, model, given, message):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm(model, "toy", config_dict={**settings, **given})


def test_without_ratings_the_past_has_no_stars(settings):
    config = model_config(settings)
    train = CTRDataset(config).build()[0]
    train.history.ratings = None
    assert SIM(config, train).ratings is None
