"""Conventional models, RecBole's own and the built-in ones, on the samples and candidates of the LLM recommenders.

With ``task: ctr`` every model runs on the samples of :class:`recbole_llm.data.dataset.CTRDataset` (one that learns
pairs of items, on the liked ones), with ``task: next_item`` on those of
:class:`recbole_llm.data.next_item.NextItemDataset`, and ranks the same stored candidates. Without a task it follows
RecBole's own protocol.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data import create_samplers, data_preparation
from recbole.data.dataset import Dataset
from recbole.data.utils import get_dataloader
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import EvaluatorType, InputType, get_trainer, init_seed

from recbole_llm.backbone.loader import Backbone
from recbole_llm.config.configurator import Config
from recbole_llm.config.model_spec import class_for, spec_of
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.create import create_dataset
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.prompts.lines import item_token_ids, sha256_of
from recbole_llm.evaluation.collector import RowCollector
from recbole_llm.experiment.assembly import (
    Assembly,
    backbone_of,
    cache_folder,
    configuration_hash,
    described,
    item_vectors,
)
from recbole_llm.experiment.base import Experiment
from recbole_llm.experiment.result import Ingredients
from recbole_llm.experiment.splits import (
    Splits,
    draw_candidate_sets,
    eval_loader,
    possible_negatives,
    set_id_retrieval,
    split,
    with_possible_topk,
)
from recbole_llm.trainer.checkpoint import check_origin, load_checkpoint
from recbole_llm.trainer.conventional_trainer import EpochTraining
from recbole_llm.utils.run_files import BEST_FILE, LAST_FILE
from recbole_llm.utils.timing import stage

logger = logging.getLogger(__name__)

RESUMED = ("configuration", "data", "titles")
"""What an interrupted training must have in common with its continuation, by the names of its identities."""
FEW_STEPS = 10
"""Optimizer steps of an epoch below which ``train_rows: few_shot`` warns: batch sizes are made for all labels."""


class ConventionalExperiment(Experiment):
    """Training and evaluation by RecBole's own trainer."""

    def __init__(self, config: Config, folder: Path) -> None:
        parts = self.assemble(config)
        config = parts.trainer_config.override(checkpoint_dir=str(folder))  # where RecBole's trainer saves
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, parts.model)
        trainer.eval_collector = RowCollector(config)  # RecBole's fails on metrics that read counts
        super().__init__(parts, trainer, folder)
        self.keeps_rows = is_labelled(config) or config["task"] == "next_item"
        if config["epochs"] and not config["eval_step"]:
            logger.warning(
                "%s: eval_step: 0, so nothing is validated or stopped early: all %d epochs are trained, and the last "
                "one is tested; in a comparison, give eval_step to single models ('RecLoRA eval_step=0')",
                config["model"],
                config["epochs"],
            )
        steps = len(parts.train_data)
        if config["train_rows"] == "few_shot" and config["epochs"] and steps < FEW_STEPS:
            logger.warning(
                "%s: train_batch_size: %d makes %d optimizer steps an epoch of %s labels, at most %d in all; a smaller "
                "one may learn much more from so few labels",
                *(config["model"], config["train_batch_size"], steps, f"{len(parts.train):,}"),
                steps * config["epochs"],
            )
        self.training = EpochTraining(
            trainer,
            parts.train_data,
            folder / LAST_FILE,
            {name: parts.identities[name] for name in RESUMED if name in parts.identities},
            how_to_resume=f"repeat the command with --resume={folder}",
        )

    def resume(self) -> None:
        """Continue after the last validated epoch."""
        self.training.load()
        self.parts.seconds["fit"] = self.training.seconds

    def fit(self) -> None:
        """Train by RecBole's trainer; the best epoch's weights are kept in ``best.safetensors``, too."""
        show = self.config["show_progress"]
        with stage(self.parts.seconds, "fit"):
            self.training.fit(self.parts.valid_data, show_progress=show)
            self.valid = self.training.valid
            if not self.config["epochs"]:  # validated as it is
                self.valid = self.trainer.evaluate(
                    self.parts.valid_data, load_best_model=False, show_progress=show
                )
        self.reads_best = self.training.pickles
        self.training.save_best(self.folder / BEST_FILE, self.parts.identities)

    def counts(self) -> dict[str, int | None]:
        return self.parts.sizes

    def extra(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.parts.model.parameters() if p.requires_grad)
        return {"identities": self.parts.identities, "trained_parameters": {"model": trained}}

    # ------------------------------------------------------------------ assembly

    @classmethod
    def describe(cls, parts: Assembly) -> str:
        config = parts.config
        lines = [f"dry run: {config['model']} on {config['dataset']}", f"device: {config['device']}"]
        return "\n".join([*lines, f"samples: {parts.sizes}", str(parts.model)])

    @classmethod
    def load_trained(cls, parts: Assembly, folder: Path) -> None:
        tensors, meta = load_checkpoint(folder / BEST_FILE)
        check_origin(folder, meta["identities"], parts.identities)
        EpochTraining.load_best(parts.model, tensors)

    @classmethod
    def assemble(cls, config: Config, *, fit: bool = True, saved: Path | None = None) -> Assembly:
        """As of every experiment; ``fit`` and ``saved`` change nothing here."""
        seconds: dict[str, float] = {}
        candidates = None
        available: dict[str, int | None] = {}
        with stage(seconds, "data"):
            dataset = create_dataset(config)
            logger.info(dataset)
            check_labels(config, dataset)
            if isinstance(dataset, HistoryDataset):
                splits = split(config, dataset)
                full_train = splits.full_train
                available = {f"{part}_available": splits.sizes[part] for part in ("valid", "test")}
                candidates = stored_candidates(config, splits)
                loaders = our_loaders(config, splits, candidates)
            else:
                loaders = data_preparation(config, dataset)
                full_train = loaders[0]._dataset
        trainer_config = with_possible_topk(config, dataset)
        train, valid, test = (loader._dataset for loader in loaders)
        sizes = {"train": len(train), "valid": len(valid), "test": len(test), **available}
        sizes["few_shot"] = len(train) if config["train_rows"] == "few_shot" else None
        with stage(seconds, "item_vectors"):
            arguments, backbone, texts = llm_arguments(config, dataset)
        model_class = class_for(config.model_class, config["task"])
        spec = spec_of(model_class)
        init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
        model = model_class(config, train, **arguments).to(config["device"])
        logger.info(model)
        if is_labelled(config) and not spec.probability:
            if spec.learns_from != "labels":
                logger.warning(
                    "%s is not trained on labels: its scores are unbounded and go through a sigmoid, so that LogLoss "
                    "and ACC are defined; compare it by AUC and GAUC",
                    config["model"],
                )
            give_probabilities(model)
        return Assembly(
            config=config,
            trainer_config=trainer_config,
            dataset=dataset,
            train=train,
            valid=valid,
            test=test,
            full_train=full_train,
            model=model,
            train_data=loaders[0],
            valid_data=loaders[1],
            test_data=loaders[2],
            candidates=candidates,
            sizes=sizes,
            identities={
                "model": config["model"],
                "data": data_hash(train),
                "backbone": backbone["sha256"] if backbone else "none",
                "configuration": configuration_hash(config),
                **texts,
            },
            ingredients=Ingredients(backbone=backbone),
            seconds=seconds,
        )


def is_labelled(config: Config) -> bool:
    """Whether evaluations compare scores with labels, and rank nothing."""
    return config["eval_type"] == EvaluatorType.VALUE and config["eval_args"]["mode"]["test"] == "labeled"


def check_labels(config: Config, dataset: Dataset) -> None:
    """Refuse a model that needs labels on data without any.

    Raises:
        ValueError: naming the key that makes labels.
    """
    field, negatives = config["LABEL_FIELD"], config["train_neg_sample_args"] or {}
    sampled = negatives.get("distribution", "none") != "none"
    learns = spec_of(config.model_class).learns_from == "labels" and not sampled
    if (is_labelled(config) or learns) and field not in dataset.field2type:
        raise ValueError(
            f"{config['model']} {'learns from' if learns else 'is evaluated on'} labels, and {config['dataset']} has "
            f"no column {field!r} (LABEL_FIELD); set threshold, e.g. {{rating: 4}}, or task: ctr"
        )


def give_probabilities(model: AbstractRecommender) -> None:
    """Let a model whose ``predict`` is unbounded give its sigmoid, float64 ``[B]``."""
    unbounded = model.predict
    model.predict = lambda interaction: torch.sigmoid(unbounded(interaction).double())


def data_hash(samples: Dataset) -> str:
    """Sha256 of training samples, in their order."""
    if isinstance(samples, HistoryDataset):
        return samples.content_hash()
    digest = hashlib.sha256()
    for name, column in sorted(samples.inter_feat.interaction.items()):
        digest.update(name.encode() + column.numpy().tobytes())
    return digest.hexdigest()


def stored_candidates(config: Config, splits: Splits) -> dict[str, CandidateSet] | None:
    """The candidates of validation and test samples, those of the LLM recommenders; ``None`` without any.

    Raises:
        ValueError: for candidates that only a lens can choose.
    """
    if (
        config["task"] == "next_item"
        and config["eval_mode"] == "candidates"
        and config["negatives"] == "hard"
    ):
        raise ValueError(
            f"negatives: hard are chosen by a lens, and {config['model']} is run without one; set negatives: uniform "
            "or popularity"
        )
    negatives = possible_negatives(config, splits)
    return draw_candidate_sets(config, evaluated_samples(config, splits), splits.full_train, negatives)


def evaluated_samples(config: Config, splits: Splits) -> dict[str, HistoryDataset]:
    """The test samples that ``eval_rows`` leaves, and all validation samples: these are cheap here.

    They are not where every state passes through layers of a language model; there ``valid_rows`` counts, too.
    """
    valid = splits.valid if config.spec.wants_backbone(config) else splits.full_valid
    return {"valid": valid, "test": splits.test}


def our_loaders(config: Config, splits: Splits, candidates: dict[str, CandidateSet] | None) -> tuple:
    """Train, validation and test loaders on the samples, and with the candidates, of the LLM recommenders."""
    train = splits.train
    if config["task"] == "ctr" and config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE:
        train = train.liked()
    make_loader = spec_of(config.model_class).training_loader
    if make_loader is not None:
        train_data = make_loader(config, train)
    else:
        sampler, *_ = create_samplers(config, splits.dataset, [train, splits.full_valid, splits.full_test])
        train_data = get_dataloader(config, "train")(config, train, sampler, shuffle=True)
    return train_data, *(
        eval_loader(config, splits.dataset, samples, candidates, name)
        for name, samples in evaluated_samples(config, splits).items()
    )


def llm_arguments(
    config: Config, dataset: Dataset
) -> tuple[dict[str, Any], dict[str, str] | None, dict[str, str]]:
    """What the class of a built-in conventional model wants of a language model.

    The ID history becomes the one that ``id_retrieval`` names, if the class reads that key.

    Returns:
        Arguments of its constructor (``item_vectors``, ``backbone``, or nothing), the LLM they come from, if any, and
        the identity of the titles, if these were read.

    Raises:
        ValueError: if vectors of titles are wanted, and the data has no titles.
    """
    spec = spec_of(config.model_class)
    found: dict[str, str] = {}
    texts: dict[str, str] = {}

    @functools.cache
    def language_model() -> Backbone:
        backbone = backbone_of(config, dataset.item_texts())
        found.update(described(backbone))
        return backbone

    @functools.cache
    def vectors() -> np.ndarray:
        if not dataset.item_text().titled:
            raise ValueError(
                f"{config['model']} reads the titles of items, and {dataset.dataset_name}.item has no column of "
                "them; name it in text.title"
            )
        backbone = language_model()
        texts["titles"] = sha256_of(dataset.item_text().descriptions())
        tokens = item_token_ids(dataset.item_text(), backbone.tokenizer)
        return item_vectors(backbone, tokens, cache_folder(config))

    if "id_retrieval" in spec.reads:
        set_id_retrieval(config, dataset, vectors)
    arguments: dict[str, Any] = {}
    if spec.wants_item_vectors(config):
        arguments["item_vectors"] = vectors()
    if spec.wants_backbone(config):
        arguments["backbone"] = language_model()
    return arguments, found or None, texts
