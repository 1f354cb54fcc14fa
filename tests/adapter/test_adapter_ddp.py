"""DistributedDataParallel: two processes give the gradients of one process with the whole batch."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

CASES = [
    {"mixer": "factor"},
    {"mixer": "expert", "share_gate": True, "gate": "linear"},
    {"mixer": "output", "top_k": 2},
    {"mixer": "dense"},
    {"mixer": "factor", "gate": "random"},  # a buffer that DDP broadcasts, no gate parameters
    {"mixer": "identity"},
]


def step(adapter, forward, ids, z):
    adapter.set_instance(z)
    forward(ids).logits.square().mean().backward()
    parameters = adapter.lora_parameters() | adapter.gate_parameters()
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    adapter.peft_model.zero_grad()
    return grads


def worker(rank, folder):
    build_adapter = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["build_adapter"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ids, z = torch.load(Path(folder) / "batch.pt")
    half = slice(2 * rank, 2 * rank + 2)
    results = []
    for case in CASES:
        for checkpointing in (False, True):
            adapter = build_adapter(**case, seed=rank)  # DDP must broadcast rank 0's
            adapter.peft_model.train()
            if checkpointing:
                adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
            forward = DistributedDataParallel(adapter.peft_model)
            step(adapter, forward, ids[half], z[half])  # a second step fails if a parameter was left unused
            results.append(step(adapter, forward, ids[half], z[half]))
    if rank == 0:
        torch.save(results, Path(folder) / "grads.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(adapted, tmp_path):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (4, 5), generator=generator)
    z = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    torch.save((ids, z), tmp_path / "batch.pt")
    # One process imports everything and is forked into the two.
    mp.set_forkserver_preload(["torch", "recbole_llm.adapter.personalized"])
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    results = torch.load(tmp_path / "grads.pt")
    assert len(results) == 2 * len(CASES)
    for i, case in enumerate(CASES):
        adapter = adapted(**case, seed=0)
        adapter.peft_model.train()
        expected = step(adapter, adapter.peft_model, ids, z)
        for got in results[2 * i : 2 * i + 2]:
            torch.testing.assert_close(got, expected)
