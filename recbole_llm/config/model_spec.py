"""What the package has to know about a model class, declared once: `ModelSpec`.

A built-in class declares it as the class attribute ``spec``, and a class that a user derives from it inherits it. For
RecBole's classes `spec_of` derives it from ``type`` and ``input_type``; what these two do not say is in
`RECBOLE_EXCEPTIONS`. A user's class that derives from RecBole's base classes may declare ``spec``, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recbole.utils import InputType, ModelType

from recbole_llm.config.keys import Key


@dataclass(frozen=True)
class ModelSpec:
    """The declared properties of a model class.

    Attributes:
        family: ``llm``: a language model is tuned; ``conventional``: built in, trained by RecBole's Trainer on all
            samples; ``recbole``: one of RecBole's models, or a user's model that declares nothing.
        tasks: values of the key ``task`` that the model has, the default first. Empty (``recbole``): the protocol of
            RecBole by default, and either task on request.
        reads: keys that otherwise only LLM recommenders read (``Key.llm``). Ignored for the family ``llm``.
        keys: what each key of the model's own may hold.
        learns_from: what the training loss needs: ``labels``; ``pairs`` of a positive and a sampled item;
            ``next_item``; ``interactions`` (users' item sets or counts); ``loss_type``: the key of that name decides,
            ``CE`` being ``next_item`` and ``BPR`` being ``pairs``.
        probability: whether ``predict`` returns a probability, not an unbounded score.
        gate_scopes: what the state may have seen where the model is a lens, the default first: ``user_item`` (the
            target item, too) or ``user``. Empty: it cannot be a lens.
        lens_retrieval: value of ``id_retrieval`` in a run with this lens, unless the user sets it.
        takes_item_vectors: whether the constructor takes ``item_vectors``, the LLM's vectors of all titles.
        negative_history: whether the loss reads a history of items that the user has not met.
        ctr_class: the class that is built in the task ctr, if it is another one.
    """

    family: Literal["llm", "conventional", "recbole"]
    tasks: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    keys: Mapping[str, Key] = field(default_factory=dict)
    learns_from: Literal["labels", "pairs", "next_item", "interactions", "loss_type"] = "labels"
    probability: bool = False
    gate_scopes: tuple[Literal["user_item", "user"], ...] = ()
    lens_retrieval: str | None = None
    takes_item_vectors: bool = False
    negative_history: bool = False
    ctr_class: type | None = None

    @property
    def is_llm(self) -> bool:
        """Whether the model tunes a language model."""
        return self.family == "llm"

    @property
    def task(self) -> str | None:
        """The default task; ``None``: RecBole's own protocol."""
        return self.tasks[0] if self.tasks else None

    @property
    def sees_target(self) -> bool:
        """Whether the state can depend on the target item where the model is a lens."""
        return "user_item" in self.gate_scopes

    def reads_key(self, name: str, key: Key | None) -> bool:
        """Whether the model reads a key of the table; ``None``: a key that is not in the table."""
        return self.is_llm or key is None or not key.llm or name in self.reads

    def learns_pairs(self, loss_type: str | None) -> bool:
        """Whether the loss compares an item with a sampled one, given the value of ``loss_type``."""
        return self.learns_from == "pairs" or (self.learns_from == "loss_type" and loss_type == "BPR")

    def wants_item_vectors(self, config: Mapping[str, Any]) -> bool:
        """Whether the constructor is given ``item_vectors`` in this run: always, unless an own key says ``~``."""
        return self.takes_item_vectors and ("item_vectors" not in self.keys or bool(config["item_vectors"]))


RECBOLE_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    # These are trained on implicit feedback, although RecBole gives them input_type POINTWISE ("with a label") ...
    "CDAE": {"learns_from": "interactions", "probability": False},
    "ENMF": {"learns_from": "interactions", "probability": False},
    "NCEPLRec": {"learns_from": "interactions", "probability": False},
    # ... and this one on the next item.
    "RepeatNet": {"learns_from": "next_item", "probability": False},
    # Their predict returns the logit of the trained probability.
    "MKR": {"probability": False},
    "RippleNet": {"probability": False},
    # As lenses: both score labelled samples, and the lens built from DIN can show a state that has seen the target.
    "DIN": {"gate_scopes": ("user_item", "user")},
    "DIEN": {"negative_history": True},
}
"""What ``type`` and ``input_type`` do not say about RecBole's classes, by class name."""


def spec_of(model_class: type) -> ModelSpec:
    """The properties of a model class: declared as ``spec``, or derived for RecBole's classes and those built on them.

    RecBole's convention is that ``InputType.POINTWISE`` is trained on labels and ``PAIRWISE`` on pairs, that classes of
    ``ModelType.TRADITIONAL`` count interactions, and that a class without ``input_type`` follows the key ``loss_type``.
    """
    declared = getattr(model_class, "spec", None)
    if isinstance(declared, ModelSpec):
        return declared
    input_type = getattr(model_class, "input_type", None)
    model_type = getattr(model_class, "type", None)
    if model_type == ModelType.TRADITIONAL or input_type == InputType.LISTWISE:
        learns_from = "interactions"
    elif input_type == InputType.POINTWISE or model_type in (ModelType.CONTEXT, ModelType.DECISIONTREE):
        learns_from = "labels"
    else:
        learns_from = "pairs" if input_type == InputType.PAIRWISE else "loss_type"
    derived = ModelSpec(
        family="recbole",
        learns_from=learns_from,
        probability=learns_from == "labels",
        gate_scopes=("user",) if model_type == ModelType.SEQUENTIAL else (),
    )
    names = [base.__name__ for base in model_class.__mro__ if base.__module__.startswith("recbole.")]
    exceptions = next((RECBOLE_EXCEPTIONS[name] for name in names if name in RECBOLE_EXCEPTIONS), {})
    return replace(derived, **exceptions)


def class_for(model_class: type, task: str | None) -> type:
    """The class to build in a task: the model's own, or the one that it names for the task ctr."""
    return (spec_of(model_class).ctr_class or model_class) if task == "ctr" else model_class
