"""What a conventional model of ours says about itself, so that nothing else has to know its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from recbole_llm.config.keys import Key


class Conventional:
    """A model of RecBole's kind that RecBole does not have; to be inherited beside RecBole's own class.

    RecBole's Trainer trains it on all training rows, by the path of RecBole's models
    (:mod:`recbole_llm.experiment.conventional`). Its defaults are ``properties/model/<Name>.yaml``.

    Attributes:
        tasks: the tasks it has, the default first.
        reads: keys of :data:`recbole_llm.config.keys.KEYS` that are otherwise the LLM recommenders' alone. Any other of
            them is refused.
        keys: what each key of its own may hold.
        training_loader: what makes its training batches of configuration and samples; ``None``: RecBole's loader.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[dict[str, Key]] = {}
    training_loader: ClassVar[Callable | None] = None

    @classmethod
    def wants_item_vectors(cls, config) -> bool:
        """Whether its constructor is given ``item_vectors``, the LLM's vectors of all titles, in this run."""
        return False

    @classmethod
    def wants_backbone(cls, config) -> bool:
        """Whether its constructor is given ``backbone``, the language model, in this run."""
        return False

    @classmethod
    def for_task(cls, task: str) -> type:
        """The class to build in a task."""
        return cls
