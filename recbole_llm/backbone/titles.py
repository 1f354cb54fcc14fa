r"""The likelihood of titles behind a prompt, by a causal language model.

An answer is the tokens of a title and of the line break that ends it. What the prompt makes of it is

    log p(answer | prompt) = sum_t log p(answer_t | prompt, answer_<t),

and the candidates' answers share much: the prompt, and among each other their beginnings. So the prompt goes
through the model once and leaves its keys and values in a cache; the answers hang behind it as a tree, each
node one token, and a whole piece of the tree goes through the model as if it were one text
(:class:`~recbole_llm.backbone.title_trie.TitleTrie`):

    " Heat\n"           prompt -+- 0 " Heat" -- 1 "\n"
    " Toy Story\n"              +- 2 " Toy" --- 3 " Story" -+- 4 "\n"
    " Toy Story 2\n"                                        +- 5 " 2" -- 6 "\n"         computed: 0, 2, 3, 5

A node sees the real tokens of the prompt and its own ancestors (a mask), and stands where it would stand in
its title (position = prompt length + depth), which makes every number that of the title written out behind
the prompt, up to rounding. Leaves predict nothing and are not computed.

Prompts are padded on the right, as in ``answers``: no real token sees the padding, and positions count from
the first token.

Log-probabilities are computed in float32 over the whole vocabulary (a plain output head is multiplied in
float32 too), in float64 where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.cached_prompts import CachedPrompts, reads_positions_from_mask
from recbole_llm.backbone.head import at_least_float32, at_places, precise_head, unwrapped
from recbole_llm.backbone.title_trie import TitleTrie, TriePiece
from recbole_llm.utils.causal_lm import check_length

# Numbers of logits that are exponentiated at a time: 256 MB in float32.
LOGITS_AT_ONCE = 1 << 26


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
    chained = reads_positions_from_mask(unwrapped(model))
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
