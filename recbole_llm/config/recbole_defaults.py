"""RecBole's own keys: the defaults in its yaml files, and the keys that its model classes look up."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from recbole_llm.utils.yaml_files import RECBOLE_PROPERTIES, load_yaml

# Read by RecBole's code, but in none of its yaml files and argument lists.
UNLISTED_KEYS = (
    "encoding", "eta", "ip", "local_rank", "offset", "group_offset", "port", "tail_ratio",
    "token_num_threshold", "verbose", "world_size",
)  # fmt: skip


@cache
def recbole_defaults() -> dict[str, Any]:
    """RecBole's defaults that do not depend on the model."""
    files = ["overall.yaml", "dataset/sample.yaml", "dataset/ml-100k.yaml"]
    folder = RECBOLE_PROPERTIES / "quick_start_config"
    files += [f"quick_start_config/{path.name}" for path in sorted(folder.iterdir())]
    defaults: dict[str, Any] = {}
    for name in files:
        defaults = load_yaml(RECBOLE_PROPERTIES / name) | defaults
    return defaults


@cache
def recbole_model_keys() -> dict[str, set[str]]:
    """Keys of each of RecBole's model yaml files, by model."""
    return {path.stem: set(load_yaml(path)) for path in sorted((RECBOLE_PROPERTIES / "model").glob("*.yaml"))}


@cache
def keys_in_source(model_class: type) -> frozenset[str]:
    """Keys that a model class and its bases look up in the config, found in their source code.

    For the check for misspelt keys alone: some keys of RecBole's models, and those of a user's model, are listed in no
    file. What a model is or does is declared (:mod:`recbole_llm.config.model_spec`), never found this way.
    """
    keys: set[str] = set()
    for base in model_class.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            try:
                source = inspect.getsource(base)
            except (OSError, TypeError):
                continue  # defined in a session without source files
            keys.update(re.findall(r"config(?:\[|\.get\()\s*[\"'](\w+)[\"']", source))
    return frozenset(keys)
