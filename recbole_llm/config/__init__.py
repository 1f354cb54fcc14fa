"""The configuration of a run: keys, checks, command line, device."""

from recbole_llm.config.configurator import Config

__all__ = ["Config"]
