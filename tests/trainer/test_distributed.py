"""One run in two processes, as torchrun starts them, is the run of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from synthetic import TEXT

from recbole_llm.config.configurator import Config
from recbole_llm.trainer.checkpoint import load_checkpoint
from recbole_llm.utils.distributed import Processes, ProcessLost

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
LENS = {"epochs": 1, "embedding_size": 8, "mlp_hidden_size": [16, 8], "attention_hidden_size": [8]}
COMMON = {
    "text": TEXT,
    "backbone": "tiny",
    "device": "cpu",
    "few_shot": 22,  # the last batch has 6 samples in 3 micro-batches
    "eval_rows": 21,
    "text_history_length": 4,
    "train_batch_size": 8,
    "micro_batch_size": 2,
    "eval_batch_size": 16,
    "bootstrap_samples": 0,
    "show_progress": False,
    "learning_rate": 0.01,
    "gate_dropout": 0.0,
    "zero_shot": False,
    "compare_with": None,
}
CASES = {
    "prompts": {
        "model": "RecLoRA",
        "settings": {"layout": "prompt", "lens_config": LENS, "lens_residual": True, "epochs": 2},
    },
    "streams": {
        "model": "RecLoRA",
        "settings": {
            "lens": "DIN",
            "lens_config": LENS,
            "layout": "stream",
            "max_prompt_tokens": 64,
            "train_batch_size": 30,
            "lens_residual": True,
            "residual_rows": 21,
        },
    },
    "candidates": {"model": "TALLRecNext", "settings": {"num_negatives": 5, "scoring_batch_size": 2}},
    "catalogue": {"model": "TALLRecNext", "settings": {"eval_mode": "full"}},
}
SHARDED = ("prompts", "streams", "catalogue")


@pytest.fixture(scope="module")
def runs(toy_data, tmp_path_factory):
    """The folder of each case's runs, by one process, by two, and by two with a share of the weights each; and how
    the last two processes ended."""
    folder = tmp_path_factory.mktemp("processes")
    cases: dict[str, list] = {"one": [], "two": []}
    for name, case in {**CASES, "dies": CASES["prompts"]}.items():
        settings = {
            **COMMON,
            **case["settings"],
            "data_path": str(toy_data),
            "cache_dir": str(folder / "cache"),
            "checkpoint_seconds": 1e6,
        }
        for count in cases:
            if name != "dies" or count == "two":
                output = {"output_dir": str(folder / count / name)}
                cases[count].append({**case, "settings": settings | output, "dies": name == "dies"})
        if name in SHARDED:
            output = {"output_dir": str(folder / "sharded" / name), "shard_backbone": True}
            cases["two"].append({**case, "settings": settings | output, "dies": False})
    for count, listed in cases.items():
        (folder / f"{count}.json").write_text(json.dumps(listed))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(count: str, **environment: str) -> subprocess.Popen:
        worker = Path(__file__).with_name("distributed_worker.py")
        return subprocess.Popen(
            [sys.executable, str(worker), str(folder / f"{count}.json")],
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )

    started = [start("two", RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]
    started.append(start("one"))
    errors = [process.communicate(timeout=900)[1] for process in started]
    assert started[2].returncode == 0, errors[2]
    return folder, [process.returncode for process in started[:2]], errors


def the_run(folder: Path) -> Path:
    (found,) = folder.iterdir()  # one folder, whatever the number of processes
    return found


@pytest.mark.parametrize(
    ("how", "name"), [*(("two", name) for name in CASES), *(("sharded", name) for name in SHARDED)]
)
def test_two_processes_are_one(runs, how, name):
    folder, _, errors = runs
    one, two = (the_run(folder / count / name) for count in ("one", how))
    expected, found = (json.loads((run / "result.json").read_text()) for run in (one, two))
    for split in ("valid", "test"):
        assert found["metrics"][split] == pytest.approx(expected["metrics"][split], abs=1e-6), errors[0]
    for key in ("trained_on", "identities", "scoring"):
        assert found.get(key) == expected.get(key)
    # Of a chunk whose samples two processes share each reads the tokens.
    assert found["tokens"] == expected["tokens"] or (
        (how, name) == ("two", "streams") and found["tokens"] > expected["tokens"]
    )
    tensors, meta = load_checkpoint(two / "last.safetensors")
    of_one, meta_of_one = load_checkpoint(one / "last.safetensors")
    assert (meta["step"], meta["tokens"]["train"]) == (meta_of_one["step"], meta_of_one["tokens"]["train"])
    model = {name: tensor for name, tensor in of_one.items() if name.startswith("model/")}
    assert any(tensor.any() for name, tensor in model.items() if name.endswith("lora_B"))
    # Weights of lens and LLM that are fitted on validation samples round otherwise where two processes score these, and
    # Adam divides a gradient by its size: where that is nearly 0, rounding is a part of a step.
    fitted = "residual_rows" in CASES[name]["settings"]
    tolerance = 0.01 * COMMON["learning_rate"] if fitted else 1e-5
    torch.testing.assert_close({key: tensors[key] for key in model}, model, rtol=1e-4, atol=tolerance)
    with np.load(one / "test_rows.npz") as a, np.load(two / "test_rows.npz") as b:
        score = "model_score" if "model_score" in a else "model_rank"
        np.testing.assert_allclose(b[score], a[score], atol=1e-5)


def test_a_process_that_dies_ends_the_others_with_one_clear_error(runs):
    folder, codes, errors = runs
    assert codes == [2, 9]
    (line,) = [line for line in errors[0].splitlines() if line.startswith("error: ")]
    run = the_run(folder / "two" / "dies")
    assert "another of the 2 processes of this run has ended" in line and f"--resume={run}" in line
    _, meta = load_checkpoint(run / "last.safetensors")
    assert (meta["epoch"], meta["step"]) == (0, 2)


def test_every_thing_belongs_to_one_process():
    for n in range(12):
        for count in (1, 2, 3, 5):
            parts = [list(range(n))[Processes(rank, count).mine(n)] for rank in range(count)]
            assert sum(parts, []) == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        (
            "TALLRec",
            {"layout": "prompt", "train_batch_size": 8, "micro_batch_size": 8},
            "1 to 2 processes: set micro_batch_size to 4",
        ),
        ("RecLoRA", {"gate": "cnn"}, "cnn_groupnorm"),
        ("SASRec", {}, "start it without torchrun"),
        ("TALLRec", {"shard_backbone": True, "zero_shot": True}, "zero_shot=True .* is not possible"),
        ("TALLRec", {"shard_backbone": True, "torch_compile": True}, "leave one of them out"),
    ],
)
def test_what_two_processes_cannot_do_is_refused(monkeypatch, model, changes, said, toy_data, tmp_cwd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=said):
        Config(model, "toy", config_dict={"data_path": str(toy_data), "device": "cpu", **changes})


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_does_not_suffice_here_is_no_lost_process(kind):
    def fails() -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(kind, match="can't allocate") as raised:
        Processes(0, 2).together(fails)
    assert not isinstance(raised.value, ProcessLost)
    with pytest.raises(ProcessLost, match="another of the 2 processes"):
        Processes(0, 2).together(lambda: (_ for _ in ()).throw(RuntimeError("Connection closed by peer")))


def test_an_error_of_this_process_is_not_told_as_the_loss_of_another():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        Processes(0, 2).together(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    assert not isinstance(raised.value, ProcessLost)


def test_one_process_has_nothing_to_share_the_weights_with(toy_data, tmp_cwd):
    changes = {"data_path": str(toy_data), "device": "cpu", "shard_backbone": True}
    with pytest.raises(ValueError, match="start it with torchrun"):
        Config("TALLRec", "toy", config_dict=changes)
