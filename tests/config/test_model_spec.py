"""What is declared about model classes, against RecBole's own classes."""

from __future__ import annotations

import inspect
import re

import pytest
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import InputType, ModelType

from recbole_llm.config.configurator import Config
from recbole_llm.config.keys import KEYS
from recbole_llm.config.model_spec import RECBOLE_EXCEPTIONS, ModelSpec, class_for, spec_of
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.model.morec import LabelledMoRec, MoRec
from recbole_llm.registry import BUILT_IN_MODELS, get_model, recbole_models


def recbole_class(name: str) -> type:
    try:
        return get_model(name)
    except ImportError as error:
        pytest.skip(f"{name} needs a library that is not installed: {error}")


def source(model_class: type) -> str:
    """The code of a class and of its bases in ``recbole.model``, but for the abstract ones."""
    bases = [base for base in model_class.__mro__ if base.__module__.startswith("recbole.model.")]
    return "\n".join(inspect.getsource(base) for base in bases if "abstract" not in base.__module__)


@pytest.mark.parametrize("name", recbole_models())
def test_recbole_models_learn_from_labels_exactly_where_their_loss_reads_them(name):
    model_class = recbole_class(name)
    spec = spec_of(model_class)
    reads_labels = re.search(r"interaction\[self\.LABEL\w*\]", source(model_class)) is not None
    assert (spec.learns_from == "labels") == reads_labels
    assert not spec.probability or spec.learns_from == "labels"
    assert spec.family == "recbole" and not spec.tasks
    assert bool(spec.gate_scopes) == (model_class.type == ModelType.SEQUENTIAL)
    assert (spec.learns_from == "pairs") == (getattr(model_class, "input_type", None) == InputType.PAIRWISE)
    assert spec.negative_history == ("interaction[self.NEG_ITEM_SEQ]" in source(model_class))


def test_scores_that_are_not_probabilities():
    """ConvNCF reads the label's name and learns pairs; the others return the logit of what they learn."""
    for name, learns_from in (("ConvNCF", "pairs"), ("MKR", "labels"), ("RippleNet", "labels")):
        spec = spec_of(get_model(name))
        assert not spec.probability and spec.learns_from == learns_from


def test_every_exception_is_a_model_of_recbole():
    assert set(RECBOLE_EXCEPTIONS) <= set(recbole_models())


@pytest.mark.parametrize("name", BUILT_IN_MODELS)
def test_built_in_models_declare_theirs(name):
    spec = spec_of(get_model(name))
    assert spec.family in ("llm", "conventional") and spec.tasks
    assert set(spec.reads) <= {key for key, known in KEYS.items() if known.llm}


def test_a_subclass_inherits_the_declaration():
    class Mine(AnswerCTR):
        pass

    config = Config(Mine, "ml-100k")
    assert config.spec is AnswerCTR.spec and config["task"] == "ctr" and config["mixer"] == "factor"


def test_a_user_s_model_follows_recbole_s_convention_or_declares():
    class Labelled(GeneralRecommender):
        input_type = InputType.POINTWISE

    class ByLoss(SequentialRecommender):
        pass

    class Declared(Labelled):
        spec = ModelSpec("recbole", learns_from="interactions")

    class OnMKR(recbole_class("MKR")):
        pass

    assert spec_of(Labelled).probability and spec_of(Labelled).learns_from == "labels"
    assert spec_of(ByLoss).learns_pairs("BPR") and not spec_of(ByLoss).learns_pairs("CE")
    assert not spec_of(Declared).probability
    assert not spec_of(OnMKR).probability and spec_of(OnMKR).learns_from == "labels"


def test_item_vectors_and_classes_by_task():
    sim = get_model("SIM").spec
    assert sim.wants_item_vectors({"item_vectors": "add"}) and not sim.wants_item_vectors(
        {"item_vectors": None}
    )
    assert get_model("TitleKNN").spec.wants_item_vectors({})
    assert class_for(MoRec, "ctr") is LabelledMoRec and class_for(MoRec, "next_item") is MoRec
    assert spec_of(LabelledMoRec).probability and not spec_of(MoRec).probability
    assert spec_of(get_model("DIN")).sees_target and not spec_of(get_model("SASRec")).sees_target
