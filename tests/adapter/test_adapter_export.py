"""Folders: our format goes round, PEFT refuses it, and one instance's plain LoRA is PEFT's."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from recbole_llm.adapter.export import CONFIG_FILE, TENSOR_FILE
from recbole_llm.adapter.personalized import PersonalizedAdapter

ALL = ["identity", "expert", "factor", "output", "dense"]


def logits(adapter, ids, z):
    adapter.set_instance(z)
    return adapter.peft_model(ids).logits


@pytest.mark.parametrize("share_gate", [False, True])
@pytest.mark.parametrize("mixer", ALL)
def test_save_and_load(adapted, model, batch, tmp_path, mixer, share_gate):
    ids, z = batch
    adapter = adapted(mixer, share_gate=share_gate, temperature=2.0, target_modules=["o_proj", "up_proj"])
    adapter.save(tmp_path / "saved")
    torch.manual_seed(99)
    again = PersonalizedAdapter.load(model(), tmp_path / "saved")
    again.peft_model.eval()
    assert again.config == adapter.config
    assert torch.equal(logits(again, ids, z), logits(adapter, ids, z))
    with again.disabled():
        assert not torch.allclose(again.peft_model(ids).logits, logits(adapter, ids, z))


@pytest.mark.parametrize("mixer", ALL)
def test_stock_peft_refuses_the_saved_folder(adapted, model, tmp_path, mixer):
    adapted(mixer).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    with pytest.raises(KeyError, match="PERSONALIZED_LORA.*PersonalizedAdapter.load"):
        PeftModel.from_pretrained(model(), tmp_path)
    with pytest.raises(KeyError, match="PERSONALIZED_LORA"):
        model().load_adapter(str(tmp_path))  # transformers' own way in
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="Repo id"):  # nor does naming a configuration help
        PeftModel.from_pretrained(model(), str(tmp_path), config=config)


def test_pefts_save_is_refused(adapted, tmp_path):
    """It would write peft_type LORA: a folder that loads as a plain LoRA."""
    with pytest.raises(ValueError, match="PersonalizedAdapter.save"):
        adapted("factor").peft_model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG_FILE).exists()


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSOR_FILE])
def test_incomplete_folder(adapted, model, tmp_path, name):
    adapted("factor").save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PersonalizedAdapter.load(model(), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'.*PeftModel.from_pretrained"),
        ({"format_version": 2}, "format_version is 2"),
        ({"adapter": {"mixer": "factor", "instance_size": 6, "colour": 1}}, "unknown adapter settings"),
    ],
)
def test_other_folder(adapted, model, tmp_path, change, words):
    adapted("factor").save(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        PersonalizedAdapter.load(model(), tmp_path)


def test_pickled_tensors_are_not_read(adapted, model, tmp_path):
    adapter = adapted("factor")
    adapter.save(tmp_path)
    torch.save(adapter.state_dict(), tmp_path / TENSOR_FILE)
    with pytest.raises(Exception, match="is damaged"):
        PersonalizedAdapter.load(model(), tmp_path)


@pytest.mark.parametrize("gate", ["mlp60", "random", "uniform"])
@pytest.mark.parametrize("mixer", ALL)
def test_exported_instance_is_a_plain_lora(adapted, model, batch, tmp_path, mixer, gate):
    ids, z = batch
    adapter = adapted(mixer, gate=gate, gate_dropout=0.5, lora_alpha=5.0)
    adapter.peft_model.train()
    adapter.export_user(z[:1], tmp_path)  # dropout must not get in
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
    adapter.export_user(z[:1].float(), tmp_path)
    plain = PeftModel.from_pretrained(model(dtype=torch.bfloat16), tmp_path)
    torch.testing.assert_close(plain(ids[:1]).logits, logits(adapter, ids[:1], z[:1].float()))


@pytest.mark.parametrize("rows", [None, 0, 2])
def test_export_needs_one_instance(adapted, batch, tmp_path, rows):
    z = None if rows is None else batch[1][:rows]
    with pytest.raises(ValueError, match="one instance"):
        adapted("factor").export_user(z, tmp_path)


def test_nothing_to_export_from_the_shuffled_control(adapted, batch, tmp_path):
    with pytest.raises(ValueError, match="shuffled"):
        adapted("factor", gate="shuffled").export_user(batch[1][:1], tmp_path)


def test_identity_exports_without_an_instance(adapted, model, batch, tmp_path):
    adapter = adapted("identity")
    adapter.export_user(None, tmp_path)
    plain = PeftModel.from_pretrained(model(), tmp_path)
    assert torch.equal(plain(batch[0]).logits, adapter.peft_model(batch[0]).logits)
