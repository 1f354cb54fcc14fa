"""Every configuration key, once: what it may hold, what it means, and who reads it.

A new key is one entry in `TABLE` and one line in ``properties/overall.yaml``, which a test compares with it. From the
table come the check of a configuration, the parsing of the command line, and which keys a saved run, a resumed run and
a comparison have in common. `RECBOLE_KEYS` are the keys of RecBole that everybody sets and RecBole does not check.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from recbole_llm.config.kinds import (
    POSITIVE,
    PROBABILITY,
    Anything,
    Choice,
    Flag,
    ListOf,
    Number,
    Share,
    Table,
    Text,
    Whole,
)

ANY = object()


class Key:
    """One key.

    Args:
        meaning: one phrase, with which the comment in ``properties/overall.yaml`` begins.
        kinds: the value must be accepted by one of them.
        optional: whether ``~`` (None) is allowed.
        llm: whether only LLM recommenders read the key, and built-in conventional models that declare it in
            ``reads``; for RecBole's models it has no effect.
        affects_result: whether another value can change a result. If not, a run may be resumed with another one.
        shared: whether all models of a comparison must have the same value, because it decides which samples are
            tested, what their targets are ranked among, or by what they are evaluated.
        run_only: whether the value is that of a single run, and no model of a comparison takes it over.
        passed_to: which models of ``compare_with`` take over the value that the user set: ``all``; ``llm``, as
            conventional models have training defaults of their own; ``none``, as it belongs to the first model's
            adapter.
        tasks: the tasks that read the key.
        neutral: the value that an LLM recommender must have in a task that does not read the key; ``ANY``: any.

    Attributes:
        group: the section of the table.
    """

    group = ""

    def __init__(
        self,
        meaning: str,
        *kinds: Any,
        optional: bool = False,
        llm: bool = True,
        affects_result: bool = True,
        shared: bool = False,
        run_only: bool = False,
        passed_to: Literal["all", "llm", "none"] = "all",
        tasks: tuple[str, ...] = ("ctr", "next_item"),
        neutral: Any = ANY,
    ) -> None:
        self.meaning, self.kinds, self.optional, self.llm = meaning, kinds, optional, llm
        self.affects_result, self.shared, self.run_only = affects_result, shared, run_only
        self.passed_to, self.tasks, self.neutral = passed_to, tasks, neutral

    def accepts(self, value: Any) -> bool:
        return (self.optional and value is None) or any(kind.accepts(value) for kind in self.kinds)

    @property
    def is_flag(self) -> bool:
        return any(isinstance(kind, Flag) for kind in self.kinds)

    @property
    def is_text(self) -> bool:
        """Whether a text is legal and neither a number nor a collection is."""
        others = (Whole, Number, ListOf, Table, Anything)
        return any(isinstance(kind, Text) for kind in self.kinds) and not any(
            isinstance(kind, others) for kind in self.kinds
        )

    def __str__(self) -> str:
        return " or ".join([str(kind) for kind in self.kinds] + ["~"] * self.optional)


# What several entries have in common.
_RUN: dict[str, Any] = {"llm": False, "affects_result": False}
_ONE_RUN: dict[str, Any] = {**_RUN, "run_only": True}
_SHARED: dict[str, Any] = {"llm": False, "shared": True}
_CTR: dict[str, Any] = {"tasks": ("ctr",)}
_RANKING: dict[str, Any] = {"tasks": ("next_item",)}
_ADAPTER: dict[str, Any] = {"passed_to": "none"}
_TRAINING: dict[str, Any] = {"llm": False, "passed_to": "llm"}

TABLE: dict[str, dict[str, Key]] = {
    "run": {
        "task": Key("what is predicted", Choice("ctr", "next_item"), optional=True, **_SHARED),
        "device": Key("where to compute", Text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?"), **_RUN),
        "dtype": Key("number format of the LLM", Choice("auto", "float32", "bfloat16", "float16")),
        "cache_dir": Key("folder for downloads, lenses and item vectors", Text(), optional=True, **_RUN),
        "run_name": Key("name of the run in the result's table", Text(), optional=True, **_ONE_RUN),
        "output_dir": Key("folder in which each run makes a folder", Text(), optional=True, **_ONE_RUN),
        "dry_run": Key("build everything, print what a run would do, train nothing", Flag(), **_RUN),
        "resume": Key("continue a run", Flag(), Text(), optional=True, **_ONE_RUN),
        "few_shot": Key("training samples for the LLM", Whole(0), Share(), Choice("auto"), optional=True, llm=False),
        "few_shot_by": Key("what few_shot draws", Choice("sample", "user"), llm=False),
        "train_rows": Key("what a conventional model learns from", Choice("all", "few_shot"), llm=False),
        "eval_rows": Key("at most this many validation and test samples each", Whole(1), Choice("auto"), optional=True,
                         **_SHARED),
        "valid_rows": Key("at most this many validation samples", Whole(1), optional=True, **_SHARED),
        "eval_rows_by": Key("what eval_rows and valid_rows draw", Choice("sample", "user"), **_SHARED),
        "eval_seed": Key("seed of that draw", Whole(0), **_SHARED),
        "compare_with": Key("further models, trained and tested on the same samples", ListOf(Text()), Text(),
                            optional=True, **_ONE_RUN),
        "seeds": Key("runs of each model of a comparison", Whole(1), **_ONE_RUN),
        "subject": Key("the model whose differences with all others are tested", Text(), optional=True, **_ONE_RUN),
        "nproc": Key("runs of a comparison side by side", Whole(1), **_ONE_RUN),
        "controls": Key("add the control models of a comparison", Flag(), **_ONE_RUN),
        "preset": Key("a set of defaults", Text(), optional=True, **_RUN),
        "bootstrap_samples": Key("resamples of users for the 95% intervals", Whole(0), **_RUN, shared=True),
        "search": Key("choose hyper-parameters on validation samples first", Text(), optional=True, **_ONE_RUN),
        "trials": Key("settings that a search tries for each model", Whole(1), **_ONE_RUN),
        "read_test": Key("evaluate on the test samples", Flag(), llm=False),
        "score_valid": Key("also keep the scores of the validation samples", Flag(), llm=False),
        "zero_shot": Key("also score the test samples with the untrained LLM", Flag()),
    },
    "samples and histories": {
        "min_history": Key("earlier interactions that a sample's user must have", Whole(0), **_SHARED),
        "max_dropped": Key("most interactions that may be dropped without an error, as a share", Number(0, 1),
                           llm=False),
        "tie_order": Key("order of interactions of one time", Choice("id", "file"), **_SHARED),
        "history_ties": Key("history at the target's own timestamp", Choice("order", "strict"), **_SHARED),
        "history_scope": Key("which interactions may be history", Choice("all", "split"), **_SHARED),
        "id_history_length": Key("items of the history that the lens sees", Whole(1), llm=False),
        "id_retrieval": Key("how these are chosen", Choice("recent", "semantic", "category"), **_CTR,
                            neutral="recent"),
        "text_history_length": Key("items of the history that the prompt shows", Whole(0)),
        "text_retrieval": Key("how these are chosen", Choice("recent", "semantic", "mixed"), **_CTR,
                              neutral="recent"),
        "mixed_training": Key("train each few_shot sample twice", Flag(), **_ADAPTER, **_CTR, neutral=False),
        "shuffle_history": Key("show the text history in a random order", Flag()),
        "semantic_vectors": Key("item vectors for semantic retrieval", Choice("backbone", "lens"), **_CTR),
    },
    "streams": {
        "layout": Key("what the LLM reads", Choice("prompt", "stream")),
        "stream_lead": Key("earlier interactions before the first target of a training chunk", Whole(0)),
        "stream_context": Key("earlier interactions before the first target of an evaluation chunk", Whole(0), **_CTR),
        "rating_scale": Key("all values that a rating may have", ListOf(Number()), optional=True, **_CTR),
    },
    "next item": {
        "min_rating": Key("interactions with a lower rating are removed", Number(), optional=True, **_SHARED,
                          **_RANKING),
        "user_split": Key("shares of users for train, valid, test", ListOf(Number(0)), optional=True, **_SHARED,
                          **_RANKING),
        "eval_mode": Key("what the target is ranked among",
                         Text("candidates, full, uniN or popN", r"candidates|full|(uni|pop)\d+"), **_SHARED,
                         **_RANKING),
        "num_negatives": Key("candidates beside the target", Whole(1), **_SHARED, **_RANKING),
        "negatives": Key("how these are drawn", Choice("uniform", "popularity", "hard"), **_SHARED, **_RANKING),
        "candidate_items": Key("what is drawn, ranked and recommended", Choice("seen", "all"), **_SHARED),
        "rank_history": Key("items of the user's history are ranked too", Flag(), **_SHARED, **_RANKING),
        "candidate_seed": Key("seed of that draw", Whole(0), **_SHARED, **_RANKING),
        "curriculum": Key("share of hybrid steps", Choice("linear", "text_only", "hybrid_only", "as_released"),
                          **_ADAPTER, **_RANKING),
        "two_stage": Key("items of the lens's ranking that the LLM ranks again", Whole(1), optional=True, **_RANKING),
        "scoring_batch_size": Key("samples per scoring pass", Whole(1), **_RANKING),
        "trie_nodes": Key("title tokens per sample and scoring pass", Whole(16), **_RANKING),
        "generate": Key("also let the LLM write its answer", Flag(), **_RANKING),
        "max_new_tokens": Key("longest answer written, in tokens", Whole(1), **_RANKING),
    },
    "language model and prompt": {
        "backbone": Key("the language model", Text()),
        "quantization": Key("keep the backbone's weights in few bits", Choice("8bit", "4bit"), optional=True),
        "gradient_checkpointing": Key("recompute activations in the backward pass", Flag()),
        "backbone_layers": Key("use only the first so many layers of the language model", Whole(1), optional=True),
        "torch_compile": Key("compile the decoder layers", Flag()),
        "shard_backbone": Key(
            "with torchrun: every process keeps a share of the frozen weights", Flag(), affects_result=False
        ),
        "prompt": Key("the template", Text(), **_ADAPTER),
        "obfuscate_titles": Key('replace titles by "Movie 123"', Flag(), optional=True),
        "max_prompt_tokens": Key("longest prompt in tokens", Whole(16)),
    },
    "lens": {
        "lens": Key("the frozen conventional recommender that the gate reads", Text("the name of a sequential model"),
                    optional=True),
        "lens_config": Key("keys of the lens itself", Table(), optional=True),
        "lens_rows": Key("samples that train the lens", Choice("all", "without_few_shot", "earlier"), **_CTR,
                         neutral="all"),
        "tune_lens": Key("train a copy of the lens further, together with the LLM", Flag(), **_ADAPTER),
        "lens_ratings": Key("past ratings are an input of the lens", Flag(), **_CTR, neutral=False),
        "gate_scope": Key("what the lens's state may have seen", Choice("auto", "user_item", "user")),
    },
    "adapter": {
        "mixer": Key("how the experts are combined, M(z)",
                     Choice("identity", "expert", "factor", "output", "dense"), **_ADAPTER),
        "gate": Key("network from the lens's state to the mixture",
                    Choice("mlp60", "linear", "mlp", "cnn", "cnn_groupnorm", "token", "uniform", "random", "shuffled"),
                    optional=True, **_ADAPTER),
        "num_experts": Key("number K of meta-LoRAs", Whole(1), **_ADAPTER),
        "lora_r": Key("rank r", Whole(1)),
        "lora_alpha": Key("scale of the update, divided by the rank", POSITIVE),
        "lora_dropout": Key("dropout before the adapter", PROBABILITY),
        "target_modules": Key("ends of the names of the adapted projections", ListOf(Text())),
        "lora_layers": Key("first and last layer that is adapted", ListOf(Whole(0)), optional=True),
        "lora_from": Key("folder of a finished run whose A and B are loaded and frozen", Text(), optional=True,
                         **_ADAPTER),
        "gate_inputs": Key("what the gate reads of the lens", Choice("state", "state_and_logit"), **_ADAPTER, **_CTR,
                           neutral="state"),
        "gate_balance": Key("weight of a loss for experts that are used unequally", Number(0), **_ADAPTER),
        "gate_entropy": Key("weight of a loss for peaked mixtures", Number(), **_ADAPTER),
        "temperature": Key("divides the gate's logits before the softmax", POSITIVE, **_ADAPTER),
        "top_k": Key("keep only the largest k mixture weights", Whole(1), optional=True, **_ADAPTER),
        "share_gate": Key("one gate for all projections instead of one each", Flag(), **_ADAPTER),
        "gate_dropout": Key("dropout inside gates mlp60 and mlp", PROBABILITY, **_ADAPTER),
        "lens_residual": Key("add the lens's logit, with a learned scale, to the answer's logit margin", Flag(),
                             **_ADAPTER, **_CTR, neutral=False),
        "residual_rows": Key("validation samples on which lens_residual's three scalars are fitted", Whole(10),
                             optional=True, **_ADAPTER, **_CTR),
    },
    "training": {
        "gate_learning_rate": Key("learning rate of the gates", POSITIVE, optional=True, **_ADAPTER),
        "projector_learning_rate": Key("learning rate of the projector of item vectors", POSITIVE, optional=True),
        "stage_one_share": Key("share of the optimizer steps that train the LoRA on text alone", PROBABILITY,
                               **_ADAPTER, **_CTR),
        "residual_learning_rate": Key("learning rate of lens_residual's three scalars", POSITIVE, optional=True,
                                      **_CTR),
        "lens_learning_rate": Key("learning rate of tune_lens", POSITIVE, optional=True),
        "autocast_dtype": Key("arithmetic in this format over weights of dtype", Choice("bfloat16", "float16"),
                              optional=True),
        "lr_schedule": Key("learning rate after the warm-up", Choice("linear", "cosine", "constant")),
        "warmup_ratio": Key("share of the optimizer steps with a rising learning rate", PROBABILITY),
        "micro_batch_size": Key("samples per forward pass", Whole(1), Choice("auto")),
        "bucket_by_length": Key("samples of similar length share a micro-batch", Flag()),
        "checkpoint_seconds": Key("time between checkpoints in seconds", Number(0), affects_result=False),
    },
}  # fmt: skip

KEYS: dict[str, Key] = {name: key for section in TABLE.values() for name, key in section.items()}
for _group, _section in TABLE.items():
    for _key in _section.values():
        _key.group = _group

RECBOLE_KEYS: dict[str, Key] = {
    "epochs": Key("passes over the few_shot samples", Whole(0), **_TRAINING),
    "train_batch_size": Key("samples per optimizer step", Whole(1), **_TRAINING),
    "eval_batch_size": Key("samples per evaluation batch", Whole(1), llm=False),
    "learning_rate": Key("peak learning rate", POSITIVE, **_TRAINING),
    "weight_decay": Key("weight decay", Number(0), optional=True, **_TRAINING),
    "learner": Key("optimizer", Text("one of adam, adamw, sgd, adagrad, rmsprop, sparse_adam",
                                     r"(?i)adam|adamw|sgd|adagrad|rmsprop|sparse_adam"), **_TRAINING),
    "loss_type": Key("training loss of a model that has several", Text(), optional=True, **_TRAINING),
    "eval_step": Key("epochs between validations", Whole(0), **_TRAINING),
    "stopping_step": Key("stop after more than this many validations without improvement", Whole(0), **_TRAINING),
    "clip_grad_norm": Key("arguments of torch's clip_grad_norm_", Table(), optional=True, **_TRAINING),
    "seed": Key("random seed", Whole(0), llm=False),
    "MAX_ITEM_LIST_LENGTH": Key("longest history", Whole(1), llm=False),
    "threshold": Key("label 1 where the column is at least this value", Table(Number()), optional=True, **_SHARED),
    "metrics": Key("metrics", ListOf(Text()), Text(), **_SHARED),
    "topk": Key("cut-offs of ranking metrics", ListOf(Whole(1)), Whole(1), **_SHARED),
    "valid_metric": Key("the metric that selects the best epoch", Text(), **_SHARED),
    "eval_args": Key("split, order, group_by and mode of the evaluation", Table(), **_SHARED),
    "filter_inter_by_user_or_item": Key("drop interactions whose user or item is in no file", Flag(), **_SHARED),
    "text": Key("how columns become text (dataset yaml)", Table(), optional=True, llm=False),
    "data_path": Key("folder that holds the dataset's folder", Text(), **_RUN),
    "checkpoint_dir": Key("folder for saved models", Text(), **_ONE_RUN),
    "show_progress": Key("progress bars", Flag(), **_RUN),
    "reproducibility": Key("deterministic algorithms", Flag(), llm=False),
    "use_gpu": Key("false: compute on the CPU", Flag(), **_RUN),
    "gpu_id": Key("number of the CUDA device", Anything(), **_RUN),
    "state": Key("level of the log", Text(), **_RUN),
    "log_wandb": Key("log to Weights & Biases", Flag(), **_RUN),
    "wandb_project": Key("project there", Text(), optional=True, **_RUN),
}  # fmt: skip

_ALL = RECBOLE_KEYS | KEYS
VOLATILE_KEYS = frozenset(name for name, key in _ALL.items() if not key.affects_result)
"""Keys that cannot change a result: a run may be resumed with other values of them."""

RUN_ONLY_KEYS = frozenset({"model", "dataset", *(name for name, key in _ALL.items() if key.run_only)})
"""Keys of a single run that no model of a comparison takes over."""

SHARED_KEYS = tuple(name for name, key in _ALL.items() if key.shared)
"""Keys that are the same for all models of a comparison."""


def keys_not_passed_to(llm: bool) -> frozenset[str]:
    """Keys whose user-set value a model of ``compare_with`` does not take over from the first model."""
    receivers = ("all", "llm") if llm else ("all",)
    return frozenset(name for name, key in _ALL.items() if key.passed_to not in receivers)


def keys_of_other_tasks(task: str | None, own: Collection[str]) -> frozenset[str]:
    """Keys that have no effect in a task, but those of the model's ``own``; none where there is no task."""
    if task is None:
        return frozenset()
    others = {name for name, key in _ALL.items() if task not in key.tasks and key.neutral is ANY}
    return frozenset(others.difference(own))


def check_values(
    values: Mapping[str, Any], origins: Mapping[str, str], more: Mapping[str, Key] | None = None
) -> None:
    """Check every value that the tables, or ``more``, know.

    Raises:
        ValueError: naming each bad key, where its value came from, the value, and what is expected.
    """
    problems = [
        f"{name}={values[name]!r} ({origins.get(name, 'default')}): expected {key}"
        for name, key in (_ALL | dict(more or {})).items()
        if name in values and not key.accepts(values[name])
    ]
    if problems:
        raise ValueError("configuration value not allowed:\n  " + "\n  ".join(problems))
