"""The parts of an LLM recommender's run: backbone, lens, retrievers, prompts, model with adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader

from recbole_llm.backbone.loader import Backbone
from recbole_llm.config.configurator import Config
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.prompts.ctr import CTR_TEMPLATE, PromptBuilder
from recbole_llm.data.prompts.lines import TemplateKind
from recbole_llm.data.prompts.next_item import TITLE_TEMPLATE, TitlePromptBuilder
from recbole_llm.data.prompts.stream import STREAM_TEMPLATE, StreamPrompts
from recbole_llm.data.prompts.title_stream import TITLE_STREAM_TEMPLATE, TitleStreamPrompts
from recbole_llm.data.retriever import (
    MixedRetriever,
    RecentRetriever,
    Retriever,
    SemanticRetriever,
    ShuffledRetriever,
)
from recbole_llm.data.streams import StreamLoader, interactions_of
from recbole_llm.experiment.assembly import (
    Assembly,
    backbone_of,
    cache_folder,
    configuration_hash,
    described,
    item_vectors,
)
from recbole_llm.experiment.before_training import check_adapter, check_prompts
from recbole_llm.experiment.result import Ingredients
from recbole_llm.experiment.splits import (
    Splits,
    draw_candidate_sets,
    eval_loader,
    item_counts,
    newest,
    possible_negatives,
    prepare_splits,
    set_id_retrieval,
    with_possible_topk,
)
from recbole_llm.lens.fit import fit_lens
from recbole_llm.lens.lens import Lens
from recbole_llm.model.base import LLMRecommender
from recbole_llm.model.stream_ctr import streamed
from recbole_llm.model.title_stream import streamed_titles
from recbole_llm.trainer.warm_start import SHAPE, read_plain_lora
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.timing import stage

AnyPrompts = PromptBuilder | TitlePromptBuilder | StreamPrompts | TitleStreamPrompts


@dataclass(kw_only=True, repr=False)
class LLMAssembly(Assembly):
    """The parts of an LLM recommender's run.

    Attributes:
        item_counts: how often each item is the target of a training sample, int64 ``[n_items]``.
    """

    model: LLMRecommender
    backbone: Backbone
    lens: Lens | None
    prompts: AnyPrompts
    item_counts: np.ndarray


def assemble(config: Config, *, fit: bool = True, saved: Path | None = None) -> LLMAssembly:
    """Build everything of an LLM recommender's run but the trainer.

    Args:
        fit: ``False`` for dry runs: the lens has random weights instead of being trained.
        saved: the folder of a run that is loaded, which has its own copies of lens and LoRA.

    Raises:
        CheckpointError: if ``lora_from`` does not fit.
    """
    seconds: dict[str, float] = {}
    lora = None
    if config["lora_from"] and saved is None:
        lora = read_plain_lora(Path(config["lora_from"]), {key: config[key] for key in SHAPE})
    with stage(seconds, "data"):
        splits = prepare_splits(config)
        trainer_config = with_possible_topk(config, splits.dataset)
    with stage(seconds, "backbone"):
        backbone = backbone_of(config, splits.dataset.item_texts())

    def train_lens() -> Lens | None:
        if not config["lens"]:
            return None
        with stage(seconds, "lens"):
            lens = fit_lens(
                config,
                splits.full_train,
                splits.full_valid,
                cache_dir=saved or cache_folder(config),
                exclude_rows=hidden_from_lens(config, splits),
                fit=fit,
                saved=saved is not None,
            )
            return lens.to(config["device"])

    if lora is not None:
        lora.check({"data": splits.dataset.content_hash(), "backbone": backbone.sha256}, config["eval_args"])
    check_adapter(config, backbone)
    prompts: AnyPrompts
    candidates = None
    if config["task"] == "ctr":
        prompts, lens = _ctr_prompts(config, splits, backbone, train_lens, seconds)
    else:
        prompts, lens, candidates = _next_item_prompts(config, splits, backbone, train_lens, seconds)

    train = splits.train.mixed() if config["mixed_training"] else splits.train
    torch.manual_seed(config["seed"])  # the adapter's start must not depend on whether caches were warm
    model_class = config.model_class
    if isinstance(prompts, StreamPrompts):
        model_class = streamed(model_class)
    elif isinstance(prompts, TitleStreamPrompts):
        model_class = streamed_titles(model_class)
    model = model_class(config, splits.train, backbone=backbone, prompts=prompts, lens=lens)
    model.to(config["device"])
    identities = {
        "model": config["model"],
        "data": splits.dataset.content_hash(),
        "backbone": backbone.sha256,
        "lens": lens.identity if lens else "none",
        "configuration": configuration_hash(config),
        **prompts.identities(),
    } | {f"{name} candidates": found.sha256 for name, found in (candidates or {}).items()}
    if lora is not None:
        model.adapter.load_lora(lora.tensors)
        identities["lora_from"] = lora.sha256
    return LLMAssembly(
        config=config,
        trainer_config=trainer_config,
        dataset=splits.dataset,
        train=train,
        valid=splits.valid,
        test=splits.test,
        full_train=splits.full_train,
        backbone=backbone,
        lens=lens,
        prompts=prompts,
        model=model,
        candidates=candidates,
        item_counts=item_counts(splits.full_train),
        train_data=StreamLoader(config, train, prompts.cutter)
        if isinstance(prompts, (StreamPrompts, TitleStreamPrompts))
        else TrainDataLoader(config, train, None, shuffle=len(train) > 0),
        valid_data=eval_loader(config, splits.dataset, splits.valid, candidates, "valid"),
        test_data=eval_loader(config, splits.dataset, splits.test, candidates, "test"),
        sizes=splits.sizes,
        identities=identities,
        ingredients=Ingredients(described(backbone), lens_facts(lens)),
        seconds=seconds,
    )


def hidden_from_lens(config: Config, splits: Splits) -> np.ndarray | None:
    """``row_id`` of the training samples that ``lens_rows`` keeps from the lens; ``None``: none of them."""
    hidden = {
        "all": lambda: None,
        "without_few_shot": lambda: splits.train,
        "earlier": lambda: splits.full_train.subset(newest(splits.full_train)),
    }[config["lens_rows"]]()
    return None if hidden is None else hidden.inter_feat[ROW_ID].numpy()


def lens_facts(lens: Lens | None) -> dict[str, Any] | None:
    """The lens as the result describes it."""
    if lens is None:
        return None
    return {"name": lens.name, "identity": lens.identity, "gate_scope": lens.gate_scope, **lens.info}


def template(config: Config, kind: TemplateKind) -> dict:
    """The prompt's template, with what the configuration changes of it."""
    settings = kind.load(config["prompt"])
    hidden = config["obfuscate_titles"]
    return settings if hidden is None else {**settings, "obfuscate_titles": hidden}


def _ctr_prompts(
    config: Config,
    splits: Splits,
    backbone: Backbone,
    train_lens: Callable[[], Lens | None],
    seconds: dict[str, float],
) -> tuple[PromptBuilder | StreamPrompts, Lens | None]:
    """Prompts and lens of the labelled task; either may need vectors of the other for semantic retrieval."""
    dataset, length = splits.dataset, config["text_history_length"]
    with stage(seconds, "backbone"):
        prompts: PromptBuilder | StreamPrompts
        if config["layout"] == "stream":
            prompts = StreamPrompts(
                dataset,
                backbone.tokenizer,
                template(config, STREAM_TEMPLATE),
                max_prompt_tokens=config["max_prompt_tokens"],
                lead=config["stream_lead"],
                context=config["stream_context"],
                rating_scale=config["rating_scale"],
            )
        else:
            prompts = PromptBuilder(
                dataset,
                backbone.tokenizer,
                template(config, CTR_TEMPLATE),
                max_prompt_tokens=config["max_prompt_tokens"],
                retriever=RecentRetriever(dataset.history, length),
            )
    vectors = None
    semantic = config["id_retrieval"] == "semantic" or config["text_retrieval"] != "recent"
    if semantic and config["semantic_vectors"] == "backbone":
        with stage(seconds, "item_vectors"):
            vectors = item_vectors(backbone, prompts.item_token_ids(), cache_folder(config))
    set_id_retrieval(config, dataset, lambda: vectors)
    check_prompts(config, backbone, prompts, splits)
    lens = train_lens()
    if config["text_retrieval"] != "recent":
        source = vectors if vectors is not None else cast(Lens, lens).item_vectors().cpu().numpy()
        kind = {"semantic": SemanticRetriever, "mixed": MixedRetriever}[config["text_retrieval"]]
        cast(PromptBuilder, prompts).retriever = kind(dataset.history, length, source)
    if config["shuffle_history"]:
        texts = cast(PromptBuilder, prompts)  # as above: the configuration refuses both keys for streams
        texts.retriever = ShuffledRetriever(texts.retriever, config["eval_seed"])
    if prompts.tells_lens:
        if lens is None:
            raise ValueError(
                f"prompt: {config['prompt']} states the lens's score, but lens is ~; set e.g. lens: DIN, or another "
                "prompt"
            )
        if isinstance(prompts, StreamPrompts):
            prompts.lens_scores = lambda chunks: (
                lens.probability(interactions_of(dataset, chunks)).cpu().numpy()
            )
        else:
            prompts.lens_scores = lambda interaction: lens.probability(interaction).cpu().numpy()
    return prompts, lens


def _next_item_prompts(
    config: Config,
    splits: Splits,
    backbone: Backbone,
    train_lens: Callable[[], Lens | None],
    seconds: dict[str, float],
) -> tuple[TitlePromptBuilder | TitleStreamPrompts, Lens | None, dict[str, CandidateSet] | None]:
    """Prompts, lens and stored candidates of the next-item task; hard candidates are chosen by the trained lens."""
    negatives = possible_negatives(config, splits)
    chooses = config["negatives"] == "hard"
    lens = train_lens() if chooses else None
    with stage(seconds, "candidates"):
        candidates = draw_candidate_sets(
            config,
            {"train": splits.train, "valid": splits.valid, "test": splits.test},
            splits.full_train,
            negatives,
            item_scores=lens.score_items if lens else None,
            scores_identity=lens.identity if lens else None,
        )
    prompts = _title_prompts(config, splits, backbone, candidates)
    if not chooses:
        check_prompts(config, backbone, prompts, splits)
        lens = train_lens()
    return prompts, lens, candidates


def _title_prompts(
    config: Config, splits: Splits, backbone: Backbone, candidates: dict[str, CandidateSet] | None
) -> TitlePromptBuilder | TitleStreamPrompts:
    """Prompts of the next-item task; single ones may list each sample's candidates where these are stored."""
    if config["layout"] == "stream":
        return TitleStreamPrompts(
            splits.dataset,
            backbone.tokenizer,
            template(config, TITLE_STREAM_TEMPLATE),
            max_prompt_tokens=config["max_prompt_tokens"],
            lead=config["stream_lead"],
            history_length=config["text_history_length"],
        )
    listed = None
    if candidates is not None:  # the splits have no sample in common
        sets = list(candidates.values())
        listed = CandidateSet(
            *(
                np.concatenate([getattr(part, name) for part in sets])
                for name in ("row_ids", "items", "targets")
            )
        ).of
    retriever: Retriever = RecentRetriever(splits.dataset.history, config["text_history_length"])
    if config["shuffle_history"]:
        retriever = ShuffledRetriever(retriever, config["eval_seed"])
    return TitlePromptBuilder(
        splits.dataset,
        backbone.tokenizer,
        template(config, TITLE_TEMPLATE),
        max_prompt_tokens=config["max_prompt_tokens"],
        retriever=retriever,
        candidates=listed,
    )
