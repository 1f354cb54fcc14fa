"""Truncated and bit-flipped files: refused by name, made again where they are a cache, never half-loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_wheel import write_gguf

from recbole_llm.backbone import loader
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.backbone.tiny import tiny_backbone
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.trainer.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from recbole_llm.utils.files import load_array, read_columns, read_json, read_tensors, save_array
from recbole_llm.utils.yaml_files import load_yaml

SEED = 7


def damages(content: bytes, flips: int = 40, cuts: int = 8) -> Iterator[bytes]:
    """The content with one wrong bit, or without its end."""
    rng = np.random.default_rng(SEED)
    for place, bit in zip(rng.integers(len(content), size=flips), rng.integers(8, size=flips), strict=True):
        wrong = bytearray(content)
        wrong[place] ^= 1 << int(bit)
        yield bytes(wrong)
    for length in [0, 1, *rng.integers(len(content), size=cuts)]:
        yield content[: int(length)]


def refused(path: Path, read: Callable[[Path], object], content: bytes) -> bool:
    """Whether reading this content fails with one error that names the file."""
    path.write_bytes(content)
    try:
        read(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error) or path.parent.name in str(error), error
        return True
    return False


def test_checkpoints(tmp_path):
    path = tmp_path / "last.safetensors"
    tensors = {"a": torch.arange(300.0), "b": torch.arange(7, dtype=torch.int64)}
    save_checkpoint(path, tensors, {"epoch": 3, "identities": {"data": "abc"}})
    whole = path.read_bytes()
    for content in damages(whole, flips=400):
        assert refused(path, load_checkpoint, content)
    path.write_bytes(whole)
    assert load_checkpoint(path)[1]["epoch"] == 3


def test_checkpoints_of_the_first_format_are_still_read(tmp_path):
    from safetensors.torch import save_file

    meta = {"recbole_llm": json.dumps({"format": 1, "epoch": 2})}
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata=meta)
    assert load_checkpoint(tmp_path / "old.safetensors")[1] == {"format": 1, "epoch": 2}


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_read(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name, read in (
        ("c.safetensors", load_checkpoint),
        ("c.npz", read_columns),
        ("c.npy", load_array),
        ("a.npz", CandidateSet.load),
    ):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Evil()))
        assert read(path) is None if name == "c.npy" else refused(path, read, path.read_bytes())
    np.save(tmp_path / "o.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    assert load_array(tmp_path / "o.npy") is None
    np.savez(tmp_path / "o.npz", a=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="o.npz"):
        read_columns(tmp_path / "o.npz")
    assert not (tmp_path / "ran").exists()


def test_scores_by_sample(tmp_path):
    path = tmp_path / "test_rows.npz"
    rng = np.random.default_rng(0)
    columns = {"row_id": np.arange(50), "model_score": rng.random(50), "user": np.array(["u"] * 50)}
    np.savez_compressed(path, **columns)
    whole = path.read_bytes()
    for content in damages(whole, flips=200):
        if not refused(path, read_columns, content):  # in the date of an entry, or where nothing is read
            found = read_columns(path)
            assert all(np.array_equal(found[name], values) for name, values in columns.items())


def test_candidates(tmp_path):
    path = tmp_path / "candidates.npz"
    items = np.array([[1, 2, 3], [4, 5, 6]] * 20)
    drawn = CandidateSet(np.arange(40), items, items[:, 1].copy())
    drawn.save(path)
    for content in damages(path.read_bytes(), flips=200):
        if not refused(path, CandidateSet.load, content):
            assert CandidateSet.load(path).sha256 == drawn.sha256


def test_cached_arrays_are_made_again(tmp_path, caplog):
    path = tmp_path / "vectors.npy"
    save_array(path, np.arange(100.0))
    assert np.array_equal(load_array(path), np.arange(100.0))
    whole = path.read_bytes()
    for content in damages(whole):
        path.write_bytes(content)
        assert load_array(path) is None
    assert "vectors.npy is damaged and is made again" in caplog.text
    path.write_bytes(whole)
    path.with_name("vectors.npy.sha256").unlink()  # as earlier versions kept them
    assert np.array_equal(load_array(path), np.arange(100.0))


def test_json_and_yaml_are_named_or_read_whole(tmp_path):
    content = {"schema": 1, "metrics": {"auc": 0.5}, "names": ["a", "b"]}
    for name, read in (("result.json", read_json), ("mine.yaml", load_yaml)):
        path = tmp_path / name
        whole = json.dumps(content).encode()
        n = sum(refused(path, read, damaged) for damaged in damages(whole, flips=200))
        assert n > 20
    for text in ("a: 2011-13-99", "[" * 5000, "a: !!binary x", "a: !!int 'x'", "a: &x [*x]\n? *x\n: 1"):
        assert refused(tmp_path / "mine.yaml", load_yaml, text.encode()) or text.startswith("a: &x")


def test_tensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.arange(20.0)}, path)
    for content in [b"", path.read_bytes()[:9], path.read_bytes()[:-1], b"\xff" * 64]:
        assert refused(path, read_tensors, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder of transformers."""
    path = tmp_path_factory.mktemp("backbone") / "model"
    model, tokenizer, _ = tiny_backbone(None)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_truncated_backbone_is_refused_by_name(name, folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="backbone .*model"):
        load_backbone(str(broken))


def test_gguf_files_and_their_plain_copy(tmp_path, caplog):
    gguf, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(gguf)
    whole = gguf.read_bytes()
    before = load_backbone(str(gguf), cache_dir=cache)
    weights_before = {
        name: tensor.clone() for name, tensor in before.model.state_dict().items()
    }  # not the file's
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        gguf.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="tiny.gguf cannot be read as a causal language model"):
            load_backbone(str(gguf), cache_dir=cache)
    gguf.write_bytes(whole)
    (copy,) = (cache / "dequantised").glob("*/model.safetensors")
    weights = bytearray(copy.read_bytes())
    weights[-100] ^= 1
    copy.write_bytes(weights)
    again = load_backbone(str(gguf), cache_dir=cache)
    assert "is damaged and is made again" in caplog.text
    for name, tensor in weights_before.items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    (copy.parent / loader.HASHES).unlink()  # of an earlier version: nothing to compare with
    load_backbone(str(gguf), cache_dir=cache)


def test_a_flipped_bit_in_a_cached_lens_and_in_its_description(tmp_path):
    from recbole_llm.lens import lens as module

    description = {
        "format": module.FORMAT,
        "name": "DIN",
        "identity": "x",
        "gate_scope": "user",
        "info": {"auc": 0.7},
    }
    from safetensors.torch import save

    content = save({"a": torch.ones(4)})
    import hashlib

    description["sha256"] = hashlib.sha256(content).hexdigest()
    description["own sha256"] = module._own_hash(description)
    (tmp_path / module.TENSORS).write_bytes(content)
    whole = json.dumps(description).encode()
    path = tmp_path / module.DESCRIPTION
    path.write_bytes(whole)
    assert module._read(tmp_path)[0]["name"] == "DIN"
    for damaged in damages(whole, flips=200):
        if not refused(path, lambda path: module._read(path.parent), damaged):
            found = module._read(tmp_path)[0]  # the bit was in the name of the key of the hash itself
            assert {key: found[key] for key in ("name", "identity", "sha256")} == {
                key: description[key] for key in ("name", "identity", "sha256")
            }
    path.write_bytes(whole)
    for damaged in damages(content):
        assert refused(tmp_path / module.TENSORS, lambda path: module._read(path.parent), damaged)


def test_a_damaged_last_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.safetensors")
