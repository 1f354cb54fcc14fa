"""What a result shows beside its numbers."""

from __future__ import annotations

import numpy as np
from synthetic import write_dataset

from recbole_llm.config.configurator import Config
from recbole_llm.data.create import create_dataset
from recbole_llm.experiment.exhibits import principal_components, profile_of


def test_principal_components_are_those_of_the_covariance():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 5)) * [5, 3, 1, 0.5, 0.1] + 7
    found = principal_components(values)
    variances, directions = np.linalg.eigh(np.cov(values.T))
    np.testing.assert_allclose(found.var(axis=0, ddof=1), variances[::-1][:2])
    projected = (values - values.mean(axis=0)) @ directions[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found), np.abs(projected), atol=1e-9)


def test_equal_rows_have_no_components():
    assert (principal_components(np.ones((4, 3))) == 0).all()
    np.testing.assert_allclose(np.abs(principal_components(np.array([[1.0], [3.0]]))), [[1, 0], [1, 0]])


def test_row_facts_are_counts_of_the_file(tmp_path):
    path = write_dataset(tmp_path)
    dataset = create_dataset(Config("TALLRec", "toy", config_dict={"data_path": str(path)}))
    train, _, test = dataset.build()
    facts = test.row_facts(train)
    feat, index = test.inter_feat, dataset.history
    for row in range(len(test)):
        user, item, end = (int(feat[field][row]) for field in ("user_id", "item_id", "history_end"))
        assert facts["history_length"][row] == end - index.user_start[user]
        assert facts["user_rows"][row] == (train.inter_feat["user_id"] == user).sum()
        assert facts["item_rows"][row] == (train.inter_feat["item_id"] == item).sum()


def test_a_dataset_without_profiles_has_no_profile(tmp_path):
    path = write_dataset(tmp_path)
    (path / "toy" / "toy.user").unlink()
    dataset = create_dataset(Config("TALLRec", "toy", config_dict={"data_path": str(path)}))
    dataset.build()
    assert profile_of(dataset, np.array([1, 2])) == (None, None)


def test_the_profile_is_the_first_field_with_few_values(tmp_path):
    dataset = create_dataset(
        Config("TALLRec", "toy", config_dict={"data_path": str(write_dataset(tmp_path))})
    )
    dataset.build()
    field, values = profile_of(dataset, dataset.token2id("user_id", ["1", "2", "3"]))
    assert (field, values) == ("gender", ["M", "F", "M"])
