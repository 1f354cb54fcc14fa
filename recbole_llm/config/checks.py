"""What cannot work together, and values that others determine.

Every check is a small function of the merged values that raises one sentence with the remedy; ``resolve_`` functions
fill in values that others determine. `check_llm` and `check_conventional` run those of a family, in order.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType, ModelType
from torch.nn.utils.clip_grad import clip_grad_norm_

from recbole_llm.config.keys import ANY, KEYS, keys_of_other_tasks
from recbole_llm.config.layout import check_stream
from recbole_llm.config.model_spec import ModelSpec, spec_of
from recbole_llm.evaluation.metrics import labeled_metrics
from recbole_llm.registry import BUILT_IN_MODELS, get_model, recbole_models
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.names import nearest

TASKS = ("ctr", "next_item")

SAMPLES_OF_A_CATALOGUE = 8
"""Samples per evaluation batch where the LLM scores all items: the progress bar counts batches."""


@dataclass(frozen=True)
class Values:
    """The merged values of a configuration under construction.

    Attributes:
        model: the model's name.
        spec: what its class declares.
        final: all values; ``resolve_`` functions change them.
        user: the values that the user set.
        origins: where these came from.
        defaults: what the keys are where the user sets nothing.
    """

    model: str
    spec: ModelSpec
    final: dict[str, Any]
    user: Mapping[str, Any]
    origins: Mapping[str, str]
    defaults: Mapping[str, Any]

    def said(self, key: str) -> str:
        """``key=value (origin)`` for a message."""
        return f"{key}={self.final.get(key)!r} ({self.origins.get(key, 'default')})"

    def __getitem__(self, key: str) -> Any:
        return self.final[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.final[key] = value


# ---------------------------------------------------------------- every model


def check_keys_of_task(v: Values) -> None:
    """A key that only the other task reads must be left as it is by default: another value would have no effect."""
    task = v.final.get("task")
    if v.spec.tasks and task not in v.spec.tasks:
        return  # the check of the task says so
    for name in sorted(keys_of_other_tasks(task, v.spec.keys)):
        if name in v.user and v.user[name] != v.defaults.get(name, v.user[name]):
            tasks = " and ".join(KEYS[name].tasks)
            raise ValueError(
                f"{v.said(name)} has no effect in the {task} task, only in {tasks}: leave it out"
            )


def resolve_history_length(v: Values) -> None:
    """Keep RecBole's name for the length of an ID history equal to ``id_history_length`` in both tasks."""
    if v.final.get("task") not in TASKS or v["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        return
    recbole_name, name = "MAX_ITEM_LIST_LENGTH", "id_history_length"
    if recbole_name in v.user and name in v.user and v.user[recbole_name] != v.user[name]:
        raise ValueError(f"{v.said(recbole_name)} and {v.said(name)} are the same length: set one of them")
    length = v.user[recbole_name] if recbole_name in v.user and name not in v.user else v[name]
    v[recbole_name] = v[name] = length


def resolve_eval_mode(v: Values) -> None:
    """RecBole's ``eval_args.mode`` from ``eval_mode``. Stored candidates are its uniN with a loader of their own."""
    if "mode" in (v.user.get("eval_args") or {}):
        raise ValueError(
            f"{v.said('eval_args')}: in the next_item task the mode is set by eval_mode: candidates, full, "
            "uniN or popN; leave mode out"
        )
    mode = v["eval_mode"]
    if mode == "full" and v.spec.is_llm and "eval_batch_size" not in v.user:
        v["eval_batch_size"] = SAMPLES_OF_A_CATALOGUE
    mode = f"uni{v['num_negatives']}" if mode == "candidates" else mode
    v["eval_args"] = {**v["eval_args"], "mode": {"valid": mode, "test": mode}}


def resolve_metrics(v: Values) -> None:
    """AUC, LogLoss, ACC and GAUC together on labelled samples; check what RecBole finds too late."""
    if unknown := sorted(set(v["eval_args"]) - {"split", "order", "group_by", "mode"}):
        raise ValueError(f"{v.said('eval_args')}: {unknown[0]} is not one of split, order, group_by and mode")
    mode = v["eval_args"].get("mode", "full")
    labeled = (set(mode.values()) if isinstance(mode, Mapping) else {mode}) == {"labeled"}
    if v.final.get("task") == "ctr" and not labeled:
        raise ValueError(
            f"{v.said('eval_args')}: task ctr is evaluated on labelled samples; set mode: labeled"
        )
    metrics = [v["metrics"]] if isinstance(v["metrics"], str) else list(v["metrics"])
    metrics = labeled_metrics(metrics) if labeled else metrics
    for name in metrics:
        if name.lower() not in metric_types:
            near = nearest(name, [known for known in metric_types if known != "labeledgauc"], 1)
            hint = f": did you mean {near[0].upper()}?" if near else ""
            raise ValueError(f"{v.said('metrics')}: there is no metric named {name!r}{hint}")
    if labeled and (ranking := [n for n in metrics if metric_types[n.lower()] == EvaluatorType.RANKING]):
        raise ValueError(
            f"{v.said('metrics')}: {', '.join(ranking)} rank candidates, the mode labeled has none; "
            "use AUC, LogLoss, ACC, GAUC, MAE or RMSE"
        )
    if v["valid_metric"].lower() == "labeledgauc":
        v["valid_metric"] = "GAUC"
    check_valid_metric(v, metrics)
    v["metrics"] = metrics


def check_valid_metric(v: Values, metrics: list[str]) -> None:
    """`valid_metric` must be a key of the result, or RecBole fails after the first epoch."""
    name, at, k = v["valid_metric"].partition("@")
    results = ["gauc" if metric.lower() == "labeledgauc" else metric.lower() for metric in metrics]
    if name.lower() not in results:
        raise ValueError(f"{v.said('valid_metric')} is not among {v.said('metrics')}")
    topk = v["topk"] if isinstance(v["topk"], list) else [v["topk"]]
    at_k = metric_types[name.lower()] == EvaluatorType.RANKING and name.lower() != "gauc"
    if at_k and (not at or k not in map(str, topk)):
        raise ValueError(f"{v.said('valid_metric')} must name one of {v.said('topk')}, e.g. {name}@{topk[0]}")
    if at and not at_k:
        raise ValueError(f"{v.said('valid_metric')}: {name} has no @k")


def check_training(v: Values) -> None:
    """What RecBole looks at when it trains, after the lens: a package that is missing, names of arguments."""
    if v.final.get("log_wandb") and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"{v.said('log_wandb')} needs the package wandb, which is not installed: pip install wandb, or leave it out"
        )
    clip = v.final.get("clip_grad_norm") or {}
    known = set(inspect.signature(clip_grad_norm_).parameters) - {"parameters"}
    if clip and ("max_norm" not in clip or not set(clip) <= known):
        raise ValueError(
            f"{v.said('clip_grad_norm')} must hold max_norm, and may hold {', '.join(sorted(known - {'max_norm'}))}"
        )


def check_cuda(v: Values) -> None:
    """Number formats that only a CUDA device has."""
    if v["device"].type == "cuda":
        return
    for key, value, remedy in (
        ("quantization", ("8bit", "4bit"), "leave it out (~)"),
        ("dtype", ("float16",), "use float32, bfloat16 or auto"),
        ("autocast_dtype", ("float16",), "use bfloat16 or leave it out (~)"),
    ):
        if v.spec.reads_key(key, KEYS[key]) and v[key] in value:
            raise ValueError(f"{v.said(key)} needs a CUDA device, this run is on the CPU: {remedy}")


# ---------------------------------------------------------------- built-in conventional models


def check_conventional(v: Values) -> None:
    """A built-in conventional model has the tasks and reads the keys that its class declares."""
    tasks, reads = v.spec.tasks, v.spec.reads
    if v["task"] not in tasks:
        raise ValueError(f"{v.said('task')}: {v.model} needs task: {' or '.join(tasks)}")
    if v["task"] == "ctr" and "loss_type" in v.user:
        raise ValueError(
            f"{v.said('loss_type')}: in task ctr {v.model} is trained on labels; leave loss_type out"
        )
    if unread := [key for key in v.user if not v.spec.reads_key(key, KEYS.get(key))]:
        raise ValueError(
            f"{', '.join(map(v.said, unread))}: {v.model} does not read this; of the keys of LLM "
            f"recommenders it reads {', '.join(reads) or 'none'}"
        )


# ---------------------------------------------------------------- LLM recommenders


def check_sharding(v: Values) -> None:
    """What a backbone whose weights several processes share cannot do: what one of them would do alone."""
    if not v["shard_backbone"]:
        return
    if not launched().several:
        raise ValueError(
            f"{v.said('shard_backbone')} shares the backbone among processes, and this is one: start it with "
            "torchrun --nproc_per_node=N, or leave it out"
        )
    if "zero_shot" not in v.user:
        v["zero_shot"] = False
    for key, off in (
        ("zero_shot", False),
        ("generate", False),
        ("quantization", None),
        ("torch_compile", False),
    ):
        if v[key] != off:
            raise ValueError(
                f"{v.said(key)} is not possible with shard_backbone: True; leave one of them out"
            )


def check_layout(v: Values) -> None:
    """Streams, and the layers that are adapted."""
    check_stream(v, v.said)
    layers = v["lora_layers"]
    if layers is not None and (len(layers) != 2 or layers[0] > layers[1]):
        raise ValueError(
            f"{v.said('lora_layers')} must be the first and the last adapted layer, e.g. [10, 29]"
        )


def check_llm(v: Values) -> None:
    """All checks of an LLM recommender; then values that others determine are filled in."""
    check_task(v)
    check_sharding(v)
    if v["lens"] is None and "lens_residual" not in v.user:
        v["lens_residual"] = False  # a default, where there is nothing to add
    if v["task"] == "next_item":
        check_next_item(v)
    else:
        check_token_gate(v)
        if "id_retrieval" not in v.user:
            v["id_retrieval"] = lens_spec(v["lens"]).lens_retrieval or v["id_retrieval"]
    for check in (
        check_mixed_training,
        check_train_rows,
        check_tune_lens,
        check_gate_penalties,
        check_mixer_and_gate,
        check_lora_from,
        check_top_k,
        check_without_lens if v["lens"] is None else check_lens,
        check_semantic_vectors,
        check_lens_rows,
        check_layout,
    ):
        check(v)
    if v["mixer"] == "identity":
        v["gate"] = None
    if v["few_shot"] == 0:
        v["epochs"] = 0
    if v["lora_from"]:
        v["stage_one_share"] = 0.0
    if v["gate_scope"] == "auto" and v["lens"] is not None:
        v["gate_scope"] = "user_item" if _state_sees_target(v) else "user"
    if v["micro_batch_size"] != "auto":
        v["micro_batch_size"] = min(v["micro_batch_size"], v["train_batch_size"])


def check_task(v: Values) -> None:
    """The task must be one of the model's."""
    if v["task"] not in v.spec.tasks:
        raise ValueError(f"{v.said('task')}: {v.model} needs task: {' or '.join(v.spec.tasks)}")


def check_next_item(v: Values) -> None:
    """What the next-item task cannot have: anything that would need the target, or its label."""
    for name, key in KEYS.items():
        if "next_item" not in key.tasks and key.neutral is not ANY and v[name] != key.neutral:
            raise ValueError(
                f"{v.said(name)} is not possible in the next_item task: set {name}: {key.neutral}"
            )
    if lens_spec(v["lens"]).sees_target:
        raise ValueError(
            f"{v.said('lens')} needs the target item, which the next_item task is to find: set lens: SASRec"
        )
    if v["two_stage"] and v["eval_mode"] != "full":
        raise ValueError(f"{v.said('two_stage')} with {v.said('eval_mode')}: set eval_mode: full")
    if not v["rank_history"] and v["eval_mode"] != "full":
        raise ValueError(
            f"{v.said('rank_history')} with {v.said('eval_mode')}: drawn candidates leave out what the user has met "
            "anyway (candidates), or are RecBole's (uniN, popN); set eval_mode: full, or leave it out"
        )
    if v["negatives"] == "hard" and v["lens"] is None:
        raise ValueError(f"{v.said('negatives')} needs a lens, and {v.said('lens')}: set lens: SASRec")
    if v["generate"] and v["eval_mode"] != "candidates":
        raise ValueError(
            f"{v.said('generate')} with {v.said('eval_mode')}: what the LLM writes is matched with stored "
            "candidates; set eval_mode: candidates"
        )


def check_token_gate(v: Values) -> None:
    """The gate that reads the prompt exists in the next-item task only."""
    if v["gate"] == "token":
        raise ValueError(
            f"{v.said('gate')} reads the prompt's tokens, which only the next_item task offers it"
        )


def check_mixed_training(v: Values) -> None:
    """Training each sample twice needs two different histories."""
    if v["mixed_training"] and v["text_retrieval"] == "recent":
        raise ValueError(
            f"{v.said('mixed_training')} with {v.said('text_retrieval')}: each sample would be trained twice with "
            "the same history; set text_retrieval: semantic"
        )


def check_train_rows(v: Values) -> None:
    """``train_rows`` is for conventional models."""
    if v["train_rows"] != "all":
        raise ValueError(
            f"{v.said('train_rows')} is for conventional models: {v.model} learns from few_shot samples in any case"
        )


def check_tune_lens(v: Values) -> None:
    """A lens that is trained further must be read by something that is trained."""
    reads_lens = (v["mixer"] != "identity" and v["gate"] != "token") or v["lens_residual"]
    if v["tune_lens"] and not reads_lens:
        raise ValueError(
            f"{v.said('tune_lens')}: with {v.said('mixer')}, {v.said('gate')} and without lens_residual nothing that "
            "is trained reads the lens; leave tune_lens out"
        )


def check_gate_penalties(v: Values) -> None:
    """Penalties on the mixture need experts."""
    for key in ("gate_balance", "gate_entropy"):
        if v[key] and v["mixer"] in ("identity", "dense"):
            raise ValueError(f"{v.said(key)} with {v.said('mixer')}: there are no experts to weigh")


def check_mixer_and_gate(v: Values) -> None:
    """A mixer needs a gate, one plain LoRA has none, and slices of the rank must be equal."""
    if v["mixer"] == "identity" and v.user.get("gate") is not None:
        raise ValueError(
            f"{v.said('gate')} with {v.said('mixer')}: one plain LoRA has nothing to mix; set gate: ~ or "
            "another mixer"
        )
    if v["mixer"] != "identity" and v["gate"] is None:
        raise ValueError(f"{v.said('mixer')} needs a gate, and {v.said('gate')}: set e.g. gate: mlp60")
    if v["mixer"] == "expert" and v["lora_r"] % v["num_experts"]:
        raise ValueError(
            f"{v.said('lora_r')} is not divisible by {v.said('num_experts')}, and {v.said('mixer')} cuts the "
            "rank into one slice per expert"
        )


def check_lora_from(v: Values) -> None:
    """A given LoRA fits one pair of A and B only, and replaces the stage that trains them."""
    if v["lora_from"] and v["mixer"] not in ("identity", "dense"):
        raise ValueError(
            f"{v.said('lora_from')} with {v.said('mixer')}: A and B of a plain LoRA fit mixer: identity and dense only"
        )
    if v["lora_from"] and v.user.get("stage_one_share"):  # 0 in the configuration of a saved run
        raise ValueError(
            f"{v.said('stage_one_share')} with {v.said('lora_from')}, which stands for stage 1: leave one of them out"
        )


def check_top_k(v: Values) -> None:
    """``top_k`` chooses among experts."""
    if v["top_k"] is None:
        return
    if v["mixer"] in ("identity", "dense"):
        raise ValueError(f"{v.said('top_k')} with {v.said('mixer')}: there are no experts to choose from")
    if v["top_k"] > v["num_experts"]:
        raise ValueError(f"{v.said('top_k')} is more than {v.said('num_experts')}")


def check_without_lens(v: Values) -> None:
    """What needs a lens, where there is none."""
    by_similarity = v["id_retrieval"] == "semantic" or v["text_retrieval"] != "recent"
    for key, needs_lens in (
        ("mixer", v["mixer"] != "identity"),
        ("lens_residual", v["lens_residual"]),
        ("lens_rows", v["lens_rows"] != "all"),
        ("tune_lens", v["tune_lens"]),
        ("lens_config", bool(v["lens_config"])),
        ("id_retrieval", v["id_retrieval"] != "recent"),
        ("semantic_vectors", by_similarity and v["semantic_vectors"] == "lens"),
    ):
        if needs_lens:
            raise ValueError(
                f"{v.said(key)} needs a lens, and {v.said('lens')}: set lens: DIN or lens: SASRec"
            )


def check_lens(v: Values) -> None:
    """The lens must be a model that can be one, and its state must be of the scope that the gate wants."""
    if not lens_spec(v["lens"]).gate_scopes:
        sequential = [n for n, module in recbole_models().items() if ".sequential_recommender." in module]
        near = nearest(v["lens"], sequential)
        hint = f"did you mean {' or '.join(near)}?" if near else "e.g. DIN or SASRec"
        raise ValueError(f"{v.said('lens')} is not a sequential model of RecBole: {hint}")
    if v["gate_scope"] == "user_item" and not _state_sees_target(v):
        raise ValueError(
            f"{v.said('gate_scope')}: {v.said('lens')} does not see the target item, as lens: DIN "
            "does; set gate_scope: user or auto"
        )
    if v["gate_scope"] == "user" and v["id_retrieval"] != "recent":
        raise ValueError(
            f"{v.said('gate_scope')} with {v.said('id_retrieval')}: the history is chosen by its similarity "
            "to the target, so no state made from it is the user's alone; set id_retrieval: recent or "
            "gate_scope: auto"
        )


def check_semantic_vectors(v: Values) -> None:
    """The lens cannot choose the histories that it is trained on."""
    if v["id_retrieval"] == "semantic" and v["semantic_vectors"] == "lens":
        raise ValueError(
            f"{v.said('semantic_vectors')} with {v.said('id_retrieval')}: the lens would be trained on "
            "histories that only the trained lens can choose; set semantic_vectors: backbone"
        )


def check_lens_rows(v: Values) -> None:
    """The lens needs training samples of its own."""
    if v["lens_rows"] == "without_few_shot" and v["few_shot"] is None:
        raise ValueError(
            f"{v.said('lens_rows')} with {v.said('few_shot')}: no samples would be left for the lens"
        )


def lens_spec(lens: str | None) -> ModelSpec:
    """The properties of a lens by its name; no lens and an unknown name are models that cannot be a lens."""
    known = lens is not None and (lens in BUILT_IN_MODELS or lens in recbole_models())
    return spec_of(get_model(str(lens))) if known else ModelSpec("recbole")


def _state_sees_target(v: Values) -> bool:
    """A state made of a retrieved history has seen the target, whatever the lens is."""
    return v["id_retrieval"] != "recent" or lens_spec(v["lens"]).sees_target
