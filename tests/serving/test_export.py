"""Exported and merged adapters: plain PEFT loads them and gives the same logits; what cannot be exported says why."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from recbole_llm.backbone.answers import pad_right
from recbole_llm.quick_start import load_data_and_model
from recbole_llm.serving import export as exporting
from recbole_llm.serving.export import engine_rank, export, lora_of, unpack
from recbole_llm.serving.merge import merge_runs, read_lora


def plain_logits(finished, name, folder, ids) -> torch.Tensor:
    """Logits of the base model with a folder's adapter, loaded by PEFT alone."""
    run = load_data_and_model(finished(name), device="cpu")
    base = run.model.adapter.peft_model.unload()
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return adapted(ids).logits


def own_logits(run, user: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of a user and logits of the run's own model, gate included."""
    users = run.ids("user_id", [user, user]).known
    samples = run.samples(users, run.ids("item_id", ["1", "2"]).known)
    ids, _ = pad_right(run.model.encode(samples).input_ids, run.model.pad_id)
    with torch.no_grad():
        if run.model.gated:
            state, logit = run.model.lens.represent(samples)
            run.model.adapter.set_instance(run.model.gate_instance(state, logit))
        return ids, run.model.adapter.peft_model(ids).logits


@pytest.mark.parametrize("name", ["RecLoRA user", "RecLoRA expert"])
def test_a_users_folder_gives_the_logits_of_the_run_in_plain_peft(name, served, finished, tmp_path):
    run = served(name)
    done = export(run, tmp_path / "out", users=["4", "nobody", "2"])
    assert list(done.folders) == ["user-4", "user-2"] and done.unknown == ["nobody"]
    assert done.rank in exporting.ENGINE_RANKS and f"--max-lora-rank {done.rank}" in done.start_lines()[0]
    for user in ("4", "2"):
        ids, expected = own_logits(run, user)
        found = plain_logits(finished, name, done.folders[f"user-{user}"], ids)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    about = json.loads((done.folders["user-4"] / "recbole_llm.json").read_text())
    assert about["base_model"]["sha256"] == run.parts.backbone.sha256
    assert json.loads((done.folders["user-4"] / "adapter_config.json").read_text())["r"] == done.rank


PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, ids = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
assert not any(name.startswith("recbole") for name in sys.modules)
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(ids))).logits[:, -1].tolist()))
"""


def test_a_process_without_this_package_gets_the_same_logits(served, tmp_path):
    run = served("RecLoRA user")
    done = export(run, tmp_path / "out", users=["4"])
    ids, expected = own_logits(run, "4")
    load_data_and_model(run.folder, device="cpu").model.adapter.peft_model.unload().save_pretrained(
        tmp_path / "base"
    )
    arguments = [str(tmp_path / "base"), str(done.folders["user-4"]), json.dumps(ids.tolist())]
    ended = subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = torch.tensor(json.loads(ended.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected[:, -1], atol=1e-5, rtol=1e-5)


def test_a_run_without_a_gate_has_one_adapter(served, finished, tmp_path):
    run = served("TALLRec")
    done = export(run, tmp_path / "out", mean=True)
    ids, expected = own_logits(run, "4")
    torch.testing.assert_close(
        plain_logits(finished, "TALLRec", done.folders["adapter"], ids), expected, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="nothing to cluster"):
        export(run, tmp_path / "other", clusters=2)


def test_clusters_are_centroids_of_gates_and_as_many_as_users_cost_nothing(served, tmp_path):
    run = served("RecLoRA user")
    done = export(run, tmp_path / "out", clusters=3, evaluate=True)
    assert list(done.folders) == ["cluster-0", "cluster-1", "cluster-2"]
    assignment = json.loads((tmp_path / "out" / "users.json").read_text())
    assert len(assignment) == 40 and set(assignment.values()) == set(done.folders)
    assert any("AUC of 20 test samples" in line for line in done.lines)
    users = run.ids("user_id", [u for u, c in assignment.items() if c == "cluster-1"]).known
    with torch.no_grad():
        state, logit = run.model.lens.represent(run.samples(users, np.zeros_like(users)))
        gates = run.model.adapter.gate_weights(run.model.gate_instance(state, logit))
    centre = {name: gate.mean(dim=0, keepdim=True) for name, gate in gates.items()}
    expected = lora_of(run, centre, None, "x").updates()
    found = read_lora(done.folders["cluster-1"]).lora.updates()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def test_the_mean_gate_and_many_users_in_shards(served, tmp_path, monkeypatch):
    run = served("RecLoRA user")
    assert list(export(run, tmp_path / "mean", mean=True).folders) == ["mean"]
    monkeypatch.setattr(exporting, "MOST_FOLDERS", 10)
    monkeypatch.setattr(exporting, "SHARD_USERS", 16)
    done = export(run, tmp_path / "all", users=["all"])
    index = json.loads(done.index.read_text())
    assert len(index["adapters"]) == 40 and len(set(index["adapters"].values())) == 3
    unpack(done.index, "user-4", tmp_path / "one")
    monkeypatch.undo()
    single = export(run, tmp_path / "single", users=["4"]).folders["user-4"]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "one", single))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "one", single)
    ]
    for key in ("r", "lora_alpha", "base_model_name_or_path"):
        assert configs[0][key] == configs[1][key]
    with pytest.raises(ValueError, match="no adapter user-x"):
        unpack(done.index, "user-x", tmp_path / "two")


def test_a_gate_that_saw_the_target_needs_an_item(served, finished, tmp_path):
    run = served("RecLoRA")
    with pytest.raises(ValueError, match="seen the target"):
        export(run, tmp_path / "out", users=["4"])
    done = export(run, tmp_path / "out", users=["4"], item="1")
    ids, expected = own_logits(run, "4")
    found = plain_logits(finished, "RecLoRA", done.folders["user-4"], ids)
    torch.testing.assert_close(found[:1], expected[:1], atol=1e-5, rtol=1e-5)  # the pair of user 4 and item 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SASRec", {"mean": True}, "no adapter"),
        ("iLoRA", {"mean": True}, "slots"),
        ("RecLoRA stream", {"users": ["4"]}, "layout: stream gives every interaction a gate of its own"),
        ("RecLoRA user", {}, "exactly one"),
        ("RecLoRA user", {"mean": True, "clusters": 2}, "exactly one"),
        ("RecLoRA user", {"users": ["nobody"]}, "none of the users"),
        ("RecLoRA user", {"clusters": 1000}, "between 1 and 40"),
        ("RecLoRA user", {"mean": True, "rank": 7}, "must be one of"),
    ],
)
def test_what_cannot_be_exported_says_why(name, options, message, served, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(served(name), tmp_path / "out", **options)


def test_ranks_are_those_that_engines_accept():
    assert [engine_rank(r) for r in (1, 2, 8, 9, 300)] == [1, 8, 8, 16, 320]
    assert engine_rank(8, 64) == 64
    with pytest.raises(ValueError, match="512 at most"):
        engine_rank(513)
    with pytest.raises(ValueError, match="at least 8"):
        engine_rank(8, 1)


# ------------------------------------------------------------------ merging runs


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "regmean", "iteris"])
def test_runs_are_merged_into_a_folder_that_peft_loads(method, finished, tmp_cwd):
    folders = [finished("TALLRec"), finished("TALLRec again")]
    done = merge_runs(folders, tmp_cwd / "merged", method=method, prompts=4, evaluate=method == "iteris")
    ids = torch.arange(1, 12).reshape(1, -1)
    run = load_data_and_model(folders[0], device="cpu")
    base = run.model.adapter.peft_model.unload()
    for name, update in done.lora.updates().items():
        base.get_submodule(name).weight.data += update.to(base.dtype)
    with torch.no_grad():
        expected = base(ids).logits
    found = plain_logits(finished, "TALLRec", tmp_cwd / "merged", ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if method == "iteris":
        assert set(done.auc) == {folder.name for folder in folders}
        assert all(set(found) == {"own", "merged", "uncut"} for found in done.auc.values())


@pytest.mark.parametrize("method", ["cat", "iteris"])
def test_a_run_merged_with_itself_is_itself(method, finished, tmp_cwd):
    folder = finished("TALLRec")
    done = merge_runs([folder, folder], tmp_cwd / "merged", method=method, prompts=4)
    own = read_lora(folder).lora.updates()
    for name, update in done.lora.updates().items():
        torch.testing.assert_close(update, own[name], atol=1e-6, rtol=1e-4)


def test_clusters_of_a_personalised_run_can_be_merged(served, finished, tmp_path):
    done = export(served("RecLoRA user"), tmp_path / "out", clusters=2)
    merged = merge_runs(list(done.folders.values()), tmp_path / "merged", method="cat")
    parts = [read_lora(folder).lora.updates() for folder in done.folders.values()]
    for name, update in merged.lora.updates().items():
        torch.testing.assert_close(update, (parts[0][name] + parts[1][name]) / 2, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="export its clusters"):
        merge_runs([finished("RecLoRA user"), finished("TALLRec")], tmp_path / "no")


def test_runs_of_other_bases_or_projections_are_refused(finished, tmp_path):
    folders = [finished("TALLRec"), finished("TALLRec v only")]
    with pytest.raises(ValueError, match="same projections"):
        merge_runs(folders, tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        merge_runs(folders[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="neither a finished run nor a PEFT folder"):
        merge_runs([folders[0], tmp_path], tmp_path / "out")
    with pytest.raises(ValueError, match="another base model"):
        merge_runs([folders[0], finished("TALLRec other base")], tmp_path / "out")
