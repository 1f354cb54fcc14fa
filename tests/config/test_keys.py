"""The table of keys, against the comments in properties/overall.yaml and what is derived from it."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from recbole_llm.config.configurator import Config
from recbole_llm.config.keys import (
    ANY,
    KEYS,
    RECBOLE_KEYS,
    RUN_ONLY_KEYS,
    SHARED_KEYS,
    TABLE,
    VOLATILE_KEYS,
    keys_not_passed_to,
)
from recbole_llm.config.kinds import Choice, Flag, ListOf, Number, Table, Text, Whole
from recbole_llm.config.settings import AdapterConfig, Settings, adapter_config
from recbole_llm.utils.yaml_files import PROPERTIES

TYPES = (
    (ListOf, "list of"),
    (Table, "dict"),
    (Flag, "bool"),
    (Whole, "int"),
    (Number, "float"),
    (Text, "str"),
)
COMMENTS = {
    match[1]: (match[2], match[3])
    for match in re.finditer(
        r"^(\w+):.*?# \(([^)]*)\) (.*)$",
        (PROPERTIES / "overall.yaml").read_text(encoding="utf-8"),
        flags=re.M,
    )
}


def documented() -> list[str]:
    return [key for key in COMMENTS if key in KEYS | RECBOLE_KEYS]


@pytest.mark.parametrize("name", documented())
def test_the_comment_says_the_meaning_the_types_and_the_range_of_the_table(name):
    key = (KEYS | RECBOLE_KEYS)[name]
    types, comment = COMMENTS[name]
    meaning = key.meaning[0].upper() + key.meaning[1:]
    assert re.match(re.escape(meaning) + r"[.,:;( ]", comment), f"{name}: begin with {meaning!r}"
    for kind in key.kinds:
        said = next(word for of, word in TYPES if isinstance(kind, of))
        assert said in types or (said == "list of" and key.is_flag), f"{name}: {said} is not in ({types})"
        if isinstance(kind, Choice):
            missing = [choice for choice in kind.names if not re.search(rf"\b{choice}\b", comment)]
            assert not missing, f"{name}: {missing}"
        elif isinstance(kind, (Whole, Number)) and (bounds := re.search(r"(>=?|in) .*$", str(kind))):
            assert bounds[0] in comment, f"{name}: {bounds[0]!r}"
    if key.optional:
        assert "~" in comment, f"{name}: what ~ means"


def test_the_sections_of_the_file_are_those_of_the_table():
    text = (PROPERTIES / "overall.yaml").read_text(encoding="utf-8")
    sections = re.split(r"^# -{10,} ", text, flags=re.M)[1:]
    found = {
        key: section.splitlines()[0] for section in sections for key in re.findall(r"^(\w+):", section, re.M)
    }
    for group, section in TABLE.items():
        for name, key in section.items():
            assert key.group == group and group in found[name], f"{name} is under {found[name]!r}"


def test_lists_that_follow_from_the_table():
    assert {"output_dir", "checkpoint_dir", "device", "bootstrap_samples", "preset"} <= VOLATILE_KEYS
    assert not VOLATILE_KEYS & {"few_shot", "seed", "gate", "eval_rows", "read_test"}
    assert {"model", "dataset", "seeds", "output_dir"} <= RUN_ONLY_KEYS and "device" not in RUN_ONLY_KEYS
    assert {"eval_rows", "candidate_seed", "threshold", "topk", "task"} <= set(SHARED_KEYS)
    assert "few_shot" not in SHARED_KEYS
    assert {"gate", "prompt"} <= keys_not_passed_to(True) and "epochs" not in keys_not_passed_to(True)
    assert {"gate", "epochs", "loss_type"} <= keys_not_passed_to(False)
    assert "lora_r" not in keys_not_passed_to(False)
    assert all(key.neutral is ANY or key.accepts(key.neutral) for key in KEYS.values())


@pytest.mark.parametrize("group", Settings.__subclasses__())
def test_every_field_of_the_settings_is_a_key(group):
    assert {field.name for field in fields(group)} <= set(KEYS | RECBOLE_KEYS)
    config = Config("TALLRec", "ml-100k", config_dict={"lora_from": "run"})
    made = group.from_config(config)
    assert all(getattr(made, field.name) == config[field.name] for field in fields(group))


def test_adapter_config():
    config = Config("RecLoRA", "ml-100k", config_dict={"gate_inputs": "state_and_logit", "top_k": 2})
    made = adapter_config(config, 12)
    assert (made.instance_size, made.num_experts, made.r, made.top_k) == (13, 16, 8, 2)
    plain = adapter_config(Config("TALLRec", "ml-100k"), None)
    assert plain == AdapterConfig(mixer="identity", instance_size=1, gate="uniform", temperature=5.0)
