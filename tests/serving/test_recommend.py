"""Recommendations and scores of finished runs of every kind, by the ids of the files."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils.case_study import full_sort_scores, full_sort_topk

from recbole_llm.quick_start import load_data_and_model
from recbole_llm.serving.recommend import recommend
from recbole_llm.serving.run import ServedRun
from recbole_llm.serving.score import score

MODELS = ["RecLoRA", "TALLRec", "iLoRA", "TALLRecNext", "SASRec", "DIN", "TitleKNN", "MoRec", "BPR"]
STREAMS = ["TALLRec stream", "RecLoRA stream", "LensPrompt stream", "Stream", "HLLM"]


def direct(run, user: str, items: list[str]) -> np.ndarray:
    """Scores by RecBole's own call."""
    columns = {
        "user_id": torch.full((len(items),), run.dataset.token2id("user_id", user)),
        "item_id": torch.as_tensor(run.dataset.token2id("item_id", items)),
    }
    return run.model.predict(Interaction(columns)).double().cpu().numpy()


@pytest.mark.parametrize("name", MODELS + STREAMS)
def test_scores_are_those_of_the_model_in_the_order_of_the_pairs(name, served, finished):
    pairs = pd.DataFrame({"user_id": [3, 1, 3, 2], "item_id": [5, 9, 1, 5]})
    table = score(served(name), pairs)
    assert table["user"].tolist() == ["3", "1", "3", "2"] and table["item"].tolist() == ["5", "9", "1", "5"]
    run = load_data_and_model(finished(name), device="cpu")
    expected = [direct(run, str(u), [str(i)])[0] for u, i in pairs.itertuples(index=False)]
    np.testing.assert_allclose(table["score"], expected, atol=1e-6)


@pytest.mark.parametrize("name", MODELS + STREAMS)
def test_recommendations_are_the_best_unseen_items(name, served):
    run = served(name)
    table = recommend(run, ["4", "2"], top=5, retrieve=0)
    assert table["user"].tolist() == ["4"] * 5 + ["2"] * 5 and table["rank"].tolist() == [*range(1, 6)] * 2
    for user, part in table.groupby("user"):
        seen = set(run.tokens("item_id", run.seen(run.dataset.token2id("user_id", user))))
        assert len(seen) == 25 and not seen & set(part["item"])
        unseen = sorted(set(map(str, range(1, 51))) - seen, key=int)
        scores = direct(run.parts, user, unseen)
        np.testing.assert_allclose(part["score"], np.sort(scores)[::-1][:5], atol=1e-6)


def test_two_stages_name_the_one_that_ranked(served):
    run = served("RecLoRA")
    table = recommend(run, [4], top=8, retrieve=5)
    assert table["stage"].tolist() == ["llm (RecLoRA)"] * 5 + ["lens (DIN)"] * 3
    unseen = np.setdiff1d(run.scorable(), run.seen(run.dataset.token2id("user_id", "4")))
    user = np.full(len(unseen), run.dataset.token2id("user_id", "4"))
    best = unseen[np.argsort(-run.lens_scores(user, unseen), kind="stable")]
    assert set(table["item"][:5]) == set(run.tokens("item_id", best[:5]))
    assert table["item"][5:].tolist() == run.tokens("item_id", best[5:8])
    assert table["title"].str.contains(r" \(\d{4}\)$").all()


@pytest.mark.parametrize("name", ["TALLRec", "TALLRec stream", "iLoRA"])
def test_another_run_retrieves_and_the_llm_ranks_again(name, served, finished):
    run, first = served(name, retriever=finished("HLLM")), served("HLLM")
    table = recommend(run, ["4", "2"], top=6, retrieve=4)
    stage = f"llm ({name.split()[0]})"
    assert table["stage"].tolist() == ([stage] * 4 + ["retriever (HLLM)"] * 2) * 2
    for user, part in table.groupby("user"):
        expected = recommend(first, [user], top=6)
        assert set(part["item"][:4]) == set(expected["item"][:4])
        assert part["item"].tolist()[4:] == expected["item"].tolist()[4:]
        np.testing.assert_allclose(part["score"][4:], expected["score"][4:], atol=1e-6)
        assert part["score"][:4].is_monotonic_decreasing
    again = score(run, table[table["stage"] == stage][["user", "item"]])
    if name != "iLoRA":  # whose prompt lists what was retrieved
        np.testing.assert_allclose(again["score"], table["score"][table["stage"] == stage], atol=1e-6)
    assert run.default_retrieved == (4 if name == "iLoRA" else 50)


def test_a_retriever_on_other_data_is_refused(served, finished, monkeypatch):
    load = ServedRun.load.__func__

    def elsewhere(cls, folder, **options):
        run = load(cls, folder, **options)
        run.dataset.dataset_name = "other" if folder == finished("HLLM") else "toy"
        return run

    monkeypatch.setattr(ServedRun, "load", classmethod(elsewhere))
    with pytest.raises(ValueError, match="was trained on other and .* on toy; name a run on the same data"):
        ServedRun.load(finished("TALLRec"), retriever=finished("HLLM"), device="cpu")


def test_prompts_that_listed_candidates_list_those_of_the_first_stage(served, monkeypatch):
    run = served("iLoRA")
    assert run.lists_candidates and run.default_retrieved == 4
    texts = []
    encode = run.parts.prompts.encode

    def spy(interaction, *, slots):
        texts.append(run.parts.prompts.text(interaction, 0))
        return encode(interaction, slots=slots)

    monkeypatch.setattr(run.parts.prompts, "encode", spy)
    table = recommend(run, [4], top=4)
    titles = table["title"].str.replace(r" \(\d{4}\)$", "", regex=True)
    assert len(texts) == 1 and all(title in texts[0] for title in titles)


def test_candidates_unknown_ids_and_seen_items(served, caplog):
    run = served("DIN")
    table = recommend(run, ["4", "nobody"], top=3, candidates=["1", "2", "3", "no item"], exclude_seen=False)
    assert set(table["item"]) == {"1", "2", "3"}
    assert table.attrs["unknown_users"] == ["nobody"] and table.attrs["unknown_items"] == ["no item"]
    assert "nobody" in caplog.text and "no item" in caplog.text
    pairs = pd.DataFrame({"user": ["4", "nobody"], "item": ["1", "1"]})
    assert len(score(run, pairs)) == 1
    with pytest.raises(ValueError, match="none of the users .*nobody"):
        recommend(run, ["nobody"])
    with pytest.raises(ValueError, match="no column item_id"):
        score(run, pd.DataFrame({"user_id": ["4"]}))
    with pytest.raises(ValueError, match="top"):
        recommend(run, ["4"], top=0)


def test_a_user_who_has_seen_everything_gets_nothing(served):
    run = served("DIN")
    seen = run.tokens("item_id", run.seen(run.dataset.token2id("user_id", "4")))
    assert recommend(run, ["4"], candidates=seen).empty


@pytest.mark.parametrize("name", ["RecLoRA", "RecLoRA stream", "iLoRA", "TALLRec", "SASRec"])
def test_explanations_hold_prompt_lens_and_gate(name, served):
    run = served(name)
    table = recommend(
        run, ["4"], top=2, retrieve=0, candidates=["1", "2", "3"], explained=True, exclude_seen=False
    )
    assert table["history"].tolist() == [25, 25]
    if name == "SASRec":
        assert table["prompt"].isna().all()
        return
    assert all(isinstance(text, str) and len(text) > 50 for text in table["prompt"])
    if name == "TALLRec":
        assert table["gate"].isna().all() and table["lens_score"].isna().all()
        return
    assert all(abs(sum(gate) - 1) < 1e-3 for gate in table["gate"])
    users, items = (run.ids(f, table[c]).known for f, c in (("user_id", "user"), ("item_id", "item")))
    np.testing.assert_allclose(table["lens_score"].astype(float), run.lens_scores(users, items))


@pytest.mark.parametrize("name", MODELS + STREAMS)
def test_recboles_case_study_works_on_loaded_runs(name, finished, tmp_cwd):
    run = load_data_and_model(finished(name), device="cpu")
    users = run.dataset.token2id("user_id", ["1", "2"])
    inside = [user for user in users if (run.test_data.dataset.inter_feat["user_id"] == int(user)).any()] or [
        int(run.test_data.dataset.inter_feat["user_id"][0])
    ]
    user = np.array(inside[:1])
    scores = full_sort_scores(user, run.model, run.test_data)
    assert scores.shape[1] == run.dataset.item_num and (scores[:, 0] == -torch.inf).all()
    best, index = full_sort_topk(user, run.model, run.test_data, k=3)
    assert best.shape[1] == 3 and (index > 0).all()
    assert torch.equal(best, scores.topk(3).values)


@pytest.mark.parametrize("name", ["TALLRec stream", "RecLoRA stream", "LensPrompt stream"])
def test_the_stream_that_was_read_ends_with_the_candidate(name, served):
    run = served(name)
    table = score(run, pd.DataFrame({"user": ["4"], "item": ["1"]}), explained=True)
    *earlier, last = table["prompt"][0].splitlines()
    assert last.startswith(run.parts.prompts._items.titles[int(run.ids("item_id", ["1"]).known[0])])
    assert last.endswith(":") and len(earlier) >= 6  # a header and the context of an evaluation


EMPTY = [
    "RecLoRA",
    "TALLRec",
    "RecLoRA stream",
    "TALLRec stream",
    "iLoRA",
    "SASRec",
    "Stream",
    "HLLM",
    "TitleKNN",
]


@pytest.mark.parametrize("name", EMPTY)
def test_a_user_without_any_history_is_answered(name, served):
    run = served(name)
    history = run.dataset.history
    last = int(history.user_start[-2])  # where the interactions of the last user begin
    for column in ("item_ids", "labels", "timestamps", "ratings", "opens_split"):
        values = getattr(history, column)
        setattr(history, column, None if values is None else values[:last])
    history.user_start[-1] = last
    history.__dict__.pop("tie_start", None)
    if hasattr(run.model, "follow_history"):
        run.model.follow_history()
    elif name.endswith("stream"):
        run.parts.prompts.refresh()
    user = run.tokens("user_id", [run.dataset.user_num - 1])
    table = recommend(run, user, top=3, retrieve=0, candidates=["1", "2", "3"])
    assert len(table) == 3 and np.isfinite(table["score"]).all()
    assert recommend(run, user, top=1, explained=True)["history"].tolist() == [0]


def test_a_run_whose_lens_or_backbone_is_missing_is_refused(finished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(finished("RecLoRA"), copied)
    shutil.rmtree(copied / "lens")
    with pytest.raises(ValueError, match="the run was copied without its lens"):
        ServedRun.load(copied, device="cpu")
    assert not list(copied.rglob("lens.json"))  # nothing was trained in its place
    with pytest.raises(FileNotFoundError, match="backbone: there is no file or folder .*none"):
        ServedRun.load(finished("TALLRec"), device="cpu", backbone="./none/model")


@pytest.mark.parametrize("which", ["seen", "all"])
def test_candidate_items_are_what_is_recommended(which, served):
    run = served("TALLRec", candidate_items=which)
    size = run.dataset.item_num
    run.dataset.history.item_ids[run.dataset.history.item_ids == 7] = 8  # nobody has met item 7
    expected = [item for item in range(1, size) if item != 7 or which == "all"]
    assert run.scorable().tolist() == expected
