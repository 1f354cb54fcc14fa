"""What all candidates of a user begin with goes through the language model once, and its keys and values are kept.

Prompts of one user are the same up to the target's line; streams up to the last interaction's::

    Stars given so far: ... 3 Heat  -+- Next film: Alien ...      one row of a batch: the prefix in the cache, and the
                                     +- Next film: Fargo ...      candidates behind it, which do not see each other

A batch has one row per user and one pass for all candidates of all its rows; another one, before it, for those
prefixes that are not kept. Kept are as many as fit into a number of bytes, the one used longest ago goes first. They
are found by their own tokens and by how many interactions the user has, so that nothing kept can be out of date.

That is exact where nothing of the prefix depends on the target: a plain LoRA; a gate whose state is that of the user
(``gate_scope: user``); and streams, whose earlier interactions have instances of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.cached_prompts import CachedPrompts, KeptPrompt, takes_branches
from recbole_llm.data.prompts.ctr import PromptBuilder
from recbole_llm.data.prompts.stream import EncodedStreams
from recbole_llm.data.retriever import RecentRetriever
from recbole_llm.data.streams import Chunk, interactions_at, visible_until
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.model.stream_ctr import StreamCTR
from recbole_llm.serving.kept import Kept
from recbole_llm.serving.new_data import KnownItemsRetriever

ROWS = 16
"""Prefixes in one pass."""
BRANCH_TOKENS = 256
"""Tokens behind a prefix in one pass; what is more stands behind it in another row."""

Key = tuple[int, int, bytes]
"""User, number of his interactions, tokens of the prefix."""


def why_not(model: object) -> str | None:
    """Why prefixes cannot be shared exactly, as the end of a sentence; ``None`` where they can."""
    if not isinstance(model, AnswerCTR):
        return "only prompts and streams of the ctr task end with the target"
    if model.slots:
        return "the prompt has slots for vectors of the lens"
    if not takes_branches(model.adapter.peft_model):
        return "the language model's attention takes no mask"
    if model.gated and model.adapter.config.gate == "shuffled":
        return "the gate is shuffled within a batch"
    if isinstance(model, StreamCTR):
        return None
    prompts = model.prompts
    if not prompts.assembled:
        return "the tokenizer joins lines of the prompt"
    retriever = prompts.retriever
    if not isinstance(
        retriever.inner if isinstance(retriever, KnownItemsRetriever) else retriever, RecentRetriever
    ):
        return "the history that is shown depends on the target"
    if model.gated and (model.gate_reads_logit or model.lens.gate_scope != "user"):
        return "the gate has seen the target item"
    return None


def bytes_of(prefix: KeptPrompt) -> int:
    """Of the keys and values of a prefix."""
    return sum(tensor.nbytes for layer in prefix for tensor in layer)


@dataclass
class Pair:
    """A prompt in two parts.

    Attributes:
        key: of its prefix.
        prefix, suffix: token ids.
        chunk, places: of a stream, and which interaction of it each token of the prefix belongs to.
    """

    key: Key
    prefix: np.ndarray
    suffix: np.ndarray
    chunk: Chunk | None = None
    places: np.ndarray | None = None


@dataclass
class Row:
    """A prefix and some of the pairs behind it, by their numbers."""

    key: Key
    members: list[int]


class PrefixScorer:
    """Scores of a labelled LLM recommender, with shared prefixes.

    Args:
        model: the model.
        memory: bytes of keys and values that are kept from one call to the next.

    Raises:
        ValueError: if prefixes cannot be shared exactly, with the reason.
    """

    def __init__(self, model: AnswerCTR, memory: int) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ValueError(f"prompts of one user cannot share their beginning: {reason}")
        self.model, self.kept = model, Kept[Key, KeptPrompt](memory, bytes_of)
        self.passes = {"prefixes": 0, "branches": 0}
        self._answers = torch.as_tensor(model.answer_ids)

    @torch.no_grad()
    def score(self, interaction: Interaction) -> Tensor:
        """Probability of label 1 of samples that are still to come, ``[B]`` float64.

        Args:
            interaction: with histories, as :func:`recbole_llm.experiment.loading.complete` makes it.
        """
        pairs = (
            self._streams(interaction) if isinstance(self.model, StreamCTR) else self._prompts(interaction)
        )
        scores = torch.empty(len(interaction), dtype=torch.float64, device=self.model.device)
        alone = [i for i, pair in enumerate(pairs) if pair is None]
        if alone:
            scores[alone] = self.model.score_rows(interaction[torch.as_tensor(alone)]).to(scores)
        whole = {i: pair for i, pair in enumerate(pairs) if pair is not None}
        if not whole:
            return scores
        instances, lens_logit = self._read_lens(interaction)
        margins = torch.zeros(len(interaction), device=self.model.device)
        for rows in self._batches(whole):
            prefixes = self._prefixes(rows, whole, instances)
            members, found = self._branches(rows, whole, prefixes, instances)
            margins[members] = self.model.like_margin(found).to(margins)
        total = torch.sigmoid(self.model.with_residual(margins, lens_logit).double())
        chosen = list(whole)
        scores[chosen] = total[chosen]
        return scores

    # ------------------------------------------------------------------ prompts in two parts

    def _interactions(self, user: int) -> int:
        start = self.model.prompts._history.user_start
        return int(start[user + 1] - start[user])

    def _prompts(self, interaction: Interaction) -> list[Pair | None]:
        prompts: PromptBuilder = self.model.prompts
        ids, shared = prompts.encode_shared(interaction)
        users = interaction[self.model.USER_ID].tolist()
        return [
            self._pair(user, found[:size], found[size:])
            for user, found, size in zip(users, ids, shared, strict=True)
        ]

    def _streams(self, interaction: Interaction) -> list[Pair | None]:
        pairs: list[Pair | None] = []
        for stream in cast(EncodedStreams, self.model.encode(interaction)).streams:
            chunk, last = stream.chunk, len(stream.chunk) - 1
            size = int((stream.places < last).sum())
            # The header has the instance of the chunk's first interaction: here that of the target itself.
            mixed = last == 0 and self.model.gated
            tied = visible_until(self.model.prompts._history, chunk) is not None
            whole = None if mixed or tied else self._pair(chunk.user, *np.split(stream.input_ids, [size]))
            if whole is not None:
                whole.chunk, whole.places = chunk, np.maximum(stream.places[:size], 0)
            pairs.append(whole)
        return pairs

    def _pair(self, user: int, prefix: np.ndarray, suffix: np.ndarray) -> Pair | None:
        if not len(prefix):
            return None
        return Pair((user, self._interactions(user), prefix.tobytes()), prefix, suffix)

    def _batches(self, pairs: dict[int, Pair]) -> Iterator[list[Row]]:
        """Rows of each pass: those of one prefix side by side, long prefixes together."""
        groups: dict[Key, list[int]] = {}
        for i, pair in pairs.items():
            groups.setdefault(pair.key, []).append(i)
        rows = []
        for key in sorted(groups, key=lambda key: -len(key[2])):
            size = BRANCH_TOKENS  # so that the first member begins a row
            for i in groups[key]:
                size += len(pairs[i].suffix)
                if size > BRANCH_TOKENS:
                    rows.append(Row(key, []))
                    size = len(pairs[i].suffix)
                rows[-1].members.append(i)
        for start in range(0, len(rows), ROWS):
            yield rows[start : start + ROWS]

    # ------------------------------------------------------------------ passes

    def _read_lens(self, interaction: Interaction) -> tuple[Tensor | None, Tensor | None]:
        """The gate's instances of all pairs ``[B, H]`` and the lens's logits ``[B]``, of what is read."""
        model = self.model
        if not (model.gated or model.residual):
            return None, None
        if isinstance(model, StreamCTR):
            users, items, ends = model.prompts.samples(interaction)
            interaction = interactions_at(model._dataset, ends, users, items)
        state, logit = model.lens.represent(interaction)
        instances = model.gate_instance(state, logit).to(model.device) if model.gated else None
        return instances, logit.to(model.device) if model.residual else None

    def _prefixes(
        self, rows: list[Row], pairs: dict[int, Pair], instances: Tensor | None
    ) -> dict[Key, KeptPrompt]:
        """The prefixes of a batch, those that are not kept by one pass."""
        found: dict[Key, KeptPrompt] = {}
        missing: dict[Key, int] = {}
        for row in rows:
            if row.key in found or row.key in missing:
                continue
            kept = self.kept.get(row.key)
            if kept is None:
                missing[row.key] = row.members[0]
            else:
                found[row.key] = kept
        if not missing:
            return found
        firsts = [pairs[i] for i in missing.values()]
        input_ids, lengths = pad_right([pair.prefix for pair in firsts], self.model.pad_id)
        self._set_prefix_instance(list(missing.values()), firsts, instances)
        embedded = self.model.adapter.model.get_input_embeddings()(input_ids.to(self.model.device))
        longest = max(len(pair.suffix) for pair in pairs.values())
        cached = CachedPrompts(self.model.adapter.peft_model, embedded, lengths, longest, self._answers)
        self._count("prefixes", int(lengths.sum()))
        for key, prefix in zip(missing, cached.kept(), strict=True):
            found[key] = prefix
            self.kept.put(key, prefix)
        return found

    def _set_prefix_instance(self, members: list[int], firsts: list[Pair], instances: Tensor | None) -> None:
        if instances is None:
            return
        model = self.model
        if not isinstance(model, StreamCTR):
            model.adapter.set_instance(instances[members])
            return
        chunks = [cast(Chunk, pair.chunk) for pair in firsts]
        earlier = [Chunk(chunk.user, chunk.start, chunk.targets - 1) for chunk in chunks]
        z = model.gate_instance(*model.lens.represent(model.gate_samples(earlier)))
        padded = torch.nn.utils.rnn.pad_sequence(z.split(list(map(len, earlier))), batch_first=True)
        places, _ = pad_right([cast(np.ndarray, pair.places) for pair in firsts], 0)
        model.adapter.set_instance(padded.to(model.device), places.to(model.device))

    def _branches(
        self,
        rows: list[Row],
        pairs: dict[int, Pair],
        prefixes: dict[Key, KeptPrompt],
        instances: Tensor | None,
    ) -> tuple[list[int], Tensor]:
        """Pairs of a batch, and the answers' logits behind each, ``[n, K]``, by one pass."""
        suffixes = [[pairs[i].suffix for i in row.members] for row in rows]
        branch = [np.repeat(np.arange(len(own)), list(map(len, own))) for own in suffixes]
        tokens, lengths = pad_right([np.concatenate(own) for own in suffixes], self.model.pad_id)
        depth, _ = pad_right([np.concatenate([np.arange(len(part)) for part in own]) for own in suffixes], 0)
        of, _ = pad_right(branch, 0)
        ends, counts = pad_right([np.cumsum(list(map(len, own))) - 1 for own in suffixes], 0)
        width = tokens.shape[1]
        inside = torch.arange(width) < lengths[:, None]
        same = (of[:, :, None] == of[:, None, :]) & inside[:, None, :]
        sees = (same & torch.ones(width, width, dtype=torch.bool).tril()) | torch.eye(width, dtype=torch.bool)
        if instances is not None and isinstance(self.model, StreamCTR):
            own = torch.nn.utils.rnn.pad_sequence([instances[row.members] for row in rows], batch_first=True)
            self.model.adapter.set_instance(own, of.to(self.model.device))
        elif instances is not None:
            self.model.adapter.set_instance(instances[[row.members[0] for row in rows]])
        longest = max(len(part) for own in suffixes for part in own)
        cached = CachedPrompts.restored(
            self.model.adapter.peft_model, [prefixes[row.key] for row in rows], longest, self._answers
        )
        logits = cached.forward(tokens, depth, depth, sees, ends).float()
        self._count("branches", int(lengths.sum()))
        found = torch.cat([part[:count] for part, count in zip(logits, counts.tolist(), strict=True)])
        return [i for row in rows for i in row.members], found

    def _count(self, kind: str, tokens: int) -> None:
        self.passes[kind] += 1
        self.model.counts["tokens"] += tokens
