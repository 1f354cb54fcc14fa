"""The samples of a run: splits, ``few_shot``, ``eval_rows``, stored candidates, and the loaders that evaluate them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
from recbole.data.dataloader import AbstractDataLoader, NegSampleEvalDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.sampler import RepeatableSampler
from recbole.utils import EvaluatorType
from torch import Tensor

from recbole_llm.config.configurator import Config
from recbole_llm.data.candidates import CandidateSet, draw_candidates, most_negatives
from recbole_llm.data.create import create_dataset
from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.loading import build_splits, draw_rows
from recbole_llm.data.ranking_loaders import CandidateDataLoader, RankedItemsDataLoader
from recbole_llm.data.retriever import CategoryRetriever, SemanticRetriever
from recbole_llm.data.streams import draw_by_user
from recbole_llm.evaluation.bootstrap import MIN_USERS
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
    sizes: dict[str, int | None]


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
    sizes: dict[str, int | None] = {
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
    if config["lens_rows"] == "earlier":
        full_train = full_train.subset(newest(full_train))
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


def newest(samples: HistoryDataset) -> np.ndarray:
    """With ``lens_rows: earlier``, what of the training samples is the LLM's: the newest fifth, ascending indices."""
    order = np.argsort(samples.inter_feat[samples.time_field].numpy(), kind="stable")
    return np.sort(order[len(order) - len(order) // 5 :])


def bounded(config: Config, samples: HistoryDataset, purpose: str) -> HistoryDataset:
    """``samples``, or the seeded draw of ``eval_rows`` of them; ``purpose`` is ``valid`` or ``test``."""
    size = config["eval_rows"]
    if purpose == "valid" and config["valid_rows"] is not None:
        size = config["valid_rows"]
    if not size or size >= len(samples):
        return samples
    users = samples.inter_feat[samples.uid_field].numpy()
    if config["eval_rows_by"] == "user":
        drawn = draw_by_user(users, size, config["eval_seed"], purpose)
    else:
        drawn = draw_rows(len(samples), size, config["eval_seed"], purpose)
    found = len(np.unique(users[drawn]))
    if purpose == "test" and found < MIN_USERS <= len(np.unique(users)):
        logger.warning(
            "eval_rows: %d draws test samples of %d users (eval_rows_by: %s), and intervals need at least %d; a larger "
            "eval_rows, or eval_rows_by: sample, has more of them",
            *(size, found, config["eval_rows_by"], MIN_USERS),
        )
    return samples.subset(drawn)


def item_counts(train: HistoryDataset) -> np.ndarray:
    """How often each item is the target of a training sample, int64 ``[n_items]``."""
    return np.bincount(train.inter_feat[train.iid_field].numpy(), minlength=train.item_num)


def set_id_retrieval(
    config: Config, dataset: HistoryDataset, vectors: Callable[[], np.ndarray | None]
) -> None:
    """Let ``id_retrieval`` choose the ID histories; ``vectors`` gives item vectors if they are needed."""
    how, k = config["id_retrieval"], config["id_history_length"]
    if how == "semantic":
        dataset.set_id_retriever(SemanticRetriever(dataset.history, k, cast(np.ndarray, vectors())))
    elif how == "category":
        dataset.set_id_retriever(CategoryRetriever(dataset.history, k, dataset.item_text().genre_lists))


# ---------------------------------------------------------------------- evaluation


def possible_negatives(config: Config, splits: Splits) -> int:
    """``num_negatives``, or as many as every sample of the data can have: one number for all models and samples.

    Where no candidates are stored, that is ``num_negatives``.

    Raises:
        ValueError: if a sample can have none.
    """
    wanted = config["num_negatives"]
    if config["task"] != "next_item" or config["eval_mode"] != "candidates":
        return wanted
    drawable = splits.dataset.ranked_items
    if config["negatives"] == "popularity":
        drawable = drawable & (item_counts(splits.full_train) > 0)
    found = [
        most_negatives(samples, drawable, wanted)
        for samples in (splits.full_train, splits.full_valid, splits.full_test)
    ]
    most, user = min(found, key=lambda pair: pair[0])
    if user is None:
        return wanted
    dataset = splits.dataset
    why = (
        f"of the {int(drawable.sum()):,} items that may be drawn, user {dataset.id2token(dataset.uid_field, user)} "
        f"has met {f'all but {most}' if most else 'all'}"
    )
    if not most:
        raise ValueError(
            f"candidates of {dataset.dataset_name}: {why}, so nothing is left to rank the target among; set "
            "eval_mode: full"
        )
    logger.warning("num_negatives: %d negatives per sample instead of %d: %s", most, wanted, why)
    dataset.note_negatives({"asked": wanted, "used": most, "reason": why})
    return most


def with_possible_topk(config: Config, dataset: Dataset) -> Config:
    """What a trainer evaluates with: ``topk`` and ``valid_metric`` reach no further than the items.

    Args:
        config: the run's.
        dataset: a built dataset.
    """
    if config["eval_type"] != EvaluatorType.RANKING:
        return config
    most = ranked_items(dataset)
    asked = config["topk"] if isinstance(config["topk"], list) else [config["topk"]]
    used = list(dict.fromkeys(min(k, most) for k in asked))
    if used == asked:
        return config
    name, at, k = config["valid_metric"].partition("@")
    metric = f"{name}@{min(int(k), most)}" if at else name
    logger.warning(
        "topk: %s becomes %s, as %s has %d items to rank%s",
        asked, used, dataset.dataset_name, most,
        f"; valid_metric: {metric}" if metric != config["valid_metric"] else "",
    )  # fmt: skip
    return config.override(topk=used, valid_metric=metric)


def ranked_items(dataset: Dataset) -> int:
    """Number of items that targets may be ranked among: those of ``candidate_items``, else all."""
    return int(dataset.ranked_items.sum()) if isinstance(dataset, HistoryDataset) else dataset.item_num - 1


def draw_candidate_sets(
    config: Config,
    evaluated: dict[str, HistoryDataset],
    full_train: HistoryDataset,
    num_negatives: int,
    *,
    item_scores: Callable[[Interaction], Tensor] | None = None,
    scores_identity: str | None = None,
) -> dict[str, CandidateSet] | None:
    """The stored candidates of the samples of each split, or ``None`` where ``eval_mode`` has none.

    Args:
        evaluated: samples by the name of their split.
        full_train: all training samples, whose items are counted.
        num_negatives: beside the target, as :func:`possible_negatives` gives it.
        item_scores, scores_identity: of a lens, for ``negatives: hard``.
    """
    if config["task"] != "next_item" or config["eval_mode"] != "candidates":
        return None
    counts = item_counts(full_train)
    return {
        name: draw_candidates(
            samples,
            num_negatives=num_negatives,
            kind=config["negatives"],
            seed=config["candidate_seed"],
            purpose=name,
            item_counts=counts,
            item_scores=item_scores,
            scores_identity=scores_identity,
            allowed=samples.ranked_items,
            cache_dir=cache_folder(config),
        )
        for name, samples in evaluated.items()
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
    if not dataset.ranked_items[1:].all():
        logger.warning(
            "eval_mode: %s is RecBole's: negatives are drawn from all %s items, %s of which nobody met "
            "(candidate_items does not apply); eval_mode: candidates leaves those out",
            config["eval_mode"], f"{dataset.item_num - 1:,}", f"{int((~dataset.ranked_items[1:]).sum()):,}",
        )  # fmt: skip
    sampler = RepeatableSampler(["valid", "test"], dataset, distribution).set_phase(split)
    return NegSampleEvalDataLoader(config, samples, sampler, shuffle=False)
