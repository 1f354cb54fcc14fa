"""What a model's result is compared with, on the same test samples: lens, past ratings or popularity, untrained LLM.

Every function returns columns for ``test_rows.npz``, in the order of the test samples: ``NAME_score`` in the ctr task,
``NAME_rank`` in the next-item task.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import set_color
from torch import Tensor
from tqdm import tqdm

from recbole_llm.data.dataset import HISTORY_END
from recbole_llm.data.prompts.ctr import PromptBuilder
from recbole_llm.data.prompts.next_item import TitlePromptBuilder
from recbole_llm.data.prompts.stream import StreamPrompts
from recbole_llm.evaluation.generation import generation_report, match_title
from recbole_llm.evaluation.ranking import target_ranks
from recbole_llm.experiment.assembly import cache_folder
from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.experiment.past_ratings import past_ratings_scores
from recbole_llm.lens.lens import Lens
from recbole_llm.trainer.score_cache import KeptScores
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.files import load_array, locked, save_array
from recbole_llm.utils.timing import stage

logger = logging.getLogger(__name__)

BATCH = 64


def reference_columns(parts: LLMAssembly) -> dict[str, np.ndarray]:
    """The columns of every reference that this run has; the time of each is added to ``parts.seconds``."""
    if parts.config["task"] == "ctr":
        references = {
            "past_ratings_score": lambda parts: past_ratings_scores(parts.train, parts.test_data._dataset),
            "lens_score": lens_scores,
            "zero_shot_score": untrained_scores,
        }
    elif parts.config["eval_mode"] in ("candidates", "full"):
        references = {
            "popularity_rank": popularity_ranks,
            "lens_rank": lens_ranks,
            "zero_shot_rank": untrained_ranks,
        }
    else:
        logger.info(
            "eval_mode: %s draws other negatives at every evaluation, so nothing can be compared on the same ones",
            parts.config["eval_mode"],
        )
        return {}
    columns = {}
    for name, compute in references.items():
        if (name.startswith("lens") and parts.lens is None) or (
            name.startswith("zero_shot") and not parts.config["zero_shot"]
        ):
            continue
        with stage(parts.seconds, name.rpartition("_")[0] + "_test"):
            columns[name] = compute(parts)
    return columns


# ---------------------------------------------------------------------- labelled samples


def lens_scores(parts: LLMAssembly, split: str = "test") -> np.ndarray:
    """Probability of "yes" by the lens alone for every sample of a split, ``[n]``."""
    lens, loader = cast(Lens, parts.lens), {"valid": parts.valid_data, "test": parts.test_data}[split]
    return torch.cat([lens.probability(interaction).cpu() for interaction, *_ in loader]).numpy()


def untrained_scores(parts: LLMAssembly) -> np.ndarray:
    """Probability of "yes" by the language model before any tuning for every test sample, ``[n]``."""
    batches = [batch[0] for batch in parts.test_data]
    digest = _digest(parts, str(parts.model.answer_ids))
    if parts.config["layout"] == "stream":  # one chunk may be read for different targets and labels
        digest.update(str(cast(StreamPrompts, parts.prompts).likes).encode())
        _add(digest, [interaction[HISTORY_END].numpy() for interaction in batches])
    prompts = cast(PromptBuilder | StreamPrompts, parts.prompts)  # those of the ctr task
    for interaction in batches:
        _add(digest, prompts.encode(interaction).input_ids)
    return _cached(
        parts,
        digest,
        batches,
        lambda batch: parts.model.score_within_memory(lambda: parts.model.predict_untrained(batch)),
    )


# ---------------------------------------------------------------------- ranking


def popularity_ranks(parts: LLMAssembly) -> np.ndarray:
    """Rank of every test sample's target by the number of training samples of each item, int64 ``[n]``."""
    counts = torch.from_numpy(parts.item_counts).double()
    counts[0] = -torch.inf
    return _ranks(parts, lambda interaction: counts.expand(len(interaction), -1))


@torch.no_grad()
def lens_ranks(parts: LLMAssembly) -> np.ndarray:
    """Rank of every test sample's target by the lens alone, int64 ``[n]``."""
    lens = cast(Lens, parts.lens)
    return _ranks(parts, lambda interaction: lens.score_items(interaction).double().cpu())


def untrained_ranks(parts: LLMAssembly) -> np.ndarray:
    """Rank of every test sample's target by the language model before any tuning, int64 ``[n]``."""
    model, prompts = parts.model, cast(TitlePromptBuilder, parts.prompts)
    digest = _digest(parts, "ranks")
    batches = [interaction for interaction, _ in _test_batches(parts, BATCH)]
    for interaction in batches:
        _add(digest, prompts.encode(interaction, slots=False).input_ids)
    _add(digest, prompts.answers)
    digest.update(str([parts.config[key] for key in ("eval_mode", "two_stage", "rank_history")]).encode())
    ranked = parts.dataset.ranked_items.tobytes()
    digest.update(parts.candidates["test"].sha256.encode() if parts.candidates else ranked)
    if not parts.candidates and parts.lens is not None:
        digest.update(parts.lens.identity.encode())

    def ranks(batch: tuple[Interaction, Tensor | None]) -> Tensor:
        interaction, items = batch
        if items is None:
            scores = model.full_sort_predict(interaction, adapted=False).cpu()
            scores[parts.dataset.not_ranked(interaction)] = -torch.inf
        else:
            scores = torch.full((len(interaction), parts.dataset.item_num), -torch.inf, dtype=torch.float64)
            listed = model.score_items(interaction, items.tolist(), adapted=False)
            scores.scatter_(1, items, torch.stack(listed).cpu())
        return target_ranks(scores, interaction[parts.dataset.iid_field])

    batches = list(_test_batches(parts, parts.config["scoring_batch_size"]))
    found = _cached(parts, digest, batches, lambda batch: model.score_within_memory(lambda: ranks(batch)))
    return found.astype(np.int64)


def _test_batches(parts: LLMAssembly, size: int) -> Iterator[tuple[Interaction, Tensor | None]]:
    """The test samples in pieces of ``size``, each with its stored candidates ``[b, C]`` or ``None`` (all items)."""
    candidates = parts.candidates["test"] if parts.candidates else None
    for start in range(0, len(parts.test), size):
        interaction = parts.test[np.arange(start, min(start + size, len(parts.test)))]
        items = None
        if candidates is not None:
            items = torch.from_numpy(candidates.of(interaction[ROW_ID].numpy()))
        yield interaction, items


def _ranks(parts: LLMAssembly, score: Callable[[Interaction], Tensor]) -> np.ndarray:
    """Ranks of the targets among the candidates by ``score(interaction)``, ``[b, n_items]``."""
    ranks = []
    for interaction, items in _test_batches(parts, BATCH):
        scores = score(interaction)
        if items is not None:
            listed = torch.full_like(scores, -torch.inf)
            scores = listed.scatter(1, items, scores.gather(1, items))
        else:
            scores = scores.clone()  # popularity's is one row, expanded
            scores[parts.dataset.not_ranked(interaction)] = -torch.inf
        ranks.append(target_ranks(scores, interaction[parts.dataset.iid_field]))
    return torch.cat(ranks).numpy()


def written_answers(parts: LLMAssembly) -> tuple[np.ndarray, dict]:
    """What the tuned model writes for every test sample, and how much of it is a candidate's title.

    Returns:
        The texts ``[n]``, and the report of :func:`recbole_llm.evaluation.generation.generation_report`.
    """
    prompts = cast(TitlePromptBuilder, parts.prompts)
    texts, matches, targets, users = [], [], [], []
    size = parts.config["micro_batch_size"]
    for interaction, items in _progress(parts, list(_test_batches(parts, size)), "Generate   "):
        found = parts.model.generate(interaction, parts.config["max_new_tokens"])
        for text, candidates in zip(found, items.tolist(), strict=True):
            index = match_title(text, [prompts.answer_text(item).strip() for item in candidates])
            matches.append(-1 if index is None else candidates[index])
        texts += found
        targets.append(interaction[parts.dataset.iid_field].numpy())
        users.append(interaction[parts.dataset.uid_field].numpy())
    report = generation_report(
        np.array(matches),
        np.concatenate(targets),
        np.concatenate(users),
        n=parts.config["bootstrap_samples"],
        seed=parts.config["seed"],
    )
    return np.array(texts), report


# ---------------------------------------------------------------------- the untrained model's cache


def _digest(parts: LLMAssembly, what: str) -> Any:
    return hashlib.sha256(f"{parts.backbone.sha256} {parts.backbone.dtype} {what}".encode())


def _add(digest: Any, token_ids: list[np.ndarray]) -> None:
    for ids in token_ids:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")


def _progress(parts: LLMAssembly, batches: list, what: str = "Zero-shot  ") -> tqdm:
    parts.model.eval()
    show = parts.config["show_progress"]
    return tqdm(batches, ncols=100, desc=set_color(what, "pink"), disable=not show)


@torch.no_grad()
def _cached(parts: LLMAssembly, digest, batches: list, score: Callable[[Any], Tensor]) -> np.ndarray:
    """What ``score`` gives for all batches, cached by weights and prompts: every run on the same samples needs it."""
    path = cache_folder(parts.config) / "zero_shot" / f"{digest.hexdigest()[:32]}.npy"
    with locked(path):
        if (kept_before := load_array(path)) is not None:
            logger.info("zero-shot scores from the cache: %s", path)
            return kept_before
        partial_file = path.with_suffix(".safetensors")
        identity = f"{digest.hexdigest()}, {len(batches)} batches"
        every = parts.config["checkpoint_seconds"]
        with KeptScores(partial_file, identity, parts.model.counts, every) as kept:
            found = [
                kept(str(number), partial(score, batch))
                for number, batch in enumerate(_progress(parts, batches))
            ]
        parts.seconds["zero_shot_test"] = parts.seconds.get("zero_shot_test", 0.0) + kept.seconds_before
        values = torch.cat(found).double().numpy()
        save_array(path, values)
        partial_file.unlink(missing_ok=True)
    return values
