"""``kill -9`` at random moments of every stage; the resumed run must equal the unbroken one:  make faults

Of each command one run is left alone. Then runs are killed: in each stage in turn, at a moment drawn evenly from the
time that the stage takes. The same command (with ``--resume`` where there is a checkpoint) finishes what was killed.
The scores of every sample must be the unbroken run's bit for bit. Every run starts with an empty cache.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from runs import SCENARIOS, Run, prepared_data

PATIENCE = 600.0
"""Seconds after which a run that neither ends nor reaches its stage is an error."""


def finish(run: Run) -> tuple[int, list[tuple[str, float]]]:
    """Run the command to its end; its exit status, and its stages with the end as the last one."""
    process = run.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
    return process.exitcode, [*run.stages(), ("end", time.monotonic())]


def kill(run: Run, stage: str, visit: int, delay: float, rng: random.Random) -> str:
    """Kill the command ``delay`` seconds after a stage began for the ``visit``-th time; the stage it was in."""
    process, deadline = run.start(), time.monotonic() + PATIENCE
    begun = None
    while process.is_alive() and time.monotonic() < deadline:
        if begun is None:
            times = [moment for name, moment in run.stages() if name == stage]
            begun = times[visit] if len(times) > visit else None
        elif time.monotonic() >= begun + delay:
            break
        time.sleep(0.002)
    reached = run.stages()
    victims = [process.pid, *(workers(process.pid) if "," in run.scenario.model else ())]
    with suppress(ProcessLookupError):  # it has ended since
        os.kill(rng.choice(victims), signal.SIGKILL)
    process.join(PATIENCE)  # the command of a comparison outlives one of its workers
    if process.exitcode == 0:
        return "end"
    return reached[-1][0] if reached else "start"


def workers(pid: int) -> list[int]:
    """The processes of a comparison's runs."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.is_file() else []


def difference(found: dict, expected: dict) -> str:
    """What differs between two outcomes; empty if nothing does."""
    if found.keys() != expected.keys():
        return f"runs {sorted(found)} instead of {sorted(expected)}"
    for name, (columns, metrics) in expected.items():
        there, measured = found[name]
        wrong = [c for c in columns.keys() | there.keys() if columns.get(c) != there.get(c)]
        if wrong or metrics != measured:
            return f"{name}: {', '.join(sorted(wrong)) or 'metrics'} differ"
    return ""


def try_kills(kills: int, seed: int, scenarios: list[str], root: Path) -> list[tuple[str, str, str, str]]:
    """Kill and resume; ``(scenario, stage aimed at, stage it died in, what differs)`` of each kill."""
    data, wheels = prepared_data(root)
    rng, unbroken, timing, table = random.Random(seed), {}, {}, []
    for name in scenarios:
        run = Run(SCENARIOS[name], root / name.replace(" ", "-") / "unbroken", data, wheels)
        status, stages = finish(run)
        if status != 0:
            raise SystemExit(f"{name}: the unbroken run ended with {status}:\n{run.output()[-3000:]}")
        unbroken[name] = run.outcome()
        spans = defaultdict(list)
        for (stage, begun), (_, ended) in zip(stages, stages[1:], strict=False):
            spans[stage].append(ended - begun)
        timing[name] = spans
    # A run need not have every stage: where nothing is validated, none can be killed there.
    aims = [(name, stage) for name in scenarios for stage in SCENARIOS[name].stages if timing[name][stage]]
    for number in range(kills):
        name, stage = aims[number % len(aims)]
        visit = rng.randrange(len(timing[name][stage]))
        delay = rng.random() * timing[name][stage][visit]
        folder = root / name.replace(" ", "-") / f"killed-{number}"
        run = Run(SCENARIOS[name], folder, data, wheels)
        died = kill(run, stage, visit, delay, rng)
        status, _ = finish(run)
        wrong = f"exit status {status}" if status else difference(run.outcome(), unbroken[name])
        table.append((name, stage, died, wrong))
        print(f"{number + 1:3} {name:24} {stage:20} killed in {died:20} {wrong or 'equal'}", flush=True)
        if wrong:
            print(run.output()[-3000:], flush=True)
        else:
            shutil.rmtree(folder)
    return table


def main() -> int:
    """Print the table; the number of kills after which something differed."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments and resume them.")
    parser.add_argument("--kills", type=int, default=20, help="in all; stages take turns")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--keep", type=Path, help="a folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (arguments.keep or Path(scratch)).resolve()
        table = try_kills(arguments.kills, arguments.seed, arguments.scenario or list(SCENARIOS), root)
    good: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for name, stage, _, wrong in table:
        good[name, stage].append(not wrong)
    print(f"\n{'command':24} {'killed in':20} {'equal':>7}")
    for (name, stage), outcomes in good.items():
        print(f"{name:24} {stage:20} {sum(outcomes):3} of {len(outcomes)}")
    failed = sum(bool(wrong) for *_, wrong in table)
    print(f"{len(table) - failed} of {len(table)} resumed runs equal the unbroken one")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
