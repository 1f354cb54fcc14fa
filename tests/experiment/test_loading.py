"""Finished runs of every kind of model, loaded again, and asked about users and items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec

from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.checkpoint import CheckpointError

NETWORK = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1}
LENS = {"epochs": 1, "embedding_size": 4, "mlp_hidden_size": [8], "attention_hidden_size": [4]}
CONVENTIONAL = {
    "SASRec": {"task": "next_item", "num_negatives": 3, **NETWORK},
    "DeepFM": {"task": "next_item", "num_negatives": 3, "embedding_size": 4, "mlp_hidden_size": [8]},
    "MoRec": {"task": "next_item", "num_negatives": 3, "backbone": "tiny", **NETWORK},
    "DIN": {"task": "ctr", "embedding_size": 4, "mlp_hidden_size": [8]},
    "BPR": {"task": "ctr", "embedding_size": 4},
    "Pop": {"task": "ctr"},
}
LLM = {
    "RecLoRA": {"layout": "prompt", "lens_config": LENS},
    "iLoRA": {"lens_config": {"epochs": 1, **NETWORK}, "num_negatives": 3, "compare_with": None},
}


class Mine(AnswerCTR):
    """A user's LLM recommender: no name stands for it."""


class MySASRec(SASRec):
    """A user's conventional model."""


@pytest.fixture
def common(toy_settings) -> dict:
    return {**toy_settings, "device": "cpu", "bootstrap_samples": 0, "epochs": 1, "eval_rows": 20}


@pytest.fixture
def finished(common):
    """``finished(model, **options)``: the folder of a finished run."""

    def run(model: str | type, **options) -> Path:
        settings = {**common, **options}
        if model in CONVENTIONAL or model is MySASRec:
            settings.pop("text") if model != "MoRec" else None
            if model != "MoRec":
                settings.pop("backbone")
        else:
            settings |= {"few_shot": 16, "train_batch_size": 8}
        return Path(run_recbole_llm(model, "toy", config_dict=settings)["path"]).parent

    return run


def saved(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "test_rows.npz", allow_pickle=False) as file:
        return dict(file)


def scores_of(run) -> np.ndarray:
    """The model's scores of the test samples, or of their stored candidates ``[n, C]``."""
    scores = torch.cat(
        [run.model.predict(batch[0].to(run.model.device)).detach().reshape(-1) for batch in run.test_data]
    )
    scores = scores.double().numpy()
    return scores if run.candidates is None else scores.reshape(len(run.test), -1)


@pytest.mark.parametrize("model", [*CONVENTIONAL, *LLM])
def test_a_loaded_run_has_the_scores_that_were_saved(model, finished):
    folder = finished(model, **(CONVENTIONAL | LLM)[model])
    run = load_data_and_model(folder)
    column = "model_score" if run.candidates is None else "candidate_scores"
    np.testing.assert_array_equal(scores_of(run), saved(folder)[column])


@pytest.mark.parametrize("model", ["SASRec", "iLoRA"])
def test_candidates_are_kept_with_their_scores(model, finished):
    folder = finished(model, **(CONVENTIONAL | LLM)[model])
    columns, stored = saved(folder), load_data_and_model(folder).candidates["test"]
    assert columns["candidates"].shape == columns["candidate_scores"].shape == (20, 4)
    is_target = columns["candidates"] == columns["item"][:, None]
    assert (is_target.sum(axis=1) == 1).all()
    own = columns["candidate_scores"][is_target]
    np.testing.assert_array_equal(
        (columns["candidate_scores"] >= own[:, None]).sum(axis=1), columns["model_rank"]
    )
    run = load_data_and_model(folder)
    tokens = run.dataset.id2token("item_id", stored.of(columns["row_id"]))
    np.testing.assert_array_equal(columns["candidates"], tokens)


@pytest.mark.parametrize("model", ["DIN", "RecLoRA", "SASRec", "iLoRA", "BPR"])
def test_a_pair_is_scored_after_all_interactions_of_its_user(model, finished):
    options = (CONVENTIONAL | LLM)[model]
    # Without a list of candidates, so that samples and what is still to come have the same prompt.
    run = load_data_and_model(
        finished(model, **options, **({"eval_mode": "full"} if model == "iLoRA" else {}))
    )
    users = torch.tensor([3, 3, 5])
    items = torch.tensor([2, 7, 2])
    scores = run.model.predict(Interaction({"user_id": users, "item_id": items}))
    history = run.dataset.history
    ends = torch.from_numpy(history.user_start)[users + 1]
    whole = run.dataset.join(
        Interaction({"user_id": users, "item_id": items, HISTORY_END: ends, "row_id": -users})
    )
    if model != "BPR":
        newest = history.item_ids[ends[0] - 1]
        assert newest in whole["item_id_list"][0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(scores, run.model.predict(whole), rtol=0, atol=0)
    one = run.model.predict(Interaction({"user_id": users[1:2], "item_id": items[1:2]}))
    torch.testing.assert_close(one, scores[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["DIN", "RecLoRA", "SASRec", "iLoRA", "BPR", "DeepFM"])
def test_all_items_are_scored_for_a_user_alone(model, finished):
    run = load_data_and_model(finished(model, **(CONVENTIONAL | LLM)[model]))
    scores = run.model.full_sort_predict(Interaction({"user_id": torch.tensor([3, 5])}))
    assert scores.shape == (2, run.dataset.item_num)
    assert (scores[:, 0] == -torch.inf).all() and torch.isfinite(scores[:, 1:]).all()
    items = torch.arange(1, run.dataset.item_num)
    pairs = run.model.predict(Interaction({"user_id": torch.full_like(items, 5), "item_id": items}))
    if model != "BPR":  # its predict gives the sigmoid on labelled samples
        torch.testing.assert_close(scores[1, 1:].double(), pairs.double(), rtol=0, atol=1e-4)


def test_ids_that_are_not_in_the_data_are_refused(finished):
    run = load_data_and_model(finished("DIN", **CONVENTIONAL["DIN"]))
    with pytest.raises(ValueError, match=r"user_id: internal ids go from 1 to 40"):
        run.model.predict(Interaction({"user_id": torch.tensor([41]), "item_id": torch.tensor([1])}))


@pytest.mark.parametrize(
    ("model", "options"), [(Mine, {"lens_config": LENS}), (MySASRec, CONVENTIONAL["SASRec"])]
)
def test_a_class_takes_the_place_of_a_name(model, options, finished):
    folder = finished(model, **options)
    run = load_data_and_model(folder, model=model)
    assert type(run.model) is model
    column = "model_score" if run.candidates is None else "candidate_scores"
    np.testing.assert_array_equal(scores_of(run), saved(folder)[column])


def test_what_cannot_be_loaded_is_said_in_one_sentence(finished, tmp_path):
    folder = finished("DIN", **CONVENTIONAL["DIN"])
    (folder / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no run that can be loaded: it has no best\.safetensors"):
        load_data_and_model(folder)
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        load_data_and_model(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder .*none: give that of a finished run"):
        load_data_and_model(tmp_path / "none")


def test_one_more_interaction_is_other_data(finished, toy_data, tmp_path):
    import shutil

    data = shutil.copytree(toy_data, tmp_path / "grown")
    folder = finished("SASRec", **CONVENTIONAL["SASRec"], data_path=str(data))
    with open(data / "toy" / "toy.inter", "a") as file:
        file.write("1\t5\t4\t1400000000\n")
    with pytest.raises(CheckpointError, match="trained with another data than there is now"):
        load_data_and_model(folder)


def test_a_relative_data_path_is_found_from_another_folder(finished, toy_data, tmp_cwd, monkeypatch):
    (tmp_cwd / "data").symlink_to(toy_data, target_is_directory=True)
    folder = finished("DIN", **CONVENTIONAL["DIN"], data_path="data").resolve()
    elsewhere = tmp_cwd / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert len(load_data_and_model(folder).test) == 20
