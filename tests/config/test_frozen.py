"""A configuration is built once: RecBole writes what it must, nothing else is written."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import recbole

from recbole_llm.config.configurator import RECBOLE_WRITES, Config
from recbole_llm.model.answer_ctr import AnswerCTR


def test_nothing_is_written_into_a_finished_configuration():
    config = Config("RecLoRA", "ml-100k")
    with pytest.raises(TypeError, match=r"the configuration is frozen: .*config.replace\(few_shot=3\)"):
        config["few_shot"] = 3
    assert config["few_shot"] == 8192


def test_recbole_writes_exactly_the_keys_that_are_allowed():
    written = set()
    for file in Path(recbole.__file__).parent.rglob("*.py"):
        if file.parent.name != "config":
            text = file.read_text(encoding="utf-8")
            written |= set(re.findall(r"config\[\"(\w+)\"\] = ", text))
    assert written == RECBOLE_WRITES
    config = Config("KD_DAGFM", "ml-100k")
    for key in RECBOLE_WRITES:
        config[key] = "x"
    teacher = deepcopy(config)
    teacher["depth"] = teacher["t_depth"]  # as KD_DAGFM does, in a copy
    with pytest.raises(TypeError, match="frozen"):
        teacher["epochs"] = 3


def test_replace_builds_another_configuration_and_checks_it():
    config = Config(
        "RecLoRA", "ml-100k", config_dict={"lora_r": 4, "layout": "prompt"}, cmd_line=["--epochs=2"]
    )
    other = config.replace(lens="SASRec", lora_r=2)
    assert (other["lens"], other["gate_scope"], other["lora_r"], other["epochs"]) == ("SASRec", "user", 2, 2)
    assert (config["lens"], config["gate_scope"], config["lora_r"]) == ("DIN", "user_item", 4)
    assert config.replace().as_dict() == config.as_dict() and "few_shot" not in other.origins
    with pytest.raises(ValueError, match="lora_r=0"):
        config.replace(lora_r=0)


def test_override_changes_final_values_of_a_copy_only():
    class Mine(AnswerCTR):
        pass

    config = Config(Mine, "ml-100k")
    other = config.override(resume="folder", lens_keys={"epochs": 1})
    assert other["resume"] == "folder" and other["lens_keys"] and other.spec is config.spec
    assert config["resume"] is None and "lens_keys" not in config
    with pytest.raises(TypeError, match="frozen"):
        other["resume"] = None
