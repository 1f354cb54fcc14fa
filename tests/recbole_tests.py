"""Runs RecBole's own test files under the repairs, on the installed RecBole:  make recbole-tests RECBOLE=path

The path is that of a checkout of RecBole 1.2.1 (tag v1.2.1). Its tests and its example data are copied to a temporary
folder, without its package, so that the installed one is tested. Each file runs in a process of its own; the table at
the end counts its tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = (
    "metrics/test_loss_metrics.py",
    "metrics/test_rank_metrics.py",
    "metrics/test_topk_metrics.py",
    "data/test_dataset.py",
    "data/test_dataloader.py",
    "data/test_transform.py",
    "config/test_config.py",
    "config/test_overall.py",
    "evaluation_setting/test_evaluation_setting.py",
)
CONFTEST = """
import sys

import recbole_llm
from recbole_llm.utils import recbole_repairs

recbole_repairs.install()
sys.argv = sys.argv[:1]  # RecBole's Config would read pytest's options
"""
COUNTS = ("tests", "failures", "errors", "skipped")


def run_file(name: str, folder: Path) -> dict[str, int]:
    """Run one test file below ``folder/tests``; its counts. What fails is printed."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=short",
        "-c",
        os.devnull,
        "--rootdir=.",
    ]
    command += ["-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}", f"tests/{name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    if not report.is_file():
        return {**dict.fromkeys(COUNTS, 0), "errors": 1}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    return {count: int(suite.get(count, "0")) for count in COUNTS}


def main() -> int:
    """Run all files, or those named; 1 if a test failed."""
    parser = argparse.ArgumentParser(description="Run RecBole's own tests under the repairs of recbole_llm.")
    parser.add_argument("checkout", type=Path, help="a checkout of RecBole 1.2.1")
    parser.add_argument("files", nargs="*", default=FILES, help="test files below its folder tests")
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests" / "metrics").is_dir():
        parser.error(f"{arguments.checkout} is no checkout of RecBole: it has no folder tests/metrics")
    lines, failed = [f"{'file':50} {'passed':>6} {'failed':>6} {'skipped':>7} {'seconds':>7}"], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(arguments.checkout / "tests", folder / "tests")
        if (arguments.checkout / "dataset").is_dir():
            shutil.copytree(arguments.checkout / "dataset", folder / "dataset")
        (folder / "tests" / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        for name in arguments.files:
            started = time.monotonic()
            counts = run_file(name, folder)
            bad = counts["failures"] + counts["errors"]
            passed = max(0, counts["tests"] - bad - counts["skipped"])
            seconds = time.monotonic() - started
            lines.append(f"{name:50} {passed:6} {bad:6} {counts['skipped']:7} {seconds:7.0f}")
            print(lines[-1], flush=True)
            failed += bad
    print("", *lines, sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
