"""Everything a run needs, built from its configuration: data, backbone, lens, retrievers, prompts, model, loaders.

Training, dry runs and loading a saved model all start here, so that they see the same rows and the same prompts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from recbole.data.dataloader import (
    AbstractDataLoader,
    NegSampleEvalDataLoader,
    TrainDataLoader,
)
from recbole.sampler import RepeatableSampler

from recbole_llm.backbone.answers import mean_pooled_vectors
from recbole_llm.backbone.loader import Backbone, load_backbone
from recbole_llm.backbone.store import default_cache_dir
from recbole_llm.config.configurator import Config
from recbole_llm.data.candidates import (
    CandidateDataLoader,
    CandidateSet,
    RankedItemsDataLoader,
    draw_candidates,
)
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.loading import build_splits, draw_rows
from recbole_llm.data.prompts.ctr import PromptBuilder, load_prompt_config
from recbole_llm.data.prompts.lines import item_token_ids
from recbole_llm.data.prompts.next_item import TitlePromptBuilder, load_title_prompt_config
from recbole_llm.data.retriever import (
    CategoryRetriever,
    MixedRetriever,
    RecentRetriever,
    Retriever,
    SemanticRetriever,
    ShuffledRetriever,
)
from recbole_llm.lens.fit import fit_lens
from recbole_llm.lens.lens import Lens
from recbole_llm.model.base import LLMRecommender
from recbole_llm.registry import create_dataset, get_model
from recbole_llm.trainer.warm_start import read_plain_lora
from recbole_llm.utils.files import locked, write_atomically

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
        "compare_with",
        "seeds",
        "subject",
        "controls",
        "preset",
        "search",
        "trials",
        "nproc",
        "log_wandb",
        "wandb_project",
    }
)

CONFIG_FILE = "config.json"


@dataclass
class Assembly:
    """What a run is made of.

    Attributes:
        train, valid, test: the rows that the language model is trained and evaluated on (after ``few_shot``,
            ``mixed_training`` and ``eval_rows``); ``sizes`` has the sizes before and after.
        full_train: all training rows, those of the lens.
        candidates: what the targets are ranked among, by split; ``None`` without stored candidates.
        item_counts: how often each item is the target of a training row, ``[n_items]``.
        identities: hashes of data, backbone, lens and configuration, by name.
        seconds: wall time of each stage so far, by name.
    """

    config: Config
    dataset: HistoryDataset
    train: HistoryDataset
    valid: HistoryDataset
    test: HistoryDataset
    full_train: HistoryDataset
    backbone: Backbone
    lens: Lens | None
    prompts: PromptBuilder | TitlePromptBuilder
    model: LLMRecommender
    candidates: dict[str, CandidateSet] | None
    item_counts: np.ndarray
    train_data: TrainDataLoader
    valid_data: AbstractDataLoader
    test_data: AbstractDataLoader
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


def write_configuration(run_folder: Path, config: Config) -> None:
    """Keep the configuration beside what a run leaves, so that it is not resumed with another one."""
    (run_folder / CONFIG_FILE).write_text(json.dumps(config.as_dict(), indent=2), encoding="utf-8")


def configuration_hash(config: Config) -> str:
    """Hash of :func:`lasting_configuration`."""
    return hashlib.sha256(json.dumps(lasting_configuration(config), sort_keys=True).encode()).hexdigest()


def item_vectors(config: Config, tokens: list[np.ndarray], backbone: Backbone) -> np.ndarray:
    """The LLM's mean-pooled vector of every item's text, ``[n_items, d]``; row 0 is the padding item.

    Cached by the weights and the texts. Source: the semantic user behaviour retrieval of ReLLa (Lin et al., WWW 2024).
    """
    digest = hashlib.sha256(f"{backbone.sha256} {backbone.dtype}".encode())
    for ids in tokens:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    path = cache_folder(config) / "item_vectors" / f"{digest.hexdigest()[:32]}.npy"
    with locked(path):
        if path.is_file():
            return np.load(path, allow_pickle=False)
        vectors = mean_pooled_vectors(backbone.model, tokens)
        write_atomically(path, lambda file: np.save(file, vectors))
    return vectors


def conventional_parts(config: Config, dataset: HistoryDataset) -> tuple[dict, dict | None]:
    """What the class of a conventional model of ours asks for beside configuration and rows.

    The ID history becomes the one that ``id_retrieval`` says, if the class reads that key.

    Returns:
        Arguments of its constructor (``item_vectors``, or nothing), and the identity of the LLM that was asked, if
        any was.

    Raises:
        ValueError: if vectors of titles are wanted, and the data has no titles.
    """
    model_class, identity = config.model_class, {}

    @functools.cache
    def vectors() -> np.ndarray:
        if not dataset.item_text().titled:
            raise ValueError(
                f"{config['model']} reads the titles of items, and {dataset.dataset_name}.item has no column of "
                "them; name it in text.title"
            )
        backbone = load_backbone(
            config["backbone"],
            device=config["device"],
            dtype=config["dtype"],
            quantization=config["quantization"],
            cache_dir=cache_folder(config),
            texts=dataset.item_texts(),
            seed=config["seed"],
        )
        identity.update(
            name=backbone.name,
            sha256=backbone.sha256,
            source=backbone.source,
            dtype=str(backbone.dtype).removeprefix("torch."),
        )
        return item_vectors(config, item_token_ids(dataset.item_text(), backbone.tokenizer), backbone)

    if "id_retrieval" in getattr(model_class, "reads", ()):
        set_id_retrieval(config, dataset, vectors)
    wanted = getattr(model_class, "wants_item_vectors", None)
    arguments = {"item_vectors": vectors()} if wanted is not None and wanted(config) else {}
    return arguments, identity or None


def set_id_retrieval(
    config: Config, dataset: HistoryDataset, vectors: Callable[[], np.ndarray | None]
) -> None:
    """Let ``id_retrieval`` choose the ID histories of all rows; ``vectors`` gives item vectors if they are needed."""
    how, k = config["id_retrieval"], config["id_history_length"]
    if how == "semantic":
        dataset.set_id_retriever(SemanticRetriever(dataset.history, k, vectors()))
    elif how == "category":
        dataset.set_id_retriever(CategoryRetriever(dataset.history, k, dataset.item_text().genre_lists))


@dataclass
class Rows:
    """The rows of a run.

    Attributes:
        train, valid, test: what the language model sees; ``full_train`` and ``full_valid`` are the lens's.
    """

    dataset: HistoryDataset
    full_train: HistoryDataset
    full_valid: HistoryDataset
    train: HistoryDataset
    valid: HistoryDataset
    test: HistoryDataset
    sizes: dict[str, int]


def prepare_rows(config: Config) -> Rows:
    """Read the dataset, split it, and draw ``few_shot`` and ``eval_rows``."""
    dataset = create_dataset(config)
    full_train, full_valid, full_test = build_splits(dataset)
    train = few_shot_rows(config, full_train)
    valid, test = (bounded(config, rows, name) for rows, name in ((full_valid, "valid"), (full_test, "test")))
    sizes = {
        "all": len(full_train) + len(full_valid) + len(full_test),
        "train": len(full_train),
        "valid": len(full_valid),
        "test": len(full_test),
        "few_shot": len(train),
        "valid_used": len(valid),
        "test_used": len(test),
    }
    return Rows(dataset, full_train, full_valid, train, valid, test, sizes)


def few_shot_rows(config: Config, full_train: HistoryDataset) -> HistoryDataset:
    """The training rows that ``few_shot`` draws, once per seed; a default is cut to the size of the data."""
    few_shot = config["few_shot"]
    if config.origins.get("few_shot") is None and isinstance(few_shot, int) and few_shot > len(full_train):
        logger.info("few_shot: all %d training rows; the default is %d", len(full_train), few_shot)
        few_shot = config["few_shot"] = len(full_train)
    return full_train.subset(draw_rows(len(full_train), few_shot, config["seed"], "few_shot"))


def bounded(config: Config, rows: HistoryDataset, purpose: str) -> HistoryDataset:
    """``rows``, or the seeded draw of ``eval_rows`` of them; ``purpose`` is ``valid`` or ``test``."""
    if config["eval_rows"] and config["eval_rows"] < len(rows):
        return rows.subset(draw_rows(len(rows), config["eval_rows"], config["eval_seed"], purpose))
    return rows


def assemble(
    config: Config, *, fit: bool = True, lens_root: Path | None = None, warm_start: bool = True
) -> Assembly:
    """Build everything but the trainer.

    Args:
        config: the run's configuration.
        fit: ``False`` for dry runs: the lens is built with random weights instead of being trained.
        lens_root: where a trained lens is looked for, by default the cache (a saved run has its own copy).
        warm_start: whether to read what ``lora_from`` names (a saved run has its own copy).

    Raises:
        CheckpointError: if ``lora_from`` does not fit.
    """
    seconds: dict[str, float] = {}
    lora = read_plain_lora(config) if warm_start else None
    with stage(seconds, "data"):
        rows = prepare_rows(config)
    with stage(seconds, "backbone"):
        backbone = load_backbone(
            config["backbone"],
            device=config["device"],
            dtype=config["dtype"],
            quantization=config["quantization"],
            gradient_checkpointing=config["gradient_checkpointing"],
            cache_dir=cache_folder(config),
            texts=rows.dataset.item_texts(),
            seed=config["seed"],
        )

    def train_lens() -> Lens | None:
        if not config["lens"]:
            return None
        with stage(seconds, "lens"):
            lens = fit_lens(
                config,
                rows.full_train,
                rows.full_valid,
                cache_dir=lens_root or cache_folder(config),
                exclude_rows=rows.train.inter_feat["row_id"].numpy()
                if config["lens_rows"] == "without_few_shot"
                else None,
                fit=fit,
            )
            return lens.to(config["device"])

    candidates = None
    if config["task"] == "ctr":
        prompts, lens = _ctr_prompts(config, rows, backbone, train_lens, seconds)
    else:
        lens = train_lens()
        with stage(seconds, "candidates"):
            candidates = draw_candidate_sets(config, rows, lens)
        prompts = _title_prompts(config, rows, backbone, candidates)

    train = rows.train.mixed() if config["mixed_training"] else rows.train
    torch.manual_seed(config["seed"])  # the adapter's start must not depend on whether caches were warm
    model = get_model(config["model"])(config, rows.train, backbone=backbone, prompts=prompts, lens=lens)
    model.to(config["device"])
    identities = {
        "model": config["model"],
        "data": rows.dataset.content_hash(),
        "backbone": backbone.sha256,
        "lens": lens.identity if lens else "none",
        "configuration": configuration_hash(config),
        **prompts.identities(),
    } | {f"{split} candidates": found.sha256 for split, found in (candidates or {}).items()}
    if lora is not None:
        lora.check(identities, config)
        model.adapter.load_lora(lora.tensors)
        identities["lora_from"] = lora.sha256
    return Assembly(
        config=config,
        dataset=rows.dataset,
        train=train,
        valid=rows.valid,
        test=rows.test,
        full_train=rows.full_train,
        backbone=backbone,
        lens=lens,
        prompts=prompts,
        model=model,
        candidates=candidates,
        item_counts=item_counts(rows.full_train),
        train_data=TrainDataLoader(config, train, None, shuffle=True),
        valid_data=eval_loader(config, rows.dataset, rows.valid, candidates and candidates["valid"], "valid"),
        test_data=eval_loader(config, rows.dataset, rows.test, candidates and candidates["test"], "test"),
        sizes=rows.sizes,
        identities=identities,
        seconds=seconds,
    )


def template(config: Config, load: Callable[[str], dict]) -> dict:
    """The prompt's template, with what the configuration changes of it."""
    settings = load(config["prompt"])
    hidden = config["obfuscate_titles"]
    return settings if hidden is None else {**settings, "obfuscate_titles": hidden}


def _ctr_prompts(config: Config, rows: Rows, backbone: Backbone, train_lens, seconds) -> tuple:
    """Prompts and lens of the labelled task; either may need vectors of the other for semantic retrieval."""
    dataset = rows.dataset
    with stage(seconds, "backbone"):
        prompts = PromptBuilder(
            dataset,
            backbone.tokenizer,
            template(config, load_prompt_config),
            max_prompt_tokens=config["max_prompt_tokens"],
            retriever=RecentRetriever(dataset.history, config["text_history_length"]),
        )
    vectors = None
    if (config["id_retrieval"] == "semantic" or config["text_retrieval"] != "recent") and config[
        "semantic_vectors"
    ] == "backbone":
        with stage(seconds, "item_vectors"):
            vectors = item_vectors(config, prompts.item_token_ids(), backbone)
    set_id_retrieval(config, dataset, lambda: vectors)
    lens = train_lens()
    if config["text_retrieval"] != "recent":
        source = vectors if vectors is not None else lens.item_vectors().cpu().numpy()
        kind = {"semantic": SemanticRetriever, "mixed": MixedRetriever}[config["text_retrieval"]]
        prompts.retriever = kind(dataset.history, config["text_history_length"], source)
    if config["shuffle_history"]:
        prompts.retriever = ShuffledRetriever(prompts.retriever, config["eval_seed"])
    if prompts.tells_lens:
        if lens is None:
            raise ValueError(
                f"prompt: {config['prompt']} says the score of a lens, but lens is ~; set e.g. lens: DIN, or another "
                "prompt"
            )
        prompts.lens_scores = lambda rows: lens.probability(rows).cpu().numpy()
    return prompts, lens


def _title_prompts(config: Config, rows: Rows, backbone: Backbone, candidates) -> TitlePromptBuilder:
    """Prompts of the next-item task; they may list each row's candidates where these are stored."""
    listed = None
    if candidates is not None:  # the splits have no row in common
        parts = list(candidates.values())
        listed = CandidateSet(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("row_ids", "items", "targets")
            )
        ).of
    retriever: Retriever = RecentRetriever(rows.dataset.history, config["text_history_length"])
    if config["shuffle_history"]:
        retriever = ShuffledRetriever(retriever, config["eval_seed"])
    return TitlePromptBuilder(
        rows.dataset,
        backbone.tokenizer,
        template(config, load_title_prompt_config),
        max_prompt_tokens=config["max_prompt_tokens"],
        retriever=retriever,
        candidates=listed,
    )


def item_counts(train: HistoryDataset) -> np.ndarray:
    """How often each item is the target of a training row, ``[n_items]``."""
    return np.bincount(train.inter_feat[train.iid_field].numpy(), minlength=train.item_num)


def draw_candidate_sets(config: Config, rows: Rows, lens: Lens | None) -> dict[str, CandidateSet] | None:
    """The stored candidates of the rows of each split, or ``None`` where ``eval_mode`` has none."""
    if config["eval_mode"] != "candidates":
        return None
    counts = item_counts(rows.full_train)
    return {
        name: draw_candidates(
            split,
            num_negatives=config["num_negatives"],
            kind=config["negatives"],
            seed=config["candidate_seed"],
            purpose=name,
            item_counts=counts,
            item_scores=lens.score_items if lens is not None else None,
            scores_identity=lens.identity if lens is not None else None,
            allowed=split.ranked_items,
            cache_dir=cache_folder(config),
        )
        for name, split in (("train", rows.train), ("valid", rows.valid), ("test", rows.test))
    }


def eval_loader(
    config: Config, dataset: HistoryDataset, rows: HistoryDataset, candidates: CandidateSet | None, split: str
):
    """The loader that RecBole's Trainer evaluates ``split`` (``valid`` or ``test``) with."""
    if config["task"] == "ctr":
        return NegSampleEvalDataLoader(config, rows, None, shuffle=False)
    if candidates is not None:
        return CandidateDataLoader(config, rows, candidates)
    if config["eval_mode"] == "full":
        return RankedItemsDataLoader(config, rows)
    distribution = {"uni": "uniform", "pop": "popularity"}[config["eval_mode"][:3]]
    sampler = RepeatableSampler(["valid", "test"], dataset, distribution).set_phase(split)
    return NegSampleEvalDataLoader(config, rows, sampler, shuffle=False)
