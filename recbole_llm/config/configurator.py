"""RecBole's Config, extended: our defaults, our keys, and errors that say what to do.

Precedence, lowest first, as RecBole has it::

    RecBole's overall < sample < dataset yaml  <  our overall < our task < our model < our dataset yaml (our models
        only) < config files < config_dict < command line

For RecBole's own models our defaults are not loaded, but for the keys of ours that concern every model; the
dataset yaml of ours is used where RecBole has none. ``task: ctr`` puts such a model on our labelled protocol,
``task: next_item`` on our rows and candidates.
"""

from __future__ import annotations

import ast
import copy
import enum
import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType, ModelType

from recbole_llm.config.keys import KEYS, RECBOLE_KEYS, check_values
from recbole_llm.config.model_spec import ModelSpec, spec_of
from recbole_llm.registry import BUILT_IN_MODELS, get_model, recbole_models
from recbole_llm.utils import recbole_repairs
from recbole_llm.utils.names import nearest
from recbole_llm.utils.yaml_files import PROPERTIES, RECBOLE_PROPERTIES, YamlLoader, load_yaml

logger = logging.getLogger(__name__)

PROTOCOL = (
    "train_neg_sample_args",
    "eval_args",
    "repeatable",
    "threshold",
    "normalize_all",
    "load_col",
    "metrics",
    "valid_metric",
)
"""Keys of our overall.yaml that make the labelled protocol; a RecBole model gets them with ``task: ctr``."""

RANKING_PROTOCOL = (*(key for key in PROTOCOL if key != "train_neg_sample_args"), "topk")
"""Likewise for ``task: next_item``. Negatives for the training stay what the model's own loss needs."""

TASKS = ("ctr", "next_item")

SIZES = {
    "cpu": {"few_shot": 128, "eval_rows": 200},
    "cuda": {"few_shot": 8192, "eval_rows": None},
}
"""What ``auto`` stands for by the kind of device; chosen by time alone."""

# Read by RecBole's code, but in none of its yaml files and argument lists.
_UNLISTED_KEYS = (
    "encoding", "eta", "ip", "local_rank", "offset", "group_offset", "port", "tail_ratio",
    "token_num_threshold", "verbose", "world_size",
)  # fmt: skip
_NAMES = ("model", "dataset", "config_files")
_DATASET_KEYS = ("text", *TASKS)


# Worked out by RecBole or by this machine, so no part of what `from_dict` takes over.
_DERIVED_KEYS = (
    "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "valid_metric_bigger", "valid_neg_sample_args",
    "test_neg_sample_args", "single_spec", "local_rank", "use_gpu", "gpu_id",
)  # fmt: skip


ROWS_OF_A_CATALOGUE = 8
"""Rows per evaluation batch where the LLM scores the whole catalogue: the progress bar counts batches."""


def parse_value(text: str, key: str | None = None) -> Any:
    """A value of the command line, as a literal of Python or YAML; anything else is the text itself. Nothing
    is run.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("{rating: 4}"), parse_value("~")
    (0.001, [1, 2], {'rating': 4}, None)
    >>> parse_value("2024", "output_dir"), parse_value("__import__('os').getcwd()")
    ('2024', "__import__('os').getcwd()")
    """
    stripped = text.strip()
    if stripped in ("None", "~", "null"):
        return None
    known = (KEYS | RECBOLE_KEYS).get(key)
    if known is not None and known.is_text:
        if known.is_flag and stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
        return stripped[1:-1] if quoted else text
    try:
        return ast.literal_eval(stripped)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass  # not Python: perhaps YAML
    try:
        value = yaml.load(stripped, Loader=YamlLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    collection = isinstance(value, (dict, list)) and stripped[0] in "[{"
    return value if collection or isinstance(value, (bool, int, float)) else text


def parse_command_line(arguments: Sequence[str]) -> dict[str, Any]:
    """``--key=value`` arguments, RecBole's way; ``--key`` alone means true for a key that is true or false.

    As RecBole's own script does, ``--model NAME``, ``-m NAME``, ``--dataset NAME``, ``-d NAME`` and
    ``--config_files "a.yaml b.yaml"`` may have a space instead of ``=``.

    Raises:
        ValueError: for any other form, and for a key given twice with different values.
    """
    values: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, text = argument.partition("=")
        name = {"-m": "--model", "-d": "--dataset"}.get(name, name)
        key = name[2:]
        if not name.startswith("--") or not key.isidentifier():
            alike = "--" + argument.lstrip("-").replace("-", "_") if equals else "--key=value"
            raise ValueError(f"command line: cannot read {argument!r}; write {alike}")
        follows = bool(queue) and not queue[0].startswith("-")
        if equals:
            value = text if key in _NAMES else parse_value(text, key)
        elif key in _NAMES and follows:
            value = queue.pop(0)
        elif follows:
            raise ValueError(f"command line: write --{key}={queue[0]} instead of --{key} {queue[0]}")
        elif _is_flag(key):
            value = True
        elif key in {*KEYS, *RECBOLE_KEYS, *_NAMES, *_recbole_defaults()}.union(
            *_recbole_model_keys().values()
        ):
            raise ValueError(f"command line: --{key} needs a value, --{key}=VALUE")
        else:
            value = True  # unknown: the check of keys says so, with the nearest key
        if key in values and values[key] != value:
            raise ValueError(f"command line: --{key} is given twice, as {values[key]!r} and {value!r}")
        values[key] = value
    return values


def config_file(name: str | Path) -> Path:
    """A file, or one of properties/protocol/ by its bare name."""
    protocol = PROPERTIES / "protocol" / f"{name}.yaml"
    return protocol if protocol.is_file() and not Path(name).is_file() else Path(name)


def given_values(
    config_file_list: Iterable[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the user gave, before any default; the sources as of :class:`Config`, later ones win."""
    arguments = parse_command_line(cmd_line or [])
    files = [*(config_file_list or ()), *str(arguments.pop("config_files", "")).split()]
    values: dict[str, Any] = {}
    for file in dict.fromkeys(map(str, files)):
        values |= load_yaml(config_file(file))
    return values | dict(config_dict or {}) | arguments


def load_preset(name: str, model: str, llm: bool) -> dict[str, Any]:
    """The defaults that a preset has for a model.

    ``properties/preset/NAME.yaml`` holds keys for every model, and under ``models`` those of our models (``llm``), of
    RecBole's (``classical``) and of single ones by their name, which win.

    Raises:
        ValueError: if there is no such preset.
    """
    folder = PROPERTIES / "preset"
    file = Path(name) if Path(name).is_file() else folder / f"{name}.yaml"
    if not file.is_file():
        presets = sorted(path.stem for path in folder.glob("*.yaml"))
        near = nearest(name, presets, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets)}, or give a yaml file"
        raise ValueError(f"preset: there is no preset {name!r}: {hint}")
    values = load_yaml(file)
    by_model = values.pop("models", None) or {}
    mine = {**(by_model.get("llm" if llm else "classical") or {}), **(by_model.get(model) or {})}
    return {**values, **mine}


@cache
def _recbole_defaults() -> dict[str, Any]:
    """RecBole's defaults that do not depend on the model."""
    files = ["overall.yaml", "dataset/sample.yaml", "dataset/ml-100k.yaml"]
    files += [
        f"quick_start_config/{p.name}" for p in sorted((RECBOLE_PROPERTIES / "quick_start_config").iterdir())
    ]
    defaults: dict[str, Any] = {}
    for name in files:
        defaults = load_yaml(RECBOLE_PROPERTIES / name) | defaults
    return defaults


@cache
def _recbole_model_keys() -> dict[str, set[str]]:
    """Keys of each of RecBole's model yaml files, by model."""
    return {path.stem: set(load_yaml(path)) for path in sorted((RECBOLE_PROPERTIES / "model").glob("*.yaml"))}


@cache
def keys_read_by(model_class: type) -> frozenset[str]:
    """Keys that a model class and its bases look up in the config (some of RecBole's are in no yaml file)."""
    keys: set[str] = set()
    for base in model_class.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "builtins"):
            try:
                source = inspect.getsource(base)
            except (OSError, TypeError):
                continue  # defined in a session without source files
            keys.update(re.findall(r"config(?:\[|\.get\()\s*[\"'](\w+)[\"']", source))
    return frozenset(keys)


def _is_flag(key: str) -> bool:
    known = (KEYS | RECBOLE_KEYS).get(key)
    return known.is_flag if known else isinstance(_recbole_defaults().get(key), bool)


class Config(RecBoleConfig):
    """The configuration of a run: RecBole's, with the keys of :data:`recbole_llm.config.keys.KEYS`.

    Unlike RecBole's it never reads ``sys.argv`` by itself, evaluates no string as Python code, leaves
    ``CUDA_VISIBLE_DEVICES`` alone, changes no module of RecBole or yaml, and refuses keys that nothing reads.

    Args:
        model: name or class; default: key ``model``.
        dataset: name; default: key ``dataset``.
        config_file_list: yaml files, later ones win.
        config_dict: keys and values; a str that is a literal of another type is converted, as RecBole does.
        cmd_line: arguments such as ``sys.argv[1:]``; None: none. ``config_files`` in it is read here too.

    Attributes:
        spec: what the model class declares.
        origins: where the value of each key that the user set came from.

    Raises:
        ValueError: for unknown keys, bad values, and combinations that cannot work.
        FileNotFoundError: for a config file that does not exist.
    """

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Iterable[str | Path] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        cmd_line: Sequence[str] | None = None,
    ) -> None:
        self.origins: dict[str, str] = {}
        self._arguments = parse_command_line(cmd_line or [])
        files = list(config_file_list or [])
        in_arguments = self._arguments.pop("config_files", None)
        if in_arguments:
            files += [name for name in str(in_arguments).split() if name not in map(str, files)]
        super().__init__(model, dataset, files, config_dict)

    # ------------------------------------------------------------------ RecBole's steps, in its order

    def compatibility_settings(self) -> None:
        recbole_repairs.install()

    def _init_parameters_category(self) -> None:
        super()._init_parameters_category()
        # RecBole appends each dataset's keys to these lists, which belong to its module.
        self.parameters = {category: list(keys) for category, keys in self.parameters.items()}

    def _build_yaml_loader(self) -> type:
        return YamlLoader

    def _load_config_files(self, file_list: list[str | Path]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for file in file_list or []:
            content = load_yaml(config_file(file))
            values.update(content)
            self.origins.update({key: f"file {file}" for key in content})
        return values

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        values = {
            key: parse_value(value, key) if isinstance(value, str) else copy.deepcopy(value)
            for key, value in (config_dict or {}).items()
        }
        self.origins.update(dict.fromkeys(values, "config_dict"))
        return values

    def _load_cmd_line(self) -> dict[str, Any]:
        self.origins.update(dict.fromkeys(self._arguments, "command line"))
        return self._arguments

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        model = self.external_config_dict.get("model") if model is None else model
        dataset = self.external_config_dict.get("dataset") if dataset is None else dataset
        for name, value in (("model", model), ("dataset", dataset)):
            if value is None:
                raise ValueError(f"no {name} given: write --{name}=NAME, or set {name} in a config file")
        model_class = get_model(model) if isinstance(model, str) else model
        self.spec = spec_of(model_class)
        return super()._get_model_and_dataset(model_class, str(dataset))

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        overall = load_yaml(PROPERTIES / "overall.yaml")
        dataset_file = PROPERTIES / "dataset" / f"{dataset}.yaml"
        of_dataset = load_yaml(dataset_file) if dataset_file.is_file() else {}
        internal = self.internal_config_dict
        task = self.external_config_dict.get("task", self.spec.task)
        preset = self.external_config_dict.get("preset")
        of_preset = load_preset(preset, model, self.spec.is_llm) if preset else {}
        task_file = PROPERTIES / "task" / f"{task}.yaml"
        of_task = load_yaml(task_file) if task_file.is_file() else {}
        if self.spec.is_llm:
            internal.update(overall)
            internal.update(of_task)
            model_file = PROPERTIES / "model" / f"{model}.yaml"
            internal.update(load_yaml(model_file) if model_file.is_file() else {})
            internal.update(of_dataset)
            internal.update(of_preset)
            return
        defaults = {**overall, **of_task}
        reads_key = self.spec.reads_key
        internal.update({key: defaults[key] for key, known in KEYS.items() if reads_key(key, known)})
        internal["task"] = self.spec.task
        if task:
            protocol = PROTOCOL if task == "ctr" else RANKING_PROTOCOL
            internal.update({key: defaults[key] for key in protocol})
        model_file = PROPERTIES / "model" / f"{model}.yaml"
        internal.update(load_yaml(model_file) if model_file.is_file() else {})
        if task or not (RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml").is_file():
            internal.update(of_dataset)
        else:
            internal.update({key: of_dataset[key] for key in _DATASET_KEYS if key in of_dataset})
        internal.update({key: value for key, value in of_preset.items() if reads_key(key, KEYS.get(key))})

    def _get_final_config_dict(self) -> dict[str, Any]:
        """Merge, then check keys, values and combinations (those with the device: `_init_device`)."""
        internal, external = dict(self.internal_config_dict), dict(self.external_config_dict)
        of_dataset = {task: internal.pop(task, None) or {} for task in TASKS}
        of_user = {task: external.pop(task, None) or {} for task in TASKS}
        for section in (*of_user.values(), external):
            self._check_keys(section)
        task = external.get("task", internal.get("task"))
        if task in TASKS:
            internal = {**internal, **of_dataset[task], **of_user[task]}
        final = self.final_config_dict = {**internal, **external}
        check_values(final, self.origins, self.spec.keys)
        self._set_history_length(final)
        if self.spec.is_llm:
            self._check_combinations(final)
        elif self.spec.family == "conventional":
            self._check_conventional(final)
        elif ignored := sorted(key for key in external if key in KEYS and KEYS[key].llm):
            logger.warning("%s is a model of RecBole: %s has no effect on it", self.model, ", ".join(ignored))
        return final

    def _set_default_parameters(self) -> None:
        final = self.final_config_dict
        user_path = self.external_config_dict.get("data_path")
        if final["task"] == "next_item":
            self._set_eval_mode(final)
        self._set_metrics(final)
        if (
            final["MODEL_TYPE"] == ModelType.SEQUENTIAL
            and self.spec.learns_from == "loss_type"
            and final.get("loss_type") == "CE"
            and "train_neg_sample_args" not in self.external_config_dict
        ):
            # Stock RecBole raises here for a plain SASRec: its default does not fit the model's own default
            # loss.
            final["train_neg_sample_args"] = None
        if final["task"] == "ctr" and self.spec.learns_pairs(final.get("loss_type")):
            # Such a model learns liked items against sampled ones that the user has not met.
            negatives = self.external_config_dict.get("train_neg_sample_args")
            final["train_neg_sample_args"] = negatives or _recbole_defaults()["train_neg_sample_args"]
            final["repeatable"] = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        super()._set_default_parameters()
        final["data_path"] = self._data_folder(user_path, final["data_path"])

    def _init_device(self) -> None:
        final = self.final_config_dict
        if "local_rank" in final:
            self._init_distributed(final)
        else:
            device = self._choose_device(final)
            final.update(device=device, single_spec=True, local_rank=0)
        on_cuda = final["device"].type == "cuda"
        for key, value in SIZES["cuda" if on_cuda else "cpu"].items():
            if final.get(key) == "auto":
                final[key] = value
                logger.info("%s: %s (auto, on %s)", key, value or "all", final["device"].type)
        # RecBole asks for the memory of a CUDA device wherever use_gpu is set.
        final["use_gpu"] = on_cuda
        final["gpu_id"] = str(final["gpu_id"] or "")
        if not on_cuda:
            for key, value, remedy in (
                ("quantization", ("8bit", "4bit"), "leave it out (~)"),
                ("dtype", ("float16",), "use float32, bfloat16 or auto"),
                ("autocast_dtype", ("float16",), "use bfloat16 or leave it out (~)"),
            ):
                if self.spec.reads_key(key, KEYS[key]) and final[key] in value:
                    raise ValueError(
                        f"{self._said(key)} needs a CUDA device, this run is on the CPU: {remedy}"
                    )

    # ------------------------------------------------------------------ checks

    def _said(self, key: str) -> str:
        """``key=value (origin)`` for a message."""
        return f"{key}={self.final_config_dict.get(key)!r} ({self.origins.get(key, 'default')})"

    def valid_keys(self) -> set[str]:
        """Every key that this model, its task or RecBole reads."""
        valid = {*_recbole_defaults(), *KEYS, *RECBOLE_KEYS, *_NAMES, *_DATASET_KEYS, *_UNLISTED_KEYS}
        valid.update(self.internal_config_dict)
        valid.update(key for keys in self.parameters.values() for key in keys)
        for base in self.model_class.__mro__:
            valid |= _recbole_model_keys().get(base.__name__, set())
        return valid | keys_read_by(self.model_class)

    def _check_keys(self, given: Mapping[str, Any]) -> None:
        valid = self.valid_keys()
        problems = [
            f"{key} ({self.origins.get(key, 'ctr')}): {self._hint(key, valid)}"
            for key in given
            if key not in valid
        ]
        if problems:
            raise ValueError(f"unknown configuration key for {self.model}:\n  " + "\n  ".join(problems))

    def _hint(self, key: str, valid: set[str]) -> str:
        owners = [model for model, keys in _recbole_model_keys().items() if key in keys]
        if owners:
            models = ", ".join(owners[:3]) + (", ..." if len(owners) > 3 else "")
            lens = f"; for the lens write lens_config: {{{key}: ...}}" if self.spec.is_llm else ""
            return f"a key of RecBole's {models}, which {self.model} does not read{lens}"
        near = nearest(key, valid, 1)
        return f"did you mean {near[0]}?" if near else "properties/overall.yaml lists the keys of recbole_llm"

    def _set_history_length(self, final: dict[str, Any]) -> None:
        """RecBole's name for the length of an ID history follows ours on our rows."""
        if final.get("task") not in TASKS or final["MODEL_TYPE"] != ModelType.SEQUENTIAL:
            return
        recbole_name, ours = "MAX_ITEM_LIST_LENGTH", "id_history_length"
        given = self.external_config_dict
        if recbole_name in given and ours in given and given[recbole_name] != given[ours]:
            raise ValueError(
                f"{self._said(recbole_name)} and {self._said(ours)} are the same length: set one of them"
            )
        length = given[recbole_name] if recbole_name in given and ours not in given else final[ours]
        final[recbole_name] = final[ours] = length

    def _check_conventional(self, final: Mapping[str, Any]) -> None:
        """A conventional model of ours says itself which tasks it has and which keys it reads."""
        tasks, reads = self.spec.tasks, self.spec.reads
        if final["task"] not in tasks:
            raise ValueError(f"{self._said('task')}: {self.model} needs task: {' or '.join(tasks)}")
        if final["task"] == "ctr" and "loss_type" in self.external_config_dict:
            raise ValueError(
                f"{self._said('loss_type')}: in task ctr {self.model} is trained on labels; leave loss_type out"
            )
        unread = [key for key in self.external_config_dict if not self.spec.reads_key(key, KEYS.get(key))]
        if unread:
            raise ValueError(
                f"{', '.join(map(self._said, unread))}: {self.model} does not read this; of the keys of LLM "
                f"recommenders it reads {', '.join(reads) or 'none'}"
            )

    def _check_combinations(self, final: dict[str, Any]) -> None:
        """What cannot work together, each with the remedy; derived values are filled in."""
        user, said = self.external_config_dict, self._said
        task = self.spec.task
        if final["task"] != task:
            raise ValueError(f"{said('task')}: {self.model} needs task: {task}")
        if task == "next_item":
            self._check_next_item(final)
        elif final["gate"] == "token":
            raise ValueError(
                f"{said('gate')} reads the prompt's tokens, which only the next_item task offers it"
            )
        if task == "ctr" and "id_retrieval" not in user:
            final["id_retrieval"] = _lens_spec(final["lens"]).lens_retrieval or final["id_retrieval"]

        if final["mixed_training"] and final["text_retrieval"] == "recent":
            raise ValueError(
                f"{said('mixed_training')} with {said('text_retrieval')}: each row would be trained twice with the "
                "same history; set text_retrieval: semantic"
            )
        if final["train_rows"] != "all":
            raise ValueError(
                f"{said('train_rows')} is for conventional models: {self.model} learns from few_shot rows in any case"
            )
        if final["gate_inputs"] != "state" and task == "next_item":
            raise ValueError(
                f"{said('gate_inputs')}: in the next_item task the lens's logit is the target's own; set state"
            )
        reads_lens = final["mixer"] != "identity" and final["gate"] != "token"
        if final["tune_lens"] and not (reads_lens or final["lens_residual"]):
            raise ValueError(
                f"{said('tune_lens')}: with {said('mixer')}, {said('gate')} and without lens_residual nothing that is "
                "trained reads the lens; leave tune_lens out"
            )
        for key in ("gate_balance", "gate_entropy"):
            if final[key] and final["mixer"] in ("identity", "dense"):
                raise ValueError(f"{said(key)} with {said('mixer')}: there are no experts to weigh")
        if final["mixer"] == "identity":
            if user.get("gate") is not None:
                raise ValueError(
                    f"{said('gate')} with {said('mixer')}: one plain LoRA has nothing to mix; set gate: ~ or "
                    "another mixer"
                )
            final["gate"] = None
        elif final["gate"] is None:
            raise ValueError(f"{said('mixer')} needs a gate, and {said('gate')}: set e.g. gate: mlp60")
        if final["mixer"] == "expert" and final["lora_r"] % final["num_experts"]:
            raise ValueError(
                f"{said('lora_r')} is not divisible by {said('num_experts')}, and {said('mixer')} cuts the "
                "rank into one slice per expert"
            )
        if final["lora_from"] and final["mixer"] not in ("identity", "dense"):
            raise ValueError(
                f"{said('lora_from')} with {said('mixer')}: A and B of a plain LoRA fit mixer: identity and dense only"
            )
        if final["lora_from"] and user.get("stage_one_share"):  # 0 in the configuration of a saved run
            raise ValueError(
                f"{said('stage_one_share')} with {said('lora_from')}, which stands for stage 1: leave one of them out"
            )
        if final["lora_from"]:
            final["stage_one_share"] = 0.0
        if final["top_k"] is not None:
            if final["mixer"] in ("identity", "dense"):
                raise ValueError(f"{said('top_k')} with {said('mixer')}: there are no experts to choose from")
            if final["top_k"] > final["num_experts"]:
                raise ValueError(f"{said('top_k')} is more than {said('num_experts')}")

        lens = final["lens"]
        if lens is None:
            for key, bad in (
                ("mixer", final["mixer"] != "identity"),
                ("lens_residual", final["lens_residual"]),
                ("lens_rows", final["lens_rows"] != "all"),
                ("tune_lens", final["tune_lens"]),
                ("lens_config", bool(final["lens_config"])),
                ("id_retrieval", final["id_retrieval"] != "recent"),
                (
                    "semantic_vectors",
                    self._retrieves_by_similarity(final) and final["semantic_vectors"] == "lens",
                ),
            ):
                if bad:
                    raise ValueError(
                        f"{said(key)} needs a lens, and {said('lens')}: set lens: DIN or lens: SASRec"
                    )
        else:
            if not _lens_spec(lens).gate_scopes:
                sequential = [
                    n for n, module in recbole_models().items() if ".sequential_recommender." in module
                ]
                near = nearest(lens, sequential)
                hint = f"did you mean {' or '.join(near)}?" if near else "e.g. DIN or SASRec"
                raise ValueError(f"{said('lens')} is not a sequential model of RecBole: {hint}")
            self._resolve_gate_scope(final)
        if final["id_retrieval"] == "semantic" and final["semantic_vectors"] == "lens":
            raise ValueError(
                f"{said('semantic_vectors')} with {said('id_retrieval')}: the lens would be trained on "
                "histories that only the trained lens can choose; set semantic_vectors: backbone"
            )
        if final["lens_rows"] == "without_few_shot" and final["few_shot"] is None:
            raise ValueError(
                f"{said('lens_rows')} with {said('few_shot')}: no rows would be left for the lens"
            )
        final["micro_batch_size"] = min(final["micro_batch_size"], final["train_batch_size"])

    def _check_next_item(self, final: dict[str, Any]) -> None:
        """What the next-item task cannot have: anything that would need the target, or its label."""
        said = self._said
        for key, allowed in (
            ("id_retrieval", "recent"),
            ("text_retrieval", "recent"),
            ("mixed_training", False),
            ("lens_residual", False),
            ("lens_rows", "all"),
            ("lens_ratings", False),
        ):
            if final[key] != allowed:
                raise ValueError(f"{said(key)} is not possible in the next_item task: set {key}: {allowed}")
        if _lens_spec(final["lens"]).sees_target:
            raise ValueError(
                f"{said('lens')} needs the target item, which the next_item task is to find: set lens: SASRec"
            )
        if final["two_stage"] and final["eval_mode"] != "full":
            raise ValueError(f"{said('two_stage')} with {said('eval_mode')}: set eval_mode: full")
        if final["negatives"] == "hard" and final["lens"] is None:
            raise ValueError(f"{said('negatives')} needs a lens, and {said('lens')}: set lens: SASRec")
        if final["generate"] and final["eval_mode"] != "candidates":
            raise ValueError(
                f"{said('generate')} with {said('eval_mode')}: what the LLM writes is matched with stored "
                "candidates; set eval_mode: candidates"
            )

    def _set_eval_mode(self, final: dict[str, Any]) -> None:
        """RecBole's ``eval_args.mode`` from ``eval_mode``. Stored candidates are its uniN with our loader."""
        if "mode" in (self.external_config_dict.get("eval_args") or {}):
            raise ValueError(
                f"{self._said('eval_args')}: in the next_item task the mode is set by eval_mode: candidates, full, "
                "uniN or popN; leave mode out"
            )
        mode = final["eval_mode"]
        if mode == "full" and self.spec.is_llm and "eval_batch_size" not in self.external_config_dict:
            final["eval_batch_size"] = ROWS_OF_A_CATALOGUE
        mode = f"uni{final['num_negatives']}" if mode == "candidates" else mode
        final["eval_args"] = {**final["eval_args"], "mode": {"valid": mode, "test": mode}}

    def _resolve_gate_scope(self, final: dict[str, Any]) -> None:
        """``auto``: what the lens offers; a state made of a retrieved history has seen the target, too."""
        said, by_target = self._said, final["id_retrieval"] != "recent"
        sees_target = by_target or _lens_spec(final["lens"]).sees_target
        if final["gate_scope"] == "user_item" and not sees_target:
            raise ValueError(
                f"{said('gate_scope')}: {said('lens')} does not see the target item, as lens: DIN "
                "does; set gate_scope: user or auto"
            )
        if final["gate_scope"] == "user" and by_target:
            raise ValueError(
                f"{said('gate_scope')} with {said('id_retrieval')}: the history is chosen by its likeness "
                "to the target, so no state made from it is the user's alone; set id_retrieval: recent or "
                "gate_scope: auto"
            )
        if final["gate_scope"] == "auto":
            final["gate_scope"] = "user_item" if sees_target else "user"

    @staticmethod
    def _retrieves_by_similarity(final: Mapping[str, Any]) -> bool:
        return final["id_retrieval"] == "semantic" or final["text_retrieval"] != "recent"

    def _set_metrics(self, final: dict[str, Any]) -> None:
        """AUC, LogLoss, ACC and GAUC together on labelled rows; check what RecBole finds too late."""
        from recbole_llm.evaluation.metrics import labeled_metrics, register_metrics

        register_metrics()
        if unknown := sorted(set(final["eval_args"]) - {"split", "order", "group_by", "mode"}):
            raise ValueError(
                f"{self._said('eval_args')}: {unknown[0]} is not one of split, order, group_by and mode"
            )
        mode = final["eval_args"].get("mode", "full")
        labeled = (set(mode.values()) if isinstance(mode, Mapping) else {mode}) == {"labeled"}
        if final.get("task") == "ctr" and not labeled:
            raise ValueError(
                f"{self._said('eval_args')}: task ctr is evaluated on labelled rows; set mode: labeled"
            )
        metrics = [final["metrics"]] if isinstance(final["metrics"], str) else list(final["metrics"])
        metrics = labeled_metrics(metrics) if labeled else metrics
        for name in metrics:
            if name.lower() not in metric_types:
                near = nearest(name, [known for known in metric_types if known != "labeledgauc"], 1)
                hint = f": did you mean {near[0].upper()}?" if near else ""
                raise ValueError(f"{self._said('metrics')}: there is no metric named {name!r}{hint}")
        if labeled and (ranking := [n for n in metrics if metric_types[n.lower()] == EvaluatorType.RANKING]):
            raise ValueError(
                f"{self._said('metrics')}: {', '.join(ranking)} rank candidates, the mode labeled has none; "
                "use AUC, LogLoss, ACC, GAUC, MAE or RMSE"
            )
        if final["valid_metric"].lower() == "labeledgauc":
            final["valid_metric"] = "GAUC"
        self._check_valid_metric(final, metrics)
        final["metrics"] = metrics

    def _check_valid_metric(self, final: Mapping[str, Any], metrics: list[str]) -> None:
        """`valid_metric` must be a key of the result, or RecBole fails after the first epoch."""
        name, at, k = final["valid_metric"].partition("@")
        results = ["gauc" if metric.lower() == "labeledgauc" else metric.lower() for metric in metrics]
        said = self._said("valid_metric")
        if name.lower() not in results:
            raise ValueError(f"{said} is not among {self._said('metrics')}")
        topk = final["topk"] if isinstance(final["topk"], list) else [final["topk"]]
        at_k = metric_types[name.lower()] == EvaluatorType.RANKING and name.lower() != "gauc"
        if at_k and (not at or k not in map(str, topk)):
            raise ValueError(f"{said} must name one of {self._said('topk')}, e.g. {name}@{topk[0]}")
        if at and not at_k:
            raise ValueError(f"{said}: {name} has no @k")

    def _data_folder(self, user_path: str | None, recbole_path: str) -> str:
        """``data_path/dataset``; for ml-100k RecBole's own copy, unless the user's data_path holds one."""
        if user_path is None:
            return os.path.normpath(recbole_path)
        base = os.path.expanduser(user_path)
        folder = os.path.join(base, self.dataset)
        if os.path.isdir(folder):
            return folder
        if os.path.isfile(os.path.join(base, f"{self.dataset}.inter")):
            return base  # the dataset's own folder was given
        if self.dataset == "ml-100k":
            logger.info("no ml-100k in %s: using the copy inside RecBole", base)
            return os.path.normpath(recbole_path)
        return folder

    # ------------------------------------------------------------------ device

    def _choose_device(self, final: Mapping[str, Any]) -> torch.device:
        """`device` decides; where it is ``auto``, RecBole's ``use_gpu: False`` and ``gpu_id`` do."""
        user, wanted = self.external_config_dict, final["device"]
        gpu_id = user.get("gpu_id", 0)
        gpu_id = (
            str(gpu_id[0] if isinstance(gpu_id, (tuple, list)) and gpu_id else gpu_id).split(",")[0].strip()
        )
        off = [
            self._said(key)
            for key, is_off in (
                ("use_gpu", user.get("use_gpu") is False),
                ("gpu_id", "gpu_id" in user and (user["gpu_id"] is None or gpu_id in ("", "()", "[]", "-1"))),
            )
            if is_off
        ]
        if off:
            if wanted.startswith("cuda"):
                raise ValueError(f"{self._said('device')} contradicts {off[0]}: leave one of them out")
            logger.info("device: cpu, because of %s", off[0])
            return torch.device("cpu")
        if wanted == "cpu":
            return torch.device("cpu")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            if wanted == "auto":
                logger.info("device: cpu (torch %s sees no CUDA device)", torch.__version__)
                return torch.device("cpu")
            build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
            raise ValueError(
                f"{self._said('device')}: torch {torch.__version__}, {build}, sees no CUDA device "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); use --device=cpu"
            )
        key = "device"
        if wanted == "auto" and "gpu_id" in user:
            key, wanted = "gpu_id", f"cuda:{gpu_id}"
        if wanted in ("auto", "cuda"):
            return torch.device("cuda")
        index = wanted.removeprefix("cuda:")
        if not index.isdigit() or int(index) >= count:
            seen = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))
            raise ValueError(f"{self._said(key)}: no such device; torch sees {seen}")
        device = torch.device("cuda", int(index))
        torch.cuda.set_device(device)
        return device

    def _init_distributed(self, final: dict[str, Any]) -> None:
        """One process of several, as RecBole's ``run(..., nproc=N)`` starts them: rank r takes cuda:r."""
        rank = final["local_rank"]
        if not torch.cuda.is_available() or rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {rank} of nproc={final['nproc']} needs the device cuda:{rank}; torch sees "
                f"{torch.cuda.device_count()} CUDA devices"
            )
        torch.distributed.init_process_group(
            backend="nccl",
            rank=rank + final["offset"],
            world_size=final["world_size"],
            init_method=f"tcp://{final['ip']}:{final['port']}",
        )
        torch.cuda.set_device(rank)
        final.update(device=torch.device("cuda", rank), single_spec=False)
        if rank != 0:
            final.update(state="error", show_progress=False, verbose=False)

    # ------------------------------------------------------------------ out

    def __setstate__(self, state: dict) -> None:
        """In another process RecBole has to be repaired, and to be told of our metrics, there, too."""
        from recbole_llm.evaluation.metrics import register_metrics

        recbole_repairs.install()
        get_model(state["model"])  # has repairs of its own
        register_metrics()
        self.__dict__.update(state)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration of an earlier run from its `as_dict`, with the device chosen anew.

        Args:
            values: what `as_dict` gave, possibly read back from JSON; changed values are checked as any
                others.
        """
        given = {key: value for key, value in values.items() if key not in _DERIVED_KEYS}
        if given.get("task") == "next_item":  # the mode follows eval_mode
            given["eval_args"] = {k: v for k, v in given["eval_args"].items() if k != "mode"}
        negatives = given.get("train_neg_sample_args")
        if isinstance(negatives, Mapping) and negatives.get("distribution") == "none":
            given["train_neg_sample_args"] = None
        path = Path(str(given.get("data_path", "")))
        if path.name == given.get("dataset"):
            given["data_path"] = str(path.parent)  # the final value has the dataset's own folder in it
        return cls(given.pop("model"), given.pop("dataset"), config_dict=given)

    def as_dict(self) -> dict[str, Any]:
        """The final values as JSON holds them: enums by name, devices and paths as text, tuples as lists."""
        return {str(key): _plain(value) for key, value in self.final_config_dict.items()}


def _lens_spec(lens: str | None) -> ModelSpec:
    """The properties of a lens by its name; no lens and an unknown name are models that cannot be a lens."""
    known = lens in BUILT_IN_MODELS or lens in recbole_models()
    return spec_of(get_model(lens)) if known else ModelSpec("recbole")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    return str(value)
