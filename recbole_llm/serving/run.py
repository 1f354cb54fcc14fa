"""A finished run that answers for users and items by their own ids, at the end of the data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction

from recbole_llm.backbone.loader import Backbone
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.history import HistoryIndex
from recbole_llm.data.prompts.next_item import TitlePromptBuilder
from recbole_llm.experiment.assembly import Assembly
from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.experiment.loading import complete, load_run, no_candidates_listed
from recbole_llm.lens.lens import Lens
from recbole_llm.model.stream import StreamRecommender
from recbole_llm.model.title_ranker import TitleRanker
from recbole_llm.serving.new_data import NewData, append
from recbole_llm.serving.prefixes import PrefixScorer, why_not

logger = logging.getLogger(__name__)

RETRIEVED = 50
"""Items that the lens passes on to a language model that needs one prompt per item."""
PREFIX_MEMORY = 1 << 30
"""Bytes of keys and values of prompts that are kept."""
PAIRS = 512
"""Pairs per call of a model."""


@dataclass
class Ids:
    """Internal ids of those tokens that the data has, in the order given, and the other tokens.

    Attributes:
        known: int64 ``[n]``.
        unknown: tokens that are not in the data, each once.
    """

    known: np.ndarray
    unknown: list[str]


class ServedRun:
    """Scores of any (user, item), after everything the data has of the user.

    Args:
        parts: a run as :func:`recbole_llm.experiment.loading.load_run` gives it.
        folder: where it lies, for messages.
        prefix_memory: bytes of keys and values of prompts that are kept from one call to the next; ``None``: 1 GiB if
            prompts can share them exactly, else none.

    Raises:
        ValueError: if the run has no end of a user's history, or ``prefix_memory`` is asked for and is not possible.

    Attributes:
        scale: what a score is: ``probability``, ``log-likelihood`` (mean over a title's tokens), or ``score``.
        new: what was appended to the data so far.
        prefixes: scores the model with what all candidates of a user begin with shared; ``None`` where that is not
            exact.
        retriever: another run on the same data whose first items this one ranks again; ``None``: the lens's.
    """

    def __init__(
        self,
        parts: Assembly,
        folder: Path,
        prefix_memory: int | None = None,
        retriever: ServedRun | None = None,
    ) -> None:
        self.parts, self.folder, self.retriever = parts, folder, retriever
        self.model, self.dataset, self.config = parts.model, parts.dataset, parts.config
        if self.config["benchmark_filename"]:
            raise ValueError(
                f"{folder} was trained on ready-made splits (benchmark_filename), which have no end of a user's "
                "history to recommend after; train on one .inter file"
            )
        self.new = NewData.of(self.dataset)
        self.prefixes: PrefixScorer | None = None
        if prefix_memory or (prefix_memory is None and why_not(self.model) is None):
            self.prefixes = PrefixScorer(
                self.model, PREFIX_MEMORY if prefix_memory is None else prefix_memory
            )
        if isinstance(self.model, TitleRanker):
            self.scale = "log-likelihood"
        else:
            self.scale = "probability" if self.config["task"] == "ctr" else "score"

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        interactions: str | Path | pd.DataFrame | None = None,
        items: str | Path | pd.DataFrame | None = None,
        device: str | None = None,
        prefix_memory: int | None = None,
        retriever: str | Path | None = None,
        **changes,
    ) -> ServedRun:
        """Load a finished run.

        Args:
            folder: its folder.
            interactions: later interactions to append, an atomic file or a table (see :meth:`append`).
            items: an atomic ``.item`` file with the titles of items that the data does not have.
            device: where to put it; by default the device is chosen again, as ``auto``.
            prefix_memory: of the class.
            retriever: the folder of a run whose first items this one ranks again.
            **changes: configuration values to change, e.g. ``data_path``.
        """
        first = None if retriever is None else cls.load(retriever, device=device)
        run = cls(load_run(Path(folder), device=device, changes=changes), Path(folder), prefix_memory, first)
        if first is not None and first.dataset.dataset_name != run.dataset.dataset_name:
            raise ValueError(
                f"the retriever {retriever} was trained on {first.dataset.dataset_name} and {folder} on "
                f"{run.dataset.dataset_name}; name a run on the same data"
            )
        if interactions is not None:
            run.append(interactions, items)
        return run

    def append(
        self, interactions: str | Path | pd.DataFrame, items: str | Path | pd.DataFrame | None = None
    ) -> dict[str, int]:
        """Append later interactions of known and unknown users; see :func:`recbole_llm.serving.new_data.append`."""
        if self.retriever is not None:
            self.retriever.append(interactions, items)
        return append(self.parts, self.new, interactions, items)

    # ------------------------------------------------------------------ what it is made of

    @property
    def lens(self) -> Lens | None:
        """The lens, or ``None``."""
        return self.parts.lens if isinstance(self.parts, LLMAssembly) else None

    @property
    def backbone(self) -> Backbone:
        """The language model of an LLM recommender."""
        return cast(LLMAssembly, self.parts).backbone

    @property
    def model_stage(self) -> str:
        """What the model's own scores are called."""
        return f"llm ({self.config['model']})" if self.config.spec.is_llm else self.config["model"]

    @property
    def first_stage(self) -> str | None:
        """What the scores that choose the model's candidates are called; ``None``: nothing chooses."""
        if self.retriever is not None:
            return f"retriever ({self.retriever.config['model']})"
        return None if self.lens is None else f"lens ({self.config['lens']})"

    @property
    def default_retrieved(self) -> int | None:
        """How many items the first stage passes on to the model; ``None``: the model scores every item."""
        if self.first_stage is None:
            return None
        if self.retriever is not None and not self.lists_candidates:
            return RETRIEVED
        if not isinstance(self.model, TitleRanker):
            return RETRIEVED
        if self.lists_candidates:
            return self.listed_candidates
        return self.config["two_stage"] or None

    @property
    def title_prompts(self) -> TitlePromptBuilder | None:
        """The prompts of a title ranker, else ``None``."""
        prompts = self.parts.prompts if isinstance(self.parts, LLMAssembly) else None
        return prompts if isinstance(prompts, TitlePromptBuilder) else None

    @property
    def listed_candidates(self) -> int:
        """How many candidates its prompts list."""
        sets = self.parts.candidates
        return next(iter(sets.values())).items.shape[1] if sets else self.config["num_negatives"] + 1

    @property
    def lists_candidates(self) -> bool:
        """Whether the model was trained with prompts that list the candidates."""
        return self.title_prompts is not None and self.title_prompts.lists_candidates

    # ------------------------------------------------------------------ ids

    def ids(self, field: str, tokens: Iterable[object]) -> Ids:
        """Internal ids of users (``field`` = ``dataset.uid_field``) or items."""
        table = self.dataset.field2token_id[field]
        names = [str(token) for token in tokens]
        found = [table[name] for name in names if name in table and name != "[PAD]"]
        unknown = list(dict.fromkeys(name for name in names if name not in table or name == "[PAD]"))
        return Ids(np.array(found, dtype=np.int64), unknown)

    def tokens(self, field: str, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of the data's files."""
        return [str(self.dataset.id2token(field, int(i))) for i in ids]

    def titles(self, items: Sequence[int] | np.ndarray) -> list[str]:
        """Titles by internal id, with the year; '' where the data has none."""
        text = None
        if isinstance(self.dataset, HistoryDataset):
            # Only prompts cannot do without titles.
            with contextlib.nullcontext() if self.config.spec.is_llm else contextlib.suppress(ValueError):
                text = self.dataset.item_text()
        if text is None or not text.titled:
            return ["" for _ in items]
        pairs = [(text.titles[i], text.years[i]) for i in map(int, items)]
        return [f"{title} ({year})" if year else title for title, year in pairs]

    def seen(self, user: int) -> np.ndarray:
        """Items that a user has in the data, internal ids."""
        if isinstance(self.dataset, HistoryDataset):
            history = cast(HistoryIndex, self.dataset.history)
            return np.unique(history.item_ids[history.user_start[user] : history.user_start[user + 1]])
        feat = self.dataset.inter_feat
        users, items = feat[self.dataset.uid_field].numpy(), feat[self.dataset.iid_field].numpy()
        return np.unique(items[users == user])

    def scorable(self) -> np.ndarray:
        """Internal ids of the items that the model can score, ascending; those of ``candidate_items``."""
        size = self.dataset.item_num if self.new.scores_new_items else self.new.n_items
        if isinstance(self.dataset, HistoryDataset):
            return np.flatnonzero(self.dataset.ranked_items[:size])
        return np.arange(1, size)

    # ------------------------------------------------------------------ scores

    def samples(self, users: np.ndarray, items: np.ndarray) -> Interaction:
        """Pairs ``[B]`` with the features and the whole history of their users."""
        columns = {
            self.dataset.uid_field: torch.as_tensor(users, dtype=torch.long),
            self.dataset.iid_field: torch.as_tensor(items, dtype=torch.long),
        }
        return complete(self.parts, Interaction(columns))

    def for_model(self, batch: Interaction) -> Interaction:
        """Samples as the model may see them: one with trained tables is not told ids that were appended."""
        told = self.config.spec.is_llm or isinstance(self.model, StreamRecommender)
        if told or getattr(self.model, "titles_suffice", False):
            return batch
        return self.new.known_only(batch)

    def check_users(self, users: np.ndarray) -> None:
        """Refuse users that were appended and that the model cannot know.

        Raises:
            ValueError: naming them.
        """
        new = np.unique(users[users >= self.new.n_users])
        if len(new) and not self.new.scores_new_users:
            names = ", ".join(self.tokens(self.dataset.uid_field, new[:10]))
            raise ValueError(
                f"{self.config['model']} has trained parameters for every user, and none for {names}; train again with "
                "these users, or use a model that reads histories"
            )

    def check_items(self, items: np.ndarray) -> None:
        """Refuse items that were appended and that the model cannot score.

        Raises:
            ValueError: naming them.
        """
        new = np.unique(items[items >= self.new.n_items])
        if len(new) and not self.new.scores_new_items:
            names = ", ".join(self.tokens(self.dataset.iid_field, new[:10]))
            raise ValueError(
                f"{self.config['model']} has trained parameters for every item, and none for {names}; only a model "
                "that reads nothing but titles can score them (e.g. TALLRec, or HLLM without an ID table)"
            )

    @torch.no_grad()
    def score(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The model's score of every pair of internal ids, float64 ``[n]``; users may be mixed in any order."""
        self.check_users(users)
        self.check_items(items)
        scores = np.empty(len(users), dtype=np.float64)
        # The pairs of one user together: a title ranker shares the prompt between them.
        order = np.argsort(users, kind="stable")
        for start in range(0, len(order), PAIRS):
            at = order[start : start + PAIRS]
            batch = self.samples(users[at], items[at])
            if self.prefixes is not None:
                scores[at] = self.prefixes.score(batch).cpu().numpy()
                continue
            with no_candidates_listed(self.parts):
                scores[at] = self.model.predict(self.for_model(batch)).double().cpu().numpy()
        return scores

    @torch.no_grad()
    def score_listed(self, user: int, items: np.ndarray) -> np.ndarray:
        """The scores of candidates that the prompt lists, in ascending order of their ids; float64 ``[n]``."""
        prompts = cast(TitlePromptBuilder, self.title_prompts)
        kept, prompts.candidates = prompts.candidates, lambda rows: np.tile(np.sort(items), (len(rows), 1))
        try:
            batch = self.samples(np.full(len(items), user), items)
            return self.model.predict(self.for_model(batch)).double().cpu().numpy()
        finally:
            prompts.candidates = kept

    @torch.no_grad()
    def lens_scores(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The lens's scores of pairs, float64 ``[n]``: probabilities in the ctr task, else unbounded."""
        self.check_users(users)
        found = []
        for start in range(0, len(users), PAIRS):
            batch = self.samples(users[start : start + PAIRS], items[start : start + PAIRS])
            logit = cast(Lens, self.lens).represent(batch)[1].double()
            found.append((torch.sigmoid(logit) if self.config["task"] == "ctr" else logit).cpu().numpy())
        return np.concatenate(found) if found else np.empty(0)

    def retrievable(self, items: np.ndarray) -> np.ndarray:
        """Which items the first stage can score, bool ``[n]``."""
        if self.retriever is None:
            return items < self.new.n_items
        field, other = self.dataset.iid_field, self.retriever
        table, known = other.dataset.field2token_id[other.dataset.iid_field], set(other.scorable().tolist())
        return np.array([table.get(token) in known for token in self.tokens(field, items)], dtype=bool)

    def first_scores(self, user: int, items: np.ndarray) -> np.ndarray:
        """The first stage's scores of a user's items, which are :meth:`retrievable`, float64 ``[n]``."""
        if self.retriever is None:
            return self.lens_scores(np.full(len(items), user), items)
        other = self.retriever
        people = other.ids(other.dataset.uid_field, self.tokens(self.dataset.uid_field, [user]))
        things = other.ids(other.dataset.iid_field, self.tokens(self.dataset.iid_field, items))
        if people.unknown:
            raise ValueError(f"user {people.unknown[0]} is not in the data of the retriever {other.folder}")
        return other.score(np.full(len(things.known), people.known[0]), things.known)

    @torch.no_grad()
    def gate(self, users: np.ndarray, items: np.ndarray) -> np.ndarray | None:
        """The mixture of experts of pairs, mean over projections, float64 ``[n, K]``; ``None`` without experts."""
        if not self.config.spec.is_llm or not self.model.gated or self.config["gate"] == "token":
            return None
        lens = self.model.lens
        state, logit = lens.represent(self.samples(users, items))
        found = self.model.adapter.mean_gate(self.model.gate_instance(state, logit))
        return None if found is None else found.double().cpu().numpy()


def report_unknown(what: str, unknown: Sequence[str], where: Path) -> None:
    """Warn about ids that the data does not have."""
    if unknown:
        first = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        logger.warning("%d %s not in the data of %s: %s; they are left out", len(unknown), what, where, first)
