"""The DIN lens against its equations, written out again in numpy-like loops and float64."""

from __future__ import annotations

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.layers import SequenceAttLayer
from torch import Tensor

from recbole_llm.lens.din import LensDIN, TargetAttention
from recbole_llm.lens.embedding import MAX_RATING_LEVELS, RatingLevels, choose_fields
from recbole_llm.lens.settings import build_model, lens_settings

ROWS = [0, 5, 50, 200]


def make(configure, train, **given) -> LensDIN:
    torch.manual_seed(0)
    model = build_model(lens_settings(configure(lens="DIN", **given), train), train).double().eval()
    for bias in (p for n, p in model.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(bias)
    return model


def embedded(model: LensDIN, side: str, values: dict[str, Tensor]) -> Tensor:
    """The fields of one user or item, side by side, from the embedding tables themselves."""
    layer, parts = model.fields, []
    names = layer.token_field_names[side]
    for name, offset in zip(names, layer.token_field_offsets[side], strict=True):
        parts.append(layer.token_embedding_table[side].embedding.weight[values[name] + int(offset)])
    for name, table in zip(
        layer.token_seq_field_names[side], layer.token_seq_embedding_table[side], strict=True
    ):
        words = values[name][values[name] != 0]
        parts.append(table.weight[words].sum(0) / len(words))
    return torch.cat(parts)


def expected(
    model: LensDIN, train, batch: Interaction, row: int, ratings: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``final``, ``user`` and the logit of one row."""
    users, items = train.get_user_feature(), train.get_item_feature()

    def item(i: int) -> Tensor:
        return embedded(model, "item", {f: items[f][i] for f in items.columns})

    u = embedded(model, "user", {f: users[f][batch["user_id"][row]] for f in users.columns})
    history = []
    for j in range(int(batch["item_length"][row])):
        x = item(int(batch["item_id_list"][row, j]))
        if ratings:  # the toy ratings are 1..5, so a rating is its own level
            x = torch.cat([x, model.rating_embedding.weight[int(batch["rating_list"][row, j])]])
        history.append(torch.relu(model.history_projection.weight @ x + model.history_projection.bias))
    x = item(int(batch["item_id"][row]))
    t = model.target_projection.weight @ x + model.target_projection.bias
    first, second = model.attention.att_mlp_layers.mlp_layers[1], model.attention.dense
    v = torch.zeros_like(t)
    for h in history:
        hidden = torch.sigmoid(first.weight @ torch.cat([t, h, t - h, t * h]) + first.bias)
        v = v + (second.weight @ hidden + second.bias) / len(t) ** 0.5 * h
    state = torch.cat([v, x, v * t, u])
    for layer in model.dnn_mlp_layers.mlp_layers:
        if isinstance(layer, torch.nn.Linear):
            state = torch.relu(layer.weight @ state + layer.bias)
    logit = (model.dnn_predict_layers.weight @ state + model.dnn_predict_layers.bias).squeeze()
    return state, torch.cat([torch.stack(history).mean(0), u]), logit


@pytest.mark.parametrize("ratings", [True, False])
def test_states_and_logit_are_the_equations(configure, train, ratings: bool) -> None:
    model = make(configure, train, lens_ratings=ratings)
    batch = train[ROWS]
    batch["rating_list"] = batch["rating_list"].double()
    final, logit = model.represent(batch, "user_item")
    user, same_logit = model.represent(batch, "user")
    assert torch.equal(logit, same_logit)
    assert final.shape[1] == model.widths["user_item"] == 12
    assert user.shape[1] == model.widths["user"] == 8 + 8 * 5
    for row in range(len(ROWS)):
        want_final, want_user, want_logit = expected(model, train, batch, row, ratings)
        torch.testing.assert_close(final[row], want_final, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(user[row], want_user, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(logit[row], want_logit, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.predict(batch), torch.sigmoid(logit))
    torch.testing.assert_close(
        model.calculate_loss(batch),
        torch.nn.functional.binary_cross_entropy(torch.sigmoid(logit), batch["label"].double()),
        check_dtype=False,
    )


def test_attention_is_recboles() -> None:
    torch.manual_seed(0)
    ours = TargetAttention(4, [6, 3]).double()
    theirs = SequenceAttLayer(
        torch.arange(5).view(1, -1), [16, 6, 3], activation="Sigmoid", return_seq_weight=False
    ).double()
    theirs.load_state_dict(ours.state_dict())
    query, keys = torch.randn(3, 4).double(), torch.randn(3, 5, 4).double()
    lengths = torch.tensor([5, 1, 3])
    torch.testing.assert_close(ours(query, keys, lengths), theirs(query, keys, lengths).squeeze(1))


def test_user_state_is_independent_of_the_target_and_final_is_not(configure, train) -> None:
    model = make(configure, train).float()
    batch = train[ROWS]
    other = Interaction(dict(batch.interaction))
    other["item_id"] = batch["item_id"] % (train.item_num - 1) + 1
    assert torch.equal(model.represent(batch, "user")[0], model.represent(other, "user")[0])
    assert not torch.equal(model.represent(batch, "user_item")[0], model.represent(other, "user_item")[0])


def test_past_ratings_and_user_fields_count_only_if_chosen(configure, train) -> None:
    batch = train[ROWS]
    changed = Interaction(dict(batch.interaction))
    changed["rating_list"] = torch.where(batch["rating_list"] > 0, 6 - batch["rating_list"], 0.0)
    changed["user_id"] = batch["user_id"] % (train.user_num - 1) + 1
    small = {"embedding_size": 8, "mlp_hidden_size": [16, 12], "attention_hidden_size": [6]}
    blind = make(configure, train, lens_ratings=False, lens_config={**small, "user_fields": "none"})
    assert torch.equal(blind.represent(batch, "user")[0], blind.represent(changed, "user")[0])
    assert blind.widths["user"] == 8
    seeing = make(configure, train)
    assert not torch.equal(seeing.represent(batch, "user")[0], seeing.represent(changed, "user")[0])


def test_what_stands_after_the_end_of_a_history_does_not_matter(configure, train) -> None:
    model = make(configure, train)
    rows = [i for i in range(len(train)) if int(train.inter_feat["item_length"][i]) < 8][:3]
    batch = train[rows]
    noisy = Interaction(dict(batch.interaction))
    padding = batch["item_id_list"] == 0
    assert padding.any()
    noisy["item_id_list"] = torch.where(padding, 7, batch["item_id_list"])
    noisy["rating_list"] = torch.where(padding, 3.0, batch["rating_list"])
    for scope in ("user", "user_item"):
        torch.testing.assert_close(model.represent(batch, scope)[0], model.represent(noisy, scope)[0])


def test_nothing_of_the_dataset_is_pickled(configure, train) -> None:
    model = make(configure, train)
    assert model.other_parameter() == {}
    assert not hasattr(model.fields, "dataset")
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()} | {"ratings.boundaries"}


def test_moves_as_a_whole(configure, train) -> None:
    model = make(configure, train).to("meta")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert "field_item_id" in dict(model.fields.item_feat.named_buffers())


def test_fields_are_chosen_by_name(train) -> None:
    assert choose_fields(train, "user", "none") == []
    assert choose_fields(train, "item", ["class", "item_id"]) == ["item_id", "class"]
    assert set(choose_fields(train, "user", "all")) == {"user_id", "age", "gender", "occupation", "zip_code"}
    with pytest.raises(ValueError, match=r"user_fields: agee .*offers.*age"):
        choose_fields(train, "user", ["agee"])


def test_rating_levels() -> None:
    levels = RatingLevels(torch.tensor([0.5, 1.0, 4.5, 5.0, 1.0]).numpy())
    ratings = torch.tensor([0.5, 1.0000001, 4.4999, 5.0, 0.0])
    present = torch.tensor([True, True, True, True, False])
    assert levels(ratings, present).tolist() == [1, 2, 3, 4, 0]
    assert levels.count == 5
    many = RatingLevels(torch.linspace(0, 1, 1000).numpy())
    assert many.count == MAX_RATING_LEVELS + 1
    assert int(many(torch.tensor([1.0]), torch.tensor([True]))) == MAX_RATING_LEVELS
    with pytest.raises(ValueError, match="no rating"):
        RatingLevels(torch.zeros(0).numpy())
