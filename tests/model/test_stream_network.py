"""Networks and losses of vector streams against their equations, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.model.stream_network import (
    Block,
    ItemEmbedding,
    Similarity,
    SmallTransformer,
    StarsHead,
    StreamInput,
    like_logit,
    rotate,
    sampled_softmax,
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, in evaluation mode, with every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(2)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3)
    return module


def inputs(batch: int, size: int, *, levels: int = 4, n_items: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch, size), generator=generator)

    values = {"items": draw(1, n_items), "previous": draw(1, n_items)}
    return {**values, "stars": draw(1, levels), "gaps": draw(0, 5)}


def network(width: int, layers: int = 2, heads: int = 2, **changes) -> tuple[StreamInput, SmallTransformer]:
    items = ItemEmbedding(9, width, id_size=5, vectors=torch.randn(9, 6).double())
    options = {"levels": 4, "previous_item": True, "gaps": 5, "dropout": 0.3, **changes}
    return randomised(StreamInput(items, **options)), randomised(
        SmallTransformer(width, layers, heads, 3 * width, 0.3)
    )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([(4, 1), (4, 2), (12, 3)]),
    st.booleans(),
    st.sampled_from([0, 5]),
    st.sampled_from([0, 4]),
)
def test_shapes(batch, size, widths, previous_item, gaps, levels):
    width, heads = widths
    embed, model = network(width, 1, heads, previous_item=previous_item, gaps=gaps, levels=levels)
    given_values = inputs(batch, size)
    x = embed(**given_values)
    assert x.shape == model(x).shape == (batch, size, width)
    head = randomised(StarsHead(width, 5, 9))
    assert head(model(x), given_values["items"]).shape == (batch, size, 5)


def test_the_input_is_the_equation():
    embed, _ = network(4)
    values = inputs(1, 3)
    found = embed(**values)[0].detach()
    items = embed.items

    def e(item: int) -> torch.Tensor:
        return items.widen.weight @ items.ids.weight[item] + items.project(items.vectors[item])

    for t in range(3):
        item, previous, stars, gap = (int(values[name][0, t]) for name in values)
        pair = torch.cat([e(previous), embed.stars.weight[stars]])
        event = torch.nn.functional.gelu(embed.event.weight @ pair + embed.event.bias)
        x = e(item) + event + embed.gaps.weight[gap]
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * embed.norm.weight + embed.norm.bias
        torch.testing.assert_close(found[t], x.detach())


def test_without_a_previous_interaction_there_is_no_event():
    embed, _ = network(4)
    values = inputs(1, 2)
    values["previous"][:] = 0
    other = {**values, "stars": values["stars"].flip(1)}
    torch.testing.assert_close(embed(**values), embed(**other))


def test_padding_and_other_rows_change_nothing():
    embed, model = network(8)
    whole = inputs(3, 10)
    states = model(embed(**whole))
    for row, size in enumerate((4, 10, 7)):
        alone = model(embed(**{name: value[row : row + 1, :size] for name, value in whole.items()}))
        torch.testing.assert_close(states[row, :size], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", [0, 3, 9])
def test_a_state_sees_its_item_and_earlier_stars_and_nothing_else(place):
    embed, model = network(8)
    values = inputs(1, 10)
    before = model(embed(**values))
    for name in ("items", "previous", "stars", "gaps"):
        changed = {key: value.clone() for key, value in values.items()}
        changed[name][0, place] = changed[name][0, place] % 3 + 1 + (changed[name][0, place] % 3 == 0)
        after = model(embed(**changed))
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=0)
        assert (after[:, place:] - before[:, place:]).abs().amax(dim=-1).min() > 1e-6


def test_attention_depends_on_distances_alone():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    rotated_q = rotate(q.expand(1, 1, 9, 6))[0, 0]
    rotated_k = rotate(k.expand(1, 1, 9, 6))[0, 0]
    products = rotated_q @ rotated_k.T
    for distance in range(-5, 6):
        along = torch.diagonal(products, distance)
        torch.testing.assert_close(along, along[:1].expand(len(along)), rtol=1e-5, atol=1e-6)
    assert products[0].std() > 1e-3


def test_heads_need_an_even_width():
    with pytest.raises(ValueError, match="hidden_size: 6 must be a multiple of twice n_heads: 2"):
        Block(6, 2, 8, 0.0)
    with pytest.raises(ValueError, match="an item needs at least one of"):
        ItemEmbedding(5, 4, id_size=0)


@settings(deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_logit_of_liked_levels_is_that_of_their_mass(levels, batch, random):
    liked = np.array([random.random() < 0.5 for _ in range(levels)])
    liked[0], liked[-1] = False, True
    logits = torch.randn(batch, levels, dtype=torch.float64) * 3
    mass = torch.softmax(logits, dim=-1)[:, torch.from_numpy(liked)].sum(dim=-1)
    found = like_logit(logits, torch.from_numpy(liked))
    torch.testing.assert_close(torch.sigmoid(found), mass)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False))
def test_sampled_softmax_is_the_plain_sum_without_false_negatives(n, m, random):
    generator = torch.Generator().manual_seed(random.randint(0, 10**6))
    positive = torch.randn(n, generator=generator, dtype=torch.float64)
    negatives = torch.randn(n, m, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 4, (n,), generator=generator)
    items = torch.randint(1, 4, (m,), generator=generator)
    loss, live = sampled_softmax(positive, negatives, targets, items)
    for row in range(n):
        others = [math.exp(negatives[row, j]) for j in range(m) if items[j] != targets[row]]
        p = math.exp(positive[row])
        assert float(loss[row]) == pytest.approx(-math.log(p / (p + sum(others))), abs=1e-12)
        assert int(live[row]) == len(others)


def test_equal_vectors_do_not_silence_their_negatives():
    """The released HLLM drops negatives by likeness, and stays where all vectors are one."""
    similarity = Similarity("cosine", 0.07).double()
    vectors = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    u, e = similarity.prepared(vectors[:1]), similarity.prepared(vectors[1:])
    scores = similarity.scale() * u @ e.T
    loss, live = sampled_softmax(scores[0, :1], scores[:, 1:], torch.tensor([1]), torch.tensor([2, 3]))
    assert live.tolist() == [2] and float(loss) == pytest.approx(math.log(3))


def test_similarity():
    generator = torch.Generator().manual_seed(1)
    u, e = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    dot, cosine = Similarity("dot", 0.07), Similarity("cosine", 0.05).double()
    assert dot.temperature is None and cosine.temperature == pytest.approx(0.05)
    assert float(dot.prepared(u) @ dot.prepared(e) * dot.scale()) == pytest.approx(float(u @ e))
    product = (cosine.prepared(u) @ cosine.prepared(e) * cosine.scale()).item()
    assert product == pytest.approx(20 * float(u @ e / (u.norm() * e.norm())))
    with torch.no_grad():
        cosine.log_scale.fill_(50)
    assert cosine.temperature == pytest.approx(0.01)  # bounded, as released
