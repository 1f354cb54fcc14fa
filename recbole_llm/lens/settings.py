"""A lens's own configuration, and the model it describes."""

from __future__ import annotations

import copy

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import EvaluatorType, InputType, ModelType
from torch import nn

from recbole_llm.config.keys import check_values
from recbole_llm.config.model_spec import spec_of
from recbole_llm.lens.din import LensDIN
from recbole_llm.lens.next_item import NEXT_ITEM_WORKING, next_item_lens_class
from recbole_llm.lens.sequence import WORKING, LensSASRec, labelled_lens_class
from recbole_llm.registry import get_model
from recbole_llm.utils.names import nearest
from recbole_llm.utils.yaml_files import RECBOLE_PROPERTIES, load_yaml, properties_dir

_NO_SAMPLING = {
    "distribution": "none",
    "sample_num": "none",
    "alpha": "none",
    "dynamic": False,
    "candidate_num": 0,
}

# What does not depend on the user: one process, float32, no sampled negatives ...
_FIXED = {
    "MODEL_TYPE": ModelType.SEQUENTIAL,
    "MODEL_INPUT_TYPE": InputType.POINTWISE,
    "loss_type": "CE",  # a labelled lens has a loss of its own, and RecBole's constructor reads this key
    **dict.fromkeys(("train_neg_sample_args", "valid_neg_sample_args", "test_neg_sample_args"), _NO_SAMPLING),
    "transform": None,
    "valid_metric_bigger": True,
    "metric_decimal_place": 6,
    "eval_step": 1,
    "enable_amp": False,
    "enable_scaler": False,
    "single_spec": True,
    "log_wandb": False,
}

# ... and per task how validation samples are scored: by their labels, or by the rank of the item among all items.
_FIXED_BY_TASK = {
    "ctr": {
        "metrics": ["AUC", "LogLoss"],
        "valid_metric": "AUC",
        "eval_type": EvaluatorType.VALUE,
    },
    "next_item": {
        "metrics": ["NDCG", "Hit", "MRR"],
        "topk": [1, 5, 10],
        "valid_metric": "NDCG@10",
        "eval_type": EvaluatorType.RANKING,
    },
}
LABELLED_LENSES = {"DIN": LensDIN, "SASRec": LensSASRec}
"""Models of RecBole that have a class of their own as lenses of the ctr task."""

_EVAL_MODE = {"ctr": "labeled", "next_item": "full"}


def lens_task(config) -> str:
    """What a lens is trained for: ``ctr`` (labels) or ``next_item`` (the item that comes next)."""
    return "next_item" if config["task"] == "next_item" else "ctr"


def lens_keys(name: str, task: str = "ctr") -> dict:
    """Every key that ``lens_config`` may hold for the lens ``name``, with its default.

    ``overall.yaml`` (training) and ``<name>.yaml`` in ``properties/lens`` (``next_item``: in its folder
    ``next_item``); for a lens without a file of its own, the model's own yaml in RecBole.
    """
    folder = properties_dir() / "lens"
    folder = folder / task if task == "next_item" else folder
    files = [folder / f"{name}.yaml", RECBOLE_PROPERTIES / "model" / f"{name}.yaml"]
    model = next((load_yaml(file) for file in files if file.is_file()), {})
    keys = {**load_yaml(folder / "overall.yaml"), **model}
    fixed = _FIXED | _FIXED_BY_TASK[task]
    return {key: value for key, value in keys.items() if key not in fixed}


def lens_settings(config, dataset):
    """The configuration a lens is built and trained with: a copy of the run's with the lens's own keys.

    Returns:
        A RecBole configuration. ``settings["lens_keys"]`` holds the lens's own keys and their values.

    Raises:
        ValueError: for a key in ``lens_config`` that the lens does not have, or a value that it cannot have.
    """
    name, task, given = config["lens"], lens_task(config), config["lens_config"] or {}
    keys = lens_keys(name, task)
    for key in given:
        if key not in keys:
            near = nearest(key, keys)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(keys))}"
            raise ValueError(f"lens_config: the lens {name} has no key {key!r}: {hint}")
    keys |= given
    check_values(keys, dict.fromkeys(given, "lens_config"), spec_of(get_model(name)).keys)
    if keys["epochs"] < 1:
        raise ValueError("lens_config epochs: a lens is trained for at least one epoch")

    device = torch.device(config["device"])
    fixed = _FIXED | _FIXED_BY_TASK[task]
    # In the next-item task the model is RecBole's own, which knows no ratings.
    ratings = task == "ctr" and bool(config["lens_ratings"]) and dataset.history.ratings is not None
    if task == "next_item":
        most = dataset.item_num - 1  # where there are fewer items than cut-offs, the last one is all of them
        fixed = {**fixed, "topk": sorted({min(k, most) for k in fixed["topk"]})}
        fixed["valid_metric"] = f"NDCG@{max(fixed['topk'])}"
    values = {
        **keys,
        **fixed,
        "lens_ratings": ratings,
        "lens_keys": keys,
        "eval_args": {**config["eval_args"], "mode": dict.fromkeys(("valid", "test"), _EVAL_MODE[task])},
    }
    return config.override(**copy.deepcopy(values), device=device, use_gpu=device.type == "cuda")


def build_model(settings, dataset) -> nn.Module:
    """The untrained lens model, on the configuration's device.

    Args:
        settings: from :func:`lens_settings`.

    Raises:
        ValueError: if there is no such model, or it cannot serve as a lens.
    """
    name, of_task = settings["lens"], lens_task(settings)
    if of_task == "ctr" and name in LABELLED_LENSES:
        return LABELLED_LENSES[name](settings, dataset).to(settings["device"])
    model_class = get_model(name)
    spec = spec_of(model_class)
    if of_task == "ctr" and spec.family == "conventional" and spec.gate_scopes:  # built in, a lens as it is
        return model_class(settings, dataset).to(settings["device"])
    works = f"Known to work: {', '.join(('DIN', *WORKING) if of_task == 'ctr' else NEXT_ITEM_WORKING)}"
    if not issubclass(model_class, SequentialRecommender):
        raise ValueError(f"lens {name} is not a sequential recommender of RecBole. {works}")
    if of_task == "next_item" and spec.learns_from == "labels":
        raise ValueError(f"lens {name} scores labelled samples, it cannot rank items. {works}")
    make = labelled_lens_class if of_task == "ctr" else next_item_lens_class
    try:
        return make(model_class)(settings, dataset).to(settings["device"])
    except (AttributeError, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"lens {name} cannot be built from its defaults ({error}). {works}") from error
