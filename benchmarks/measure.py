"""What the benchmarks share: runs timed in turn, rows with a goal, one table and one json file.

A value of its own says little on a machine that does other work. Every program therefore times a run and its reference
in turn, in one process, and reports the ratio: its median over the rounds, and the smallest and largest.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from recbole_llm.utils.machine import environment, peak_memory, reset_peak_memory

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Times:
    """Seconds of one call: ``wall``, and ``cpu``, those that this process spent on processors."""

    wall: float
    cpu: float


@dataclass
class Row:
    """One line of a table.

    Attributes:
        what: what is measured.
        value, low, high: median, smallest and largest over the rounds.
        unit: of the values.
        goal: at most (``<=``) or at least (``>=``) so much, e.g. ``"<= 1.10"``; empty: none.
        note: anything else, e.g. the absolute numbers.
    """

    what: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; ``None`` without a goal."""
        if not self.goal:
            return None
        sign, number = self.goal.split()[:2]
        return self.value <= float(number) if sign == "<=" else self.value >= float(number)


@dataclass
class Benchmark:
    """What a program measures.

    Args:
        name: of the program and of its json file.
        arguments: parsed by :func:`parser`.
    """

    name: str
    arguments: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Note a row, and print it at once: a run that is stopped has shown what it had."""
        self.rows.append(row)
        spread = "" if row.low is None else f"[{row.low:.3g}, {row.high:.3g}]"
        goal = "" if row.met is None else f"goal {row.goal}: {'met' if row.met else 'MISSED'}"
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.3g}"
        print(f"{row.what:<58} {value:>9} {row.unit:<9} {spread:<15} {goal:<24} {row.note}", flush=True)

    def write(self) -> None:
        """``results/speed-NAME.json`` (or the file of ``--json``): rows, command, device, threads and versions."""
        arguments = self.arguments
        path = arguments.json or RESULTS / f"speed-{self.name}{'-tiny' if arguments.tiny else ''}.json"
        content = {
            "benchmark": self.name,
            "command": " ".join(["python", f"benchmarks/{self.name}.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            "clock": arguments.clock,
            **environment(),
            "rows": [{**asdict(row), "met": row.met} for row in self.rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that all programs have."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--rounds", type=int, default=2)
    found.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that the program runs")
    found.add_argument("--json", type=Path, help="where the result goes; default: benchmarks/results")
    found.add_argument(
        "--clock",
        choices=("auto", "wall", "cpu"),
        default="auto",
        help="what ratios are of; auto: processor time with one thread, which other work on the machine disturbs "
        "least, else wall time",
    )
    return found


def start(name: str, arguments: argparse.Namespace) -> Benchmark:
    """Set threads and clock, and print the table's head."""
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "auto":
        one = arguments.device == "cpu" and arguments.threads == 1
        arguments.clock = "cpu" if one else "wall"
    device = arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"\n{name}: {device}, {arguments.threads} threads, {arguments.clock} time, {arguments.rounds} rounds"
    )
    return Benchmark(name, arguments)


def once(run: Callable[[], object]) -> Times:
    """Times of one call, what it queued on a GPU included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wait()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Times]]:
    """Times of each run, once per round, after one round that is not counted."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            times = once(run)
            if number:
                found[name].append(times)
    return found


def ratio(
    what: str,
    of: list[Times],
    to: list[Times],
    clock: str,
    *,
    goal: str = "",
    note: str = "",
    scale: float = 1.0,
) -> Row:
    """The row of ``scale * of / to``, round by round: other work of the machine falls on both."""
    found = [scale * getattr(a, clock) / getattr(b, clock) for a, b in zip(of, to, strict=True)]
    return Row(what, statistics.median(found), "x", min(found), max(found), goal, note)


def rate(
    what: str, amount: float, of: list[Times], clock: str, unit: str, *, goal: str = "", note: str = ""
) -> Row:
    """The row of ``amount`` per second."""
    found = [amount / getattr(times, clock) for times in of]
    return Row(what, statistics.median(found), unit, min(found), max(found), goal, note)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """By how much a call raises the memory in use, at its peak."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what earlier calls have freed
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory()
    before = peak_memory()["host_bytes"] or 0
    run()
    return (peak_memory()["host_bytes"] or 0) - before


def saved_bytes(loss: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes that the backward pass keeps of a forward pass, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address could be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(kept.values())


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a frozen model that shares its weights, so that several adapters fit into memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
