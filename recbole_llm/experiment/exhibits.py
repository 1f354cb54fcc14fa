"""What a result shows beside its numbers: the gate's mixture by user, and a few prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.utils import FeatureType

from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.utils.fields import ROW_ID

MOST_USERS = 200
"""More points cannot be told apart in a map, and their numbers would fill the result."""
MOST_VALUES = 12
"""Of a profile's field: more cannot be told apart by colour and shape."""
EXAMPLES = 3


@torch.no_grad()
def gate_table(parts: LLMAssembly) -> dict[str, Any] | None:
    """Every test user's mixture of experts, the mean over samples and projections; the first ``MOST_USERS`` users.

    Returns:
        ``model``, ``experts`` (their number K), ``users`` (tokens), ``values`` (K weights per user), ``coordinates``
        (the first two principal components of these), ``profile_field`` and ``profile`` (its value by user), or
        ``None`` where there are no experts, or the lens does not choose them.
    """
    model, dataset = parts.model, parts.dataset
    if not model.gated or parts.lens is None or parts.config["gate"] == "token":
        return None
    model.eval()
    users, gates = [], []
    for start in range(0, len(parts.test), 256):
        rows = parts.test[np.arange(start, min(start + 256, len(parts.test)))]
        found = parts.lens.represent(rows.to(parts.config["device"]))
        gate = model.adapter.mean_gate(model.gate_instance(*found))
        if gate is None:
            return None
        users.append(rows[dataset.uid_field].cpu().numpy())
        gates.append(gate.numpy().astype(np.float64))
    users, gates = np.concatenate(users), np.concatenate(gates)
    there, owner = np.unique(users, return_inverse=True)
    means = np.stack([np.bincount(owner, weights=column) for column in gates.T], axis=1)
    means = (means / np.bincount(owner)[:, None])[:MOST_USERS]
    there = there[:MOST_USERS]
    field, profile = profile_of(dataset, there)
    return {
        "model": parts.config["run_name"] or parts.config["model"],
        "experts": means.shape[1],
        "users": [str(user) for user in dataset.id2token(dataset.uid_field, there)],
        "values": np.round(means, 5).tolist(),
        "coordinates": np.round(principal_components(means), 5).tolist(),
        "profile_field": field,
        "profile": profile,
    }


def principal_components(values: np.ndarray, n: int = 2) -> np.ndarray:
    """The first ``n`` principal components of ``values [m, d]``, ``[m, n]``; zeros where there are fewer.

    A component's sign is free: here its largest entry is positive.
    """
    centred = values - values.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(values), n))
    for column in range(min(n, len(sizes))):
        component = left[:, column] * sizes[column]
        found[:, column] = component * np.sign(component[np.abs(component).argmax()] or 1.0)
    return found


def profile_of(dataset: HistoryDataset, users: np.ndarray) -> tuple[str | None, list[str] | None]:
    """A field of the users' table with few values, and its value for each of ``users`` (internal ids), if any."""
    feat = dataset.user_feat
    for field in feat.columns if feat is not None else ():
        if field == dataset.uid_field or dataset.field2type[field] is not FeatureType.TOKEN:
            continue
        values = feat[field].numpy()
        if len(np.unique(values[1:])) <= MOST_VALUES:
            return field, [str(value) for value in dataset.id2token(field, values[users])]
    return None, None


def example_prompts(parts: LLMAssembly) -> list[dict[str, Any]]:
    """The prompts of the first test samples: ``row_id`` and ``text``."""
    rows = parts.test[np.arange(min(EXAMPLES, len(parts.test)))]
    return [
        {ROW_ID: row_id, "text": parts.prompts.text(rows, i)}
        for i, row_id in enumerate(rows[ROW_ID].tolist())
    ]
