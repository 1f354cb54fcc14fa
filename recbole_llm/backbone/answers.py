"""Reading answers and vectors from a causal language model.

Prompts are padded on the right:

    input_ids   [[12, 7, 99, 31],        lengths  [4,
                 [12, 5,  0,  0]]                  2]

Attention is causal, so no real token ever sees the padding behind it, and positions count from the first
token. The hidden state at ``lengths - 1`` is therefore the one the prompt has alone: no attention mask is
needed (which also keeps the fast causal kernels), and a score does not depend on what else is in the batch.

Only that one position of each prompt goes through the output head, and only the rows of the head that belong to
the answer words are used: [B, d] x [d, words] in float32, instead of [B, T, vocabulary] in the model's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from recbole_llm.backbone.head import precise_head, replaced_head, unwrapped
from recbole_llm.utils.causal_lm import check_length

logger = logging.getLogger(__name__)


def answer_token_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], behind: str | Sequence[int] | np.ndarray = ""
) -> list[int]:
    """The token each answer begins with, as the model would write it straight behind the prompt.

    A word is tokenised behind the end of the prompt, not alone: SentencePiece (Llama 2, Vicuna) writes a blank before
    any text that stands alone, so " Yes" and " No" alone both begin with the token of a blank, where behind
    "Answer:" they are one token each. The answer's token is the first one behind the longest common beginning of
    ``tokenize(behind)`` and ``tokenize(behind + word)``.

    Args:
        words: Answers with the blank that stands before them, such as ``[" Yes", " No"]``.
        behind: The end of the prompt, such as its last line: as text, or as token ids (of a chat template).

    Returns:
        One token id per word. A word of several tokens is represented by its first (logged).

    Raises:
        ValueError: A word is empty, or two words begin with the same token and so cannot be told apart.
    """

    def tokens_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    before = behind if isinstance(behind, str) else tokenizer.decode(behind)
    lead = tokens_of(before) if before else []
    owners: dict[int, str] = {}
    for word in words:
        whole = tokens_of(before + word) if word.strip() else []
        shared = next((i for i, (a, b) in enumerate(zip(lead, whole, strict=False)) if a != b), len(lead))
        ids = whole[shared:]
        if not ids:
            raise ValueError(f"answer word {word!r} is empty: give a word the tokenizer can write")
        first = int(ids[0])
        if first in owners:
            token = tokenizer.convert_ids_to_tokens(first)
            raise ValueError(
                f"answer words {owners[first]!r} and {word!r} begin with the same token {token!r} (id "
                f"{first}) of this backbone's tokenizer, so a logit cannot tell them apart: use other words"
            )
        tokens = tokenizer.convert_ids_to_tokens(ids)
        if shared < len(lead):
            logger.warning(
                "the tokenizer joins the end of the prompt %r and the answer word %r into one token %r; let the "
                "question end with a character that stays apart, and the answer begin with the blank",
                *(before[-20:], word, tokens[0]),
            )
        elif len(ids) > 1:
            logger.info("answer word %r is %d tokens %s: its first one is read", word, len(ids), tokens)
        owners[first] = word
    return list(owners)


def pad_right(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Puts token sequences of different lengths into one right-padded batch.

    Args:
        rows: B sequences of token ids, none empty.
        pad_id: The token that fills up; its value never changes a result.

    Returns:
        ``input_ids`` [B, T] int64 and ``lengths`` [B] int64.
    """
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    if len(rows) == 0 or lengths.min() == 0:
        what = "no sequence given" if len(rows) == 0 else f"sequence {lengths.argmin()} is empty"
        raise ValueError(f"cannot pad: {what}")
    batch = np.full((len(rows), int(lengths.max())), pad_id, dtype=np.int64)
    for filled, row in zip(batch, rows, strict=True):
        filled[: len(row)] = row
    return torch.from_numpy(batch), torch.from_numpy(lengths)


def answer_logits(model: nn.Module, inputs: Tensor, lengths: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Logits of the answer words at the position behind each prompt.

    Args:
        model: A causal LM of transformers, plain or with PEFT layers in it (also a ``PeftModel``).
        inputs: token ids [B, T] or input embeddings [B, T, d], right-padded.
        lengths: [B], the number of real tokens of each row, between 1 and T.
        token_ids: The answers' tokens, from ``answer_token_ids``.

    Returns:
        [B, len(token_ids)] float32; differentiable. Rows do not depend on each other, nor on the padding.
    """
    embedded = inputs.is_floating_point()
    if inputs.dim() != 2 + embedded or lengths.shape != inputs.shape[:1]:
        raise ValueError(
            "ids [B, T] or embeddings [B, T, d] and lengths [B] expected, got "
            f"{list(inputs.shape)}, {list(lengths.shape)}"
        )
    if lengths.device.type == "cpu" and not bool(((lengths >= 1) & (lengths <= inputs.shape[1])).all()):
        raise ValueError(
            f"lengths must lie between 1 and the batch's width {inputs.shape[1]}, got {lengths.tolist()}"
        )
    rows = torch.arange(len(lengths), device=lengths.device)
    return logits_at(model, inputs, rows, lengths - 1, token_ids)


def logits_at(
    model: nn.Module,
    inputs: Tensor,
    rows: Tensor,
    places: Tensor,
    token_ids: Sequence[int],
    **attention: Tensor,
) -> Tensor:
    """Logits of the answer words behind some tokens of a batch: any number of each sequence.

    Args:
        model: as of :func:`answer_logits`.
        inputs: token ids [B, T] or input embeddings [B, T, d], right-padded.
        rows, places: [n], the sequence and the token in it that each answer follows.
        token_ids: The answers' tokens.
        attention: ``attention_mask`` [B, 1, T, T] bool and ``position_ids`` [B, T], where causal attention is not
            exact.

    Returns:
        [n, len(token_ids)] float32; differentiable.
    """
    inner = unwrapped(model)
    check_length(inner, inputs.shape[1])
    device = inner.get_input_embeddings().weight.device
    inputs = inputs.to(device)
    answers = torch.as_tensor(list(token_ids), device=device)

    def select(hidden: Tensor) -> Tensor:
        return hidden[rows.to(hidden.device), places.to(hidden.device)].unsqueeze(1)  # [n, 1, d]

    with precise_head(model, inputs.shape[:2], select, answers):
        given = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
        given |= {name: tensor.to(device) for name, tensor in attention.items()}
        return model(**given, use_cache=False, return_dict=True).logits[:, 0].float()


@torch.no_grad()
def mean_pooled_vectors(
    model: nn.Module,
    token_ids: Sequence[np.ndarray],
    *,
    batch_tokens: int = 4096,
) -> np.ndarray:
    """One vector per text: the mean, over its tokens, of the last hidden states (after the final norm).

    Args:
        model: A causal LM.
        token_ids: n token sequences, none empty.
        batch_tokens: Texts of similar length are batched until this many tokens, padding included.

    Returns:
        [n, d] float32 in the order given; rows do not depend on what else was in their batch.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(
            "cannot embed: " + ("no text given" if len(lengths) == 0 else f"text {lengths.argmin()} is empty")
        )
    device = model.get_input_embeddings().weight.device
    captured: list[Tensor] = []

    def gather(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden[:, :1]  # the head's answer is not wanted: let it cost nothing

    vectors = np.empty((len(lengths), 0), dtype=np.float32)
    # The longest first: running out of memory shows at once, not at the end.
    order = np.argsort(-lengths, kind="stable")
    with replaced_head(model, gather), tqdm(total=len(order), desc="text vectors") as bar:
        start = 0
        while start < len(order):
            size = max(1, batch_tokens // int(lengths[order[start]]))
            batch = order[start : start + size]
            input_ids, real = pad_right([token_ids[i] for i in batch], 0)
            model(input_ids=input_ids.to(device), use_cache=False, return_dict=True)
            hidden = captured.pop().float()  # [b, T, d]
            is_token = torch.arange(hidden.shape[1])[None, :] < real[:, None]
            hidden = hidden.masked_fill(~is_token.to(hidden.device)[..., None], 0.0)
            pooled = (hidden.sum(dim=1) / real.to(hidden.device)[:, None]).cpu().numpy()
            if start == 0:
                vectors = np.empty((len(order), pooled.shape[1]), dtype=np.float32)
            vectors[batch] = pooled
            start += len(batch)
            bar.update(len(batch))
    return vectors
