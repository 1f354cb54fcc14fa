"""One instance's plain LoRA is PEFT's; PEFT's own way to save the whole adapter is refused."""

import pytest
import torch
from formulas import export_instance
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

ALL = ["identity", "expert", "factor", "output", "dense"]


def logits(adapter, ids, z):
    adapter.set_instance(z)
    return adapter.peft_model(ids).logits


def test_pefts_save_is_refused(adapted, tmp_path):
    """It would write peft_type LORA: a folder that loads as a plain LoRA."""
    with pytest.raises(ValueError, match="recbole-llm export"):
        adapted("factor").peft_model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("gate", ["mlp60", "random", "uniform"])
@pytest.mark.parametrize("mixer", ALL)
def test_exported_instance_is_a_plain_lora(adapted, model, batch, tmp_path, mixer, gate):
    ids, z = batch
    adapter = adapted(mixer, gate=gate, gate_dropout=0.5, lora_alpha=5.0)
    adapter.peft_model.train()
    export_instance(adapter, z[:1], tmp_path)  # dropout must not get in
    assert all(module.training for module in adapter.peft_model.modules())
    adapter.peft_model.eval()
    expected = logits(adapter, ids[:1], z[:1])

    plain = PeftModel.from_pretrained(model(), tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(plain(ids[:1]).logits, expected)
    torch.testing.assert_close(plain.merge_and_unload()(ids[:1]).logits, expected)
    if mixer != "identity" and gate == "mlp60":
        assert (logits(adapter, ids[:1], z[1:2]) - expected).abs().max() > 1e-3  # somebody else's differs
    ranks = {
        t.shape[0] for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n
    }
    assert ranks == {16 if mixer == "output" else 4}


def test_export_from_a_bfloat16_base(adapted, model, batch, tmp_path):
    ids, z = batch
    adapter = adapted("factor", dtype=torch.bfloat16)
    export_instance(adapter, z[:1].float(), tmp_path)
    plain = PeftModel.from_pretrained(model(dtype=torch.bfloat16), tmp_path)
    torch.testing.assert_close(plain(ids[:1]).logits, logits(adapter, ids[:1], z[:1].float()))


def test_nothing_to_export_from_the_shuffled_control(adapted, batch, tmp_path):
    with pytest.raises(ValueError, match="shuffled"):
        export_instance(adapted("factor", gate="shuffled"), batch[1][:1], tmp_path)


def test_identity_exports_without_an_instance(adapted, model, batch, tmp_path):
    adapter = adapted("identity")
    export_instance(adapter, None, tmp_path)
    plain = PeftModel.from_pretrained(model(), tmp_path)
    assert torch.equal(plain(batch[0]).logits, adapter.peft_model(batch[0]).logits)
