"""Lets ``recbole.quick_start`` be imported without ray.

That package's one module begins with ``from ray import tune`` (quick_start/quick_start.py:20), for one call in
``objective_function``, so that without ray neither ``run_recbole`` nor ``load_data_and_model`` can be imported.
Importing ``recbole_llm`` puts a finder for this one module first in line. Nothing is imported or changed before a user
imports the module; then it gets the repairs of RecBole, as a run of recbole_llm does.

This module imports nothing beyond Python itself: ``import recbole_llm`` stays cheap.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

QUICK_START = "recbole.quick_start.quick_start"


class RepairedLoader(SourceFileLoader):
    """Runs the module's own code between the repairs that it needs."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module."""
        from recbole_llm.utils import recbole_repairs  # here, as it imports torch and pandas

        recbole_repairs.install()
        with recbole_repairs.ray_when_used():
            super().exec_module(module)
        recbole_repairs.quick_start(module)


class QuickStartFinder(MetaPathFinder):
    """Finds RecBole's quick start, and nothing else, with a loader that repairs it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; ``None`` for every other name."""
        found = PathFinder.find_spec(name, path, target) if name == QUICK_START else None
        if found is None or found.origin is None:
            return None
        return spec_from_file_location(name, found.origin, loader=RepairedLoader(name, found.origin))


def install_finder() -> None:
    """Put the finder first in line, once."""
    if not any(isinstance(finder, QuickStartFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, QuickStartFinder())
