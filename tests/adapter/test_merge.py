"""Merging plain LoRAs: against the formulas, against least squares in float64, and a LoRA with itself."""

from __future__ import annotations

import pytest
import torch

from recbole_llm.adapter.merge import (
    BY_INPUTS,
    METHODS,
    PlainLora,
    Products,
    applied,
    check_mergeable,
    input_products,
    merge_inputs,
    merge_weights,
    padded,
    solve,
    truncate,
    truncation_error,
)

PROJECTIONS = {
    f"model.layers.{layer}.self_attn.{name}": (16, width)
    for layer in range(2)
    for name, width in (("q_proj", 16), ("v_proj", 8))
}


def lora(seed: int, rank: int = 3, scale: float = 2.0, base: str = "base") -> PlainLora:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = {n: (draw(rank, d_in), draw(d_out, rank)) for n, (d_in, d_out) in PROJECTIONS.items()}
    return PlainLora(pairs, scale, base, f"LoRA {seed}")


def prompts(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(40, (3, 9), generator=generator), torch.tensor([9, 4, 6])),
        (torch.randint(40, (2, 12), generator=generator), torch.tensor([12, 11])),
    ]


def assert_same(found: dict, expected: dict, atol: float = 1e-6) -> None:
    """Equal updates; PEFT keeps the weights of LoRAs in float32."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0)


def mean(*loras: PlainLora, weights=None) -> dict:
    weights = weights or [1 / len(loras)] * len(loras)
    updates = [one.updates() for one in loras]
    return {n: sum(w * u[n] for w, u in zip(weights, updates, strict=True)) for n in PROJECTIONS}


# ------------------------------------------------------------------ by weights alone


def test_linear_averages_the_factors():
    one, two = lora(1), lora(2)
    merged = merge_weights([one, two], "linear", weights=[0.7, 0.3])
    expected = {
        n: 2.0
        * (0.7 * one.pairs[n][1] + 0.3 * two.pairs[n][1])
        @ (0.7 * one.pairs[n][0] + 0.3 * two.pairs[n][0])
        for n in PROJECTIONS
    }
    assert_same(merged.updates(), expected)
    assert merged.rank == 3


def test_cat_is_the_exact_mean_and_takes_unequal_ranks():
    one, two = lora(1), lora(2, rank=5, scale=0.5)
    merged = merge_weights([one, two], "cat", weights=[0.7, 0.3])
    assert_same(merged.updates(), mean(one, two, weights=[0.7, 0.3]))
    assert merged.rank == 8


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_a_rank_gives_the_best_approximation_of_the_mean(method):
    one, two = lora(1), lora(2)
    merged = merge_weights([one, two], method, rank=2)
    wanted = mean(one, two)
    for name, update in merged.updates().items():
        p, s, q = torch.linalg.svd(wanted[name], full_matrices=False)
        torch.testing.assert_close(update, (p[:, :2] * s[:2]) @ q[:2], atol=1e-6, rtol=0)
    error = truncation_error(wanted, merged)
    assert 0 < error < 1
    assert truncation_error(wanted, merge_weights([one, two], method, rank=6)) < 1e-6


def test_ties_trims_elects_a_sign_and_averages_what_agrees():
    one, two = lora(1), lora(2)
    merged = merge_weights([one, two], "ties", density=0.4, rank=16)
    for name, got in merged.updates().items():
        kept = []
        for update in (one.updates()[name], two.updates()[name]):
            count = int(0.4 * update.numel())
            least = update.abs().flatten().topk(count).values[-1]
            kept.append(torch.where(update.abs() >= least, update, 0))
        sign = torch.where(sum(kept) >= 0, 1.0, -1.0).double()
        agree = [(k != 0) & (k.sign() == sign) for k in kept]
        total = sum(torch.where(a, k, 0) for a, k in zip(agree, kept, strict=True))
        expected = total / sum(a.double() for a in agree).clamp(min=1)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_dare_drops_at_random_by_a_seed_and_rescales():
    one, two = lora(1), lora(2)
    first, again, other = (merge_weights([one, two], "dare", rank=16, seed=s).updates() for s in (1, 1, 2))
    assert_same(first, again)
    name = next(iter(PROJECTIONS))
    assert not torch.allclose(first[name], other[name])
    # Each element is a sum of u / density or 0 of each LoRA, weighted by one half.
    u, v = one.updates()[name], two.updates()[name]
    choices = torch.stack([torch.zeros_like(u), u, v, u + v])
    assert float((choices - first[name]).abs().amin(dim=0).max()) < 1e-6


# ------------------------------------------------------------------ by inputs


def records(model, batches, updates) -> dict[str, torch.Tensor]:
    """Inputs of the real tokens ``[d_in, n]``, recorded by another route: LoRA merged into the weights."""
    found: dict[str, list] = {name: [] for name in PROJECTIONS}
    saved = {n: model.get_submodule(n).weight.detach().clone() for n in PROJECTIONS}
    for name, update in updates.items():
        model.get_submodule(name).weight.data += update
    for ids, lengths in batches:
        for row, length in zip(ids, lengths.tolist(), strict=True):
            hooks = [
                model.get_submodule(n).register_forward_pre_hook(
                    lambda _, args, n=n: found[n].append(args[0][0])
                )
                for n in PROJECTIONS
            ]
            with torch.no_grad():
                model(row[None, :length])
            for hook in hooks:
                hook.remove()
    for name, weight in saved.items():
        model.get_submodule(name).weight.data = weight
    return {name: torch.cat(parts).T for name, parts in found.items()}


def least_squares(updates, xs, tildes, lam, alpha):
    """The minimum by one stacked system: sqrt(lam / n) X~^T U^T = sqrt(lam / n) X^T U_i^T, and the ridge's rows."""
    left, right = [], []
    for update, x, tilde, factor in zip(updates, xs, tildes, lam, strict=True):
        n, d = x.shape[1], x.shape[0]
        ridge = alpha * float(tilde.square().sum()) / n / d
        left += [(factor / n) ** 0.5 * tilde.T, (factor * ridge) ** 0.5 * torch.eye(d, dtype=torch.float64)]
        right += [(factor / n) ** 0.5 * x.T @ update.T, (factor * ridge) ** 0.5 * update.T]
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution.T


@pytest.mark.parametrize("method", BY_INPUTS)
def test_the_first_round_is_the_least_squares_solution(method, model):
    base, one, two = model(0, torch.float64), lora(1), lora(2)
    tasks = [prompts(1), prompts(2)]
    found = merge_inputs(base, [one, two], tasks, method, rounds=1, alpha=1e-4)
    xs = [records(base, batches, part.updates()) for batches, part in zip(tasks, (one, two), strict=True)]
    for name in PROJECTIONS:
        updates = [one.updates()[name], two.updates()[name]]
        lam = [0.5, 0.5]
        if method == "iteris":
            lam = [
                0.5 * float(u.square().sum() / (u @ x[name]).square().sum()) * x[name].shape[1]
                for u, x in zip(updates, xs, strict=True)
            ]
        inputs = [x[name] for x in xs]
        expected = least_squares(updates, inputs, inputs, lam, 1e-4)
        torch.testing.assert_close(found[name], expected, atol=1e-8, rtol=0)


def test_the_second_round_of_iteris_uses_the_inputs_of_the_merged_model(model):
    base, loras, tasks = model(0, torch.float64), [lora(1), lora(2)], [prompts(1), prompts(2)]
    first = merge_inputs(base, loras, tasks, "iteris", rounds=1, alpha=1e-4)
    second = merge_inputs(base, loras, tasks, "iteris", rounds=2, alpha=1e-4)
    xs = [records(base, batches, part.updates()) for batches, part in zip(tasks, loras, strict=True)]
    tildes = [records(base, batches, first) for batches in tasks]
    for name in PROJECTIONS:
        updates = [part.updates()[name] for part in loras]
        lam = [
            0.5 * float(u.square().sum() / (u @ x[name]).square().sum()) * x[name].shape[1]
            for u, x in zip(updates, xs, strict=True)
        ]
        expected = least_squares(updates, [x[name] for x in xs], [x[name] for x in tildes], lam, 1e-4)
        torch.testing.assert_close(second[name], expected, atol=1e-8, rtol=0)
    last = [n for n in PROJECTIONS if "layers.1" in n]
    assert any(not torch.allclose(first[n], second[n], atol=1e-6) for n in last)


def test_regmean_fits_the_tasks_better_than_the_mean(model):
    base, loras, tasks = model(0, torch.float64), [lora(1), lora(2)], [prompts(1), prompts(2)]
    found, plain = merge_inputs(base, loras, tasks, "regmean"), mean(*loras)
    loss = {"regmean": 0.0, "mean": 0.0}
    for part, batches in zip(loras, tasks, strict=True):
        products, own = input_products(base, batches, part.updates(), None), part.updates()
        for name in PROJECTIONS:
            for key, merged in (("regmean", found), ("mean", plain)):
                gap = merged[name] - own[name]
                loss[key] += float((gap @ products[name].own @ gap.T).trace())
    assert loss["regmean"] < loss["mean"]


def test_padding_is_no_input(model):
    base, own = model(0, torch.float64), lora(1).updates()
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3))
    short = input_products(base, [(ids[:, :5], torch.tensor([5, 3]))], own, None)
    long = input_products(base, [(ids, torch.tensor([5, 3]))], own, None)
    for name in PROJECTIONS:
        torch.testing.assert_close(short[name].own, long[name].own, atol=1e-10, rtol=0)


def test_the_ridge_keeps_a_singular_system_solvable():
    update, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    product = x @ x.T / 2
    found = solve([update, 3 * update], [Products(product, product, product)] * 2, [1, 1], 1e-6)
    torch.testing.assert_close(found, 2 * update, atol=1e-8, rtol=0)


# ------------------------------------------------------------------ all methods


@pytest.mark.parametrize("method", METHODS)
def test_a_lora_merged_with_itself_is_itself(method, model):
    one = lora(1)
    if method in BY_INPUTS:
        found = merge_inputs(model(0, torch.float64), [one, one], [prompts(1), prompts(2)], method)
        assert_same(truncate(found, 3).updates(), one.updates(), atol=1e-8)
    else:
        found = merge_weights([one, one], method, density=1.0).updates()
    assert_same(found, one.updates(), atol=1e-8 if method in BY_INPUTS else 1e-6)


@pytest.mark.parametrize("change", [{"base": "other"}, {"pairs": "fewer"}])
def test_loras_of_different_bases_are_refused(change):
    other = lora(2, base=change.get("base", "base"))
    if "pairs" in change:
        other.pairs.popitem()
    with pytest.raises(ValueError, match="another base model|same projections"):
        merge_weights([lora(1), other], "cat")


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.0], [0.5, 0.6, 0.7]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        check_mergeable([lora(1), lora(2)], weights)


def test_linear_needs_equal_ranks_and_inputs_need_prompts(model):
    with pytest.raises(ValueError, match="equal ranks"):
        merge_weights([lora(1), lora(2, rank=5)], "linear")
    with pytest.raises(ValueError, match="prompts"):
        merge_inputs(model(0, torch.float64), [lora(1), lora(2)], [prompts(1), []], "regmean")


def test_applied_updates_are_those_of_merged_weights_and_go_away(model):
    base, other, one = model(0, torch.float64), model(0, torch.float64), lora(1)
    ids = prompts(1)[0][0]
    before = base(ids).logits
    for name, update in one.updates().items():
        other.get_submodule(name).weight.data += update
    with applied(base, one.updates()):
        torch.testing.assert_close(base(ids).logits, other(ids).logits, atol=1e-10, rtol=0)
    assert torch.equal(base(ids).logits, before)


def test_padding_a_rank_changes_nothing_and_cannot_shrink():
    one = lora(1)
    assert_same(padded(one, 8).updates(), one.updates())
    assert padded(one, 8).rank == 8
    with pytest.raises(ValueError, match="rank 3"):
        padded(one, 2)
