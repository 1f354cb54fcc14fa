"""``layout: stream``: its defaults, and what cannot be streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from recbole_llm.utils.yaml_files import PROPERTIES, load_yaml


def layout_defaults(layout: str | None, task: str | None, model: str) -> dict[str, Any]:
    """``properties/layout/LAYOUT.yaml``, with what it has for a task and a single model; nothing for ``prompt``."""
    file = PROPERTIES / "layout" / f"{layout}.yaml"
    values = load_yaml(file) if file.is_file() else {}
    by_model = values.pop("models", None) or {}
    of_next_item = values.pop("next_item", None) or {}
    return values | (of_next_item if task == "next_item" else {}) | (by_model.get(model) or {})


def layout_of(template: Any) -> str | None:
    """The layout that a template (a name, or the path of a yaml file) is written for; ``None`` if it cannot be told."""
    file = PROPERTIES / "prompt" / f"{template}.yaml"
    file = file if file.is_file() else Path(str(template))
    keys = load_yaml(file) if file.suffix in (".yaml", ".yml") and file.is_file() else {}
    if "history_item" in keys:  # which every template of a prompt per sample must have
        return "prompt"
    return "stream" if "header" in keys else None


class _Readable(Protocol):
    """What is read by key: a mapping, or values under construction."""

    def __getitem__(self, key: str, /) -> Any: ...


def check_stream(final: _Readable, said: Callable[[str], str]) -> None:
    """What a stream cannot show.

    Args:
        final: the configuration.
        said: from a key to ``key=value (origin)``.

    Raises:
        ValueError: naming the key and the remedy.
    """
    if final["layout"] != "stream":
        return
    layout = said("layout")
    if final["text_retrieval"] != "recent":
        raise ValueError(
            f"{said('text_retrieval')} with {layout}: a retrieved history is another one for every target, so targets "
            "cannot share a sequence; set text_retrieval: recent (with mixed_training: False), or layout: prompt"
        )
    for key, wanted, why in (
        ("mixed_training", False, "it shows each sample once with a retrieved history"),
        ("shuffle_history", False, "a target's history would not be what its chunk shows before it"),
        ("history_scope", "all", "a chunk shows all earlier interactions, those of other splits included"),
    ):
        if final[key] != wanted:
            raise ValueError(f"{said(key)} with {layout}: {why}; set {key}: {wanted}, or layout: prompt")
    if final["task"] == "next_item":
        if final["gate"] == "token":
            raise ValueError(
                f"{said('gate')} with {layout}: it reads a whole prompt, and a gate of a stream, one per interaction, "
                "must not see what comes later; set gate: linear, or layout: prompt"
            )
    elif final["stream_context"] < final["stream_lead"]:
        raise ValueError(
            f"{said('stream_context')} is less than {said('stream_lead')}: evaluation would show shorter histories "
            "than training"
        )
