"""Next-item models: scores, slots, gates, the curriculum in a training, candidates shared by all models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import write_dataset

from recbole_llm.cli import report as printed
from recbole_llm.config.configurator import Config
from recbole_llm.experiment.llm_assembly import assemble
from recbole_llm.quick_start import load_data_and_model, run_recbole_llm
from recbole_llm.trainer.llm_trainer import LLMTrainer

TEXT = {"title": "movie_title", "year": "release_year"}
LENS = {"epochs": 2, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(data_path, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "data_path": str(data_path),
        "cache_dir": str(cache),
        "text": TEXT,
        "backbone": "tiny",
        "layout": "prompt",
        "few_shot": 32,
        "train_batch_size": 8,
        "micro_batch_size": 4,
        "num_negatives": 9,
        "topk": [1, 5],
        "valid_metric": "NDCG@5",
        "lens_config": LENS,
        "bootstrap_samples": 50,
        "show_progress": False,
        "learning_rate": 0.01,
        "compare_with": None,
    }


def parts_of(settings, model="iLoRA", **options):
    parts = assemble(Config(model, "toy", config_dict={**settings, **options}))
    parts.model.eval()
    return parts


def disturb(model) -> None:
    """Give every trained parameter a value of its own, as a training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in model.parameter_groups().values():
            for parameter in group.values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def rows_of(result: dict) -> dict[str, np.ndarray]:
    with np.load(Path(result["path"]).with_name("test_rows.npz"), allow_pickle=False) as file:
        return dict(file)


@torch.no_grad()
def brute_force(parts, interaction, row: int, item: int) -> float:
    """Mean log-likelihood of one title behind one prompt, token by token from a forward pass of its own."""
    model = parts.model
    one = interaction[torch.tensor([row])]
    prompt = parts.prompts.encode(one, slots=model.slots).input_ids[0]
    answer = parts.prompts.answers[item]
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    if model.gated:
        state, _ = model.lens.represent(one)
        model.adapter.set_instance(state)
    embedded = model.embed(ids, hybrid=model.hybrid)
    logits = model.adapter.peft_model(inputs_embeds=embedded, use_cache=False).logits[0].double()
    found = [
        logits[len(prompt) + t - 1].log_softmax(-1)[token].item() for t, token in enumerate(answer.tolist())
    ]
    return float(np.mean(found))


@pytest.mark.parametrize("model", ["iLoRA", "LLaRA", "TALLRecNext"])
def test_scores_are_those_of_each_full_prompt_alone(model, settings):
    parts = parts_of(settings, model)
    disturb(parts.model)
    batch, row_index, *_ = next(iter(parts.test_data))
    scores = parts.model.predict(batch)
    rows = parts.test[np.arange(int(row_index.max()) + 1)]
    for position in range(0, len(scores), 7):
        expected = brute_force(parts, rows, int(row_index[position]), int(batch["item_id"][position]))
        assert scores[position].item() == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_depend_on_how_the_loader_cuts_its_rows(settings):
    parts = parts_of(settings)
    disturb(parts.model)
    batch, *_ = next(iter(parts.test_data))
    together = parts.model.predict(batch)
    parts.model.scoring = replace(parts.model.scoring, scoring_batch_size=1)
    pieces = torch.cat([parts.model.predict(batch[i : i + 7]) for i in range(0, len(batch), 7)])
    torch.testing.assert_close(pieces, together, atol=1e-4, rtol=0)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(parts.model.predict(batch[order]), together[order], atol=1e-4, rtol=0)


def test_the_catalogue_is_ranked_as_by_brute_force_and_the_work_is_counted(settings):
    parts = parts_of(settings, eval_mode="full", trie_nodes=16)
    disturb(parts.model)
    rows = parts.test[np.arange(3)]
    parts.model.reset_work()
    scores = parts.model.full_sort_predict(rows)
    assert scores.shape == (3, parts.dataset.item_num) and torch.isneginf(scores[:, 0]).all()
    for item in range(1, parts.dataset.item_num, 6):
        for row in range(3):
            assert scores[row, item].item() == pytest.approx(brute_force(parts, rows, row, item), abs=1e-4)
    work = parts.model.extra_results()["scoring"]
    lengths = [len(ids) for ids in parts.model.encode(rows).input_ids]
    assert work["rows"] == 3 and work["prompt_tokens"] == sum(lengths)
    assert work["edges"] == 3 * parts.model.catalogue().n_edges
    assert work["tokens"] >= sum(lengths)


def test_two_stages_put_the_lens_first_choices_first_and_keep_its_order_behind(settings):
    parts = parts_of(settings, eval_mode="full", two_stage=5)
    rows = parts.test[np.arange(4)]
    scores, first = parts.model.full_sort_predict(rows), parts.lens.score_items(rows)
    single = parts_of(settings, eval_mode="full").model.full_sort_predict(rows)
    for row in range(4):
        order = first[row].argsort(descending=True)
        chosen, rest = order[:5], order[5:-1]  # the last is the padding item
        torch.testing.assert_close(scores[row, chosen], single[row, chosen], atol=1e-4, rtol=0)
        assert scores[row, chosen].min() > scores[row, rest].max()
        assert (scores[row, rest].diff() <= 0).all()


def unmet(parts, rows) -> np.ndarray:
    """Which items each sample's target is ranked among without history, ``[B, n_items]``, one by one."""
    history, mask = parts.dataset.history, np.tile(parts.dataset.ranked_items, (len(rows), 1))
    for row, (user, item, end) in enumerate(
        zip(*(rows[name].tolist() for name in ("user_id", "item_id", "history_end")), strict=True)
    ):
        mask[row, history.item_ids[history.user_start[user] : end]] = False
        mask[row, item] = True
    return mask


def test_two_stages_choose_among_the_items_that_are_ranked(settings):
    parts = parts_of(settings, eval_mode="full", two_stage=5, rank_history=False)
    rows = parts.test[np.arange(4)]
    scores, first = parts.model.full_sort_predict(rows), parts.lens.score_items(rows)
    changed = 0
    for row, ranked in enumerate(unmet(parts, rows)):
        order = [item for item in first[row].argsort(descending=True).tolist() if ranked[item]]
        assert scores[row, order[:5]].min() > scores[row, order[5:]].max()
        changed += first[row].argmax().item() not in order
    assert changed  # without it, the lens's first choice would have been one that the user has met


def test_without_history_model_and_references_are_ranked_among_the_items_that_users_have_not_met(settings):
    options = {**settings, "eval_mode": "full", "rank_history": False, "zero_shot": True, "eval_rows": 12}
    result = run_recbole_llm("LLaRA", "toy", config_dict=options)
    run = load_data_and_model(Path(result["path"]).parent)
    rows = run.test_data._dataset[np.arange(12)]
    mask = unmet(run, rows)
    with np.load(Path(result["path"]).with_name("test_rows.npz"), allow_pickle=False) as file:
        found = dict(file)
    scores = {
        "model": run.model.full_sort_predict(rows),
        "zero_shot": run.model.full_sort_predict(rows, adapted=False),
        "lens": run.model.lens.score_items(rows).double(),
    }
    for name, of_items in scores.items():
        others = np.where(mask, of_items.numpy(), -np.inf)
        own = others[np.arange(12), rows["item_id"].numpy()]
        np.testing.assert_array_equal(found[f"{name}_rank"], (others >= own[:, None]).sum(axis=1))
    assert mask.sum(axis=1).max() < run.dataset.ranked_items.sum()
    assert found["popularity_rank"].max() <= mask.sum(axis=1).max()
    (ranked,) = set(mask.sum(axis=1).tolist())  # all users of this data have met as many
    assert f"the {ranked} items that its user had not met; ties" in printed(result)


def test_slots_hold_projected_item_vectors_and_count_history_and_candidates(settings):
    parts = parts_of(settings)
    disturb(parts.model)
    rows = parts.test[np.arange(2)]
    ids = parts.model.encode(rows).input_ids[0]
    slots = np.flatnonzero(ids < 0)
    candidates = parts.candidates["test"].of(rows["row_id"].numpy())[0]
    history = rows["item_id_list"][0, -0:][: int(rows["item_length"][0])].numpy()
    assert sorted(-ids[slots]) == sorted([*history, *candidates])
    embedded = parts.model.embed(torch.from_numpy(ids)[None], hybrid=True)[0]
    vectors = parts.lens.item_vectors()[torch.from_numpy(-ids[slots])]
    torch.testing.assert_close(embedded[slots], parts.model.projector(vectors))
    text_only = parts.model.embed(torch.from_numpy(ids)[None], hybrid=False)[0]
    torch.testing.assert_close(text_only[slots], parts.model.empty_slot.expand(len(slots), -1))
    words = np.flatnonzero(ids >= 0)
    torch.testing.assert_close(embedded[words], text_only[words], rtol=0, atol=0)


def test_slots_start_at_the_mean_embedding_in_text_only_prompts(settings):
    parts = parts_of(settings)
    mean = parts.model.adapter.model.get_input_embeddings().weight.mean(dim=0)
    torch.testing.assert_close(parts.model.empty_slot.detach(), mean.detach())


def test_the_target_is_one_of_its_candidates_once_and_never_in_its_history(settings):
    parts = parts_of(settings)
    for name, rows in (("train", parts.train), ("valid", parts.valid), ("test", parts.test)):
        batch = rows[np.arange(len(rows))]
        items = parts.candidates[name].of(batch["row_id"].numpy())
        targets = batch["item_id"].numpy()
        assert ((items == targets[:, None]).sum(axis=1) == 1).all()
        assert not (batch["item_id_list"].numpy()[:, :, None] == items[:, None, :]).any()


def test_gradients_reach_adapter_gate_and_projector_and_nothing_else(settings):
    parts = parts_of(settings)
    disturb(parts.model)
    parts.model.train()
    parts.model._hybrid_step = True
    parts.model.calculate_loss(parts.train[np.arange(8)]).backward()
    trained = {id(p) for group in parts.model.parameter_groups().values() for p in group.values()}
    for name, parameter in parts.model.named_parameters():
        if id(parameter) in trained and "empty_slot" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        elif "empty_slot" not in name:
            assert parameter.grad is None, name


def test_loss_is_the_negative_score_of_the_targets(settings):
    parts = parts_of(settings, lora_dropout=0.0)
    disturb(parts.model)
    rows = parts.train[np.arange(6)]
    expected = -torch.cat(parts.model.score_items(rows, [[item] for item in rows["item_id"].tolist()])).mean()
    parts.model._hybrid_step = True
    assert parts.model.calculate_loss(rows).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_token_gate_reads_the_prompt_and_not_the_lens(settings):
    parts = parts_of(settings, gate="token")
    disturb(parts.model)
    rows = parts.test[np.arange(2)]
    before = parts.model.score_items(rows, [[1, 2], [1, 2]])
    parts.model.lens.represent = None  # would fail if it were asked
    torch.testing.assert_close(parts.model.score_items(rows, [[1, 2], [1, 2]]), before)
    assert parts.model.adapter.config.instance_size == parts.model.empty_slot.numel()


def test_a_training_follows_the_curriculum_by_its_optimizer_steps(settings, tmp_path):
    parts = parts_of(settings, epochs=3)
    seen = []
    original = parts.model.begin_step
    parts.model.begin_step = lambda *where: (seen.append(where), original(*where))
    trainer = LLMTrainer(parts.config, parts.model, run_folder=tmp_path, identities=parts.identities)
    trainer.fit(parts.train_data, parts.valid_data, saved=True)
    assert seen == [(step, 4, 3) for step in range(12)]
    assert parts.model._hybrid_step  # the last step is a hybrid one


def test_text_only_curriculum_never_shows_item_vectors(settings):
    parts = parts_of(settings, "LLaRA", curriculum="text_only")
    rows = parts.test[np.arange(2)]
    before = parts.model.score_items(rows, [[1, 2], [1, 2]])
    with torch.no_grad():
        parts.model.projector[0].weight.add_(1)
    torch.testing.assert_close(parts.model.score_items(rows, [[1, 2], [1, 2]]), before)
    assert set(parts.model.own_parameters()["projector"]) == {"empty_slot"}


CASES = {
    "iLoRA": ("iLoRA", {}),
    "iLoRA, cnn": ("iLoRA", {"gate": "cnn"}),
    "iLoRA, token": ("iLoRA", {"gate": "token"}),
    "iLoRA, uniform": ("iLoRA", {"gate": "uniform"}),
    "iLoRA, top 2": ("iLoRA", {"top_k": 2}),
    "iLoRA, GRU4Rec": ("iLoRA", {"lens": "GRU4Rec", "lens_config": {"epochs": 1, "hidden_size": 8}}),
    "iLoRA, hard negatives": ("iLoRA", {"negatives": "hard"}),
    "iLoRA, popular negatives": ("iLoRA", {"negatives": "popularity"}),
    "iLoRA, full": ("iLoRA", {"eval_mode": "full", "eval_rows": 10}),
    "iLoRA, uni9": ("iLoRA", {"eval_mode": "uni9", "eval_rows": 10}),
    "iLoRA, generate": ("iLoRA", {"generate": True, "max_new_tokens": 4}),
    "LLaRA": ("LLaRA", {"eval_step": 1, "epochs": 2}),
    "TALLRecNext": ("TALLRecNext", {"lens": None, "lens_config": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_run(case, settings):
    model, options = CASES[case]
    result = run_recbole_llm(model, "toy", config_dict={**settings, **options})
    saved, rows = json.loads(Path(result["path"]).read_text()), rows_of(result)
    bounded = options.get("eval_rows", 40)
    assert saved["model"] == model and len(rows["model_rank"]) == saved["rows"]["test"] == bounded
    if options.get("eval_mode", "candidates")[:3] != "uni":
        assert {"popularity_rank", "zero_shot_rank"} <= rows.keys()
        assert ("lens_rank" in rows) == (saved["lens"] is not None)
        assert 0 <= saved["metrics"]["test"]["hr@1"] <= 1
    if options.get("generate"):
        report = saved["generated"]
        assert report["n"] == 40 and report["valid_ratio"] >= report["hit_ratio_all"]
        assert len(rows["written"]) == 40
        assert f"written answers of 40 samples: ValidRatio {report['valid_ratio']:.4f}" in printed(result)
    assert saved["scoring"]["tokens"] > 0


def test_a_loaded_run_ranks_as_the_saved_one_and_its_gate_is_bit_identical(settings):
    result = run_recbole_llm("iLoRA", "toy", config_dict={**settings, "gate": "cnn"})
    parts = load_data_and_model(Path(result["path"]).parent)
    again = load_data_and_model(Path(result["path"]).parent)
    rows = parts.test[np.arange(4)]  # one scoring batch
    gates = []
    for loaded in (parts, again):
        loaded.model.score_items(rows, [[1, 2]] * 4)
        gates.append(next(iter(loaded.model.adapter.gate_values().values())))
    assert torch.equal(gates[0], gates[1]) and gates[0].std(dim=0).max() > 0
    saved = rows_of(result)
    scores = torch.cat([parts.model.predict(batch[0]) for batch in parts.test_data]).reshape(40, -1)
    targets = parts.candidates["test"].items == parts.candidates["test"].targets[:, None]
    own = scores.masked_select(torch.from_numpy(targets))[:, None]
    np.testing.assert_array_equal((scores >= own).sum(dim=1).numpy(), saved["model_rank"])


def test_every_model_ranks_the_same_candidates_and_the_differences_are_paired(settings, caplog):
    wanted = ["LLaRA", "iLoRA gate=uniform", "GRU4Rec epochs=1", "Pop"]
    result = run_recbole_llm("iLoRA", "toy", config_dict={**settings, "compare_with": wanted})
    folder = Path(result["path"]).parent
    results = [json.loads((folder / "compare" / name / "result.json").read_text())
               for name in ("LLaRA", "iLoRA-gate=uniform", "GRU4Rec-epochs=1", "Pop")]  # fmt: skip
    assert [found["name"] for found in results] == wanted
    assert results[1]["config"]["gate"] == "uniform" and results[0]["config"]["mixer"] == "identity"
    own = rows_of(result)
    for name in ("LLaRA", "Pop"):
        with np.load(folder / "compare" / name / "test_rows.npz") as file:
            order, mine = np.argsort(file["row_id"]), np.argsort(own["row_id"])
            np.testing.assert_array_equal(file["item"][order], own["item"][mine])
            if name == "Pop":  # RecBole's popularity is ours, on the same candidates
                np.testing.assert_array_equal(file["model_rank"][order], own["popularity_rank"][mine])
    comparison = json.loads((folder / "compare.json").read_text())
    names = [model["name"] for model in comparison["models"]]
    assert names[:1] == [comparison["subject"]] == ["iLoRA"] and set(wanted) < set(names)
    differences = {d["b"]: d for d in comparison["differences"] if d["metric"] == "hr@1"}
    hits = {name: found["metrics"]["test"]["hr@1"] for name, found in zip(wanted, results, strict=True)}
    mine = result["metrics"]["test"]["hr@1"]
    assert differences.keys() == set(names) - {"iLoRA"}
    for name in wanted:
        assert differences[name]["test"] == "McNemar (HR@1)" and differences[name]["p_holm"] is not None
        assert differences[name]["value"] == pytest.approx(mine - hits[name])


def test_a_failing_model_is_reported_and_the_others_go_on(settings, caplog):
    wanted = ["GRU4Rec loss_type=XX epochs=1", "Pop"]
    result = run_recbole_llm("TALLRecNext", "toy", config_dict={**settings, "compare_with": wanted})
    assert [found["name"] for found in result["compared"]] == ["TALLRecNext", "Pop"]
    assert any("failed, the other runs continue" in record.message for record in caplog.records)
    (failed,) = result["comparison"]["failed"]
    assert failed["name"] == wanted[0] and failed["error"].startswith("ValueError: ")


BAD = {
    "gate sees the target": ({"gate_scope": "user_item"}, "gate_scope"),
    "DIN as lens": ({"lens": "DIN", "lens_config": None}, "needs the target item"),
    "semantic history": ({"text_retrieval": "semantic"}, "not possible in the next_item task"),
    "two stages among candidates": ({"two_stage": 5}, "set eval_mode: full"),
    "history among candidates": ({"rank_history": False}, "rank_history=False.*set eval_mode: full"),
    "writing without candidates": ({"generate": True, "eval_mode": "full"}, "set eval_mode: candidates"),
    "another task": ({"task": "ctr"}, "needs task: next_item"),
    "rank not divisible": ({"num_experts": 3}, "is not divisible by"),
    "unknown model to compare with": ({"compare_with": ["LLaRa2"]}, "did you mean LLaRA"),
    "comparison on redrawn negatives": (
        {"compare_with": ["LLaRA"], "eval_mode": "uni9"},
        "draws other negatives for every model",
    ),
    "changed rows": ({"compare_with": ["LLaRA num_negatives=3"]}, "must be the same for all"),
    "candidates demanded in full mode": ({"eval_args": {"mode": "full"}}, "the mode is set by eval_mode"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_error(case, settings):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        run_recbole_llm("iLoRA", "toy", config_dict={**settings, **options})


def write_ready_made(folder: Path) -> Path:
    """A music dataset with splits of its own: no times, no ratings, no profiles, difficult titles."""
    rng = np.random.default_rng(5)
    titles = [
        "Yesterday", "Yesterday Once More", '"Heroes"', "Guns &amp; Roses", "上を向いて歩こう", "Песня", "Señorita",
        "<|endoftext|>", "A" * 300, "unknown", "Help!", "Help!", "Tab ", "Äther",
    ]  # fmt: skip
    titles += [f"Song {n}" for n in range(16)]
    target = folder / "songs"
    target.mkdir(parents=True)
    items = ["item_id:token\tname:token_seq", *(f"s{n}\t{title}" for n, title in enumerate(titles))]
    (target / "songs.item").write_text("\n".join(items) + "\n", encoding="utf-8")
    for split, rows in (("train", 60), ("valid", 12), ("test", 12)):
        lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
        for row in range(rows):
            *history, following = rng.permutation(len(titles))[: rng.integers(3, 9)]
            lines.append(f"u{row}\t{' '.join(f's{item}' for item in history)}\ts{following}")
        (target / f"songs.{split}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("model", ["iLoRA", "TALLRecNext"])
def test_ready_made_splits_with_only_titles(model, settings, tmp_path):
    options = {
        **settings,
        "data_path": str(write_ready_made(tmp_path / "data")),
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "text": {
            "title": "name",
            "noun": "Song",
            "missing_title": "placeholder",
            "missing_values": ["unknown"],
        },
        "compare_with": ["SASRec epochs=1"] if model == "iLoRA" else None,
    }
    result = run_recbole_llm(model, "songs", config_dict=options)
    rows = rows_of(result)
    assert len(rows["model_rank"]) == 12 and result["rows"]["train"] == 60
    assert rows["candidates"].shape == rows["candidate_scores"].shape == (12, 10)
    if model == "iLoRA":
        assert [found["name"] for found in result["compared"]] == ["iLoRA", "SASRec epochs=1"]


def test_the_default_number_of_rows_is_cut_to_the_data_and_the_run_is_read_again(settings):
    del settings["few_shot"]
    options = {**settings, "eval_rows": None, "user_split": [1, 6, 3]}
    result = run_recbole_llm("LLaRA", "toy", config_dict=options)
    assert result["rows"]["few_shot"] == result["rows"]["train"] < 128
    folder = Path(result["path"]).parent
    assert len(load_data_and_model(folder).train) == result["rows"]["train"]
    (folder / "result.json").unlink()
    again = run_recbole_llm("LLaRA", "toy", config_dict={**options, "resume": str(folder)})
    assert again["metrics"]["test"] == result["metrics"]["test"]


@pytest.mark.parametrize("model", ["BERT4Rec", "Caser", "GRU4Rec", "SASRec", "BPR", "LightGCN"])
def test_models_of_recbole_rank_the_same_candidates(model, settings):
    shared = {
        key: settings[key] for key in ("data_path", "cache_dir", "num_negatives", "topk", "valid_metric")
    }
    options = {**shared, "task": "next_item", "epochs": 1, "show_progress": False, "bootstrap_samples": 10}
    rows = rows_of(run_recbole_llm(model, "toy", config_dict=options))
    parts = parts_of(settings, "TALLRecNext")
    stored = parts.candidates["test"]
    assert sorted(rows["row_id"]) == sorted(stored.row_ids)
    np.testing.assert_array_equal(
        rows["candidates"], parts.dataset.id2token("item_id", stored.of(rows["row_id"]))
    )
    assert (rows["model_rank"] >= 1).all() and (rows["model_rank"] <= 10).all()


def test_a_finished_model_is_not_run_again_when_the_comparison_is_resumed(settings, caplog):
    wanted = {**settings, "compare_with": ["Pop"]}
    result = run_recbole_llm("TALLRecNext", "toy", config_dict=wanted)
    folder = str(Path(result["path"]).parent)
    more = {**settings, "compare_with": ["Pop", "LLaRA"], "resume": folder}
    again = run_recbole_llm("TALLRecNext", "toy", config_dict=more)
    assert [found["name"] for found in again["compared"]] == ["TALLRecNext", "Pop", "LLaRA"]
    assert [found["finished"] for found in again["compared"][:2]] == [
        result["finished"],
        result["compared"][1]["finished"],
    ]


def test_the_cost_of_ranking_a_catalogue_is_printed(settings):
    result = run_recbole_llm("LLaRA", "toy", config_dict={**settings, "eval_mode": "full", "eval_rows": 5})
    work = result["scoring"]
    assert f"LLaRA: {work['tokens']:,} tokens computed for 5 samples, {work['ratio']:.2f} x" in printed(
        result
    )
    assert work["ratio"] <= 1.1 and work["tokens"] <= work["prompt_tokens"] + work["edges"]
