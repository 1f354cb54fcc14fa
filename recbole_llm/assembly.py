"""Everything a run needs, built from its configuration: data, backbone, lens, retrievers, prompts, model, loaders.

Training, dry runs and loading a saved model all start here, so that they see the same rows and the same prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from recbole.data.dataloader import NegSampleEvalDataLoader, TrainDataLoader

from recbole_llm.backbone import Backbone, default_cache_dir, load_backbone, mean_pooled_vectors
from recbole_llm.config import Config
from recbole_llm.data import (
    CTRDataset,
    PromptBuilder,
    RecentRetriever,
    SemanticRetriever,
    draw_rows,
    load_prompt_config,
)
from recbole_llm.lens import Lens, fit_lens
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.registry import get_model

logger = logging.getLogger(__name__)

# Keys that do not change what is computed, so that a run may be resumed with other values of them.
VOLATILE_KEYS = frozenset(
    {
        "dry_run",
        "resume",
        "run_name",
        "output_dir",
        "checkpoint_dir",
        "cache_dir",
        "data_path",
        "show_progress",
        "state",
        "checkpoint_seconds",
        "device",
        "gpu_id",
        "use_gpu",
        "bootstrap_samples",
        "log_wandb",
        "wandb_project",
    }
)


@dataclass
class Assembly:
    """What a run is made of.

    Attributes:
        train, valid, test: the rows that the language model is trained and evaluated on (after ``few_shot`` and
            ``eval_rows``); ``sizes`` has the sizes before and after.
        identities: hashes of data, backbone, lens and configuration, by name.
        seconds: wall time of each stage so far, by name.
    """

    config: Config
    dataset: CTRDataset
    train: CTRDataset
    valid: CTRDataset
    test: CTRDataset
    backbone: Backbone
    lens: Lens | None
    prompts: PromptBuilder
    model: AnswerCTR
    train_data: TrainDataLoader
    valid_data: NegSampleEvalDataLoader
    test_data: NegSampleEvalDataLoader
    sizes: dict[str, int]
    identities: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[name]``."""
    started = time.monotonic()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started


def cache_folder(config: Config) -> Path:
    """Where backbones, lenses, item vectors and zero-shot scores are kept between runs."""
    return Path(config["cache_dir"]) if config["cache_dir"] else default_cache_dir()


def lasting_configuration(config: Config) -> dict:
    """Every key that can change a result, with its value."""
    return {key: value for key, value in config.as_dict().items() if key not in VOLATILE_KEYS}


def configuration_hash(config: Config) -> str:
    """Hash of :func:`lasting_configuration`."""
    return hashlib.sha256(json.dumps(lasting_configuration(config), sort_keys=True).encode()).hexdigest()


def item_vectors(config: Config, prompts: PromptBuilder, backbone: Backbone) -> np.ndarray:
    """The LLM's mean-pooled vector of every item's text, ``[n_items, d]``; row 0 is the padding item.

    Cached by the weights and the texts. Source: the semantic user behaviour retrieval of ReLLa (Lin et al., WWW 2024).
    """
    tokens = prompts.item_token_ids()
    digest = hashlib.sha256(f"{backbone.sha256} {backbone.dtype}".encode())
    for ids in tokens:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    path = cache_folder(config) / "item_vectors" / f"{digest.hexdigest()[:32]}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    vectors = mean_pooled_vectors(backbone.model, tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, vectors)
    return vectors


def assemble(config: Config, *, fit: bool = True, lens_root: Path | None = None) -> Assembly:
    """Build everything but the trainer.

    Args:
        config: the run's configuration.
        fit: ``False`` for dry runs: the lens is built with random weights instead of being trained.
        lens_root: where a trained lens is looked for, by default the cache (a saved run has its own copy).
    """
    seconds: dict[str, float] = {}
    cache = cache_folder(config)
    with stage(seconds, "data"):
        dataset = CTRDataset(config)
        full_train, full_valid, full_test = dataset.build()
        few = draw_rows(len(full_train), config["few_shot"], config["seed"], "few_shot")
        train = full_train.subset(few)
        valid, test = (
            rows.subset(draw_rows(len(rows), config["eval_rows"], config["eval_seed"], purpose))
            if config["eval_rows"] and config["eval_rows"] < len(rows)
            else rows
            for rows, purpose in ((full_valid, "valid"), (full_test, "test"))
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

    with stage(seconds, "backbone"):
        prompt_config = load_prompt_config(config["prompt"])
        backbone = load_backbone(
            config["backbone"],
            device=config["device"],
            dtype=config["dtype"],
            quantization=config["quantization"],
            gradient_checkpointing=config["gradient_checkpointing"],
            cache_dir=cache,
            texts=dataset.item_texts(),
            seed=config["seed"],
        )
        prompts = PromptBuilder(
            dataset,
            backbone.tokenizer,
            prompt_config,
            max_prompt_tokens=config["max_prompt_tokens"],
            retriever=RecentRetriever(dataset.history, config["text_history_length"]),
        )
    vectors = None
    if (
        "semantic" in (config["id_retrieval"], config["text_retrieval"])
        and config["semantic_vectors"] == "backbone"
    ):
        with stage(seconds, "item_vectors"):
            vectors = item_vectors(config, prompts, backbone)
    if config["id_retrieval"] == "semantic":
        dataset.set_id_retriever(SemanticRetriever(dataset.history, config["id_history_length"], vectors))

    lens = None
    if config["lens"]:
        with stage(seconds, "lens"):
            excluded = None
            if config["lens_rows"] == "without_few_shot":
                excluded = train.inter_feat["row_id"].numpy()
            lens = fit_lens(
                config,
                full_train,
                full_valid,
                cache_dir=lens_root or cache,
                exclude_rows=excluded,
                fit=fit,
            )
            lens.to(config["device"])
    if config["text_retrieval"] == "semantic":
        source = vectors if vectors is not None else lens.item_vectors().cpu().numpy()
        prompts.retriever = SemanticRetriever(dataset.history, config["text_history_length"], source)

    torch.manual_seed(config["seed"])  # the adapter's start must not depend on whether caches were warm
    model = get_model(config["model"])(config, train, backbone=backbone, prompts=prompts, lens=lens)
    model.to(config["device"])
    return Assembly(
        config=config,
        dataset=dataset,
        train=train,
        valid=valid,
        test=test,
        backbone=backbone,
        lens=lens,
        prompts=prompts,
        model=model,
        train_data=TrainDataLoader(config, train, None, shuffle=True),
        valid_data=NegSampleEvalDataLoader(config, valid, None, shuffle=False),
        test_data=NegSampleEvalDataLoader(config, test, None, shuffle=False),
        sizes=sizes,
        identities={
            "model": config["model"],
            "data": dataset.content_hash(),
            "backbone": backbone.sha256,
            "lens": lens.identity if lens else "none",
            "configuration": configuration_hash(config),
        },
        seconds=seconds,
    )
