"""The commands say how threads wait before torch is loaded, which reads it then."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Ends the process where torch would be loaded, and prints what it would read.
PROBE = """
import os, sys
class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Probe())
import {module}
"""


@pytest.mark.parametrize("module", ["recbole_llm.cli", "recbole_llm.demo"])
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "passive 10000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
)
def test_threads_wait_briefly_unless_told_otherwise(module, given, found):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | given
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == (found, 0), done.stderr
