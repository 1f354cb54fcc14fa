"""The real default, if this machine has it or can fetch it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from recbole_llm.backbone import loader, store
from recbole_llm.backbone.answers import answer_logits, answer_token_ids, pad_right
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.backbone.store import default_cache_dir

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_backbone("smollm2-135m-instruct", dtype="float32")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_weights_are_plain_and_frozen(smollm2):
    layers = [
        module
        for module in smollm2.model.modules()
        if "proj" in type(module).__name__ or isinstance(module, nn.Linear)
    ]
    assert len(layers) == 30 * 7 + 1
    assert all(type(layer) is nn.Linear and layer.weight.dtype == torch.float32 for layer in layers)
    assert not smollm2.model.training and not any(p.requires_grad for p in smollm2.model.parameters())
    assert len(smollm2.sha256) == 64 and smollm2.source


def test_answer_words_are_single_distinct_tokens(smollm2):
    ids = answer_token_ids(smollm2.tokenizer, [" Yes", " No"])
    assert [smollm2.tokenizer.decode([token]) for token in ids] == [" Yes", " No"]


def test_answers_do_not_depend_on_the_batch(smollm2):
    texts = [
        "Is Paris in France?",
        "The user gave Toy Story (1995) five stars. Will they like Heat (1995)? Answer:",
        "Yes",
    ]
    prompts = [np.array(smollm2.tokenizer.encode(text)) for text in texts]
    ids = answer_token_ids(smollm2.tokenizer, [" Yes", " No"])
    with torch.no_grad():
        got = answer_logits(smollm2.model, *pad_right(prompts, smollm2.tokenizer.pad_token_id), ids)
        own = torch.stack(
            [smollm2.model(input_ids=torch.tensor(p)[None]).logits[0, -1, ids] for p in prompts]
        )
    torch.testing.assert_close(got, own, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(1), own.argmax(1))


def test_it_knows_english(smollm2):
    """Weights in the wrong place would still load; they would not prefer the right continuation."""
    prompt = np.array(smollm2.tokenizer.encode("The capital of France is"))
    ids = answer_token_ids(smollm2.tokenizer, [" Paris", " London", " banana"])
    with torch.no_grad():
        logits = answer_logits(smollm2.model, *pad_right([prompt], smollm2.tokenizer.pad_token_id), ids)[0]
    assert logits.argmax() == 0 and logits.argmin() == 2


def test_the_kept_copy_is_the_gguf(smollm2):
    gguf = default_cache_dir() / store.DEFAULT_BACKBONE / store.GGUF_NAME
    if not gguf.is_file():
        pytest.skip("this machine has the hub's weights")
    assert smollm2.sha256 == store.GGUF_SHA256
    from gguf import GGUFReader, dequantize

    packed = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    pairs = {
        "token_embd.weight": smollm2.model.model.embed_tokens.weight,
        "blk.7.ffn_up.weight": smollm2.model.model.layers[7].mlp.up_proj.weight,
        "blk.29.attn_v.weight": smollm2.model.model.layers[29].self_attn.v_proj.weight,
    }
    for name, weight in pairs.items():
        truth = dequantize(packed[name].data, packed[name].tensor_type)
        np.testing.assert_array_equal(weight.numpy(), truth)
    assert loader._dequantised(gguf, smollm2.sha256, default_cache_dir()).is_dir()
