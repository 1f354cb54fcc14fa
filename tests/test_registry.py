"""Names of models: built-in ones, those of installed packages, RecBole's."""

from __future__ import annotations

import pytest

from recbole_llm.config.configurator import Config
from recbole_llm.registry import get_model, installed_models


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with two models, as pip leaves it: a module, and the metadata with its entry points."""
    (tmp_path / "their_models.py").write_text(
        "from recbole.model.general_recommender.pop import Pop\n"
        "from recbole_llm.model.tallrec import TALLRec\n\n\n"
        "class OurLoRA(TALLRec):\n    pass\n\n\nclass OurPop(Pop):\n    pass\n"
    )
    metadata = tmp_path / "their_models-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[recbole_llm.models]\nOurLoRA = their_models:OurLoRA\nPop = their_models:OurPop\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed_models.cache_clear()
    yield
    installed_models.cache_clear()


def test_a_model_of_an_installed_package_is_found_by_its_entry_point(package):
    model = get_model("OurLoRA")
    assert model.__module__ == "their_models"
    assert "OurLoRA" in installed_models()
    config = Config("OurLoRA gate=~", "ml-100k")
    assert config.model_class is model and config.spec.is_llm
    assert config["mixer"] == "identity", "the defaults of the model it derives from"
    with pytest.raises(ValueError, match="did you mean OurLoRA"):
        get_model("OurLora1")


def test_an_entry_point_comes_before_recbole_and_after_the_built_in_models(package):
    assert get_model("Pop").__module__ == "their_models"
    assert get_model("TALLRec").__module__ == "recbole_llm.model.tallrec"


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(ValueError, match="'OurLoRA' is neither one of recbole_llm nor of RecBole"):
        get_model("OurLoRA")
    assert get_model("Pop").__module__ == "recbole.model.general_recommender.pop"


def test_what_was_here_once_is_still_found():
    from recbole_llm.data import create
    from recbole_llm.registry import create_dataset

    assert create_dataset is create.create_dataset
