"""RecBole's Config, extended: defaults and keys of this package, and errors that say what to do.

Precedence, lowest first, as RecBole has it::

    RecBole's overall < sample < dataset yaml  <  properties/: overall < task < model < dataset yaml (built-in LLM
        recommenders only) < preset < config files < config_dict < command line < changes behind the model's name

For other models the defaults in properties/ are not loaded, but for the keys that the model reads; the dataset yaml in
properties/ is used where RecBole has none. ``task: ctr`` puts such a model on the labelled protocol of this package,
``task: next_item`` on its samples and candidates.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType

from recbole_llm.config.checks import (
    TASKS,
    Values,
    check_conventional,
    check_cuda,
    check_keys_of_task,
    check_llm,
    check_training,
    resolve_eval_mode,
    resolve_history_length,
    resolve_metrics,
)
from recbole_llm.config.command_line import NAMES, parse_command_line, parse_model, parse_value
from recbole_llm.config.device import choose_device, join_launched, join_process_group, resolve_auto_sizes
from recbole_llm.config.keys import KEYS, RECBOLE_KEYS, check_values, keys_of_other_tasks
from recbole_llm.config.layout import layout_defaults, layout_of
from recbole_llm.config.model_spec import spec_of
from recbole_llm.config.recbole_defaults import (
    UNLISTED_KEYS,
    keys_in_source,
    recbole_defaults,
    recbole_model_keys,
)
from recbole_llm.config.sources import config_file, data_folder, load_preset
from recbole_llm.evaluation.metrics import register_metrics
from recbole_llm.registry import get_model
from recbole_llm.utils import recbole_repairs
from recbole_llm.utils.distributed import launched
from recbole_llm.utils.files import plain
from recbole_llm.utils.names import nearest
from recbole_llm.utils.yaml_files import PROPERTIES, RECBOLE_PROPERTIES, YamlLoader, load_yaml

logger = logging.getLogger(__name__)

SAVED_RUN = "saved run"
"""Origin of all values of a configuration that was read back from an earlier run."""

PROTOCOL = (
    "train_neg_sample_args",
    "eval_args",
    "repeatable",
    "threshold",
    "normalize_all",
    "load_col",
    "filter_inter_by_user_or_item",
    "metrics",
    "valid_metric",
)
"""Keys of properties/overall.yaml that make the labelled protocol; a RecBole model gets them with ``task: ctr``."""

RANKING_PROTOCOL = (*(key for key in PROTOCOL if key != "train_neg_sample_args"), "topk")
"""Likewise for ``task: next_item``. Negatives for the training stay what the model's own loss needs."""

RECBOLE_WRITES = frozenset(
    {"MASK_INDEX", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS", "INVERSE_ITEM_SEQ", "CROP_ITEM_SEQ", "CROP_ITEM_SEQ_LEN",
     "REORDER_ITEM_SEQ", "feature_num"}
)  # fmt: skip
"""What RecBole itself writes into a finished configuration: names of the fields that a transform adds
(data/transform.py), and the number of fields (kd_dagfm.py, which also copies each ``t_KEY`` to ``KEY``)."""

_DATASET_KEYS = ("text", *TASKS)

# Derived by RecBole or from this machine, so no part of what `from_dict` takes over.
_DERIVED_KEYS = (
    "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "valid_metric_bigger", "valid_neg_sample_args",
    "test_neg_sample_args", "single_spec", "local_rank", "use_gpu", "gpu_id",
)  # fmt: skip


class Config(RecBoleConfig):
    """The configuration of a run: RecBole's, with the keys of :data:`recbole_llm.config.keys.KEYS`.

    Built once and frozen. Unlike RecBole's it never reads ``sys.argv`` by itself, evaluates no string as Python code,
    leaves ``CUDA_VISIBLE_DEVICES`` alone, changes no module of RecBole or yaml, and refuses keys that nothing reads.

    Args:
        model: name, possibly with changes (``"RecLoRA gate=uniform"``), or class; default: key ``model``.
        dataset: name; default: key ``dataset``.
        config_file_list: yaml files, later ones win.
        config_dict: keys and values; a str that is a literal of another type is converted, as RecBole does.
        cmd_line: arguments such as ``sys.argv[1:]``; None: none. ``config_files`` in it is read here too.
        origins: where values of ``config_dict`` come from, by key, for messages; default: ``config_dict``.

    Attributes:
        spec: what the model class declares.
        origins: where the value of each key that the user or the dataset's yaml set came from.
        given_origins: what was given as ``origins``.

    Raises:
        ValueError: for unknown keys, bad values, and combinations that cannot work.
        FileNotFoundError: for a config file that does not exist.
    """

    parameters: dict[str, list[str]]

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Iterable[str | Path] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        cmd_line: Sequence[str] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.origins: dict[str, str] = {}
        self.given_origins = dict(origins or {})
        self._arguments = parse_command_line(cmd_line or [])
        files = list(config_file_list or [])
        in_arguments = self._arguments.pop("config_files", None)
        if in_arguments:
            files += [name for name in str(in_arguments).split() if name not in map(str, files)]
        super().__init__(model, dataset, files, config_dict)
        self._frozen = True

    # ------------------------------------------------------------------ RecBole's steps, in its order

    def compatibility_settings(self) -> None:
        recbole_repairs.install()
        register_metrics()

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
            key: parse_value(value, key)
            if isinstance(value, str) and key not in NAMES
            else copy.deepcopy(value)
            for key, value in (config_dict or {}).items()
        }
        self.origins.update({key: self.given_origins.get(key, "config_dict") for key in values})
        return values

    def _load_cmd_line(self) -> dict[str, Any]:
        self.origins.update(dict.fromkeys(self._arguments, "command line"))
        return self._arguments

    def _merge_external_config_dict(self) -> None:
        """As RecBole's; but a ``text`` section changes single keys of one from a weaker source."""
        super()._merge_external_config_dict()
        sources = (self.file_config_dict, self.variable_config_dict, self.cmd_config_dict)
        sections = [source["text"] for source in sources if isinstance(source.get("text"), Mapping)]
        if len(sections) > 1:
            self.external_config_dict["text"] = {
                key: value for section in sections for key, value in section.items()
            }

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        user = self.external_config_dict
        model = user.get("model") if model is None else model
        dataset = user.get("dataset") if dataset is None else dataset
        for name, value in (("model", model), ("dataset", dataset)):
            if value is None:
                raise ValueError(f"no {name} given: write --{name}=NAME, or set {name} in a config file")
        if isinstance(model, str):
            name, changes = parse_model(model)
            self.origins.update(dict.fromkeys(changes, f"model {model!r}"))
            user.update(changes)
            model = get_model(name)
        recbole_repairs.model_class(model)
        self.spec = spec_of(model)
        return super()._get_model_and_dataset(model, str(dataset))

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        # A class that a user derives from a model has the defaults of that model.
        folders = (PROPERTIES / "model", RECBOLE_PROPERTIES / "model")
        bases = [base.__name__ for base in model_class.__mro__]
        model = next((b for b in bases if any((f / f"{b}.yaml").is_file() for f in folders)), model)
        super()._load_internal_config_dict(model, model_class, dataset)
        internal, user, reads = self.internal_config_dict, self.external_config_dict, self.spec.reads_key
        task = user.get("task", self.spec.task)
        of_model, of_dataset, of_task = (
            load_yaml(file) if file.is_file() else {}
            for file in (
                PROPERTIES / "model" / f"{model}.yaml",
                PROPERTIES / "dataset" / f"{dataset}.yaml",
                PROPERTIES / "task" / f"{task}.yaml",
            )
        )
        for key in (*of_dataset, *(of_dataset.get(task) or ())):
            self.origins.setdefault(key, f"file {PROPERTIES / 'dataset' / dataset}.yaml")
        defaults = {**load_yaml(PROPERTIES / "overall.yaml"), **of_task}
        preset = user.get("preset")
        of_preset = load_preset(preset, model, self.spec.is_llm) if preset else {}
        if self.spec.is_llm:
            layout = user.get("layout", {**defaults, **of_model}["layout"])
            template = user.get("prompt", of_dataset.get("prompt"))
            if "layout" not in user and layout == "stream" and layout_of(template) == "prompt":
                layout = "prompt"
                logger.warning(
                    "layout: prompt, since the template %s is that of a prompt per sample", template
                )
            of_layout = layout_defaults(layout, task, model) | {"layout": layout}
            internal.update({**defaults, **of_model, **of_layout, **of_dataset, **of_preset})
            return
        internal.update({key: defaults[key] for key, known in KEYS.items() if reads(key, known)})
        internal["task"] = self.spec.task
        if task:
            protocol = PROTOCOL if task == "ctr" else RANKING_PROTOCOL
            internal.update({key: defaults[key] for key in protocol})
        internal.update(of_model)
        if task or not (RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml").is_file():
            if not task:  # own data: all columns instead of RecBole's user and item alone
                internal["load_col"] = defaults["load_col"]
            internal.update(of_dataset)
        else:
            internal.update({key: of_dataset[key] for key in _DATASET_KEYS if key in of_dataset})
        internal.update({key: value for key, value in of_preset.items() if reads(key, KEYS.get(key))})

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
        if internal.get("text") and external.get("text"):  # key by key
            final["text"] = {**internal["text"], **external["text"]}
        check_values(final, self.origins, self.spec.keys)
        values = self._values()
        resolve_history_length(values)
        check_training(values)
        check_keys_of_task(values)
        if self.spec.is_llm:
            check_llm(values)
        elif self.spec.family == "conventional":
            check_conventional(values)
        elif ignored := sorted(key for key in external if not self.spec.reads_key(key, KEYS.get(key))):
            logger.warning("%s is a model of RecBole: %s has no effect on it", self.model, ", ".join(ignored))
        return final

    def _set_default_parameters(self) -> None:
        final, user, values = self.final_config_dict, self.external_config_dict, self._values()
        if final["task"] == "next_item":
            resolve_eval_mode(values)
        resolve_metrics(values)
        by_loss_type = final["MODEL_TYPE"] == ModelType.SEQUENTIAL and self.spec.learns_from == "loss_type"
        if by_loss_type and final.get("loss_type") == "CE" and "train_neg_sample_args" not in user:
            # RecBole raises here for a plain SASRec: its default does not fit the model's own default loss.
            final["train_neg_sample_args"] = None
        if final["task"] == "ctr" and self.spec.learns_pairs(final.get("loss_type")):
            # Such a model learns liked items against sampled ones that the user has not met.
            negatives = user.get("train_neg_sample_args") or recbole_defaults()["train_neg_sample_args"]
            final["train_neg_sample_args"] = copy.deepcopy(negatives)
            final["repeatable"] = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if (
            final["task"] == "next_item"
            and self.spec.family == "recbole"
            and self.spec.learns_from == "labels"
        ):
            # There are no labels here: RecBole gives targets the label 1 and sampled items the label 0.
            negatives = user.get("train_neg_sample_args") or recbole_defaults()["train_neg_sample_args"]
            final["train_neg_sample_args"] = copy.deepcopy(negatives)
        negatives = final["train_neg_sample_args"]
        if self.spec.is_llm and isinstance(negatives, Mapping) and negatives.get("distribution") != "none":
            logger.warning(
                "%s is ignored: %s is trained on the samples of the data, without sampled negatives",
                values.said("train_neg_sample_args"),
                self.model,
            )
            final["train_neg_sample_args"] = None
        try:
            super()._set_default_parameters()
        except NotImplementedError as error:  # RecBole's, for metrics that the mode cannot have
            raise ValueError(f"{values.said('eval_args')} with {values.said('metrics')}: {error}") from error
        user_path = user.get("data_path")
        final["data_path"], replaced = data_folder(self.dataset, user_path, final["data_path"])
        if replaced:
            logger.info("no %s in %s: using the copy inside RecBole", self.dataset, user_path)

    def _init_device(self) -> None:
        final, values = self.final_config_dict, self._values()
        spawned = "local_rank" in final  # by RecBole's run(..., nproc=N)
        if spawned:
            join_process_group(final)
        else:
            device = choose_device(final["device"], self.external_config_dict, values.said)
            final.update(device=device, single_spec=True, local_rank=0)
        resolve_auto_sizes(final)
        if not spawned and launched().several:
            join_launched(final, self.model, self.spec.is_llm)
        # RecBole asks for the memory of a CUDA device wherever use_gpu is set.
        final["use_gpu"] = final["device"].type == "cuda"
        final["gpu_id"] = str(final["gpu_id"] or "")
        check_cuda(values)

    # ------------------------------------------------------------------ checks

    def _values(self) -> Values:
        """What the checks look at."""
        return Values(
            self.model,
            self.spec,
            self.final_config_dict,
            self.external_config_dict,
            self.origins,
            self.internal_config_dict,
        )

    def valid_keys(self) -> set[str]:
        """Every key that this model, its task or RecBole reads."""
        valid = {*recbole_defaults(), *KEYS, *RECBOLE_KEYS, *NAMES, *_DATASET_KEYS, *UNLISTED_KEYS}
        valid.update(self.internal_config_dict)
        valid.update(key for keys in self.parameters.values() for key in keys)
        for base in self.model_class.__mro__:
            valid |= recbole_model_keys().get(base.__name__, set())
        return valid | keys_in_source(self.model_class)

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
        owners = [model for model, keys in recbole_model_keys().items() if key in keys]
        if owners:
            models = ", ".join(owners[:3]) + (", ..." if len(owners) > 3 else "")
            lens = f"; for the lens write lens_config: {{{key}: ...}}" if self.spec.is_llm else ""
            return f"a key of RecBole's {models}, which {self.model} does not read{lens}"
        near = nearest(key, valid, 1)
        return f"did you mean {near[0]}?" if near else "properties/overall.yaml lists the keys of recbole_llm"

    # ------------------------------------------------------------------ a frozen configuration, and others made of it

    def __setitem__(self, key: str, value: Any) -> None:
        teacher = f"t_{key}" in self.final_config_dict if isinstance(key, str) else False
        if self.__dict__.get("_frozen") and key not in RECBOLE_WRITES and not teacher:
            raise TypeError(
                f"the configuration is frozen: make another one with config.replace({key}={value!r})"
            )
        super().__setitem__(key, value)

    def replace(self, **changes: Any) -> Config:
        """The configuration with other values of some keys, built and checked from what the user gave.

        Raises:
            ValueError: as the constructor.
        """
        return type(self)(
            self.model_class, self.dataset, config_dict={**self.external_config_dict, **changes}
        )

    def override(self, **values: Any) -> Config:
        """A copy with other final values: nothing is checked, and nothing is derived from them.

        For what a run works out itself (a folder, a device, the size of its data), and for the parts of RecBole that
        need a configuration of their own.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.final_config_dict = {**self.final_config_dict, **values}
        return other

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration of an earlier run from its `as_dict`, with the device chosen again.

        Args:
            values: what `as_dict` gave, possibly read back from JSON; changed values are checked as any others.
        """
        model, task = values["model"], values.get("task")
        spec = spec_of(get_model(model) if isinstance(model, str) else model)
        # Runs from before keys of the other task were refused may hold any value of them.
        left_out = {"model", "dataset", *_DERIVED_KEYS, *keys_of_other_tasks(task, spec.keys)}
        given = {key: value for key, value in values.items() if key not in left_out}
        if task == "next_item":  # the mode follows eval_mode
            given["eval_args"] = {k: v for k, v in given["eval_args"].items() if k != "mode"}
        if task == "ctr" and spec.family == "conventional":
            given.pop("loss_type", None)  # a default of the model's yaml that its labelled form does not read
        negatives = given.get("train_neg_sample_args")
        if isinstance(negatives, Mapping) and negatives.get("distribution") == "none":
            given["train_neg_sample_args"] = None
        path = Path(str(given.get("data_path", "")))
        if path.name == values["dataset"]:
            given["data_path"] = str(path.parent)  # the final value has the dataset's own folder in it
        config = cls(model, values["dataset"], config_dict=given)
        config.origins = dict.fromkeys(config.origins, SAVED_RUN)
        return config

    def as_dict(self) -> dict[str, Any]:
        """The final values as JSON holds them: enums by name, devices and paths as text, tuples as lists."""
        return {str(key): plain(value) for key, value in self.final_config_dict.items()}

    def __setstate__(self, state: dict) -> None:
        """In another process RecBole has to be repaired, and to be told of the metrics, there, too."""
        recbole_repairs.install()
        recbole_repairs.model_class(state["model_class"])
        register_metrics()
        self.__dict__.update(state)
