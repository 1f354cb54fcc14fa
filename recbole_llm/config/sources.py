"""Where values come from: config files by path or name, presets, all that the user gives, and the data folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config.command_line import parse_command_line
from recbole_llm.utils.names import nearest
from recbole_llm.utils.yaml_files import PROPERTIES, load_yaml


def config_file(name: str | Path) -> Path:
    """A file, or one of properties/protocol/ by its bare name."""
    protocol = PROPERTIES / "protocol" / f"{name}.yaml"
    return protocol if protocol.is_file() and not Path(name).is_file() else Path(name)


def given_values(
    config_file_list: Iterable[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    cmd_line: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the user gave, before any default; the sources as of :class:`Config`, later ones win.

    Returns:
        The values, and where each comes from, as :attr:`Config.origins` has it.
    """
    arguments = parse_command_line(cmd_line or [])
    files = [*(config_file_list or ()), *str(arguments.pop("config_files", "")).split()]
    of_files = [(f"file {file}", load_yaml(config_file(file))) for file in dict.fromkeys(map(str, files))]
    sources = [*of_files, ("config_dict", config_dict or {}), ("command line", arguments)]
    values = {key: value for _, given in sources for key, value in given.items()}
    return values, {key: name for name, given in sources for key in given}


def load_preset(name: str, model: str, llm: bool) -> dict[str, Any]:
    """The defaults that a preset has for a model.

    ``properties/preset/NAME.yaml`` holds keys for every model, and under ``models`` those of LLM recommenders
    (``llm``), of conventional ones (``classical``) and of single ones by their name, which win.

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


def data_folder(dataset: str, user_path: str | None, recbole_path: str) -> tuple[str, bool]:
    """``data_path/dataset``; for ml-100k RecBole's own copy, unless the user's ``data_path`` holds one.

    Returns:
        The folder, and whether RecBole's copy replaces the user's ``data_path``.
    """
    if user_path is None:
        return os.path.normpath(recbole_path), False
    base = os.path.expanduser(user_path)
    folder = os.path.join(base, dataset)
    if os.path.isdir(folder):
        return folder, False
    table = os.path.join(base, f"{dataset}.inter")
    if os.path.isfile(table) or os.path.exists(f"{table}.parquet"):
        return base, False  # the dataset's own folder was given
    if dataset == "ml-100k":
        return os.path.normpath(recbole_path), True
    return folder, False
