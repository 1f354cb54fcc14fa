"""The samples of a run: splits, ``few_shot``, ``eval_rows``, stored candidates, and the loaders that evaluate them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from recbole.data.dataloader import AbstractDataLoader, NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.sampler import RepeatableSampler
from torch import Tensor

from recbole_llm.config.configurator import Config
from recbole_llm.data.candidates import (
    CandidateDataLoader,
    CandidateSet,
    RankedItemsDataLoader,
    draw_candidates,
)
from recbole_llm.data.create import create_dataset
from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.loading import build_splits, draw_rows
from recbole_llm.data.retriever import CategoryRetriever, SemanticRetriever
from recbole_llm.data.streams import draw_by_user
from recbole_llm.experiment.assembly import cache_folder, is_default_count

logger = logging.getLogger(__name__)


@dataclass
class Splits:
    """The samples of a run.

    Attributes:
        full_train, full_valid, full_test: all samples of the splits.
        train, valid, test: what ``few_shot`` (where the model learns from these samples) and ``eval_rows`` leave.
        sizes: numbers of samples: ``all``, ``train``, ``valid``, ``test`` before, ``few_shot``, ``valid_used`` and
            ``test_used`` after.
    """

    dataset: HistoryDataset
    full_train: HistoryDataset
    full_valid: HistoryDataset
    full_test: HistoryDataset
    train: HistoryDataset
    valid: HistoryDataset
    test: HistoryDataset
    sizes: dict[str, int]


def prepare_splits(config: Config) -> Splits:
    """Read the dataset, split it, and draw ``few_shot`` and ``eval_rows``."""
    dataset = create_dataset(config)
    return split(config, dataset)


def split(config: Config, dataset: HistoryDataset) -> Splits:
    """Split a dataset that was read, and draw ``few_shot`` and ``eval_rows``."""
    full_train, full_valid, full_test = build_splits(dataset)
    by_few_shot = config.spec.is_llm or config["train_rows"] == "few_shot"
    train = few_shot_samples(config, full_train) if by_few_shot else full_train
    valid, test = bounded(config, full_valid, "valid"), bounded(config, full_test, "test")
    if (
        config["layout"] == "stream" and config["task"] == "ctr"
    ):  # samples of one chunk in one evaluation batch
        valid, test = (
            samples.subset(np.argsort(samples.inter_feat[HISTORY_END].numpy())) for samples in (valid, test)
        )
    sizes = {
        "all": len(full_train) + len(full_valid) + len(full_test),
        "train": len(full_train),
        "valid": len(full_valid),
        "test": len(full_test),
        "few_shot": len(train),
        "valid_used": len(valid),
        "test_used": len(test),
    }
    return Splits(dataset, full_train, full_valid, full_test, train, valid, test, sizes)


def few_shot_samples(config: Config, full_train: HistoryDataset) -> HistoryDataset:
    """The training samples that ``few_shot`` draws, once per seed; a default is capped at the size of the data.

    Raises:
        ValueError: if the user asks for more samples than there are.
    """
    few_shot = config["few_shot"]
    if is_default_count(config, "few_shot") and few_shot > len(full_train):
        logger.info("few_shot: all %d training samples; the default is %d", len(full_train), few_shot)
        few_shot = None
    if few_shot == 0:
        if not config.spec.is_llm:
            raise ValueError(
                f"few_shot: 0 leaves {config['model']} nothing to learn from; set train_rows: all"
            )
        return full_train.subset(np.array([], dtype=np.int64))
    if config["few_shot_by"] == "user" and few_shot is not None:
        users = full_train.inter_feat[full_train.uid_field].numpy()
        return full_train.subset(draw_by_user(users, few_shot, config["seed"]))
    return full_train.subset(draw_rows(len(full_train), few_shot, config["seed"], "few_shot"))


def bounded(config: Config, samples: HistoryDataset, purpose: str) -> HistoryDataset:
    """``samples``, or the seeded draw of ``eval_rows`` of them; ``purpose`` is ``valid`` or ``test``."""
    if config["eval_rows"] and config["eval_rows"] < len(samples):
        drawn = draw_rows(len(samples), config["eval_rows"], config["eval_seed"], purpose)
        return samples.subset(drawn)
    return samples


def item_counts(train: HistoryDataset) -> np.ndarray:
    """How often each item is the target of a training sample, int64 ``[n_items]``."""
    return np.bincount(train.inter_feat[train.iid_field].numpy(), minlength=train.item_num)


def set_id_retrieval(
    config: Config, dataset: HistoryDataset, vectors: Callable[[], np.ndarray | None]
) -> None:
    """Let ``id_retrieval`` choose the ID histories; ``vectors`` gives item vectors if they are needed."""
    how, k = config["id_retrieval"], config["id_history_length"]
    if how == "semantic":
        dataset.set_id_retriever(SemanticRetriever(dataset.history, k, vectors()))
    elif how == "category":
        dataset.set_id_retriever(CategoryRetriever(dataset.history, k, dataset.item_text().genre_lists))


# ---------------------------------------------------------------------- evaluation


def draw_candidate_sets(
    config: Config,
    splits: dict[str, HistoryDataset],
    full_train: HistoryDataset,
    *,
    item_scores: Callable[[Interaction], Tensor] | None = None,
    scores_identity: str | None = None,
) -> dict[str, CandidateSet] | None:
    """The stored candidates of the samples of each split, or ``None`` where ``eval_mode`` has none.

    Args:
        splits: samples by the name of their split.
        full_train: all training samples, whose items are counted.
        item_scores, scores_identity: of a lens, for ``negatives: hard``.
    """
    if config["task"] != "next_item" or config["eval_mode"] != "candidates":
        return None
    counts = item_counts(full_train)
    return {
        name: draw_candidates(
            samples,
            num_negatives=config["num_negatives"],
            kind=config["negatives"],
            seed=config["candidate_seed"],
            purpose=name,
            item_counts=counts,
            item_scores=item_scores,
            scores_identity=scores_identity,
            allowed=samples.ranked_items,
            cache_dir=cache_folder(config),
        )
        for name, samples in splits.items()
    }


def eval_loader(
    config: Config,
    dataset: HistoryDataset,
    samples: HistoryDataset,
    candidates: dict[str, CandidateSet] | None,
    split: str,
) -> AbstractDataLoader:
    """The loader that RecBole's Trainer evaluates ``split`` (``valid`` or ``test``) with."""
    if config["task"] == "ctr":
        return NegSampleEvalDataLoader(config, samples, None, shuffle=False)
    if candidates is not None:
        return CandidateDataLoader(config, samples, candidates[split])
    if config["eval_mode"] == "full":
        return RankedItemsDataLoader(config, samples)
    distribution = {"uni": "uniform", "pop": "popularity"}[config["eval_mode"][:3]]
    sampler = RepeatableSampler(["valid", "test"], dataset, distribution).set_phase(split)
    return NegSampleEvalDataLoader(config, samples, sampler, shuffle=False)
