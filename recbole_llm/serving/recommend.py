"""The best items of users, and the scores of pairs, by the ids of the data's files."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_llm.serving.explain import explain
from recbole_llm.serving.run import ServedRun, report_unknown

logger = logging.getLogger(__name__)

RECOMMENDED = ["user", "rank", "item", "title", "score", "stage"]
"""Columns of :func:`recommend`."""


def recommend(
    run: ServedRun | str | Path,
    users: Iterable[object],
    top: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[object] | None = None,
    interactions: str | Path | pd.DataFrame | None = None,
    *,
    items: str | Path | pd.DataFrame | None = None,
    retrieve: int | None = None,
    explained: bool = False,
) -> pd.DataFrame:
    """The items that a finished run ranks first for some users, after everything the data has of them.

    With a lens, an LLM recommender that needs one prompt per item scores only the first ``retrieve`` items of the lens
    (two stages); the others follow in the lens's order if ``top`` is larger.

    Args:
        run: a run, or its folder.
        users: ids as in the data's files.
        top: items per user, at most.
        exclude_seen: leave out items that the user already has in the data.
        candidates: ids of the items to rank; by default all that the model can score.
        interactions: later interactions to append first (see :meth:`ServedRun.append`).
        items: an ``.item`` file with the titles of new items among them.
        retrieve: items that the lens passes on to the language model; 0: all are scored by the language model. By
            default 50 for labelled models with a lens, the number of listed candidates where prompts list them, and
            ``two_stage`` else.
        explained: add the columns of :func:`recbole_llm.serving.explain.explain`.

    Returns:
        A table with the columns :data:`RECOMMENDED`, users in the order given. ``attrs`` has ``unknown_users`` and
        ``unknown_items``, ids that are not in the data; they are logged and left out.

    Raises:
        ValueError: if no user is known, or the model cannot score a new user or candidate.
    """
    run = opened(run, interactions, items)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    people, wanted = run.ids(run.dataset.uid_field, users), None
    report_unknown("users", people.unknown, run.folder)
    unknown_items: list[str] = []
    if candidates is not None:
        found = run.ids(run.dataset.iid_field, candidates)
        wanted, unknown_items = np.unique(found.known), found.unknown
        report_unknown("items", unknown_items, run.folder)
        run.check_items(wanted)
    if not len(people.known):
        raise ValueError(
            f"none of the users is in the data of {run.folder}: {', '.join(people.unknown[:10])}"
        )
    run.check_users(people.known)
    choices = [choose(run, int(user), top, exclude_seen, wanted, retrieve) for user in people.known]
    table = pd.concat(
        [
            ranked(run, choice, part, top)
            for choice, part in zip(choices, scores_of(run, choices), strict=True)
        ],
        ignore_index=True,
    )
    if explained:
        table = pd.concat([table, explain(run, table)], axis=1)
    table.attrs.update(unknown_users=people.unknown, unknown_items=unknown_items)
    return table


def opened(
    run: ServedRun | str | Path,
    interactions: str | Path | pd.DataFrame | None = None,
    items: str | Path | pd.DataFrame | None = None,
) -> ServedRun:
    """A run, loaded if its folder is given, with interactions appended if there are any."""
    if not isinstance(run, ServedRun):
        return ServedRun.load(run, interactions=interactions, items=items)
    if interactions is not None:
        run.append(interactions, items)
    return run


@dataclass(frozen=True)
class Choice:
    """What the model is to rank for a user.

    Attributes:
        user: internal id.
        items: internal ids, ascending, that the model scores.
        rest: item and score of those that come behind, in the first stage's order.
        listed: whether the prompt lists the items.
    """

    user: int
    items: np.ndarray
    rest: list[tuple[int, float]]
    listed: bool


def choose(
    run: ServedRun, user: int, top: int, exclude_seen: bool, wanted: np.ndarray | None, retrieve: int | None
) -> Choice:
    """The first stage: which items of ``wanted`` (internal ids; ``None``: all) the model scores for a user."""
    items = run.scorable() if wanted is None else wanted
    if exclude_seen:
        items = np.setdiff1d(items, run.seen(user))
    retrieve = run.default_retrieved if retrieve is None else retrieve
    rest: list[tuple[int, float]] = []
    if retrieve and run.first_stage is not None and len(items) > retrieve:
        there = run.retrievable(items)
        known, new = (
            items[there],
            items[~there],
        )  # of which the first stage knows nothing: the model scores them
        first = run.first_scores(user, known)
        order = np.lexsort((known, -first))
        rest = [(int(known[i]), float(first[i])) for i in order[retrieve : max(top, retrieve)]]
        items = np.sort(np.concatenate([known[order[:retrieve]], new]))
    elif len(items) > 10 * top and run.config.spec.is_llm and run.config["task"] == "ctr":
        logger.info("%d prompts for one user; retrieve or candidates would need fewer", len(items))
    listed = run.lists_candidates and 0 < len(items) <= run.listed_candidates
    return Choice(user, items, rest, listed)


def scores_of(run: ServedRun, choices: list[Choice]) -> list[np.ndarray]:
    """The model's scores of the items of every choice; users share batches, each with an own gate."""
    users = [np.full(0 if choice.listed else len(choice.items), choice.user) for choice in choices]
    items = [choice.items[: len(owner)] for owner, choice in zip(users, choices, strict=True)]
    found = run.score(np.concatenate(users), np.concatenate(items))
    parts = np.split(found, np.cumsum([len(owner) for owner in users])[:-1])
    return [
        run.score_listed(choice.user, choice.items) if choice.listed else part
        for choice, part in zip(choices, parts, strict=True)
    ]


def ranked(run: ServedRun, choice: Choice, scores: np.ndarray, top: int) -> pd.DataFrame:
    """The second stage: the rows of one user; equal scores in the order of internal ids."""
    order = np.lexsort((choice.items, -scores))[:top]
    rest = choice.rest[: top - len(order)]
    ids = [*choice.items[order].tolist(), *(item for item, _ in rest)]
    return pd.DataFrame(
        {
            "user": run.tokens(run.dataset.uid_field, [choice.user]) * len(ids),
            "rank": range(1, len(ids) + 1),
            "item": run.tokens(run.dataset.iid_field, ids),
            "title": run.titles(ids),
            "score": [*scores[order].tolist(), *(score for _, score in rest)],
            "stage": [run.model_stage] * len(order) + [run.first_stage] * len(rest),
        },
        columns=RECOMMENDED,
    )
