"""Models with changes, as a command names them: ``"RecLoRA gate=uniform"``."""

from __future__ import annotations

from typing import Any

from recbole_llm.config.configurator import parse_value


def split_models(text: str) -> list[str]:
    """``"DIN,RecLoRA gate=uniform"`` -> the models; a comma inside brackets or quotes does not separate.

    >>> split_models("DIN, RecLoRA target_modules=[q_proj,v_proj],Pop")
    ['DIN', 'RecLoRA target_modules=[q_proj,v_proj]', 'Pop']
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
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """``"iLoRA gate=uniform"`` -> the model's name and the keys to change.

    Raises:
        ValueError: for anything else than a name followed by ``key=value``.
    """
    name, *changes = text.split()
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
