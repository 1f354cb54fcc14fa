"""A full disk and read-only folders in every stage:  make faults

Each fault begins with a stage and stays. The command must end with one error and no traceback; what it had saved before
must be intact: when the fault is over, the same command ends with the scores of the unbroken run.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from kill_and_resume import PATIENCE, difference, finish
from runs import FAULTS, SCENARIOS, Run, prepared_data, writable

ERROR = "error: "


def end_of(output: str) -> str:
    """What is wrong with how a broken command ended; empty for one error and no traceback."""
    if "Traceback" in output:
        return "a traceback"
    errors = [line for line in output.splitlines() if line.startswith(ERROR)]
    return "" if len(errors) == 1 else f"{len(errors)} errors"


def break_and_repeat(run: Run, fault: str, stage: str, unbroken: dict) -> tuple[str, str]:
    """Break a run in a stage, and repeat it without the fault; what it said, and what is wrong."""
    process = run.start((fault, stage))
    process.join(PATIENCE)
    writable(run.folder)
    output = run.output()
    said = next((line for line in output.splitlines() if line.startswith(ERROR)), "")
    if process.exitcode == 0:  # nothing is written in this stage
        wrong = difference(run.outcome(), unbroken)
        return "finished", wrong
    if process.exitcode != 2:
        return said, f"exit status {process.exitcode}"
    if wrong := end_of(output):
        return said, wrong
    status, _ = finish(run)
    return said, f"then exit status {status}" if status else difference(run.outcome(), unbroken)


def main() -> int:
    """Print the table; the number of cases in which something was lost or unclear."""
    failed = count = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve()
        data, wheels = prepared_data(root)
        for name, scenario in SCENARIOS.items():
            if "," in scenario.model:
                continue
            base = root / name.replace(" ", "-")
            run = Run(scenario, base / "unbroken", data, wheels)
            if finish(run)[0] != 0:
                raise SystemExit(f"{name}: the unbroken run failed:\n{run.output()[-3000:]}")
            unbroken = run.outcome()
            for fault in FAULTS:
                for stage in scenario.stages:
                    broken = Run(scenario, base / fault.replace(" ", "-") / stage, data, wheels)
                    said, wrong = break_and_repeat(broken, fault, stage, unbroken)
                    said = said.replace(str(root), "").replace(ERROR, "")
                    print(f"{name:10} {fault:18} {stage:11} {wrong or 'good'}: {said[:150]}", flush=True)
                    if wrong:
                        print(broken.output()[-2500:], flush=True)
                    failed += bool(wrong)
                    count += 1
                    shutil.rmtree(broken.folder)
    print(f"{count - failed} of {count}: one error, and the repeated command equals the unbroken run")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
