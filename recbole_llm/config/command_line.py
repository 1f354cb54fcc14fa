"""Parsing what a user writes: values, ``--key=value`` arguments, and lists of models with their changes."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import yaml

from recbole_llm.config.keys import KEYS, RECBOLE_KEYS
from recbole_llm.config.recbole_defaults import recbole_defaults, recbole_model_keys
from recbole_llm.utils.yaml_files import YamlLoader

NAMES = ("model", "dataset", "config_files")
"""Arguments whose text is taken as it is, and that may have a blank instead of ``=``."""


def parse_value(text: str, key: str | None = None) -> Any:
    """A value of the command line: a literal of Python or YAML, otherwise the text itself. No code is run.

    >>> parse_value("1e-3"), parse_value("[1, 2]"), parse_value("{rating: 4}"), parse_value("~")
    (0.001, [1, 2], {'rating': 4}, None)
    >>> parse_value("2024", "output_dir"), parse_value("__import__('os').getcwd()")
    ('2024', "__import__('os').getcwd()")
    """
    stripped = text.strip()
    if stripped in ("None", "~", "null"):
        return None
    known = (KEYS | RECBOLE_KEYS).get(key or "")
    if known is not None and known.is_text:
        if known.is_flag and stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
        return stripped[1:-1] if quoted else text
    try:
        return ast.literal_eval(stripped)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass  # not Python: perhaps YAML
    try:
        value = yaml.load(stripped, Loader=YamlLoader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return text
    collection = isinstance(value, (dict, list)) and stripped[0] in "[{"
    return value if collection or isinstance(value, (bool, int, float)) else text


def parse_command_line(arguments: Sequence[str]) -> dict[str, Any]:
    """``--key=value`` arguments, as RecBole has them; ``--key`` alone means true for a key that is true or false.

    As in RecBole's script, ``--model NAME``, ``-m NAME``, ``--dataset NAME``, ``-d NAME`` and
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
        value_follows = bool(queue) and not queue[0].startswith("-")
        if equals:
            value = text if key in NAMES else parse_value(text, key)
        elif key in NAMES and value_follows:
            value = queue.pop(0)
        elif value_follows:
            raise ValueError(f"command line: write --{key}={queue[0]} instead of --{key} {queue[0]}")
        elif not _is_flag(key) and _is_known(key):
            raise ValueError(f"command line: --{key} needs a value, --{key}=VALUE")
        else:
            value = True  # for an unknown key, the check of keys names the nearest one
        if key in values and values[key] != value:
            raise ValueError(f"command line: --{key} is given twice, as {values[key]!r} and {value!r}")
        values[key] = value
    return values


def _is_flag(key: str) -> bool:
    known = (KEYS | RECBOLE_KEYS).get(key)
    return known.is_flag if known else isinstance(recbole_defaults().get(key), bool)


def _is_known(key: str) -> bool:
    listed = key in {*KEYS, *RECBOLE_KEYS, *NAMES, *recbole_defaults()}
    return listed or any(key in keys for keys in recbole_model_keys().values())


# ---------------------------------------------------------------- models and their changes


def split_outside(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that are in no brackets and no quotes, without blanks and empty parts.

    Raises:
        ValueError: for a bracket or a quote that is not closed, or a closing bracket too many.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if depth < 0:
            break
        if character in separators and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise ValueError(f"cannot read {text!r}: brackets and quotes must be closed")
    return [part.strip() for part in parts if part.strip()]


def split_models(text: str) -> list[str]:
    """The models of a list such as ``"DIN, RecLoRA gate=uniform"``.

    >>> split_models("DIN, RecLoRA target_modules=[q_proj, v_proj],Pop")
    ['DIN', 'RecLoRA target_modules=[q_proj, v_proj]', 'Pop']
    """
    return split_outside(text, ",")


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """The name of a model and the keys to change.

    >>> parse_model("RecLoRA target_modules=[q_proj, v_proj] gate=uniform")
    ('RecLoRA', {'target_modules': ['q_proj', 'v_proj'], 'gate': 'uniform'})

    Raises:
        ValueError: for anything else than a name followed by ``key=value``.
    """
    name, *changes = split_outside(text, " \t\n") or [""]
    values = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"cannot read {change!r} in the model {text!r}; write 'NAME key=value'")
        values[key] = parse_value(value, key)
    return name, values


def slug(text: str) -> str:
    """A folder's name for a model and its changes."""
    return "".join(c if c.isalnum() or c in "-._=" else "-" for c in text)
