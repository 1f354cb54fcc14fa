"""The table, the json and the rows of a run."""

from __future__ import annotations

import json
import logging
import re
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import logloss, rank_metrics

from recbole_llm.evaluation.metrics import accuracy, auc, gauc
from recbole_llm.experiment.result import Cost, Evaluation, Ingredients, build_result, write_result
from recbole_llm.experiment.table import result_table
from recbole_llm.utils.machine import environment, peak_memory, reset_peak_memory

N = 300


def evaluation(seed: int) -> dict[str, np.ndarray]:
    """Rows as RowCollector gives them; the labels are those of seed 0."""
    labels = np.random.default_rng(0).integers(0, 2, N)
    noise = np.random.default_rng(seed).normal(size=N)
    return {
        "user": np.arange(N) % 30,
        "item": np.arange(N) % 17,
        "row_id": np.arange(N) + 5,
        "label": labels.astype(np.float64),
        "score": 1 / (1 + np.exp(-(labels - 0.5 + noise))),
    }


def columns(model: dict[str, np.ndarray], **others: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns as a run writes them, of evaluations of several models on the same samples."""
    value = "rank" if "rank" in model else "score"
    named = {key: values for key, values in model.items() if key != value}
    return named | {f"{name}_{value}": rows[value] for name, rows in {"model": model, **others}.items()}


CONFIG = {
    "model": "RecLoRA",
    "dataset": "ml-100k",
    "task": "ctr",
    "seed": 7,
    "device": "cpu",
    "run_name": None,
    "eval_rows": None,
    "bootstrap_samples": 60,
}
BACKBONE = {"name": "tiny", "sha256": "0", "source": "made", "dtype": "float32"}


def run(rows=None, *, extra=None, ingredients=None, counts=None, test=None, n_items=None, **config) -> dict:
    lens = {"name": "DIN", "identity": "abc"} if rows is None or "lens_score" in rows else None
    counts = counts or {"train": 1000, "few_shot": 64, "valid": 300, "test": N}
    return build_result(
        {**CONFIG, **config},
        Evaluation(counts, valid={"auc": 0.61}, test=test, rows=rows, n_items=n_items),
        ingredients or Ingredients(BACKBONE, lens),
        Cost({"fit": 1.5}, tokens_per_second=np.float32(12.5)),
        extra,
    )


@pytest.fixture
def rows():
    return columns(evaluation(1), lens=evaluation(2), zero_shot=evaluation(3))


def test_result_holds_the_metrics_of_all_models_on_the_same_rows(rows):
    result = run(rows)
    for key, entry in (("model", result), ("lens", result["lens"]), ("zero_shot", result["zero_shot"])):
        score, label = rows[f"{key}_score"], rows["label"]
        assert entry["metrics"]["test"] == {
            "auc": auc(score, label),
            "logloss": logloss(score, label),
            "acc": accuracy(score, label),
            "gauc": gauc(rows["user"], score, label),
        }
    assert result["metrics"]["valid"] == {"auc": 0.61}
    assert set(result["intervals"]["differences"]) == {"model - lens", "zero_shot - lens"}
    assert result["intervals"]["seed"] == 7 and result["intervals"]["users"] == 30
    assert result["rows"]["eval_rows_bounded"] is False
    assert result["names"] == {"model": "RecLoRA", "lens": "lens DIN", "zero_shot": "untrained LLM"}


def test_full_precision_replaces_the_evaluator_and_other_metrics_stay(rows):
    result = run(rows, test={"auc": 0.5, "rmse": 0.4})
    assert result["metrics"]["test"]["auc"] == auc(rows["model_score"], rows["label"])
    assert result["metrics"]["test"]["rmse"] == 0.4


def test_table_has_one_aligned_line_per_model(rows):
    text = result_table(run(rows))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "model" and lines[0].endswith("AUC - lens [95% interval]")
    assert [line[:13].strip() for line in lines[2:5]] == ["untrained LLM", "lens DIN", "RecLoRA"]
    assert f"{auc(rows['model_score'], rows['label']):.4f} [0." in lines[4]
    difference = auc(rows["model_score"], rows["label"]) - auc(rows["lens_score"], rows["label"])
    assert f"{difference:+.4f} [" in lines[4] and "+" not in lines[3]
    column = lines[0].index("LogLoss")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[2:5])
    assert lines[5] == (
        "ml-100k: 300 test samples of 30 users; intervals from 60 bootstrap samples of users, differences paired"
    )


def test_names_are_shown_as_they_are_and_numbers_in_ascii(rows):
    name = "RecLoRA – K−1"
    worse = columns({**evaluation(1), "score": 1 - evaluation(1)["score"]}, lens=evaluation(2))
    lines = result_table(run(worse, run_name=name)).splitlines()
    assert lines[3].startswith(f"{name}  0.") and " -0." in lines[3].removeprefix(name)
    assert not {"–", "−"} & set(lines[3].removeprefix(name))


def test_table_of_several_runs_lists_lens_and_zero_shot_once(rows):
    other = columns(evaluation(8), lens=evaluation(2), zero_shot=evaluation(3))
    runs = [run(rows, run_name="RecLoRA as published"), run(other, run_name="RecLoRA + lens_residual")]
    lines = result_table(runs).splitlines()
    names = ["untrained LLM", "lens DIN", "RecLoRA as published", "RecLoRA + lens_residual"]
    assert [line.split("  ")[0].strip() for line in lines[2:6]] == names
    shorter = {key: value[:-30] for key, value in rows.items()}
    with pytest.raises(ValueError, match="one test set"):
        result_table([runs[0], run(shorter, counts={"valid": 1, "test": N - 30})])


def test_bounded_rows_are_said_in_json_and_table(rows):
    counts = {
        "train": 1000,
        "few_shot": 64,
        "valid": 300,
        "test": N,
        "valid_available": 300,
        "test_available": 97000,
    }
    result = run(rows, counts=counts, eval_rows=N)
    assert result["rows"]["eval_rows_bounded"] is True and result["rows"]["eval_rows"] == N
    assert "300 of 97,000 (a seeded draw: eval_rows) test samples" in result_table(result)


def test_a_run_without_lens_has_no_difference_column():
    result = run(columns(evaluation(1)), model="DIN", ingredients=Ingredients())
    assert result["lens"] is result["zero_shot"] is result["backbone"] is None
    assert "AUC - lens" not in result_table(result)


def test_a_ranking_run_shows_recbole_metrics():
    result = run(
        None, model="SASRec", ingredients=Ingredients(), test={"recall@10": 0.12345, "ndcg@10": 0.05}
    )
    assert result["intervals"] is None and result["metrics"]["test"] == {
        "recall@10": 0.12345,
        "ndcg@10": 0.05,
    }
    lines = result_table(result).splitlines()
    assert lines[0].split() == ["model", "recall@10", "ndcg@10"]
    assert lines[2].split() == ["SASRec", "0.1235", "0.0500"]


def ranking(seed: int, candidates: int = 20) -> dict[str, np.ndarray]:
    """Rows of a ranking evaluation as RowCollector gives them; the rows are those of `evaluation`."""
    rows = {key: evaluation(0)[key] for key in ("user", "item", "row_id")}
    ranks = np.random.default_rng(seed).geometric(0.25, N)
    return rows | {"rank": np.minimum(ranks, candidates), "candidates": np.full(N, candidates)}


def ranking_run(rows, **more) -> dict:
    lens = Ingredients(lens={"name": "SASRec", "identity": "abc"})
    settings = {"model": "iLoRA", "task": "next_item", "ingredients": lens, "n_items": 1682, **more}
    return run(rows, **settings)


@pytest.fixture
def ranks():
    return columns(ranking(1), lens=ranking(2), zero_shot=ranking(3), popularity=ranking(4))


def test_a_ranking_run_holds_the_metrics_of_all_models(ranks):
    assert list(ranks) == [
        *(
            "user",
            "item",
            "row_id",
            "candidates",
            "model_rank",
            "lens_rank",
            "zero_shot_rank",
            "popularity_rank",
        )
    ]
    result = ranking_run(ranks, test={"hit@1": 0.3, "ndcg@10": 0.1234})
    names = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr@10")
    for key, entry in (("model", result), ("lens", result["lens"]), ("zero_shot", result["zero_shot"])):
        expected = rank_metrics(ranks[f"{key}_rank"], names)
        assert {name: entry["metrics"]["test"][name] for name in names} == pytest.approx(expected, abs=1e-14)
    assert result["metrics"]["test"]["hit@1"] == 0.3
    assert result["rows"]["candidates"] == {"min": 20, "max": 20, "all_items": False}
    assert set(result["intervals"]["differences"]) == {
        *("model - lens", "zero_shot - lens", "popularity - lens")
    }


def test_table_of_a_ranking_run(ranks):
    lines = result_table(ranking_run(ranks)).splitlines()
    columns = ["model", "HR@1 [95% interval]", "HR@5", "NDCG@5", "NDCG@10", "MRR@10"]
    assert re.split(r"  +", lines[0]) == [*columns, "HR@1 - lens [95% interval]"]
    names = ["untrained LLM", "lens SASRec", "popularity", "iLoRA"]
    assert [line.split("  ")[0] for line in lines[2:6]] == names
    for line, key in zip(lines[2:6], ("zero_shot", "lens", "popularity", "model"), strict=True):
        found = rank_metrics(ranks[f"{key}_rank"], ["hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr@10"])
        cells = line[len("untrained LLM") :].split()
        assert [cells[0], *cells[3:7]] == [f"{value:.4f}" for value in found.values()]
    gap = (ranks["model_rank"] == 1).mean() - (ranks["lens_rank"] == 1).mean()
    assert f"{gap:+.4f} [" in lines[5]
    assert lines[6] == (
        "ml-100k: 300 test samples of 30 users, each target ranked among 20 candidates; ties count against the "
        "model; intervals from 60 bootstrap samples of users, differences paired"
    )


@pytest.mark.parametrize(
    ("candidates", "n_items", "said"),
    [
        (np.full(N, 1682), 1682, "ranked among all 1,682 items; ties"),
        (np.full(N, 1682), None, "ranked among 1,682 candidates; ties"),
        (np.arange(N) + 1300, 1682, "ranked among 1,300 to 1,599 candidates; ties"),
        (None, 1682, "30 users; ties"),
    ],
)
def test_footer_says_what_was_ranked(candidates, n_items, said):
    rows = {**ranking(1), "candidates": candidates}
    merged = columns({key: value for key, value in rows.items() if value is not None})
    assert said in result_table(ranking_run(merged, ingredients=Ingredients(), n_items=n_items))


def test_only_k_below_the_number_of_candidates():
    result = ranking_run(columns(ranking(1, candidates=10), lens=ranking(2, candidates=10)))
    assert set(result["metrics"]["test"]) == {"hr@1", "hr@5", "ndcg@5", "mrr@5"}
    head = result_table(result).splitlines()[0]
    assert "NDCG@5" in head and "@10" not in head and head.endswith("HR@1 - lens [95% interval]")
    alone = ranking_run(columns(ranking(1, candidates=1)), ingredients=Ingredients())
    assert set(alone["metrics"]["test"]) == {"hr@1"}


def test_rankings_of_other_candidates_or_samples_are_not_mixed(ranks, rows):
    with pytest.raises(ValueError, match="either scored or ranked"):
        ranking_run({**ranks, "label": rows["label"], "model_score": rows["model_score"]})
    with pytest.raises(ValueError, match="counts"):
        ranking_run({key: value[1:] for key, value in ranks.items()})
    full = ranking_run(columns(ranking(1, candidates=1682), lens=ranking(2, candidates=1682)))
    for others in ([ranking_run(ranks), full], [ranking_run(ranks), run(rows)]):
        with pytest.raises(ValueError, match=r"one table needs one test set.*\(samples, users, candidates\)"):
            result_table(others)


def test_ranking_results_survive_the_file_and_share_a_table(ranks, tmp_path):
    result = ranking_run(ranks)
    saved = json.loads(write_result(tmp_path, result, ranks).read_text())
    with np.load(tmp_path / "test_rows.npz", allow_pickle=False) as stored:
        assert set(stored.files) == set(ranks)
        np.testing.assert_array_equal(stored["model_rank"], ranks["model_rank"])
    other = columns(ranking(9), lens=ranking(2), zero_shot=ranking(3), popularity=ranking(4))
    lines = result_table([saved, ranking_run(other, run_name="LLaRA")]).splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == [
        *("untrained LLM", "lens SASRec", "popularity", "iLoRA", "LLaRA")
    ]
    assert result_table(saved) == result_table(result)


def test_too_few_users_of_a_ranking_are_said(ranks, caplog):
    few = {key: value[ranks["user"] < 4] for key, value in ranks.items()}
    text = result_table(ranking_run(few, counts={"valid": 1, "test": len(few["user"])}))
    assert "iLoRA, HR@1: no interval: only 4 users, fewer than 10" in text
    assert "iLoRA, NDCG@10: no interval" in caplog.text


def test_a_labelled_result_has_the_keys_it_had(rows):
    assert set(run(rows)["rows"]) == {
        *("train", "few_shot", "valid", "test", "eval_rows", "eval_rows_bounded")
    }


def test_what_cannot_be_computed_is_null_with_its_reason(rows, tmp_path, caplog):
    few = {key: value[rows["user"] < 4] for key, value in rows.items()}
    few["lens_score"] = few["lens_score"] * 9 - 4
    result = run(few, counts={"valid": 1, "test": len(few["label"])})
    text = result_table(result)
    assert "RecLoRA, AUC: no interval: only 4 users, fewer than 10" in text
    assert "lens DIN, LogLoss: LogLoss needs probabilities" in text and "needs probabilities" in caplog.text
    saved = json.loads(write_result(tmp_path, result, few).read_text())
    assert saved["lens"]["metrics"]["test"]["logloss"] is None
    interval = saved["intervals"]["models"]["model"]["auc"]
    assert interval["low"] is None and "only 4 users" in interval["reason"] and interval["value"] > 0


def test_the_log_calls_models_as_the_table_does(rows, caplog):
    few = {key: value[rows["user"] < 4] for key, value in rows.items()} | {
        "past_ratings_score": np.full(40, 0.5)
    }
    run(few, counts={"valid": 1, "test": 40})
    assert "past ratings, AUC: no interval" in caplog.text and "past_ratings" not in caplog.text


def test_rows_must_fit_the_counts_and_extra_the_schema(rows):
    with pytest.raises(ValueError, match=r"300 test samples were scored, but counts\['test'\] is 5"):
        run(rows, counts={"test": 5})
    with pytest.raises(ValueError, match=r"\['seed'\]"):
        run(rows, extra={"seed": 1})
    assert run(rows, extra={"note": 1})["note"] == 1


class Kind(Enum):
    VALUE = 1


def test_json_takes_what_a_config_holds(rows, tmp_path, caplog):
    config = {
        "f32": np.float32(0.5),
        "i64": np.int64(3),
        "flag": np.bool_(True),
        "nan": float("nan"),
        "deep": [{"inf": np.float64("-inf")}],
        "tensor": torch.tensor([1.5]),
        "scalar": torch.tensor(2),
        "array": np.arange(3),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "kind": Kind.VALUE,
        "path": Path("a") / "b",
        "set": {"b", "a"},
        "class": torch.nn.Linear,
        "tuple": (1, 2),
        "title": "Amélie",
    }
    with caplog.at_level(logging.WARNING):
        path = write_result(tmp_path / "new" / "folder", run(rows, **config), rows)
    assert path.name == "result.json"
    saved = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert saved["config"] == {
        **CONFIG,
        "f32": 0.5,
        "i64": 3,
        "flag": True,
        "nan": None,
        "deep": [{"inf": None}],
        "tensor": [1.5],
        "scalar": 2,
        "array": [0, 1, 2],
        "device": "cpu",
        "dtype": "torch.bfloat16",
        "kind": "VALUE",
        "path": str(Path("a") / "b"),
        "set": ["a", "b"],
        "class": "torch.nn.modules.linear.Linear",
        "tuple": [1, 2],
        "title": "Amélie",
    }
    assert "config.nan" in caplog.text and "config.deep[0].inf" in caplog.text
    assert saved["test_rows"] == "test_rows.npz" and saved["tokens_per_second"] == 12.5


@pytest.mark.parametrize("token", [str, object, np.int64])
def test_rows_are_stored_without_pickles(rows, tmp_path, token):
    rows["user"] = rows["user"].astype(str).astype(token)
    write_result(tmp_path, run(rows), rows)
    with np.load(tmp_path / "test_rows.npz", allow_pickle=False) as saved:
        assert set(saved.files) == {
            *("user", "item", "row_id", "label", "model_score", "lens_score", "zero_shot_score")
        }
        np.testing.assert_array_equal(saved["user"], rows["user"].astype(saved["user"].dtype))
        assert saved["user"].dtype.kind == ("i" if token is np.int64 else "U")
        assert saved["label"].dtype == np.int8
        assert auc(saved["model_score"], saved["label"]) == auc(rows["model_score"], rows["label"])


def test_a_failed_write_keeps_the_old_result_and_leaves_no_scraps(rows, tmp_path, monkeypatch):
    path = write_result(tmp_path, run(rows), rows)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"the column \[user\] mixes"):
        write_result(tmp_path, run(rows), {**rows, "user": np.array([None] * N, dtype=object)})
    with pytest.raises(ValueError, match="differ in length"):
        write_result(tmp_path, run(rows), {**rows, "user": rows["user"][1:]})
    with pytest.raises(ValueError, match="must be a vector or a matrix"):
        write_result(tmp_path, run(rows), {**rows, "user": rows["user"][:, None, None]})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_result(tmp_path, {**run(rows), "seed": 1}, rows)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result.json", "test_rows.npz"]


def test_environment_names_versions_and_machine():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"].startswith("3.")
    assert {"transformers", "peft", "recbole", "numpy", "pandas", "recbole_llm"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1 and found["machine"]["processor"]


def test_peak_memory_is_at_least_what_is_held_now():
    block = np.ones(5_000_000)
    found = peak_memory()
    assert found["host_bytes"] > block.nbytes
    if not torch.cuda.is_available():
        assert found["gpu_bytes"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets the peak be reset")
def test_the_peak_of_memory_counts_from_its_reset():
    large = np.ones(1 << 26)  # 512 MB
    before = peak_memory()["host_bytes"]
    del large
    reset_peak_memory()
    assert before - peak_memory()["host_bytes"] > 400 << 20
