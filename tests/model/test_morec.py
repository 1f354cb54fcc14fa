"""MoRec: its item embedding against the equations, in float64, and RecBole's SASRec on top of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.model.sequential_recommender.sasrec import SASRec
from synthetic import TEXT

from recbole_llm.cli import main
from recbole_llm.config.configurator import Config
from recbole_llm.config.model_spec import class_for
from recbole_llm.data.create import create_dataset
from recbole_llm.experiment.conventional import llm_arguments
from recbole_llm.lens.sequence import LensSASRec
from recbole_llm.model.morec import LabelledMoRec, MoRec
from recbole_llm.model.title_embedding import TitleEmbedding, start_at_components
from recbole_llm.quick_start import run_recbole_llm

NETWORK = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1}
D = 5


@pytest.fixture
def settings(toy_settings):
    return {**toy_settings, "id_history_length": 6, "bootstrap_samples": 10, "device": "cpu", **NETWORK}


def vectors_of(n_items: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n_items, D)) * [1, 2, 3, 4, 0] + 7


def model_and_rows(settings: dict, **given):
    config = Config("MoRec", "toy", config_dict={**settings, **given})
    train = create_dataset(config).build()[0]
    torch.manual_seed(0)
    model_class = class_for(MoRec, config["task"])
    return model_class(config, train, item_vectors=vectors_of(train.item_num)).double().eval(), train, config


def disturbed(module: torch.nn.Module) -> torch.nn.Module:
    """With biases and everything else away from their initial values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3)
    return module


def embedded(module: TitleEmbedding, item: int) -> np.ndarray:
    """The defining equation of one item, in numpy."""
    if item == 0:
        return np.zeros(module.embedding_dim)
    vectors = vectors_of(len(module.vectors))
    mean, spread = vectors[1:].mean(axis=0), vectors[1:].std(axis=0)
    e = ((vectors[item] - mean) / np.where(spread > 0, spread, 1)).astype(np.float32).astype(np.float64)
    for number, layer in enumerate(layer for layer in module.projector if hasattr(layer, "weight")):
        if number:
            e = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in e])
        e = layer.weight.detach().numpy() @ e + layer.bias.detach().numpy()
    return e if module.ids is None else e + module.ids.weight.detach().numpy()[item]


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("ids", [True, False])
def test_the_embedding_is_the_equation(ids, layers):
    module = disturbed(TitleEmbedding(vectors_of(9), 4, layers, ids=ids).double())
    items = torch.tensor([[3, 0, 3], [8, 1, 2]])
    found = module(items).detach().numpy()
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[place], embedded(module, int(items[place])), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.weight[items], module(items))
    assert (module.ids is not None) == ids and len(list(module.parameters())) == 2 * (layers + 1) + ids


def test_vectors_are_neither_trained_nor_saved():
    module = TitleEmbedding(vectors_of(9), 4, 1, ids=True)
    assert not module.vectors.requires_grad and not any("vectors" in name for name in module.state_dict())
    module(torch.tensor([[1, 2, 0]])).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.ids.weight.grad[0].abs().sum() == 0  # the padding item learns nothing


@pytest.mark.parametrize("how", ["replace", "add", "initialise"])
def test_everything_but_the_embedding_is_recboles_sasrec(settings, how):
    model, train, config = model_and_rows(settings, item_vectors=how)
    disturbed(model)
    theirs = SASRec(config, train).double().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("item_embedding")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["item_embedding.weight"] and not unexpected
    with torch.no_grad():
        theirs.item_embedding.weight.copy_(model.item_embedding.weight)
    batch = train[[0, 5, 300]]
    for name in ("predict", "full_sort_predict", "calculate_loss"):
        torch.testing.assert_close(getattr(model, name)(batch), getattr(theirs, name)(batch))
    assert isinstance(model.item_embedding, TitleEmbedding) == (how != "initialise")


def test_labelled_score_and_loss_in_the_ctr_task(settings):
    model, train, _ = model_and_rows(settings, task="ctr", item_vectors="add")
    assert type(model) is LabelledMoRec
    disturbed(model)
    batch = train[[0, 5, 300, 400]]
    batch["rating_list"] = batch["rating_list"].double()
    state = model.state(batch).detach().numpy()
    logits = []
    for row, item in enumerate(batch["item_id"].tolist()):
        bias = float((model.item_bias.weight[item] + model.bias).detach())
        logits.append(state[row] @ embedded(model.item_embedding, item) + bias)
    probability = 1 / (1 + np.exp(-np.array(logits)))
    np.testing.assert_allclose(model.predict(batch).detach().numpy(), probability, rtol=1e-9)
    label = batch["label"].double().numpy()
    entropy = -(label * np.log(probability) + (1 - label) * np.log(1 - probability)).mean()
    loss = float(model.calculate_loss(batch).detach())
    assert loss == pytest.approx(entropy, rel=1e-6)  # the labels reach it as float32
    batch["rating_list"] = torch.where(batch["rating_list"] > 0, 6 - batch["rating_list"], 0)
    assert not np.allclose(model.predict(batch).detach().numpy(), probability)  # past ratings are an input


@pytest.mark.parametrize("width", [3, 8])
def test_an_id_embedding_starts_at_the_principal_components(width):
    torch.manual_seed(0)
    vectors = vectors_of(40)
    table = torch.nn.Embedding(40, width, padding_idx=0).double()
    torch.nn.init.normal_(table.weight, std=0.02)
    before = table.weight.detach().clone()
    start_at_components(table, vectors)
    scaled = vectors[1:, :4] - vectors[1:, :4].mean(axis=0)  # the fifth is constant
    scaled = scaled / scaled.std(axis=0)
    values, axes = np.linalg.eigh(scaled.T @ scaled)
    used = min(width, 4)
    expected = (scaled @ axes[:, np.argsort(-values)])[:, :used]
    found = table.weight.detach().numpy()[1:, :used]
    ratio = np.abs(found / expected)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)  # equal up to one scale, and signs
    signs = np.sign(found * expected)
    assert (signs == signs[0]).all()
    assert np.sqrt((found**2).mean()) == pytest.approx(float(before[1:].std()), rel=1e-6)
    assert torch.equal(table.weight[:, used:], before[:, used:]) and torch.equal(table.weight[0], before[0])


@pytest.mark.parametrize(("task", "base"), [("next_item", SASRec), ("ctr", LensSASRec)])
def test_without_vectors_it_is_the_sasrec_that_it_is_made_from(settings, task, base):
    config = Config("MoRec", "toy", config_dict={**settings, "task": task, "item_vectors": None})
    train = create_dataset(config).build()[0]
    arguments, backbone, _ = llm_arguments(config, train)
    assert not arguments and backbone is None  # no language model is loaded
    torch.manual_seed(0)
    model = class_for(MoRec, task)(config, train).eval()
    torch.manual_seed(0)
    theirs = base(config, train).eval()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())
    batch = train[[0, 5, 300]]
    assert torch.equal(model.predict(batch), theirs.predict(batch))
    assert torch.equal(model.calculate_loss(batch), theirs.calculate_loss(batch))


@pytest.mark.parametrize("how", ["replace", "add", "initialise", None])
@pytest.mark.parametrize("task", ["next_item", "ctr"])
def test_run(settings, task, how):
    options = {**settings, "task": task, "item_vectors": how, "epochs": 2, "train_batch_size": 128}
    result = run_recbole_llm("MoRec", "toy", config_dict=options)
    saved = json.loads(Path(result["path"]).read_text())
    metric = "auc" if task == "ctr" else "ndcg@10"
    assert 0 < saved["metrics"]["test"][metric] < 1 and saved["config"]["item_vectors"] == how
    with np.load(Path(result["path"]).with_name("test_rows.npz")) as file:
        assert len(file["row_id"]) == (80 if task == "ctr" else 40)
        if task == "ctr":
            assert ((file["model_score"] > 0) & (file["model_score"] < 1)).all()
            assert len(np.unique(file["model_score"])) > 40


def test_it_learns_who_likes_what_without_anything_about_single_items(settings):
    """In the toy data users like genres; here the vectors are the genres, and the items' biases are not trained."""
    config = Config("MoRec", "toy", config_dict={**settings, "task": "ctr", "hidden_dropout_prob": 0.0})
    train = create_dataset(config).build()[0]
    genres = train.item_text().genres
    names = sorted(set(genres[1:]))
    vectors = np.array([[genre == name for name in names] for genre in genres], dtype=float)
    torch.manual_seed(0)
    model = LabelledMoRec(config, train, item_vectors=vectors)
    before = model.item_embedding.vectors.clone()
    assert [n for n, p in model.named_parameters() if p.dim() and len(p) == train.item_num] == [
        "item_bias.weight"
    ]
    model.item_bias.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch, losses = train[np.arange(len(train))], []
    model.eval()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    share = float(batch["label"].mean())
    knowing_the_share = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert losses[0] == pytest.approx(math.log(2), abs=0.01) and losses[-1] < 0.9 * knowing_the_share
    assert torch.equal(model.item_embedding.vectors, before)


def test_beside_the_model_it_is_made_from(settings, capsys):
    small = " ".join(f"{key}={value}" for key, value in NETWORK.items())
    options = {
        **settings, "epochs": 1,
        "compare_with": [f"SASRec epochs=1 {small}", f"MoRec item_vectors=add backbone=tiny epochs=1 {small}"],
    }  # fmt: skip
    assert main(["--model=MoRec", "--dataset=toy", *(f"--{k}={v}" for k, v in options.items())]) == 0
    out = capsys.readouterr().out
    for other in ("SASRec epochs=1", "MoRec item_vectors=add"):
        assert f"The difference between MoRec and {other}" in out
    assert "McNemar" in out


@pytest.mark.smollm2
@pytest.mark.parametrize("model", ["MoRec", "TitleKNN", "SIM"])
def test_with_smollm2(settings, model):
    options = {**settings, "backbone": "smollm2-135m-instruct", "cache_dir": None}
    network = tuple(NETWORK)
    options = {key: value for key, value in options.items() if model == "MoRec" or key not in network}
    result = run_recbole_llm(
        model, "toy", config_dict=options | ({} if model == "TitleKNN" else {"epochs": 1})
    )
    assert all(0 <= value < 2 for value in result["metrics"]["test"].values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lens": "DIN"}, "lens='DIN' .*MoRec does not read this"),
        ({"item_vectors": "llm"}, "item_vectors='llm' .*expected one of replace, add, initialise"),
        ({"projector_layers": -1}, "projector_layers=-1 .*expected an int >= 0"),
        ({"user_fields": "all"}, "user_fields"),
        ({"task": None}, "MoRec needs task: next_item or ctr"),
        ({"id_retrieval": "semantic"}, "id_retrieval='semantic' .*MoRec does not read this"),
        ({"text": {**TEXT, "title": None}}, "MoRec reads the titles of items"),
        ({"loss_type": "BPR", "task": "ctr"}, "in task ctr MoRec is trained on labels"),
    ],
)
def test_bad_input_gets_one_clear_error(settings, given, message):
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("MoRec", "toy", config_dict={**settings, **given})
