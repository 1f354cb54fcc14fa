"""Runs side by side: how each process is started. What processes do: tests/utils/test_processes.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from recbole_llm.comparison import workers
from recbole_llm.comparison.workers import COMMAND, device_of
from recbole_llm.utils.processes import JOB_FILE


def test_a_process_gets_its_run_its_device_and_its_part_of_the_threads(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(workers.processes, "start_job", lambda *arguments: started.append(arguments))
    arguments = {"model": "Pop", "config_dict": {"epochs": 3}}
    for slot, device in enumerate(("cpu", "cuda:1")):
        folder = tmp_path / device
        folder.mkdir()
        config = {"device": torch.device(device)}
        workers.start(SimpleNamespace(config=config, arguments=arguments, folder=folder), slot, threads=2)
        values = json.loads((folder / JOB_FILE).read_text())
        assert values == {"model": "Pop", "config_dict": {"epochs": 3, "device": device}}
    (command, folder, on_cpu), (_, _, on_gpu) = started
    assert command == COMMAND and folder == tmp_path / "cpu"
    assert on_cpu["OMP_NUM_THREADS"] == "2" and "OMP_NUM_THREADS" not in on_gpu
    assert on_cpu["PYTHONPATH"]


def test_gpus_are_taken_in_turn_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [device_of({"device": torch.device("cuda")}, slot).index for slot in range(4)]
    assert found == [0, 1, 0, 1]
    assert device_of({"device": torch.device("cuda:1")}, 0).index == 1
    assert device_of({"device": torch.device("cpu")}, 3) == torch.device("cpu")
