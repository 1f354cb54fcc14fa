"""Which runs a comparison has: several models, with several seeds, on the same samples and candidates.

Two ways lead here. ``--model=DIN,TALLRec,RecLoRA --seeds=3`` compares models as equals, in a folder of their own.
``compare_with`` adds models to a single run, in a folder below it. Either way each (model, seed) is a run of its own
with its own defaults and its own folder; the keys that decide which samples are tested and what targets are ranked
among are the same for all. Running them is the task of :mod:`recbole_llm.comparison.running`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recbole_llm.comparison.controls import control_models
from recbole_llm.config.command_line import parse_model, slug
from recbole_llm.config.configurator import Config
from recbole_llm.config.keys import KEYS, RUN_ONLY_KEYS, SHARED_KEYS, VOLATILE_KEYS, keys_not_passed_to
from recbole_llm.config.model_spec import spec_of
from recbole_llm.config.sources import given_values
from recbole_llm.registry import get_model
from recbole_llm.utils.run_files import RESULT_FILE

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
FOLDER = "compare"


@dataclass(frozen=True)
class PlannedRun:
    """One model with one seed.

    Attributes:
        text: the model as requested, ``"iLoRA gate=uniform"``; its name in the comparison.
        config: its configuration.
        folder: where its result is, or will be.
        arguments: of :class:`Config`, by name: the same configuration in another process.
    """

    text: str
    config: Config
    folder: Path
    arguments: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.folder / RESULT_FILE).is_file()

    def __str__(self) -> str:
        return f"{self.text}, seed {self.config['seed']}"


@dataclass(frozen=True)
class Plan:
    """A comparison: its folder, its runs in the order of running, and the request.

    Attributes:
        given: by model, the values that the user gave for all models and that this one knows.
    """

    folder: Path
    runs: list[PlannedRun]
    models: list[str]
    seeds: list[int]
    subject: str
    first: Config
    given: dict[str, dict[str, Any]]

    def with_values(self, chosen: Mapping[str, Mapping[str, Any]]) -> Plan:
        """The plan with further values for some models, by their text; a hash of them is part of a run's folder."""
        runs = []
        for run in self.runs:
            if values := chosen.get(run.text):
                where = run.folder.with_name(f"{run.folder.name}-{_hash(dict(values))[:8]}")
                given = {**self.given[run.text], **values}
                run = plan_run(self.first, run.text, given, where, run.config["seed"])
            runs.append(run)
        return replace(self, runs=runs)


def plan_run(
    first: Config,
    text: str,
    given: Mapping[str, Any],
    folder: Path,
    seed: int | None = None,
    name: str | None = None,
) -> PlannedRun:
    """One model on the samples of ``first``.

    Args:
        first: decides samples and candidates.
        text: the model and its changes.
        given: values that the user gave for all models.
        folder: of the run.
        seed: of the run; default: that of ``first``.
        name: of the run, instead of ``text``.

    Raises:
        ValueError: if the model's changes would lead to other samples, or the configuration cannot work.
    """
    model, changes = parse_model(text)
    spec = spec_of(get_model(model))
    unread = {key for key, known in KEYS.items() if not spec.reads_key(key, known)}
    values = {key: value for key, value in given.items() if key not in RUN_ONLY_KEYS and key not in unread}
    for key in SHARED_KEYS:  # also where the first model has a default
        value = first[key]
        if key in changes and changes[key] != value:
            raise ValueError(
                f"{text!r} changes {key}, which decides samples or candidates and must be the same for all models"
            )
        follows = key == "eval_args" and first["task"] == "next_item"  # eval_mode sets the mode
        values[key] = {k: v for k, v in value.items() if k != "mode"} if follows else value
    values["seed"] = first["seed"] if seed is None else seed
    values |= changes | {"run_name": text, "output_dir": str(folder), "compare_with": None}
    origins = {**first.given_origins, **first.origins, **dict.fromkeys(changes, f"model {text!r}")}
    arguments = {"model": model, "dataset": first.dataset, "config_dict": values, "origins": origins}
    return PlannedRun(name or text, Config(**arguments), folder, arguments)


def check_models(first: Config, folder: Path) -> list[PlannedRun]:
    """The runs of all models of ``compare_with``, so that a mistake shows before anything is computed.

    Raises:
        ValueError: for a model that cannot be run, or where models would not be tested on the same samples.
    """
    wanted = first["compare_with"]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    if wanted and (what := _no_common_samples(first)):
        if "compare_with" in first.origins:
            raise ValueError(f"compare_with: {what}")
        logger.warning("compare_with: %s is left out, %s", ", ".join(wanted), what)
        wanted = []
    runs = []
    for text in wanted:
        left_out = keys_not_passed_to(spec_of(get_model(parse_model(text)[0])).is_llm)
        given = {key: value for key, value in first.external_config_dict.items() if key not in left_out}
        runs.append(plan_run(first, text, given, folder / FOLDER / slug(text)))
    return runs


def _no_common_samples(config: Config) -> str | None:
    """Why models cannot be compared under this protocol, if they cannot."""
    if config["task"] is None:
        return "RecBole's own protocols keep no samples to compare on; set task: ctr or task: next_item"
    if not config["read_test"]:
        return "read_test: False leaves no scores to compare; leave it out"
    if config["task"] == "next_item" and config["eval_mode"] not in ("candidates", "full"):
        return (
            f"eval_mode: {config['eval_mode']} draws other negatives for every model; use candidates or full"
        )
    return None


def make_plan(
    models: Sequence[str],
    dataset: str | None,
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] | None = None,
) -> Plan:
    """Every run of a comparison, all configurations checked, nothing computed.

    The samples are those of the first built-in LLM recommender, or of the first model where there is none. A value that
    the user gives for all models goes to those that know the key.

    Raises:
        ValueError: for models of different tasks, a key that no model knows, two equal models, or what
            :func:`plan_run` refuses.
    """
    given, origins = given_values(config_file_list, config_dict, cmd_line)
    dataset = dataset or given.get("dataset")
    names = {text: parse_model(text)[0] for text in models}
    twice = sorted({text for text in models if list(models).count(text) > 1})
    if twice:
        raise ValueError(f"the model {twice[0]!r} is given twice")
    specs = {text: spec_of(get_model(name)) for text, name in names.items()}
    own = {text: spec.task for text, spec in specs.items() if spec.is_llm and spec.task}
    task = _common_task(own, given, [spec.task for spec in specs.values() if spec.task])
    preset = {"preset": given["preset"]} if given.get("preset") else {}
    known = {
        text: Config(name, dataset, config_dict={**_for_task(task, text in own), **preset}).valid_keys()
        for text, name in names.items()
    }
    nobody = [key for key in given if not any(key in keys for keys in known.values())]
    anchor = next(iter(own), models[0])
    if nobody:  # the error names the nearest key
        Config(names[anchor], dataset, config_dict={nobody[0]: given[nobody[0]]}, origins=origins)

    def values(text: str) -> dict[str, Any]:
        mine = {key: value for key, value in given.items() if key in known[text]}
        return {**mine, **_for_task(task, text in own)}

    first = Config(
        names[anchor], dataset, config_dict={**values(anchor), "compare_with": None}, origins=origins
    )
    if what := _no_common_samples(first):
        raise ValueError(f"several models: {what}")
    root = Path(first["output_dir"] or first["checkpoint_dir"])
    folder = root / f"compare-{first.dataset}-{_shared_hash(first, given)}"
    seeds = [first["seed"] + number for number in range(first["seeds"])]
    models = list(models)
    if first["controls"]:
        controls = control_models(plan_run(first, anchor, values(anchor), folder).config, anchor)
        known |= dict.fromkeys(controls, known[anchor])
        own |= dict.fromkeys(controls, task)
        models += [text for text in controls if text not in models]
    subject = first["subject"] or (anchor if first["controls"] else models[-1])
    if subject not in models:
        raise ValueError(f"subject: {subject!r} is none of the models {', '.join(models)}")
    runs = [
        plan_run(first, text, values(text), folder / f"{slug(text)}-seed{seed}", seed)
        for seed in seeds
        for text in models
    ]
    return Plan(folder, runs, models, seeds, subject, first, {text: values(text) for text in models})


def _common_task(own: Mapping[str, str], given: Mapping[str, Any], defaults: Sequence[str]) -> str:
    """The task of the LLM recommenders, else the one given, else the default of built-in conventional models."""
    tasks = dict.fromkeys(own.values())
    if len(tasks) > 1:
        by_task = "; ".join(f"{task}: {', '.join(t for t in own if own[t] == task)}" for task in tasks)
        raise ValueError(f"models of different tasks cannot be compared ({by_task})")
    task = next(iter(tasks), None) or given.get("task") or next(iter(defaults), None)
    if task is None:
        raise ValueError(
            "these are models of RecBole: choose the task to compare, --task=ctr or --task=next_item"
        )
    return task


def _for_task(task: str, own: bool) -> dict[str, Any]:
    return {} if own else {"task": task}


def _shared_hash(first: Config, given: Mapping[str, Any]) -> str:
    """Of everything shared by all models: the same command finds its folder again, also with more models."""
    left_out = (VOLATILE_KEYS | RUN_ONLY_KEYS) - {"preset"}
    shared = {key: first[key] for key in SHARED_KEYS}
    shared |= {key: value for key, value in given.items() if key not in left_out}
    return _hash(shared | {"dataset": first.dataset, "seed": first["seed"]})[:10]


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def is_comparison(config_file_list: Sequence[str] | None, cmd_line: Sequence[str]) -> bool:
    """Whether a command with one model still asks for several runs: by ``seeds``, ``controls`` or ``search``."""
    given, _ = given_values(config_file_list, None, cmd_line)
    return given.get("seeds", 1) not in (None, 1) or any(given.get(key) for key in ("controls", "search"))


def describe(plan: Plan) -> str:
    """What a comparison would run, a line per run."""
    lines = [
        f"dry run: {len(plan.runs)} runs on {plan.first.dataset}, in {plan.folder}; subject {plan.subject}"
    ]
    return "\n".join([*lines, *(f"  {run}" + (" (finished)" if run.finished else "") for run in plan.runs)])
