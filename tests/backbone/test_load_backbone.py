"""loader.py: names, paths, dtypes and what every loaded backbone has in common."""

from __future__ import annotations

import hashlib

import pytest
import torch

from recbole_llm.backbone import loader, store
from recbole_llm.backbone.answers import answer_logits
from recbole_llm.backbone.loader import load_backbone, resolve_dtype
from recbole_llm.backbone.tiny import tiny_backbone


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test here may leave the machine, nor see the caches of the one who runs it."""
    monkeypatch.setattr(store.hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(store.hub_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    model, tokenizer, _ = tiny_backbone()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_tiny_is_frozen_and_in_eval_mode():
    backbone = load_backbone("tiny", device="cpu", dtype="float32", texts=["a title"], seed=3)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.model.config._attn_implementation == "sdpa"
    assert backbone.name == "tiny" and backbone.dtype == torch.float32 and len(backbone.sha256) == 64
    assert backbone.tokenizer.pad_token_id is not None


def test_local_folder_is_the_same_model(folder):
    backbone = load_backbone(str(folder), dtype="float32")
    for loaded, made in zip(backbone.model.parameters(), tiny_backbone()[0].parameters(), strict=True):
        assert torch.equal(loaded, made)
    assert backbone.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert str(folder) in backbone.source and not backbone.model.training


def test_several_weight_files_have_one_identity(tmp_path):
    model, tokenizer, _ = tiny_backbone()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(store.weight_files(tmp_path)) > 1
    first = load_backbone(str(tmp_path)).sha256
    assert load_backbone(str(tmp_path)).sha256 == first
    store.weight_files(tmp_path)[-1].unlink()
    with pytest.raises(ValueError, match="lacks weights"):
        load_backbone(str(tmp_path))


def test_a_tokenizer_without_padding_token_gets_one(tmp_path):
    model, tokenizer, _ = tiny_backbone()
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    model, tokenizer, _ = tiny_backbone()
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its tokenizer has"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./no/such", "/no/such/folder", "no/such/model.gguf", "~/no_such", "model.gguf"]
)
def test_a_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["smollm2-135m", "some/model"])
def test_a_hub_id_that_cannot_be_reached(name):
    with pytest.raises(
        FileNotFoundError, match="no file or folder here.*HF_HUB_OFFLINE is set.*Known names: smollm2"
    ):
        load_backbone(name)


def test_folders_and_files_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json$"):
        load_backbone(str(tmp_path))
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="name the file itself"):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone(str(tmp_path / "some.gguf"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load_backbone(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="neither a model folder nor"):
        load_backbone(str(tmp_path / "notes.txt"))


def test_dtype_auto_follows_the_device(monkeypatch):
    monkeypatch.setattr(loader, "_cpu_is_fast_at_bfloat16", lambda: True)
    assert resolve_dtype("auto", "cpu") == torch.bfloat16
    assert load_backbone("tiny").model.dtype == torch.bfloat16
    monkeypatch.setattr(loader, "_cpu_is_fast_at_bfloat16", lambda: False)
    assert resolve_dtype("auto", "cpu") == torch.float32
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, capability=capability: capability
        )
        assert resolve_dtype("auto", "cuda:0") == expected


def test_processor_question_survives_a_torch_without_the_private_names(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert loader._cpu_is_fast_at_bfloat16() is False


def test_given_dtypes_are_kept_and_unknown_ones_refused():
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert resolve_dtype(torch.float64, "cpu") == torch.float64
    with pytest.raises(ValueError, match="'bf16' is not known"):
        resolve_dtype("bf16", "cpu")


def test_quantization_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="'2bit' is not known"):
        load_backbone("tiny", quantization="2bit")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        load_backbone("tiny", quantization="4bit")
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install recbole_llm\[quantization\]"):
        loader._quantization_config("8bit", torch.device("cuda"), torch.bfloat16)


def test_absent_cuda_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        load_backbone("tiny", device="cuda")


def test_gradient_checkpointing_changes_no_gradient():
    weights = []
    for checkpointing in (False, True):
        backbone = load_backbone("tiny", dtype="float32", gradient_checkpointing=checkpointing)
        assert backbone.model.model.layers[0].gradient_checkpointing is checkpointing
        weight = backbone.model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        backbone.model.train()
        logits = answer_logits(backbone.model, torch.tensor([[1, 2, 3]]), torch.tensor([3]), [4, 5])
        logits.square().sum().backward()
        weights.append(weight.grad)
    assert torch.equal(*weights) and weights[0].abs().sum() > 0
