"""Comparisons from finished runs: truth by brute force, planted and absent differences, and bad folders."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from recbole_llm.comparison.analysis import BEST_STACK, COLD, build_comparison
from recbole_llm.comparison.findings import chance
from recbole_llm.comparison.finished_run import FinishedRun, load_run
from recbole_llm.comparison.stacking import best_stack, stack
from recbole_llm.evaluation.bootstrap import bootstrap
from recbole_llm.evaluation.metrics import UndefinedMetric
from recbole_llm.evaluation.significance import delong, paired_permutation

MACHINE = {"processor": "a processor", "cores": 2, "gpus": []}
N_USERS, ROWS_PER_USER = 60, 6


def rows_of(rng: np.random.Generator, task: str, n_users: int = N_USERS) -> dict[str, np.ndarray]:
    per_user = 1 if task == "next_item" else ROWS_PER_USER
    n = n_users * per_user
    rows = {
        "row_id": np.arange(n),
        "user": np.repeat(np.arange(n_users), per_user),
        "item": rng.integers(1, 50, n),
        "history_length": rng.integers(5, 60, n),
        "user_rows": rng.integers(1, 40, n),
        "item_rows": rng.integers(0, 9, n),
    }
    if task == "ctr":
        rows["label"] = rng.integers(0, 2, n).astype(np.int8)
    return rows


def run(
    name: str, rows: dict, values: np.ndarray, seed: int = 2020, path: Path = Path("nowhere"), **more
) -> FinishedRun:
    task = "ctr" if "label" in rows else "next_item"
    metrics = {"hr@1": {}, "ndcg@5": {}}
    result = {
        "name": name, "model": name, "dataset": "toy", "task": task, "seed": seed, "device": "cpu",
        "backbone": None, "names": {"model": name} | more.pop("names", {}), "rows": {"train": 9, "few_shot": None,
        "valid": 3, "test": len(rows["row_id"])}, "seconds": {"fit": 2.0, "test": 1.0}, "tokens_per_second": None,
        "peak_memory": {"host_bytes": 2**30, "gpu_bytes": None}, "versions": {}, "machine": MACHINE,
        "intervals": {"models": {"model": metrics}}, **more.pop("result", {}),
    }  # fmt: skip
    column = "model_score" if task == "ctr" else "model_rank"
    return FinishedRun(name, seed, path, result, {**rows, column: values, **more})


def scores(rng: np.random.Generator, labels: np.ndarray, strength: float) -> np.ndarray:
    """Probabilities that tell the labels apart with this strength."""
    return expit(strength * (2.0 * labels - 1) + rng.normal(size=len(labels)))


def leading(comparison: dict) -> dict[str, dict]:
    return {d["b"]: d for d in comparison["differences"] if d["metric"] == comparison["leading"]}


def test_a_model_against_its_own_copy_differs_by_nothing():
    rng = np.random.default_rng(1)
    rows = rows_of(rng, "ctr")
    values = scores(rng, rows["label"], 0.5)
    found = build_comparison([run("A", rows, values), run("B", rows, values)])
    for difference in found["differences"]:
        assert [difference[key] for key in ("value", "low", "high")] == [0, 0, 0]
    assert leading(found)["B"]["p"] == 1
    assert found["sentences"][0].startswith("The difference between A and B is not significant at 5%")


def test_a_note_says_what_past_ratings_are():
    rng = np.random.default_rng(2)
    rows = rows_of(rng, "ctr")
    values, past = (scores(rng, rows["label"], strength) for strength in (0.5, 0.3))
    plain = build_comparison([run("A", rows, values)])
    found = build_comparison(
        [run("A", rows, values, names={"past_ratings": "past ratings"}, past_ratings_score=past)]
    )
    assert [line["label"] for line in found["models"]] == ["A", "past ratings"]
    (note,) = set(found["notes"]) - set(plain["notes"])
    assert note.startswith("past ratings: averages of the user's earlier ratings")


def test_equal_references_are_one_also_where_the_first_run_has_another():
    rng = np.random.default_rng(3)
    rows = rows_of(rng, "ctr")
    values, first, second = (scores(rng, rows["label"], strength) for strength in (0.5, 0.3, 0.2))
    runs = [
        run(name, rows, values, seed, names={"past_ratings": "past ratings"}, past_ratings_score=past)
        for seed in (2020, 2021)
        for name, past in (("A", first), ("B", second), ("C", second))
    ]
    lines = {line["label"]: line for line in build_comparison(runs, samples=10)["models"]}
    assert list(lines) == ["A", "B", "C", "past ratings", "past ratings (B)"]
    assert lines["past ratings (B)"]["seeds"] == [2020, 2021]


def test_one_seed_is_named_and_models_at_chance_are_named():
    rng = np.random.default_rng(8)
    rows = rows_of(rng, "ctr")
    noise = scores(rng, rows["label"], 0.0)
    # The order of the samples is only a little better than the other's, everywhere: significant, and worth nothing.
    better = expit(logit(noise) + 0.02 * rows["label"])
    strong = scores(rng, rows["label"], 2.0)
    found = build_comparison([run("A", rows, better), run("B", rows, noise), run("C", rows, strong)])
    to_b, to_c = found["sentences"]
    assert to_b.startswith("A (one seed) is significantly better than B: AUC +0.0")
    assert to_b.endswith("Neither is distinguishable from chance (AUC 0.5 lies in both 95% CIs).")
    assert to_c.startswith("A (one seed) is significantly worse than C") and "chance" not in to_c
    assert any("not about models trained again" in note for note in found["notes"])
    twice = build_comparison(
        [run(m, rows, v, seed=s) for m, v in (("A", strong), ("B", noise)) for s in (1, 2)]
    )
    assert twice["sentences"][0].startswith("A is significantly better than B")


def test_chance_is_the_mean_over_all_ranks():
    rows = {"candidates": np.array([20, 20, 5])}
    assert chance("auc", {}) == 0.5 and chance("hr@1", {}) is None
    assert chance("hr@1", rows) == pytest.approx((2 / 20 + 1 / 5) / 3)
    assert chance("hr@10", rows) == pytest.approx((2 * 10 / 20 + 1) / 3)
    expected = np.mean([1 / np.log2(1 + rank) if rank <= 5 else 0 for rank in range(1, 21)])
    assert chance("ndcg@5", {"candidates": np.array([20])}) == pytest.approx(expected)


def test_means_and_intervals_over_seeds_are_those_of_the_replicates():
    rng = np.random.default_rng(2)
    rows = rows_of(rng, "ctr")
    values = {(m, s): scores(rng, rows["label"], 0.4) for m in "AB" for s in (1, 2, 3)}
    found = build_comparison([run(m, rows, v, seed=s) for (m, s), v in values.items()], samples=300, seed=5)
    estimate = bootstrap(
        rows["user"], rows["label"], {f"{m}{s}": v for (m, s), v in values.items()}, n=300, seed=5
    )
    for line in found["models"]:
        of_seeds = [estimate.values[f"{line['name']}{seed}"]["auc"] for seed in (1, 2, 3)]
        auc = line["metrics"]["auc"]
        assert auc["values"] == of_seeds and auc["mean"] == pytest.approx(np.mean(of_seeds))
        assert auc["sd"] == pytest.approx(np.std(of_seeds, ddof=1))
        draws = np.mean([estimate.replicates[f"{line['name']}{seed}"]["auc"] for seed in (1, 2, 3)], axis=0)
        assert [auc["low"], auc["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist())
    assert leading(found)["B"]["value"] == pytest.approx(
        found["models"][0]["metrics"]["auc"]["mean"] - found["models"][1]["metrics"]["auc"]["mean"]
    )
    assert found["seeds"] == [1, 2, 3]


def test_delong_of_equal_seeds_is_that_of_one():
    rng = np.random.default_rng(3)
    labels, users = rng.integers(0, 2, 80), rng.integers(0, 20, 80)
    a, b = scores(rng, labels, 0.7), scores(rng, labels, 0.1)
    one = delong(labels, a, b, users=users)
    three = delong(labels, np.stack([a] * 3), np.stack([b] * 3), users=users)
    assert three.p_value == pytest.approx(one.p_value) and three.difference == pytest.approx(one.difference)
    other = delong(labels, np.stack([a, scores(rng, labels, 0.7)]), b, users=users)
    assert other.p_value != one.p_value


def test_random_signs_agree_with_all_signs():
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.0, 0.25])
    users = np.array([0, 0, 1, 2, 3, 4])
    sums = np.bincount(users, weights=differences)
    all_signs = np.array(list(itertools.product([-1, 1], repeat=len(sums)))) @ sums
    exact = (np.abs(all_signs) >= abs(sums.sum())).mean()
    assert paired_permutation(users, differences, n=40_000) == pytest.approx(exact, abs=0.01)
    assert paired_permutation(users, np.zeros(6)) == 1


@pytest.mark.parametrize("task", ["ctr", "next_item"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_planted_differences_are_found_and_absent_ones_are_not(task, seeds):
    """25 worlds without a difference and 25 with one; under no difference p < 0.05 is rare."""
    found = {0.0: [], 1.2: []}
    for strength, world in itertools.product(found, range(25)):
        rng = np.random.default_rng([world, seeds, int(10 * strength)])
        rows = rows_of(rng, task)
        runs = []
        for name, gain in (("A", strength), ("B", 0.0)):
            for seed in range(seeds):
                if task == "ctr":
                    values = scores(rng, rows["label"], 0.2 + gain)
                else:
                    values = np.where(
                        rng.random(len(rows["row_id"])) < 0.1 + gain / 4, 1, rng.integers(2, 20)
                    )
                runs.append(run(name, rows, values, seed=seed))
        found[strength].append(leading(build_comparison(runs, samples=0))["B"]["p"])
    assert np.mean(np.array(found[0.0]) < 0.05) <= 0.16  # 4 of 25 at the nominal 5%: probability 0.03 of more
    assert np.mean(np.array(found[1.2]) < 0.05) >= 0.8


def test_ranks_of_one_seed_are_tested_by_mcnemar_and_others_by_signs():
    rng = np.random.default_rng(4)
    rows = rows_of(rng, "next_item")
    ranks = [rng.integers(1, 21, N_USERS) for _ in range(4)]
    one = build_comparison([run("A", rows, ranks[0]), run("B", rows, ranks[1])], samples=10)
    assert leading(one)["B"]["test"] == "McNemar (HR@1)"
    runs = [run(m, rows, r, seed=s) for (m, s), r in zip(itertools.product("AB", (1, 2)), ranks, strict=True)]
    assert leading(build_comparison(runs, samples=10))["B"]["test"] == "sign-flip permutation by user (HR@1)"


def test_a_tuned_llm_without_its_lens_is_no_reference():
    rng = np.random.default_rng(6)
    rows = rows_of(rng, "ctr")
    both, alone, lens = (scores(rng, rows["label"], strength) for strength in (1, 0.5, 0.9))
    more = {"names": {"llm": "A, LLM alone", "lens": "lens DIN"}, "result": {"backbone": {"name": "tiny"}}}
    found = build_comparison([run("A", rows, both, **more, llm_score=alone, lens_score=lens)], samples=10)
    kinds = {model["name"]: model["kind"] for model in found["models"]}
    assert kinds == {"A": "llm", "A, LLM alone": "llm", "lens DIN": "reference"}


def test_references_take_part_once_and_differing_ones_apart():
    rng = np.random.default_rng(5)
    rows = rows_of(rng, "ctr")
    lens, prompts = scores(rng, rows["label"], 1), [scores(rng, rows["label"], 0) for _ in range(2)]
    names = {"lens": "lens DIN", "zero_shot": "untrained LLM"}
    found = build_comparison(
        [
            run(
                name,
                rows,
                scores(rng, rows["label"], 0.5),
                names=names,
                lens_score=lens,
                zero_shot_score=prompt,
            )
            for name, prompt in zip("AB", prompts, strict=True)
        ],
        samples=50,
    )
    kinds = {line["name"]: line["kind"] for line in found["models"]}
    assert kinds == {
        "A": "classical", "B": "classical", "lens DIN": "reference", "untrained LLM": "reference",
        "untrained LLM (B)": "reference",
    }  # fmt: skip
    assert found["models"][2]["paths"] == [] and found["models"][2]["cost"]["train_seconds"] is None


def test_groups_have_all_rows_and_cold_items_apart():
    rng = np.random.default_rng(6)
    rows = rows_of(rng, "ctr", n_users=200)
    found = build_comparison([run("A", rows, scores(rng, rows["label"], 1))], samples=10)
    groups = found["models"][0]["groups"]
    assert set(groups) == {"history length", "user activity", "item popularity"}
    for parts in groups.values():
        assert sum(part["rows"] for part in parts) == len(rows["row_id"])
    popularity = groups["item popularity"]
    assert popularity[0]["name"] == COLD and popularity[0]["rows"] == (rows["item_rows"] == 0).sum()
    assert [part["name"] for part in groups["history length"]] == sorted(
        (part["name"] for part in groups["history length"]), key=lambda name: int(name.split("-")[0])
    )


def test_too_few_users_have_no_interval_and_the_comparison_says_so():
    rng = np.random.default_rng(7)
    rows = rows_of(rng, "ctr", n_users=6)
    found = build_comparison([run(name, rows, scores(rng, rows["label"], 0.2)) for name in "AB"], samples=100)
    auc = found["models"][0]["metrics"]["auc"]
    assert auc["low"] is None and "only 6 users" in auc["reason"]


def test_other_rows_other_tasks_and_double_runs_are_refused():
    rng = np.random.default_rng(8)
    rows = rows_of(rng, "ctr")
    a = run("A", rows, scores(rng, rows["label"], 0.2))
    other = {**rows, "row_id": rows["row_id"] + 1}
    with pytest.raises(ValueError, match=r"B .* was tested on other samples than A .*'row_id'"):
        build_comparison([a, run("B", other, a.rows["model_score"])])
    ranked = rows_of(rng, "next_item")
    with pytest.raises(ValueError, match="B is of task next_item, A of ctr"):
        build_comparison([a, run("B", ranked, np.ones(N_USERS, int))])
    with pytest.raises(ValueError, match="two runs of A with seed 2020"):
        build_comparison([a, a])
    with pytest.raises(ValueError, match="no finished run"):
        build_comparison([])


def test_a_folder_without_result_or_scores_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*none: give that of"):
        load_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="not finished"):
        load_run(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no test_rows.npz: .* run it again"):
        load_run(tmp_path)


def test_a_run_is_read_in_the_order_of_its_rows(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"name": "A", "seed": 3}))
    np.savez(tmp_path / "test_rows.npz", row_id=[5, 1, 3], model_score=[0.5, 0.1, 0.3])
    found = load_run(tmp_path, "other name")
    assert (found.name, found.seed) == ("other name", 3)
    np.testing.assert_array_equal(found.rows["model_score"], [0.1, 0.3, 0.5])


def test_the_stack_is_the_regression_of_greatest_likelihood(tmp_path):
    rng = np.random.default_rng(9)
    rows = rows_of(rng, "ctr")
    label = rng.integers(0, 2, 400)
    valid = {"label": label, "lens_score": scores(rng, label, 1), "model_score": scores(rng, label, 0.3)}
    columns = ("lens_score", "model_score")
    x = np.stack([logit(valid[column]) for column in columns], axis=1)

    def loss(weights: np.ndarray) -> float:
        return -np.log(expit((2 * label - 1) * (x @ weights[:2] + weights[2]))).sum()

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    test = {column: scores(rng, rows["label"], 0.7) for column in columns}
    expected = expit(np.stack([logit(test[c]) for c in columns], axis=1) @ best[:2] + best[2])
    found = stack(label, [valid[c] for c in columns], [test[c] for c in columns])
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    np.testing.assert_allclose([*found.weights, found.intercept], best, atol=1e-3)
    regularised = LogisticRegression(C=1e6, max_iter=1000, tol=1e-8).fit(x, label)  # as before 0.2
    before = regularised.predict_proba(np.stack([logit(test[c]) for c in columns], axis=1))[:, 1]
    np.testing.assert_allclose(found.probabilities, before, atol=1e-6)

    np.savez(tmp_path / "valid_rows.npz", **valid)
    plain = run(
        "plain",
        rows,
        test["model_score"],
        path=tmp_path,
        names={"lens": "lens DIN"},
        lens_score=test["lens_score"],
    )
    found = build_comparison([plain], samples=10)
    line = next(line for line in found["models"] if line["name"] == "stack of lens DIN and plain")
    order = bootstrap(rows["user"], rows["label"], {"stack": expected}, n=0).values["stack"]["auc"]
    assert line["metrics"]["auc"]["mean"] == pytest.approx(order, abs=1e-6)


def test_example_prompts_carry_every_models_score_of_their_row():
    rng = np.random.default_rng(10)
    rows = rows_of(rng, "ctr")
    values = [scores(rng, rows["label"], 0.5) for _ in range(2)]
    example = {"row_id": 7, "text": "Would this user like <b>?"}
    found = build_comparison(
        [run("A", rows, values[0], result={"examples": [example]}), run("B", rows, values[1])], samples=10
    )
    (shown,) = found["prompts"]
    assert shown["text"] == example["text"] and shown["label"] == rows["label"][7]
    assert shown["scores"] == {"A": values[0][7], "B": values[1][7]}


def test_the_best_stack_is_of_models_that_know_different_things():
    rng = np.random.default_rng(11)
    label = rng.integers(0, 2, 2000)
    halves = rng.random(len(label)) < 0.5
    know = [
        np.where(mine, scores(rng, label, 2), 0.5 + 0.01 * rng.random(len(label)))
        for mine in (halves, ~halves)
    ]
    noise = expit(rng.normal(size=len(label)))
    assert set(best_stack(label, {"noise": noise, "first": know[0], "second": know[1]})) >= {
        "first",
        "second",
    }
    assert best_stack(label, {"first": know[0]}) is None
    with pytest.raises(UndefinedMetric, match="SASRec: the scores are no probabilities"):
        stack(label, [noise, 5 * noise], [noise, noise], ("DIN", "SASRec"))
    with pytest.raises(UndefinedMetric, match="one class only"):
        stack(np.ones(9), [noise[:9]], [noise[:9]])
    separable = stack(np.array([0, 0, 1, 1]), [np.array([0.1, 0.2, 0.8, 0.9])], [np.array([0.3, 0.7])])
    assert np.isfinite(separable.weights).all() and (separable.probabilities.round() == [0, 1]).all()


def test_conventional_models_with_validation_scores_have_their_best_stack_as_a_reference(tmp_path):
    rng = np.random.default_rng(12)
    rows, label, runs = rows_of(rng, "ctr"), rng.integers(0, 2, 300), []
    for name in ("DIN", "SASRec"):
        valid = scores(rng, label, 0.7)
        order = rng.permutation(300)  # runs may evaluate in another order
        (tmp_path / name).mkdir()
        np.savez(
            tmp_path / name / "valid_rows.npz", row_id=order, label=label[order], model_score=valid[order]
        )
        runs.append(run(name, rows, scores(rng, rows["label"], 0.7), path=tmp_path / name))
    found = build_comparison(runs, samples=10)
    line = next(line for line in found["models"] if line["name"] == BEST_STACK)
    assert line["kind"] == "reference" and line["seeds"] == [2020]
    assert any(note.startswith(f"{BEST_STACK}, seed 2020: logistic regression") for note in found["notes"])
    assert BEST_STACK not in [line["name"] for line in build_comparison(runs[:1], samples=10)["models"]]


def test_a_stack_that_cannot_be_fitted_costs_no_report(tmp_path):
    rng = np.random.default_rng(14)
    rows = rows_of(rng, "ctr")
    values = scores(rng, rows["label"], 0.5)
    np.savez(
        tmp_path / "valid_rows.npz", label=np.ones(9), lens_score=np.full(9, 0.5), model_score=np.full(9, 0.5)
    )
    plain = run("plain", rows, values, path=tmp_path, names={"lens": "lens DIN"}, lens_score=values)
    found = build_comparison([plain], samples=10)
    assert "stack of lens DIN and plain" not in [line["name"] for line in found["models"]]
    assert any("one class only" in note for note in found["notes"])


def test_controls_are_called_by_their_labels_and_kept_by_their_names():
    rng = np.random.default_rng(13)
    rows = rows_of(rng, "ctr")
    names = ["RecLoRA", "RecLoRA gate=shuffled", "RecLoRA mixer=identity gate=~ lora_r=8 lora_alpha=16"]
    names += ["TALLRec", "TALLRec score_valid=True"]
    found = build_comparison([run(name, rows, scores(rng, rows["label"], 0.2)) for name in names], samples=10)
    assert [line["name"] for line in found["models"]] == names
    labels = [
        "RecLoRA",
        "RecLoRA, shuffled gate",
        "plain LoRA, rank 8",
        "TALLRec",
        "TALLRec score_valid=True",
    ]
    assert [line["label"] for line in found["models"]] == labels  # equal labels would not distinguish models
    assert "RecLoRA and plain LoRA, rank 8" in found["sentences"][1]
