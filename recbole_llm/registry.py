"""The class that a model name stands for: built-in models, then those of installed packages, then RecBole's."""

from __future__ import annotations

import functools
import importlib
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import recbole

from recbole_llm.utils import recbole_repairs
from recbole_llm.utils.names import nearest

BUILT_IN_MODELS = (
    "CoLLM", "HLLM", "LLaRA", "LensPrompt", "MoRec", "ReLLa", "ReLLaX", "RecLoRA", "SIM", "Stream", "TALLRec",
    "TALLRecNext", "TitleKNN",
    "iLoRA",
)  # fmt: skip
"""The class of each name is in ``recbole_llm.model.<lower-case name>``."""

_PACKAGES = (
    "general_recommender",
    "context_aware_recommender",
    "sequential_recommender",
    "knowledge_aware_recommender",
    "exlib_recommender",
)


@functools.cache
def recbole_models() -> dict[str, str]:
    """Names of RecBole's models and the module each is in, without importing any of them."""
    models = {}
    for package in _PACKAGES:
        for path in sorted((Path(recbole.__file__).parent / "model" / package).glob("*.py")):
            for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.M):
                if name.lower() == path.stem:
                    models[name] = f"recbole.model.{package}.{path.stem}"
    return models


@functools.cache
def installed_models() -> dict[str, EntryPoint]:
    """Models that installed packages register under the entry point group ``recbole_llm.models``, by name."""
    return {entry.name: entry for entry in entry_points(group="recbole_llm.models")}


def get_model(name: str) -> type:
    """The model class of that name.

    Raises:
        ValueError: if there is none; the message has the nearest names.
        ImportError: if the model needs a library that is not installed (lightgbm, xgboost, ...).
    """
    if name in BUILT_IN_MODELS:
        with recbole_repairs.anomaly_detection_kept():
            return getattr(importlib.import_module(f"recbole_llm.model.{name.lower()}"), name)
    modules, installed = recbole_models(), installed_models()
    if name in installed:
        return installed[name].load()
    if name not in modules:
        near = nearest(name, [*BUILT_IN_MODELS, *installed, *modules])
        hint = f"did you mean {' or '.join(near)}?" if near else f"built-in are {', '.join(BUILT_IN_MODELS)}"
        raise ValueError(
            f"model {name!r} is neither one of recbole_llm nor of RecBole {recbole.__version__}: {hint}"
        )
    with recbole_repairs.anomaly_detection_kept():
        module = importlib.import_module(modules[name])
    recbole_repairs.model_module(module)
    return getattr(module, name)


def __getattr__(name: str) -> object:
    """``create_dataset`` was here once, and users import it from here."""
    if name == "create_dataset":
        return importlib.import_module("recbole_llm.data.create").create_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
