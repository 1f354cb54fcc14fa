"""Reading yaml files, and where the package's and RecBole's own are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import recbole
import yaml


def properties_dir() -> Path:
    """The folder of this package's yaml files: in the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "properties"
    return installed if (installed / "overall.yaml").is_file() else package.parent / "properties"


PROPERTIES = properties_dir()
RECBOLE_PROPERTIES = Path(recbole.__file__).parent / "properties"


class YamlLoader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number, as in RecBole's files (YAML 1.1 alone makes it a string)."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a yaml file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # also for dates, bytes, brackets
        raise ValueError(f"config file {path} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"config file {path} must hold 'key: value' lines, not a {type(content).__name__}")
    return content or {}
