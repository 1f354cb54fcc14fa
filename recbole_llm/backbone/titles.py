r"""The likelihood of titles behind a prompt, by a causal language model.

An answer is the tokens of a title and of the line break that ends it. What the prompt makes of it is

    log p(answer | prompt) = sum_t log p(answer_t | prompt, answer_<t),

and the candidates' answers share much: the prompt, and among each other their beginnings. So the prompt goes
through the model once and leaves its keys and values in a cache; the answers hang behind it as a tree, each
node one token, and a whole piece of the tree goes through the model as if it were one text:

    " Heat\n"           prompt -+- 0 " Heat" -- 1 "\n"
    " Toy Story\n"              +- 2 " Toy" --- 3 " Story" -+- 4 "\n"
    " Toy Story 2\n"                                        +- 5 " 2" -- 6 "\n"         computed: 0, 2, 3, 5

A node sees the real tokens of the prompt and its own ancestors (a mask), and stands where it would stand in
its title (position = prompt length + depth), which makes every number that of the title written out behind
the prompt, up to rounding. Leaves predict nothing and are not computed. Nodes are numbered depth first:
whatever stretch of that order is taken as a piece, only the ancestors of its first node are missing.

Prompts are padded on the right, as in ``answers``: no real token sees the padding, and positions count from
the first token.

Log-probabilities are computed in float32 over the whole vocabulary (a plain output head is multiplied in
float32 too), in float64 where the model is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.head import at_least_float32, at_places, precise_head, unwrapped
from recbole_llm.utils.causal_lm import check_length

# Numbers of logits that are exponentiated at a time: 256 MB in float32.
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class TriePiece:
    """A part of the tree that goes through the model at once.

    Attributes:
        nodes: [q] nodes to compute, in depth-first order.
        n_ancestors: the first so many are ancestors of the rest, computed again for their keys and values.
    """

    nodes: np.ndarray
    n_ancestors: int


class TitleTrie:
    """The answers as a tree whose nodes are tokens, numbered depth first.

    Every distinct beginning of an answer is one node (and one edge, from its parent to it). Equal answers
    share all their nodes and stay distinct titles; an answer may end in the middle of another.

    Args:
        titles: n arrays of token ids, none empty.

    Attributes:
        n_titles: n.
        n_edges: number of nodes m.
        tokens: [m] the token of each node.
        parents: [m] the node before it; -1 is the prompt.
        depth: [m] the number of tokens before it, 0 for a first token.
        ends: [m] the nodes below node i, and i itself, are ``range(i, ends[i])``.
        leaf: [n] the node of each title's last token.
        lengths: [n] number of tokens.

    Raises:
        ValueError: no title, an empty one, or one that is not a list of token ids.
    """

    def __init__(self, titles: Sequence[np.ndarray]) -> None:
        arrays = [np.asarray(title) for title in titles]
        if not arrays:
            raise ValueError("a trie needs at least one title, got none")
        for number, array in enumerate(arrays):
            if array.size == 0:
                raise ValueError(f"title {number} has no tokens: an answer has at least its terminator")
            if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
                raise ValueError(
                    f"title {number} must be a list of token ids of at least 0, got {array.dtype} of shape "
                    f"{array.shape}: {array.ravel()[:8].tolist()}"
                )
        self.n_titles = len(arrays)
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)

        filled = np.full((self.n_titles, int(self.lengths.max())), -1, dtype=np.int32)
        filled[np.arange(filled.shape[1]) < self.lengths[:, None]] = np.concatenate(arrays)
        order = np.lexsort(filled.T[::-1])  # a title comes right before those that go on where it ends
        filled = filled[order]
        # A token is a new node if it, or one before it, differs from the title before.
        new = np.ones_like(filled, dtype=bool)
        np.logical_or.accumulate(filled[1:] != filled[:-1], axis=1, out=new[1:])
        new &= filled >= 0
        numbers = np.full(filled.shape, -1, dtype=np.int32)
        numbers[new] = np.arange(new.sum())
        # Titles with a common beginning stand together: it is the latest node made in that column.
        path = np.maximum.accumulate(numbers, axis=0)

        rows, self.depth = np.nonzero(new)
        self.n_edges = len(rows)
        self.tokens = filled[new].astype(np.int64)
        self.parents = np.where(self.depth > 0, path[rows, self.depth - 1], -1).astype(np.int64)
        self.leaf = np.empty(self.n_titles, dtype=np.int64)
        self.leaf[order] = path[np.arange(self.n_titles), self.lengths[order] - 1]

        sizes = np.ones(self.n_edges, dtype=np.int64)
        for nodes in reversed(self.levels()[1:]):
            np.add.at(sizes, self.parents[nodes], sizes[nodes])
        self.ends = np.arange(self.n_edges) + sizes

        self._by_parent = np.argsort(self.parents, kind="stable")
        self._sorted_parents = self.parents[self._by_parent]
        self._inner = np.flatnonzero(sizes > 1)

    def levels(self) -> list[np.ndarray]:
        """The nodes of each depth."""
        by_depth = np.argsort(self.depth, kind="stable")
        return np.split(by_depth, np.cumsum(np.bincount(self.depth))[:-1])

    def children(self, nodes: np.ndarray) -> np.ndarray:
        """All children of a stretch of nodes.

        Args:
            nodes: ``[-1]``, or consecutive ones of the nodes that have children.
        """
        start = np.searchsorted(self._sorted_parents, nodes[0])
        end = np.searchsorted(self._sorted_parents, nodes[-1], side="right")
        return self._by_parent[start:end]

    def sees(self, nodes: np.ndarray) -> np.ndarray:
        """[q, q] whether column j is row i or an ancestor of it."""
        rows, columns = nodes[:, None], nodes[None, :]
        return (columns <= rows) & (rows < self.ends[nodes][None, :])

    def chunks(self, max_nodes: int) -> list[TriePiece]:
        """Cuts the tree into pieces of at most ``max_nodes`` computed nodes, in depth-first order.

        Each node with children is computed in one piece, and again in those that begin below it. With pieces
        much larger than titles are long that is a few per cent more.

        Raises:
            ValueError: the longest title alone has more than ``max_nodes`` computed nodes.
        """
        inner = self._inner
        if len(inner) and max_nodes <= (deepest := int(self.depth[inner].max())):
            raise ValueError(
                f"max_nodes {max_nodes} is too small: the longest title alone needs {deepest + 1} nodes"
            )
        pieces = []
        start = 0
        while start < len(inner):
            above = self._ancestors(inner[start])
            end = min(start + max_nodes - len(above), len(inner))
            pieces.append(TriePiece(np.concatenate([above, inner[start:end]]), len(above)))
            start = end
        return pieces

    def chains(self) -> list[TriePiece]:
        """Cuts the tree into paths, each from a first token to a node whose children are all leaves.

        For models that take positions from a padding mask alone: a path behind the prompt is plain text. Nodes that
        paths share are computed once for each.
        """
        pieces, last = [], -1
        for end in self._inner[~np.isin(self._inner, self.parents[self._inner])]:
            path = np.append(self._ancestors(end), end)
            pieces.append(TriePiece(path, int(np.searchsorted(path, last, side="right"))))
            last = int(end)
        return pieces

    def _ancestors(self, node: int) -> np.ndarray:
        found = []
        while (node := int(self.parents[node])) >= 0:
            found.append(node)
        return np.array(found[::-1], dtype=np.int64)


KeptPrompt = list[tuple[Tensor, Tensor]]
"""Keys and values ``[heads, P, d]`` of one prompt, layer by layer."""


@dataclass
class TitleScores:
    """What ``score_titles`` found, for each of the B prompts.

    Attributes:
        log_likelihood: B tensors [n_b], the sum of log p over each answer's tokens; float32, or float64 where
            the model is.
        lengths: B tensors [n_b] int64, the number of tokens summed over.
        tokens: Number of positions that went through the model, without padding.
    """

    log_likelihood: list[Tensor]
    lengths: list[Tensor]
    tokens: int


@torch.no_grad()
def score_titles(
    model: nn.Module,
    prompt_embeds: Tensor,
    prompt_lengths: Tensor,
    tries: TitleTrie | Sequence[TitleTrie],
    *,
    max_nodes: int = 512,
    before_titles: Callable[[], None] | None = None,
    attention: Mapping[str, Tensor] | None = None,
) -> TitleScores:
    """How likely the model is to write each title behind each prompt.

    Args:
        model: A causal LM of transformers with attention ``sdpa`` or ``eager``, in eval mode; also a
            ``PeftModel``, a personalised one with its instance set for these B rows.
        prompt_embeds: [B, P, d] input embeddings, right-padded.
        prompt_lengths: [B], the number of real positions of each row, between 1 and P.
        tries: The answers; one trie for all rows, or one for each.
        max_nodes: Tree nodes of a row computed at once. A piece needs about B x max_nodes x vocabulary x 4
            bytes for its logits.
        before_titles: Called once, when the prompts went through and before any title does: where an adapter has an
            instance per token, it sets that of the titles.
        attention: ``attention_mask`` [B, 1, P, P] bool and ``position_ids`` [B, P] of the prompts, where causal
            attention is not exact. Titles see all of their prompt.

    Returns:
        The scores; a row does not depend on the others, nor on the padding.

    Raises:
        ValueError: shapes, lengths or token ids that do not fit, or a model that cannot be asked this way.
    """
    shared = isinstance(tries, TitleTrie)
    trees = [tries] if isinstance(tries, TitleTrie) else list(tries)
    if not shared and len(trees) != len(prompt_embeds):
        raise ValueError(
            f"{len(trees)} tries for {len(prompt_embeds)} prompts: give one for each, or a single TitleTrie for all"
        )
    chained = _reads_positions_from_mask(unwrapped(model))
    pieces = [trie.chains() if chained else trie.chunks(max_nodes) for trie in trees]
    longest = max(int(trie.lengths.max()) for trie in trees)
    prompts = CachedPrompts(model, prompt_embeds, prompt_lengths, longest, attention=attention)
    if before_titles is not None:
        before_titles()
    vocabulary = prompts.logits.shape[-1]
    if (largest := max(int(trie.tokens.max()) for trie in trees)) >= vocabulary:
        raise ValueError(f"a title has token {largest}, but the model's vocabulary has {vocabulary} tokens")

    # One column per node, and a last one that takes whatever padding writes and that no title reads.
    device, dtype = prompts.logits.device, at_least_float32(prompts.logits.dtype)
    width = max(trie.n_edges for trie in trees)
    rows = torch.arange(len(prompt_embeds), device=device)[:, None]
    log_p = torch.zeros(len(rows), width + 1, dtype=dtype, device=device)

    def read(logits: Tensor, owners: list[np.ndarray]) -> None:
        """Writes log p of the owners' children; ``logits [B, o, V]`` are those behind the owners."""
        edges = [
            trie.children(nodes) if len(nodes) else nodes for trie, nodes in zip(trees, owners, strict=True)
        ]
        of = [
            np.searchsorted(nodes, trie.parents[children])
            for trie, nodes, children in zip(trees, owners, edges, strict=True)
        ]
        tokens = [trie.tokens[children] for trie, children in zip(trees, edges, strict=True)]
        of, tokens = _stacked(of, 0, device), _stacked(tokens, 0, device)
        values = logits[rows, of, tokens].to(dtype) - _log_normaliser(logits)[rows, of]
        log_p[rows, _stacked(edges, width, device)] = values

    read(prompts.logits, [np.array([-1])] * len(trees))
    computed = int(prompts.lengths.sum())
    for step in range(max(map(len, pieces))):
        # A prompt that is finished early stays in the batch as padding: the adapter has one instance per row.
        nothing = TriePiece(np.empty(0, dtype=np.int64), 0)
        now = [own[step] if step < len(own) else nothing for own in pieces]
        nodes = [piece.nodes for piece in now]
        owners = [piece.nodes[piece.n_ancestors :] for piece in now]
        size = max(map(len, nodes))
        sees = np.broadcast_to(np.eye(size, dtype=bool), (len(trees), size, size)).copy()
        for seen, trie, own in zip(sees, trees, nodes, strict=True):
            seen[: len(own), : len(own)] = trie.sees(own)
        depth = _stacked([trie.depth[own] for trie, own in zip(trees, nodes, strict=True)], 0, "cpu")
        tokens = _stacked([trie.tokens[own] for trie, own in zip(trees, nodes, strict=True)], 0, "cpu")
        keep = _stacked([np.arange(piece.n_ancestors, len(piece.nodes)) for piece in now], 0, "cpu")
        logits = prompts.forward(tokens, depth, depth, torch.from_numpy(sees), keep)
        read(logits, owners)
        del logits  # else two pieces' logits are held at once
        prompts.forget(size)
        computed += sum(map(len, nodes)) * (len(rows) if shared else 1)

    levels = [trie.levels() for trie in trees]
    for level in range(1, max(map(len, levels))):
        nodes = [own[level] if level < len(own) else own[0][:0] for own in levels]
        above = [trie.parents[own] for trie, own in zip(trees, nodes, strict=True)]
        nodes, above = _stacked(nodes, width, device), _stacked(above, width, device)
        log_p[rows, nodes] += log_p[rows, above]
    leaves = [torch.from_numpy(trie.leaf).to(device) for trie in trees]
    lengths = [torch.from_numpy(trie.lengths).to(device) for trie in trees]
    if shared:
        leaves, lengths = leaves * len(rows), lengths * len(rows)
    return TitleScores([row[leaf] for row, leaf in zip(log_p, leaves, strict=True)], lengths, computed)


def answer_log_likelihood(
    model: nn.Module, embeds: Tensor, prompt_lengths: Tensor, answers: Sequence[np.ndarray]
) -> Tensor:
    """The likelihood of one answer behind each prompt, each written out.

    Only the positions that predict an answer's token go through the output head.

    Args:
        model: A causal LM of transformers, plain or with PEFT layers in it.
        embeds: [B, T, d] input embeddings of each prompt and, right behind it, of its answer without the last
            token (which may follow too); right-padded.
        prompt_lengths: [B], the number of positions of each prompt alone, at least 1.
        answers: B arrays of token ids, none empty.

    Returns:
        [B] the sum of log p over the answer's tokens, float32 (float64 where the model is); differentiable.
        Rows do not depend on each other, nor on the padding.

    Raises:
        ValueError: shapes or lengths that do not fit.
    """
    if embeds.dim() != 3 or prompt_lengths.shape != embeds.shape[:1] or len(answers) != len(embeds):
        raise ValueError(
            f"embeds [B, T, d], prompt_lengths [B] and B answers expected, got {list(embeds.shape)}, "
            f"{list(prompt_lengths.shape)} and {len(answers)} answers"
        )
    targets, lengths = pad_right(answers, 0)
    if prompt_lengths.device.type == "cpu":
        needed = prompt_lengths + lengths - 1
        if bool(((prompt_lengths < 1) | (needed > embeds.shape[1])).any()):
            raise ValueError(
                f"prompts of {prompt_lengths.tolist()} positions (at least 1) with answers of "
                f"{lengths.tolist()} tokens (the last of which is no input) do not fit into embeds of width "
                f"{embeds.shape[1]}"
            )
    weight = unwrapped(model).get_input_embeddings().weight
    embeds, prompt_lengths = embeds.to(weight.device, weight.dtype), prompt_lengths.to(weight.device)
    check_length(unwrapped(model), embeds.shape[1])
    offsets = torch.arange(targets.shape[1])
    targets = targets.masked_fill(offsets >= lengths[:, None], -100)
    places = (prompt_lengths[:, None] - 1 + offsets.to(weight.device)).clamp(max=embeds.shape[1] - 1)

    with precise_head(model, embeds.shape[:2], lambda hidden: at_places(hidden, places)):
        logits = model(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
    logits = logits.to(at_least_float32(logits.dtype))
    loss = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=-100, reduction="none"
    )
    return -loss.view(targets.shape).sum(dim=1)


def token_log_likelihood(
    model: nn.Module, embeds: Tensor, rows: Tensor, places: Tensor, tokens: Tensor, **attention: Tensor
) -> Tensor:
    """The likelihood of tokens behind any places of a batch: of all titles of a text in one pass.

    Only these places go through the output head.

    Args:
        model: A causal LM of transformers, plain or with PEFT layers in it.
        embeds: [B, T, d] input embeddings, right-padded.
        rows, places: [n], the sequence and the place in it that each token follows.
        tokens: [n] int64.
        attention: ``attention_mask`` [B, 1, T, T] bool and ``position_ids`` [B, T], where causal attention is not
            exact.

    Returns:
        [n] log p, float32 (float64 where the model is); differentiable. Sequences do not depend on each other, nor on
        the padding.
    """
    inner = unwrapped(model)
    check_length(inner, embeds.shape[1])
    weight = inner.get_input_embeddings().weight
    embeds = embeds.to(weight.device, weight.dtype)

    def select(hidden: Tensor) -> Tensor:
        return hidden[rows.to(hidden.device), places.to(hidden.device)].unsqueeze(0)  # [1, n, d]

    with precise_head(model, embeds.shape[:2], select):
        given = {name: tensor.to(weight.device) for name, tensor in attention.items()}
        logits = model(inputs_embeds=embeds, **given, use_cache=False, return_dict=True).logits[0]
    logits = logits.to(at_least_float32(logits.dtype))
    return -functional.cross_entropy(logits, tokens.to(logits.device), reduction="none")


@torch.no_grad()
def generate_titles(
    model: nn.Module,
    prompt_embeds: Tensor,
    prompt_lengths: Tensor,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    before_titles: Callable[[], None] | None = None,
    attention: Mapping[str, Tensor] | None = None,
) -> list[np.ndarray]:
    """What the model writes behind each prompt, always taking the most likely token.

    This does not go through the model's ``generate``, which fills in what the model's own
    ``generation_config`` holds (sampling, repetition penalties, suppressed tokens, other stops).

    Args:
        model: As in ``score_titles``.
        prompt_embeds: [B, P, d] input embeddings, right-padded.
        prompt_lengths: [B], the number of real positions of each row, between 1 and P.
        stop_ids: Tokens that end a text; they are not part of it.
        max_new_tokens: The most tokens of a text, at least 1.
        before_titles, attention: As in ``score_titles``.

    Returns:
        B int64 arrays of at most ``max_new_tokens`` token ids, each what its prompt gives alone.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompts = CachedPrompts(model, prompt_embeds, prompt_lengths, max_new_tokens, attention=attention)
    if before_titles is not None:
        before_titles()
    logits = prompts.logits
    stops = torch.as_tensor(list(stop_ids), dtype=torch.int64, device=logits.device)
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    written: list[Tensor] = []
    while True:
        tokens = logits[:, -1].argmax(dim=-1)
        running = running & ~torch.isin(tokens, stops)
        written.append(tokens.masked_fill(~running, -1))
        if len(written) == max_new_tokens or not bool(running.any()):
            break
        depth = torch.arange(len(written))[None]
        sees = torch.ones(1, 1, len(written), dtype=torch.bool)
        logits = prompts.forward(
            tokens[:, None], depth[:, -1:], depth, sees, torch.zeros(1, 1, dtype=torch.int64)
        )
    return [row[row >= 0] for row in torch.stack(written, dim=1).cpu().numpy()]


class CachedPrompts:
    """Prompts that went through the model, with their keys and values, ready for tokens behind them.

    Args:
        model: see ``score_titles``; so are the next two.
        longest: the most tokens that will stand behind a prompt, the last of which is no input.
        token_ids: [w] the tokens whose logits are wanted; ``None``: all of the vocabulary.
        attention: see ``score_titles``.

    Attributes:
        lengths: [B].
        logits: [B, 1, V] those behind each prompt, or [B, 1, w].
    """

    logits: Tensor

    def __init__(
        self,
        model: nn.Module,
        embeds: Tensor,
        lengths: Tensor,
        longest: int,
        token_ids: Tensor | None = None,
        attention: Mapping[str, Tensor] | None = None,
    ) -> None:
        if embeds.dim() != 3 or lengths.shape != embeds.shape[:1] or not len(lengths):
            raise ValueError(
                f"prompt_embeds [B, P, d] and prompt_lengths [B] expected, got {list(embeds.shape)} and "
                f"{list(lengths.shape)}"
            )
        if not bool(((lengths >= 1) & (lengths <= embeds.shape[1])).all()):
            raise ValueError(
                f"prompt_lengths must lie between 1 and the prompts' width {embeds.shape[1]}, got "
                f"{lengths.tolist()}"
            )
        self._prepare(model, lengths, longest, token_ids)
        inner = unwrapped(model)
        embeds = embeds[:, : self._width].to(self._device, self._dtype)
        last = self.lengths[:, None] - 1
        own: dict[str, Any] = {}
        if attention:
            if self._chained:
                raise ValueError(
                    f"{type(_base(inner)).__name__} takes positions from a mask of padding alone, so parts of a text "
                    "cannot be hidden from others (history_ties: strict): set history_ties: order"
                )
            places = attention["position_ids"].to(self._device)
            mask = attention["attention_mask"][:, 0].to(self._device)
            own = {"attention_mask": self._as_model_wants(mask, places, places), "position_ids": places}
        with self._precise(embeds, last):
            self.logits = self._run(embeds, **own)
        if self._cache.get_seq_length() != self._width:
            raise ValueError(
                f"{type(inner).__name__} left {self._cache.get_seq_length()} of {self._width} positions in the cache: "
                "titles need a model that keeps the keys and values of its prompt (with gradient "
                "checkpointing, call model.eval() first)"
            )

    def _prepare(self, model: nn.Module, lengths: Tensor, longest: int, token_ids: Tensor | None) -> None:
        inner = unwrapped(model)
        _check_model(inner)
        check_length(inner, int(lengths.max()) + longest - 1)
        self._model = model
        self._chained = _reads_positions_from_mask(inner)
        self._cache_argument = "cache" if "cache" in _forward_arguments(inner) else "past_key_values"
        self._config = inner.config.get_text_config()
        self._embedding = inner.get_input_embeddings()
        self._device, self._dtype = self._embedding.weight.device, self._embedding.weight.dtype
        self.lengths = lengths.to(self._device)
        self._width = int(lengths.max())
        self._token_ids = None if token_ids is None else token_ids.to(self._device)
        # Told nothing of the architecture, it keeps all keys also of layers with a sliding window.
        self._cache = DynamicCache()

    def _precise(self, embeds: Tensor, places: Tensor) -> AbstractContextManager[None]:
        return precise_head(
            self._model, embeds.shape[:2], lambda hidden: at_places(hidden, places), self._token_ids
        )

    def kept(self) -> list[KeptPrompt]:
        """The keys and values of each prompt, without its padding, as :meth:`restored` takes them."""
        return [
            [
                (layer.keys[row, :, :size].clone(), layer.values[row, :, :size].clone())
                for layer in self._cache.layers
            ]
            for row, size in enumerate(self.lengths.tolist())
        ]

    @classmethod
    def restored(
        cls, model: nn.Module, kept: Sequence[KeptPrompt], longest: int, token_ids: Tensor | None = None
    ) -> CachedPrompts:
        """Prompts that went through the model earlier, whatever their batch was; they have no ``logits``.

        Args:
            model, longest, token_ids: as of the class.
            kept: B prompts of :meth:`kept`.
        """
        found = cls.__new__(cls)
        lengths = torch.tensor([prompt[0][0].shape[1] for prompt in kept])
        found._prepare(model, lengths, longest, token_ids)
        for layer in range(len(kept[0])):
            keys, values = (
                nn.utils.rnn.pad_sequence(
                    [prompt[layer][part].transpose(0, 1) for prompt in kept], batch_first=True
                ).transpose(1, 2)
                for part in (0, 1)
            )
            found._cache.update(keys, values, layer)
        return found

    def forward(self, tokens: Tensor, depth: Tensor, key_depth: Tensor, sees: Tensor, keep: Tensor) -> Tensor:
        """Logits behind ``tokens``, whose keys and values join the cache. All b are 1 (the same for each row) or B.

        Args:
            tokens: [b, q].
            depth: [b, q] the number of tokens between the prompt and each.
            key_depth: [b, k] the same for all tokens behind the prompt that are in the cache, these included.
            sees: [b, q, k] which of those each of ``tokens`` attends to; it sees all of its prompt.
            keep: [b, o] the places, among the q, whose logits are wanted.

        Returns:
            [B, o, V].
        """
        batch = len(self.lengths)
        tokens, depth, key_depth, sees, keep = (
            tensor.to(self._device).expand(batch, *tensor.shape[1:])
            for tensor in (tokens, depth, key_depth, sees, keep)
        )
        embeds = self._embedding(tokens).to(self._dtype)
        precise = self._precise(embeds, keep)
        places, key_places = self.lengths[:, None] + depth, self.lengths[:, None] + key_depth
        width = torch.arange(self._width, device=self._device).expand(batch, -1)
        real = width < self.lengths[:, None]
        if self._chained:  # the mask of padding [B, P + k]; positions count its ones
            behind = real.new_ones(batch, sees.shape[2])
            with precise:
                return self._run(embeds, attention_mask=torch.cat([real, behind], dim=1).long())
        mask = torch.cat([real[:, None].expand(-1, sees.shape[1], -1), sees], dim=2)  # [B, q, P + k]
        masks = self._as_model_wants(mask, places, torch.cat([width, key_places], dim=1))
        with precise:
            return self._run(embeds, attention_mask=masks, position_ids=places)

    def forget(self, size: int) -> None:
        """Takes the last ``size`` tokens out of the cache."""
        self._cache.crop(-size)

    def _run(self, embeds: Tensor, **arguments: Any) -> Tensor:
        arguments[self._cache_argument] = self._cache
        return self._model(inputs_embeds=embeds, use_cache=True, return_dict=True, **arguments).logits

    def _as_model_wants(self, mask: Tensor, places: Tensor, key_places: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask [B, q, keys] in four dimensions; one per kind of layer where a sliding window matters."""

        def four(mask: Tensor) -> Tensor:
            mask = mask[:, None]
            if self._config._attn_implementation == "sdpa":
                return mask
            closed = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device)
            return closed.masked_fill_(~mask, torch.finfo(self._dtype).min)

        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        slides = kinds is None or "sliding_attention" in kinds
        if window is None or not slides or int(places.max()) < window:
            return four(mask)
        near = mask & (key_places[:, None, :] > places[:, :, None] - window)
        if kinds is None:
            return four(near)
        return {"full_attention": four(mask), "sliding_attention": four(near)}


def takes_branches(model: nn.Module) -> bool:
    """Whether several texts can stand behind one prompt in one pass (:meth:`CachedPrompts.forward`)."""
    try:
        _check_model(unwrapped(model))
    except ValueError:
        return False
    return not _reads_positions_from_mask(unwrapped(model))


def _check_model(model: nn.Module) -> None:
    """Refuses what would ignore the mask or the positions, or cannot be rolled back."""
    name, config = type(_base(model)).__name__, model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"titles need an attention that takes any mask, but {name} uses {config._attn_implementation!r}: load "
            "it with attn_implementation='sdpa' or 'eager'"
        )
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"titles cannot be scored with {name}: its layers {sorted(others)} take no mask")
    takes_positions = "position_ids" in _forward_arguments(model) and not getattr(config, "alibi", False)
    if not takes_positions and not _reads_positions_from_mask(model):
        raise ValueError(
            f"titles cannot be scored with {name}: it takes no position_ids, and its positions do not follow from "
            "the mask of padding"
        )


def _base(model: nn.Module) -> PreTrainedModel:
    """The causal LM of transformers inside a ``PeftModel``, else ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward_arguments(model: nn.Module) -> Collection[str]:
    return inspect.signature(_base(model).forward).parameters.keys()


def _reads_positions_from_mask(model: nn.Module) -> bool:
    """Whether positions are linear biases (ALiBi) that count the ones of a two-dimensional mask of padding."""
    config = model.config.get_text_config()
    return config.model_type == "bloom" or (config.model_type == "falcon" and config.alibi)


def _log_normaliser(logits: Tensor) -> Tensor:
    """``[B, o, V] -> [B, o]``: log sum exp over the vocabulary, in at least float32."""
    step = max(1, LOGITS_AT_ONCE // (logits.shape[0] * logits.shape[2]))
    parts = [part.to(at_least_float32(part.dtype)).logsumexp(dim=-1) for part in logits.split(step, dim=1)]
    return torch.cat(parts, dim=1)


def _stacked(arrays: Sequence[np.ndarray], fill: int, device: str | torch.device) -> Tensor:
    """b arrays of integers as one [b, longest] int64 tensor, filled up with ``fill``."""
    stacked = np.full((len(arrays), max(map(len, arrays))), fill, dtype=np.int64)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(stacked).to(device)
