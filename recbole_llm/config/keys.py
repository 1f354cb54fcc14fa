"""Every configuration key of recbole_llm: what it may hold and what it means.

One table, `KEYS`, serves the check of a configuration, the parsing of the command line and the test that
``properties/overall.yaml`` documents exactly these keys. `RECBOLE_KEYS` checks the keys of RecBole that
everybody sets and that RecBole itself does not check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]."""

    low: int | None = None
    high: int | None = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and _within(value, self.low, self.high)

    def __str__(self) -> str:
        return "an int" + _range_text(self.low, self.high)


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high], or without the ends in `open`."""

    low: float | None = None
    high: float | None = None
    open: str = ""  # "low", "high" or "low high": which ends are not allowed themselves

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        at_open_end = ("low" in self.open and value == self.low) or (
            "high" in self.open and value == self.high
        )
        return _within(value, self.low, self.high) and not at_open_end

    def __str__(self) -> str:
        low, high = "low" in self.open, "high" in self.open
        return "a number" + _range_text(self.low, self.high, low_open=low, high_open=high)


@dataclass(frozen=True)
class Share(Number):
    """A float strictly between 0 and 1: a share of the data. (The int 1 is a count, so 1 is not a share.)"""

    low: float = 0.0
    high: float = 1.0
    open: str = "low high"

    def __str__(self) -> str:
        return "a share in (0, 1)"


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text:
    """A non-empty str, matching `pattern` if one is given; `what` describes it."""

    what: str = "a str"
    pattern: str = r"(?s).+"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.what


class Choice(Text):
    """One of a few names."""

    def __init__(self, *names: str) -> None:
        super().__init__("one of " + ", ".join(names), "|".join(map(re.escape, names)))
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class ListOf:
    """A non-empty list of `kind`."""

    kind: Any

    def accepts(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(self.kind.accepts, value))

    def __str__(self) -> str:
        return f"a list, each entry {self.kind}"


@dataclass(frozen=True)
class Table:
    """A dict with str keys, its values being `values` if given."""

    values: Any = None

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and (self.values is None or self.values.accepts(v)) for k, v in value.items()
        )

    def __str__(self) -> str:
        return "a dict" + (f", each value {self.values}" if self.values else "")


class Key:
    """What one key may hold.

    Args:
        meaning: one line for the reader.
        kinds: the value must be accepted by one of them.
        optional: whether ``~`` (None) is allowed.
        llm: whether only our LLM recommenders read the key, and conventional models of ours that name it in
            ``reads``; for RecBole's models it has no effect.
    """

    def __init__(self, meaning: str, *kinds: Any, optional: bool = False, llm: bool = True) -> None:
        self.meaning, self.kinds, self.optional, self.llm = meaning, kinds, optional, llm

    def accepts(self, value: Any) -> bool:
        return (self.optional and value is None) or any(kind.accepts(value) for kind in self.kinds)

    @property
    def is_flag(self) -> bool:
        """Whether ``--key`` alone may stand for ``--key=true``."""
        return any(isinstance(kind, Flag) for kind in self.kinds)

    @property
    def is_text(self) -> bool:
        """Whether any text is a text here, so that ``--key=2024`` is not the number."""
        return any(isinstance(kind, Text) for kind in self.kinds) and not any(
            isinstance(kind, (Whole, Number, ListOf, Table)) for kind in self.kinds
        )

    def __str__(self) -> str:
        return " or ".join([str(kind) for kind in self.kinds] + ["~"] * self.optional)


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _range_text(
    low: float | None, high: float | None, *, low_open: bool = False, high_open: bool = False
) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>' if low_open else '>='} {low}"
    return f" in {'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"


POSITIVE = Number(0, open="low")
PROBABILITY = Number(0, 1, open="high")

KEYS: dict[str, Key] = {
    # the run
    "task": Key("what is predicted", Choice("ctr", "next_item"), optional=True, llm=False),
    "device": Key(
        "where to compute", Text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?"), llm=False
    ),
    "dtype": Key("number format of the LLM", Choice("auto", "float32", "bfloat16", "float16")),
    "cache_dir": Key("folder for downloads, lenses and item vectors", Text(), optional=True, llm=False),
    "run_name": Key("name of the run in the result", Text(), optional=True, llm=False),
    "output_dir": Key("folder of the run's results", Text(), optional=True, llm=False),
    "dry_run": Key("build everything, train nothing", Flag(), llm=False),
    "resume": Key("run folder or checkpoint to continue", Flag(), Text(), optional=True, llm=False),
    "few_shot": Key("training rows for the LLM", Whole(0), Share(), Choice("auto"), optional=True, llm=False),
    "few_shot_by": Key("what few_shot draws", Choice("sample", "user"), llm=False),
    "train_rows": Key("rows that a conventional model learns from", Choice("all", "few_shot"), llm=False),
    "eval_rows": Key("bound on validation and on test rows", Whole(1), Choice("auto"), optional=True, llm=False),
    "compare_with": Key("further models on the same rows", ListOf(Text()), Text(), optional=True, llm=False),
    "seeds": Key("number of seeds of a comparison", Whole(1), llm=False),
    "subject": Key("the model that a comparison is about", Text(), optional=True, llm=False),
    "nproc": Key("runs of a comparison side by side", Whole(1), llm=False),
    "controls": Key("add the control models of a comparison", Flag(), llm=False),
    "preset": Key("a set of defaults", Text(), optional=True, llm=False),
    "search": Key("a .hyper file, or a folder of them", Text(), optional=True, llm=False),
    "trials": Key("settings tried for each model", Whole(1), llm=False),
    "read_test": Key("evaluate on the test rows", Flag(), llm=False),
    "score_valid": Key("also keep the scores of the validation rows", Flag()),
    "obfuscate_titles": Key("hide titles behind Movie 123", Flag(), optional=True),
    "shuffle_history": Key("mix up the order of the text history", Flag()),
    "eval_seed": Key("seed of the draw of eval_rows", Whole(0), llm=False),
    "bootstrap_samples": Key("resamples of users for the intervals", Whole(0), llm=False),
    "zero_shot": Key("also score the untrained LLM", Flag()),
    # rows and histories
    "min_history": Key("earlier interactions a row must have", Whole(0), llm=False),
    "history_ties": Key("history at the target's own timestamp", Choice("order", "strict"), llm=False),
    "history_scope": Key("which interactions may be history", Choice("all", "split"), llm=False),
    "id_history_length": Key("items that the lens sees", Whole(1), llm=False),
    "id_retrieval": Key("how they are chosen", Choice("recent", "semantic", "category")),
    "text_history_length": Key("items that the prompt shows", Whole(0)),
    "text_retrieval": Key("how they are chosen", Choice("recent", "semantic", "mixed")),
    "mixed_training": Key("train each row with recent and with retrieved text", Flag()),
    "semantic_vectors": Key("item vectors of semantic retrieval", Choice("backbone", "lens")),
    # streams
    "layout": Key("a prompt per sample, or a user's interactions in one stream", Choice("prompt", "stream")),
    "stream_lead": Key("earlier interactions before a training chunk's first target", Whole(0)),
    "stream_context": Key("earlier interactions before an evaluation chunk's first target", Whole(0)),
    "rating_scale": Key("all values that a rating may have", ListOf(Number()), optional=True),
    # next item: rows, candidates, scoring
    "min_rating": Key("interactions rated lower are removed", Number(), optional=True, llm=False),
    "user_split": Key("shares of users for train, valid, test", ListOf(Number(0)), optional=True, llm=False),
    "eval_mode": Key("what the target is ranked among",
                     Text("candidates, full, uniN or popN", r"candidates|full|(uni|pop)\d+"), llm=False),
    "num_negatives": Key("candidates beside the target", Whole(1), llm=False),
    "negatives": Key("how they are drawn", Choice("uniform", "popularity", "hard"), llm=False),
    "candidate_seed": Key("seed of their draw", Whole(0), llm=False),
    "curriculum": Key("from text-only to hybrid prompts",
                      Choice("linear", "text_only", "hybrid_only", "as_released")),
    "two_stage": Key("items of the lens that the LLM ranks again", Whole(1), optional=True),
    "scoring_batch_size": Key("rows per scoring pass", Whole(1)),
    "trie_nodes": Key("title tokens per row and scoring pass", Whole(16)),
    "generate": Key("also let the LLM write its answer", Flag()),
    "max_new_tokens": Key("longest answer written", Whole(1)),
    # language model and prompt
    "backbone": Key("the language model", Text()),
    "backbone_layers": Key("use only the first so many layers", Whole(1), optional=True),
    "quantization": Key("keep the backbone's weights in few bits", Choice("8bit", "4bit"), optional=True),
    "gradient_checkpointing": Key("recompute activations to save memory", Flag()),
    "torch_compile": Key("compile the decoder layers", Flag()),
    "prompt": Key("the template", Text()),
    "max_prompt_tokens": Key("longest prompt in tokens", Whole(16)),
    # lens
    "lens": Key("what the gate reads", Text("the name of a sequential model"), optional=True),
    "lens_config": Key("the lens's own keys", Table(), optional=True),
    "lens_rows": Key("rows that the lens is trained on", Choice("all", "without_few_shot")),
    "lens_ratings": Key("past ratings are an input of the lens", Flag()),
    "tune_lens": Key("train the lens further, together with the LLM", Flag()),
    "gate_scope": Key("what the lens's state may have seen", Choice("auto", "user_item", "user")),
    # adapter
    "mixer": Key("how the experts are combined", Choice("identity", "expert", "factor", "output", "dense")),
    "gate": Key("network from lens state to mixture",
                Choice("mlp60", "linear", "mlp", "cnn", "cnn_groupnorm", "token", "uniform", "random", "shuffled"),
                optional=True),
    "num_experts": Key("number of meta-LoRAs", Whole(1)),
    "lora_r": Key("rank", Whole(1)),
    "lora_alpha": Key("scale of the update is lora_alpha over rank", POSITIVE),
    "lora_dropout": Key("dropout before the adapter", PROBABILITY),
    "target_modules": Key("names of the adapted projections", ListOf(Text())),
    "lora_layers": Key("first and last adapted layer", ListOf(Whole(0)), optional=True),
    "lora_from": Key("finished run whose A and B are loaded and frozen", Text(), optional=True),
    "gate_inputs": Key("what the gate reads of the lens", Choice("state", "state_and_logit")),
    "gate_balance": Key("weight of the loss for unequal use of experts", Number(0)),
    "gate_entropy": Key("weight of the loss for peaked mixtures", Number()),
    "temperature": Key("divides the gate's logits", POSITIVE),
    "top_k": Key("experts kept per row", Whole(1), optional=True),
    "share_gate": Key("one gate for all projections", Flag()),
    "gate_dropout": Key("dropout inside the gate", PROBABILITY),
    "lens_residual": Key("add the lens's logit to the answer margin", Flag()),
    # training
    "gate_learning_rate": Key("learning rate of the gates", POSITIVE, optional=True),
    "projector_learning_rate": Key("learning rate of the item vectors' projector", POSITIVE, optional=True),
    "stage_one_share": Key("share of the optimizer steps that train the LoRA on text alone", PROBABILITY),
    "lens_learning_rate": Key("learning rate of a lens that is trained further", POSITIVE, optional=True),
    "residual_learning_rate": Key("learning rate of the residual's scales", POSITIVE, optional=True),
    "autocast_dtype": Key("number format of the arithmetic", Choice("bfloat16", "float16"), optional=True),
    "lr_schedule": Key("learning rate after the warm-up", Choice("linear", "cosine", "constant")),
    "warmup_ratio": Key("share of the steps that warm up", PROBABILITY),
    "micro_batch_size": Key("rows per forward pass", Whole(1)),
    "bucket_by_length": Key("rows of similar length share a micro-batch", Flag()),
    "checkpoint_seconds": Key("time between checkpoints", Number(0)),
}  # fmt: skip

RECBOLE_KEYS: dict[str, Key] = {
    "epochs": Key("passes over the training rows", Whole(0)),
    "train_batch_size": Key("rows per optimizer step", Whole(1)),
    "eval_batch_size": Key("rows per evaluation batch", Whole(1)),
    "learning_rate": Key("peak learning rate", POSITIVE),
    "weight_decay": Key("weight decay", Number(0), optional=True),
    "learner": Key("optimizer", Text("one of adam, adamw, sgd, adagrad, rmsprop, sparse_adam",
                                     r"(?i)adam|adamw|sgd|adagrad|rmsprop|sparse_adam")),
    "eval_step": Key("epochs between validations", Whole(0)),
    "stopping_step": Key("bad validations that are tolerated", Whole(0)),
    "clip_grad_norm": Key("arguments of clip_grad_norm_", Table(), optional=True),
    "seed": Key("random seed", Whole(0)),
    "MAX_ITEM_LIST_LENGTH": Key("longest history", Whole(1)),
    "threshold": Key("label 1 from this value on", Table(Number()), optional=True),
    "metrics": Key("metrics", ListOf(Text()), Text()),
    "valid_metric": Key("metric of early stopping", Text()),
    "data_path": Key("folder that holds the dataset's folder", Text()),
    "checkpoint_dir": Key("folder for saved models", Text()),
    "show_progress": Key("progress bars", Flag()),
    "reproducibility": Key("deterministic algorithms", Flag()),
    "use_gpu": Key("false: compute on the CPU", Flag()),
    "eval_args": Key("split, order, group_by and mode of the evaluation", Table()),
    "text": Key("how columns become text (dataset yaml)", Table(), optional=True),
}  # fmt: skip


def check_values(
    values: Mapping[str, Any], origins: Mapping[str, str], more: Mapping[str, Key] | None = None
) -> None:
    """Check every value that the tables, or ``more``, know.

    Raises:
        ValueError: naming each bad key, where its value came from, the value, and what is expected.
    """
    problems = [
        f"{name}={values[name]!r} ({origins.get(name, 'default')}): expected {key}"
        for name, key in (RECBOLE_KEYS | KEYS | dict(more or {})).items()
        if name in values and not key.accepts(values[name])
    ]
    if problems:
        raise ValueError("configuration value not allowed:\n  " + "\n  ".join(problems))
