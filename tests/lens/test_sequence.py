"""Sequential models of RecBole with the labelled head."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec

from recbole_llm.lens.fit import fit_lens
from recbole_llm.lens.sequence import WORKING, LastPositionSASRec, LensSASRec
from recbole_llm.lens.settings import build_model, lens_settings

ROWS = [0, 5, 50, 200]
SASREC = {"hidden_size": 8, "inner_size": 8, "n_layers": 2, "n_heads": 2}


def make(configure, train, name: str, **given):
    torch.manual_seed(0)
    given = {"lens_config": {}, **given}
    model = build_model(lens_settings(configure(lens=name, **given), train), train).double().eval()
    torch.nn.init.normal_(model.item_bias.weight)
    torch.nn.init.normal_(model.bias)
    return model


def test_sasrec_is_its_last_state_times_the_target(configure, train) -> None:
    model = make(configure, train, "SASRec", lens_ratings=False, lens_config=SASREC)
    assert isinstance(model, LensSASRec)
    batch = train[ROWS]
    state, logit = model.represent(batch)
    torch.testing.assert_close(state, SASRec.forward(model, batch["item_id_list"], batch["item_length"]))
    for row, target in enumerate(batch["item_id"].tolist()):
        want = (
            state[row] @ model.item_embedding.weight[target] + model.item_bias.weight[target, 0] + model.bias
        )
        torch.testing.assert_close(logit[row], want)
    torch.testing.assert_close(model.predict(batch), torch.sigmoid(logit))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    activation=st.sampled_from(["relu", "gelu"]),
)
def test_the_last_position_alone_is_recboles_sasrec(lengths, layers, heads, activation) -> None:
    config = defaultdict(lambda: None) | {
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": 9, "device": "cpu", "loss_type": "CE",
        "n_layers": layers, "n_heads": heads, "hidden_size": 8, "inner_size": 12, "hidden_act": activation,
        "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "layer_norm_eps": 1e-12, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(len(lengths))
    dataset = SimpleNamespace(num=lambda _field: 20)
    whole, last = SASRec(config, dataset).double(), LastPositionSASRec(config, dataset).double()
    last.load_state_dict(whole.state_dict())
    length = torch.tensor(lengths)
    history = torch.randint(1, 20, (len(lengths), 9)) * (torch.arange(9) < length.unsqueeze(1))
    states = [model(history, length) for model in (whole, last)]
    torch.testing.assert_close(states[1], states[0])
    for state in states:
        (state**2).sum().backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in last.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)


def test_sasrec_adds_ratings_to_its_items(configure, train) -> None:
    model = make(configure, train, "SASRec", lens_config=SASREC)
    batch = train[ROWS]
    before, _ = model.represent(batch)
    torch.testing.assert_close(
        before, model.forward(batch["item_id_list"], batch["item_length"])
    )  # from zero
    torch.nn.init.normal_(model.rating_embedding.weight)
    with torch.no_grad():
        model.rating_embedding.weight[0] = 0  # padding
    state, _ = model.represent(batch)

    # SASRec's forward, with the sum in place of the item embedding.
    items = model.item_embedding(batch["item_id_list"]) + model.rating_embedding(batch["rating_list"].long())
    position = model.position_embedding(torch.arange(items.shape[1]))
    encoded = model.trm_encoder(
        model.LayerNorm(items + position),
        model.get_attention_mask(batch["item_id_list"]),
        output_all_encoded_layers=True,
    )[-1]
    torch.testing.assert_close(state, encoded[torch.arange(len(ROWS)), batch["item_length"] - 1])
    assert len(model.item_embedding._forward_hooks) == 0


@pytest.mark.parametrize("name", [name for name in WORKING if name != "SASRec"])
def test_other_models_give_a_state_that_ignores_the_target(configure, train, name: str) -> None:
    model = make(configure, train, name)
    batch = train[ROWS]
    other = Interaction(dict(batch.interaction))
    other["item_id"] = batch["item_id"] % (train.item_num - 1) + 1
    state, logit = model.represent(batch)
    assert state.shape == (len(ROWS), model.widths["user"]) and logit.shape == (len(ROWS),)
    assert torch.equal(state, model.represent(other)[0])
    model.train()
    model.calculate_loss(batch).backward()
    assert model.rating_embedding.weight.grad.abs().sum() > 0
    assert model.item_bias.weight.grad.abs().sum() > 0


def test_gru4rec_can_be_trained_as_a_lens(configure, train, valid, tmp_path) -> None:
    config = configure(lens="GRU4Rec", lens_config={"embedding_size": 8, "hidden_size": 8, "epochs": 1})
    lens = fit_lens(config, train, valid, cache_dir=tmp_path)
    state, logit = lens.represent(train[ROWS])
    assert lens.gate_scope == "user" and lens.width == 8
    assert state.shape == (4, 8) and logit.shape == (4,)
    assert lens.item_vectors().shape == (train.item_num, 8)


@pytest.mark.parametrize("name", ["FPMC", "BERT4Rec", "RepeatNet"])
def test_a_model_without_a_representation_is_refused(configure, train, valid, tmp_path, name: str) -> None:
    config = configure(lens=name, lens_config={})
    with pytest.raises(ValueError, match=rf"lens {name}.*[Kk]nown to work: DIN, SASRec, GRU4Rec"):
        fit_lens(config, train, valid, cache_dir=tmp_path)
