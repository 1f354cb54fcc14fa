"""What a score was made of: the prompt, the lens's score beside it, the mixture of experts."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd

from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.experiment.loading import no_candidates_listed
from recbole_llm.serving.run import ServedRun


def explain(run: ServedRun, table: pd.DataFrame) -> pd.DataFrame:
    """What the model read of each pair.

    Args:
        table: with the columns ``user`` and ``item``, ids of the data.

    Returns:
        ``prompt`` (the text; slots as ``[item vector]``), ``lens_score``, ``gate`` (a list of K weights, mean over
        projections) and ``history`` (how many earlier interactions the data has of the user); ``None`` where the run
        has no such thing.
    """
    users = run.ids(run.dataset.uid_field, table["user"]).known
    items = run.ids(run.dataset.iid_field, table["item"]).known
    found = pd.DataFrame(index=table.index, columns=["prompt", "lens_score", "gate", "history"], dtype=object)
    found = found.where(found.notna(), None)
    found["history"] = [_history(run, int(user)) for user in users]
    if not run.config.spec.is_llm or not len(table):
        return found
    samples, prompts = run.samples(users, items), cast(LLMAssembly, run.parts).prompts
    with no_candidates_listed(run.parts):
        found["prompt"] = [prompts.text(samples, i) for i in range(len(samples))]
    if run.lens is not None:
        scores = run.lens_scores(users, items)
        found["lens_score"] = [
            None if i >= run.new.n_items else float(x) for i, x in zip(items, scores, strict=True)
        ]
    gates = run.gate(users, items)
    if gates is not None:
        found["gate"] = [np.round(gate, 4).tolist() for gate in gates]
    return found


def _history(run: ServedRun, user: int) -> int | None:
    history = getattr(run.dataset, "history", None)
    return None if history is None else int(history.user_start[user + 1] - history.user_start[user])
