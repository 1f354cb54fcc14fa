"""Several models, with several seeds, on the same rows and candidates: which runs there are, and running them.

Two ways lead here. ``--model=DIN,TALLRec,RecLoRA --seeds=3`` compares models as equals, in a folder of their own.
``compare_with`` adds models to a single run, in a folder below it. Either way each (model, seed) is a run of its own
with its own defaults and its own folder; what decides which rows are seen and what targets are ranked among is the
same for all; a finished run is not repeated, a failing one is reported and the others go on. What follows from the
runs is worked out from their files alone (:mod:`recbole_llm.comparison.analysis`), at any time: ``--report``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import recbole_llm
from recbole_llm.comparison.analysis import FinishedRun, build_comparison, load_run
from recbole_llm.comparison.controls import control_models
from recbole_llm.comparison.report import write_report
from recbole_llm.comparison.workers import side_by_side
from recbole_llm.config.command_line import parse_model, slug, split_models  # noqa: F401 - others import it from here
from recbole_llm.config.configurator import Config
from recbole_llm.config.keys import KEYS, RUN_ONLY_KEYS, SHARED_KEYS, VOLATILE_KEYS, keys_not_passed_to
from recbole_llm.config.model_spec import spec_of
from recbole_llm.config.sources import given_values
from recbole_llm.experiment.assembly import lasting_configuration
from recbole_llm.registry import get_model
from recbole_llm.utils.files import write_json
from recbole_llm.utils.run_files import LAST_FILE, RESULT_FILE

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
FOLDER = "compare"


@dataclass(frozen=True)
class PlannedRun:
    """One model with one seed.

    Attributes:
        text: the model as it was asked for, ``"iLoRA gate=uniform"``; its name in the comparison.
        config: its configuration.
        folder: where its result is, or will be.
    """

    text: str
    config: Config
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.folder / RESULT_FILE).is_file()

    def __str__(self) -> str:
        return f"{self.text}, seed {self.config['seed']}"


def config_for(
    first: Config, text: str, given: Mapping[str, Any], folder: Path, seed: int | None = None
) -> Config:
    """The configuration of one model on the rows of ``first``.

    Args:
        first: decides rows and candidates.
        text: the model and its changes.
        given: values that the user gave for all models.
        folder: of the run.
        seed: of the run; default: that of ``first``.

    Raises:
        ValueError: if the model's changes would lead to other rows, or the configuration cannot work.
    """
    name, changes = parse_model(text)
    spec = spec_of(get_model(name))
    unread = {key for key, known in KEYS.items() if not spec.reads_key(key, known)}
    values = {key: value for key, value in given.items() if key not in RUN_ONLY_KEYS and key not in unread}
    for key in SHARED_KEYS:  # also where the first model has a default
        value = first[key]
        if key in changes and changes[key] != value:
            raise ValueError(
                f"{text!r} changes {key}, which decides rows or candidates and must be the same for all models"
            )
        follows = key == "eval_args" and first["task"] == "next_item"  # eval_mode sets the mode
        values[key] = {k: v for k, v in value.items() if k != "mode"} if follows else value
    values["seed"] = first["seed"] if seed is None else seed
    values |= changes | {"run_name": text, "output_dir": str(folder), "compare_with": None}
    return Config(name, first.dataset, config_dict=values)


# ---------------------------------------------------------------------- models that join a single run


def check_models(first: Config, folder: Path) -> list[PlannedRun]:
    """The runs of all models of ``compare_with``, so that a mistake shows before anything is computed.

    Raises:
        ValueError: for a model that cannot be run, or where models would not be tested on the same rows.
    """
    wanted = first["compare_with"]
    wanted = [wanted] if isinstance(wanted, str) else list(wanted or [])
    if wanted and (what := _no_common_rows(first)):
        if "compare_with" in first.origins:
            raise ValueError(f"compare_with: {what}")
        logger.warning("compare_with: %s is left out, %s", ", ".join(wanted), what)
        wanted = []
    runs = []
    for text in wanted:
        llm = spec_of(get_model(parse_model(text)[0])).is_llm
        left_out = keys_not_passed_to(llm)
        given = {key: value for key, value in first.external_config_dict.items() if key not in left_out}
        where = folder / FOLDER / slug(text)
        runs.append(PlannedRun(text, config_for(first, text, given, where), where))
    return runs


def _no_common_rows(config: Config) -> str | None:
    """Why models cannot be compared under this protocol, if they cannot."""
    if config["task"] is None:
        return "RecBole's own protocols keep no rows to compare on; set task: ctr or task: next_item"
    if not config["read_test"]:
        return "read_test: False leaves no scores to compare; leave it out"
    if config["task"] == "next_item" and config["eval_mode"] not in ("candidates", "full"):
        return (
            f"eval_mode: {config['eval_mode']} draws other negatives for every model; use candidates or full"
        )
    return None


# ---------------------------------------------------------------------- a comparison of equals


@dataclass(frozen=True)
class Plan:
    """A comparison: its folder, its runs in the order of running, and what it was asked for.

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
        """The plan with further values for some models, by their text; a run's folder says them."""
        runs = []
        for run in self.runs:
            if values := chosen.get(run.text):
                digest = hashlib.sha256(
                    json.dumps(dict(values), sort_keys=True, default=str).encode()
                ).hexdigest()
                where = run.folder.with_name(f"{run.folder.name}-{digest[:8]}")
                given = {**self.given[run.text], **values}
                run = PlannedRun(
                    run.text, config_for(self.first, run.text, given, where, run.config["seed"]), where
                )
            runs.append(run)
        return replace(self, runs=runs)


def make_plan(
    models: Sequence[str],
    dataset: str | None,
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] | None = None,
) -> Plan:
    """Every run of a comparison, all configurations checked, nothing computed.

    The rows are those of the first of our models, or of the first model where none is ours. A value that the user gives
    for all models goes to those that know the key.

    Raises:
        ValueError: for models of different tasks, a key that no model knows, two equal models, or what
            :func:`config_for` refuses.
    """
    given = given_values(config_file_list, config_dict, cmd_line)
    dataset = dataset or given.get("dataset")
    names = {text: parse_model(text)[0] for text in models}
    twice = sorted({text for text in models if list(models).count(text) > 1})
    if twice:
        raise ValueError(f"the model {twice[0]!r} is given twice")
    specs = {text: spec_of(get_model(name)) for text, name in names.items()}
    own = {text: spec.task for text, spec in specs.items() if spec.is_llm}
    task = _common_task(own, given, [spec.task for spec in specs.values() if spec.task])
    known = {
        text: Config(
            name, dataset, config_dict={**_for_task(task, text in own), **_preset(given)}
        ).valid_keys()
        for text, name in names.items()
    }
    nobody = [key for key in given if not any(key in keys for keys in known.values())]
    anchor = next(iter(own), models[0])
    if nobody:  # the error names the nearest key
        Config(names[anchor], dataset, config_dict={nobody[0]: given[nobody[0]]})

    def values(text: str) -> dict[str, Any]:
        mine = {key: value for key, value in given.items() if key in known[text]}
        return {**mine, **_for_task(task, text in own)}

    first = Config(names[anchor], dataset, config_dict={**values(anchor), "compare_with": None})
    if what := _no_common_rows(first):
        raise ValueError(f"several models: {what}")
    root = Path(first["output_dir"] or first["checkpoint_dir"])
    folder = root / f"compare-{first.dataset}-{_shared_hash(first, given)}"
    seeds = [first["seed"] + number for number in range(first["seeds"])]
    models = list(models)
    if first["controls"]:
        controls = control_models(config_for(first, anchor, values(anchor), folder), anchor)
        known |= dict.fromkeys(controls, known[anchor])
        own |= dict.fromkeys(controls, task)
        models += [text for text in controls if text not in models]
    subject = first["subject"] or (anchor if first["controls"] else models[-1])
    if subject not in models:
        raise ValueError(f"subject: {subject!r} is none of the models {', '.join(models)}")
    runs = [
        PlannedRun(text, config_for(first, text, values(text), where, seed), where)
        for seed in seeds
        for text in models
        for where in [folder / f"{slug(text)}-seed{seed}"]
    ]
    return Plan(folder, runs, models, seeds, subject, first, {text: values(text) for text in models})


def _common_task(own: Mapping[str, str], given: Mapping[str, Any], defaults: Sequence[str]) -> str:
    """The task of our LLM recommenders, else the one given, else the default of our conventional models."""
    tasks = dict.fromkeys(own.values())
    if len(tasks) > 1:
        by_task = "; ".join(f"{task}: {', '.join(t for t in own if own[t] == task)}" for task in tasks)
        raise ValueError(f"models of different tasks cannot be compared ({by_task})")
    task = next(iter(tasks), None) or given.get("task") or next(iter(defaults), None)
    if task is None:
        raise ValueError("these are models of RecBole: say what is compared, --task=ctr or --task=next_item")
    return task


def _for_task(task: str, own: bool) -> dict[str, Any]:
    return {} if own else {"task": task}


def _preset(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"preset": given["preset"]} if given.get("preset") else {}


def _shared_hash(first: Config, given: Mapping[str, Any]) -> str:
    """Of everything that holds for all models: the same command finds its folder again, also with more models."""
    left_out = (VOLATILE_KEYS | RUN_ONLY_KEYS) - {"preset"}
    shared = {key: first[key] for key in SHARED_KEYS}
    shared |= {key: value for key, value in given.items() if key not in left_out}
    shared |= {"dataset": first.dataset, "seed": first["seed"]}
    return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).hexdigest()[:10]


def is_comparison(config_file_list: Sequence[str] | None, cmd_line: Sequence[str]) -> bool:
    """Whether a command with one model still asks for several runs: by ``seeds``, ``controls`` or ``search``."""
    given = given_values(config_file_list, None, cmd_line)
    return given.get("seeds", 1) not in (None, 1) or any(given.get(key) for key in ("controls", "search"))


def describe(plan: Plan) -> str:
    """What a comparison would run, a line per run."""
    lines = [
        f"dry run: {len(plan.runs)} runs on {plan.first.dataset}, in {plan.folder}; about {plan.subject}"
    ]
    return "\n".join([*lines, *(f"  {run}" + (" (finished)" if run.finished else "") for run in plan.runs)])


def check_folder(plan: Plan) -> None:
    """Refuse a folder whose finished runs were made by another version, or with other settings.

    Raises:
        ValueError: naming the run and the keys that differ.
    """
    file = plan.folder / PLAN_FILE
    if file.is_file():
        made_by = json.loads(file.read_text(encoding="utf-8"))["version"]
        if made_by != recbole_llm.__version__:
            raise ValueError(
                f"{plan.folder} was made by recbole_llm {made_by}, this is {recbole_llm.__version__}: choose another "
                "output_dir, or remove the folder"
            )
    for run in plan.runs:
        if run.finished:
            there = json.loads((run.folder / RESULT_FILE).read_text(encoding="utf-8"))["config"]
            here = json.loads(json.dumps(lasting_configuration(run.config)))
            if "few_shot" not in run.config.origins:  # a default is cut to the size of the data
                here.pop("few_shot", None)
            different = [key for key, value in here.items() if key in there and there[key] != value]
            if different:
                what = ", ".join(f"{key} {there[key]!r} there, {here[key]!r} here" for key in different[:5])
                raise ValueError(f"{run.folder} holds a run of {run} with other settings ({what}): remove it")


def run_all(
    runs: Sequence[PlannedRun], run_one: Callable[[Config, Path], dict], nproc: int = 1
) -> list[dict[str, Any]]:
    """Run everything that has no result yet.

    Args:
        runs: the runs.
        run_one: trains and tests one configuration in a given folder.
        nproc: how many of them side by side, each in a process of its own; 1: one after another in this process.

    Returns:
        ``{"name", "seed", "error"}`` of the runs that failed; the others have a result.
    """
    waiting = _unfinished(runs)
    outcomes = one_by_one(waiting, run_one) if nproc == 1 else side_by_side(waiting, run_one, nproc)
    failed = []
    for run, error in outcomes:
        if error is not None:
            logger.error("%s failed, the others go on: %s", run, error)
            failed.append({"name": run.text, "seed": run.config["seed"], "error": error})
        elif nproc > 1:
            logger.info("%s: finished", run)
    return failed


def _unfinished(runs: Sequence[PlannedRun]) -> Iterator[PlannedRun]:
    """The runs without a result, each when it is its turn, ready to be run or to go on."""
    for number, run in enumerate(runs, 1):
        if run.finished:
            logger.info("%d of %d: %s: finished before, %s", number, len(runs), run, run.folder)
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        if (run.folder / LAST_FILE).is_file():
            run = replace(run, config=run.config.override(resume=str(run.folder)))
        logger.info("%d of %d: %s, in %s", number, len(runs), run, run.folder)
        yield run


def one_by_one(
    runs: Iterable[PlannedRun], run_one: Callable[[Config, Path], dict]
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Run everything in this process; yields each run and why it failed, ``None`` if it did not."""
    for run in runs:
        message = None
        try:
            run_one(run.config, run.folder)
        except Exception as error:  # reported by the caller; one model must not cost the others' results
            logger.debug("traceback of the error below", exc_info=True)
            message = f"{type(error).__name__}: {error}"
        yield run, message


def run_comparison(plan: Plan, run_one: Callable[[Config, Path], dict], command: str = "") -> dict[str, Any]:
    """Run what is missing and report.

    Returns:
        The comparison, with ``files``: the report's paths.

    Raises:
        ValueError: for a folder that does not fit, or if every run failed.
        KeyboardInterrupt: what is finished is kept, and the same command goes on from there.
    """
    check_folder(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 1,
        "version": recbole_llm.__version__,
        "dataset": plan.first.dataset,
        "task": plan.first["task"],
        "subject": plan.subject,
        "command": command,
        "runs": [{"name": r.text, "seed": r.config["seed"], "folder": r.folder.name} for r in plan.runs],
        "samples": plan.first["bootstrap_samples"],
        "failed": [],
    }
    write_json(plan.folder / PLAN_FILE, content)
    try:
        content["failed"] = run_all(plan.runs, run_one, plan.first["nproc"])
    except KeyboardInterrupt:
        logger.warning("interrupted; finished runs are kept in %s: repeat the command to go on", plan.folder)
        raise
    write_json(plan.folder / PLAN_FILE, content)
    return report(plan.folder)


# ---------------------------------------------------------------------- the report, from files alone


def report(folder: Path, failed: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Work out the comparison in a folder from its runs' files, and write the report files.

    Args:
        folder: of a comparison, or of a single run with ``compare_with``.
        failed: of a single run's other models, those that ended without a result.

    Returns:
        As :func:`recbole_llm.evaluation.build_comparison`, with ``files``: the paths written.

    Raises:
        FileNotFoundError: if the folder holds no finished run, or a run's score file is missing.
        ValueError: if the runs cannot be compared.
    """
    folder = Path(folder)
    if (folder / PLAN_FILE).is_file():
        plan = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        reasons = {(entry["name"], entry["seed"]): entry for entry in plan["failed"]}
        runs, failed = [], []
        for entry in plan["runs"]:
            if (folder / entry["folder"] / RESULT_FILE).is_file():
                runs.append(load_run(folder / entry["folder"], entry["name"]))
            else:
                unknown = {
                    "name": entry["name"],
                    "seed": entry["seed"],
                    "error": "has not been run to its end",
                }
                failed.append(reasons.get((entry["name"], entry["seed"]), unknown))
        if not runs:
            what = "; ".join(f"{entry['name']}, seed {entry['seed']}: {entry['error']}" for entry in failed)
            raise ValueError(f"no run in {folder} has a result ({what})")
        subject = plan["subject"] if any(run.name == plan["subject"] for run in runs) else runs[-1].name
        options = {"subject": subject, "samples": plan["samples"], "command": plan["command"]}
    else:
        runs = _of_single_run(folder)
        options = {"samples": runs[0].result["config"]["bootstrap_samples"]}
    comparison = build_comparison(runs, failed=failed, **options)
    return {**comparison, "files": [str(path) for path in write_report(folder, comparison)]}


def _of_single_run(folder: Path) -> list[FinishedRun]:
    others = sorted(folder.glob(f"{FOLDER}/*/{RESULT_FILE}"))
    return [load_run(folder), *(load_run(path.parent) for path in others)]
