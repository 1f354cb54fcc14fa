"""hashing.py: equal content has equal hashes, and nothing else has."""

from __future__ import annotations

import hashlib

import torch

from recbole_llm.utils.hashing import hash_file, hash_tensors


def test_hashes_tell_values_names_dtypes_and_texts_apart():
    weights = {"a": torch.ones(2), "b": torch.tensor(1.0)}
    assert hash_tensors(weights, "x") == hash_tensors(dict(reversed(weights.items())), "x")
    changed = [
        hash_tensors({**weights, "b": torch.tensor(2.0)}, "x"),
        hash_tensors({"a": weights["a"], "c": weights["b"]}, "x"),
        hash_tensors(weights, "y"),
        hash_tensors({**weights, "a": torch.ones(2, dtype=torch.bfloat16)}, "x"),
    ]
    assert len({hash_tensors(weights, "x"), *changed}) == 5


def test_the_hash_of_a_file_is_that_of_its_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 10**7)
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"abc" * 10**7).hexdigest()
