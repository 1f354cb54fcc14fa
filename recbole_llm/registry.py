"""Which class a name stands for: our models first, then RecBole's."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from pathlib import Path

import recbole
from recbole.utils import ModelType

from recbole_llm.utils import recbole_repairs

OWN_MODELS = ("RecLoRA", "TALLRec", "ReLLa", "ReLLaX", "CoLLM", "LensPrompt", "iLoRA", "LLaRA", "TALLRecNext")
"""Names of our models; the class of that name is in ``recbole_llm.model.<lower-case name>``."""

CONVENTIONAL_MODELS = ("SIM", "TitleKNN", "MoRec", "Stream", "HLLM")
"""Names of our models that tune no language model: the same place, but RecBole's Trainer trains them, on all rows."""

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


def list_models() -> dict[str, list[str]]:
    """Every model name that `get_model` knows, under ``"recbole_llm"`` and ``"recbole"``."""
    return {"recbole_llm": sorted(OWN_MODELS + CONVENTIONAL_MODELS), "recbole": sorted(recbole_models())}


def nearest(name: str, names, n: int = 3) -> list[str]:
    """The entries of ``names`` most like ``name``, upper and lower case being the same."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[match] for match in difflib.get_close_matches(str(name).lower(), by_lower, n=n)]


def is_own(model_class: type) -> bool:
    """Whether a model class is one of our LLM recommenders (or of the user's, built on ours)."""
    return any(
        base.__name__ in OWN_MODELS or base.__name__ == "LLMRecommender" for base in model_class.__mro__
    )


def get_model(name: str) -> type:
    """The model class of that name.

    Raises:
        ValueError: if there is none; the message has the nearest names.
        ImportError: if the model needs a library that is not installed (lightgbm, xgboost, ...).
    """
    if name in OWN_MODELS or name in CONVENTIONAL_MODELS:
        with recbole_repairs.anomaly_detection_kept():
            return getattr(importlib.import_module(f"recbole_llm.model.{name.lower()}"), name)
    modules = recbole_models()
    if name not in modules:
        near = nearest(name, [*OWN_MODELS, *CONVENTIONAL_MODELS, *modules])
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"ours are {', '.join(OWN_MODELS + CONVENTIONAL_MODELS)}"
        )
        raise ValueError(
            f"model {name!r} is neither one of recbole_llm nor of RecBole {recbole.__version__}: {hint}"
        )
    with recbole_repairs.anomaly_detection_kept():
        module = importlib.import_module(modules[name])
    recbole_repairs.checkpoint_loading(module)
    if name == "Pop":
        recbole_repairs.popularity_counts(module)
    return getattr(module, name)


def get_trainer(model_type: ModelType, model_name: str) -> type:
    """The trainer class: ours for our models, else RecBole's choice by model name and type."""
    if model_name in OWN_MODELS:
        return importlib.import_module("recbole_llm.trainer.llm_trainer").LLMTrainer
    from recbole.utils import get_trainer as recbole_trainer

    return recbole_trainer(model_type, model_name)


def create_dataset(config):
    """The dataset of a run: ours for our tasks, else RecBole's choice."""
    if config["task"] == "next_item":
        return importlib.import_module("recbole_llm.data.next_item").NextItemDataset(config)
    if config["task"] == "ctr":
        return importlib.import_module("recbole_llm.data.dataset").CTRDataset(config)
    from recbole.data import create_dataset as recbole_dataset

    return recbole_dataset(config)
