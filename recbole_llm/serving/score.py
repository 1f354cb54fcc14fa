"""Scores of pairs of a user and an item, by the ids of the data's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from recbole_llm.serving.explain import explain
from recbole_llm.serving.recommend import opened
from recbole_llm.serving.run import ServedRun, report_unknown


def score(
    run: ServedRun | str | Path,
    pairs: pd.DataFrame,
    interactions: str | Path | pd.DataFrame | None = None,
    *,
    items: str | Path | pd.DataFrame | None = None,
    explained: bool = False,
) -> pd.DataFrame:
    """The score of every pair, after everything the data has of its user.

    Args:
        run: a run, or its folder.
        pairs: a table with the columns of user and item ids (``user_id`` and ``item_id``, or ``user`` and ``item``).
        interactions, items: as of :func:`recbole_llm.serving.recommend.recommend`.
        explained: add the columns of :func:`recbole_llm.serving.explain.explain`.

    Returns:
        ``user``, ``item``, ``title``, ``score``, ``scale`` (``probability``, ``log-likelihood`` or ``score``), in the
        order of ``pairs`` without those of unknown ids; ``attrs`` has ``unknown_users`` and ``unknown_items``.

    Raises:
        ValueError: if columns are missing, no pair is known, or the model cannot score a new user or item.
    """
    run = opened(run, interactions, items)
    names = columns_of(pairs, run)
    columns = {key: pairs[name].astype(str).tolist() for key, name in names.items()}
    people = run.ids(run.dataset.uid_field, columns["user"])
    things = run.ids(run.dataset.iid_field, columns["item"])
    report_unknown("users", people.unknown, run.folder)
    report_unknown("items", things.unknown, run.folder)
    bad = set(people.unknown), set(things.unknown)
    kept = [
        (user, item)
        for user, item in zip(columns["user"], columns["item"], strict=True)
        if user not in bad[0] and item not in bad[1]
    ]
    if not kept:
        raise ValueError(f"no pair has a user and an item that are in the data of {run.folder}")
    users = run.ids(run.dataset.uid_field, [user for user, _ in kept]).known
    chosen = run.ids(run.dataset.iid_field, [item for _, item in kept]).known
    table = pd.DataFrame(
        {
            "user": [user for user, _ in kept],
            "item": [item for _, item in kept],
            "title": run.titles(chosen),
            "score": np.asarray(run.score(users, chosen)),
            "scale": run.scale,
        }
    )
    if explained:
        table = pd.concat([table, explain(run, table)], axis=1)
    table.attrs.update(unknown_users=people.unknown, unknown_items=things.unknown)
    return table


def columns_of(pairs: pd.DataFrame, run: ServedRun) -> dict[str, str]:
    """Which columns hold ``user`` and ``item``.

    Raises:
        ValueError: if one is missing.
    """
    found = {}
    for key, field in (("user", run.dataset.uid_field), ("item", run.dataset.iid_field)):
        named = [name for name in pairs.columns if str(name).split(":")[0] in (field, key)]
        if not named:
            raise ValueError(
                f"the pairs have no column {field} (or {key}); they have {', '.join(map(str, pairs.columns))}"
            )
        found[key] = named[0]
    return found
