"""Finished runs on the dataset ``toy``, trained once for all tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from synthetic import TEXT, write_dataset

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.serving.run import ServedRun

NETWORK = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1}
LENS = {"epochs": 1, "embedding_size": 4, "mlp_hidden_size": [8], "attention_hidden_size": [4]}
LLM = {"layout": "prompt", "few_shot": 16, "train_batch_size": 8, "learning_rate": 0.05}
STREAM = {
    "layout": "stream",
    "lens_residual": False,
    "max_prompt_tokens": 128,
    "stream_lead": 2,
    "stream_context": 5,
}
TITLES = {"backbone": "tiny", "text": TEXT}
RUNS = {
    "RecLoRA": ("RecLoRA", {**LLM, "lens_config": LENS}),
    "RecLoRA user": ("RecLoRA", {**LLM, "lens_config": LENS, "gate_scope": "user"}),
    "RecLoRA expert": (
        "RecLoRA",
        {**LLM, "lens_config": LENS, "gate_scope": "user", "mixer": "expert", "num_experts": 4},
    ),
    "TALLRec": ("TALLRec", {**LLM, "lens": None, "lens_config": None}),
    "TALLRec again": ("TALLRec", {**LLM, "lens": None, "lens_config": None, "learning_rate": 0.02}),
    "TALLRec other base": ("TALLRec", {**LLM, "lens": None, "lens_config": None, "seed": 7}),
    "TALLRec v only": ("TALLRec", {**LLM, "lens": None, "lens_config": None, "target_modules": ["v_proj"]}),
    "TALLRec hidden": ("TALLRec", {**LLM, "lens": None, "lens_config": None, "obfuscate_titles": True}),
    "TALLRec stream": ("TALLRec", {**LLM, **STREAM, "lens": None, "lens_config": None}),
    "RecLoRA stream": ("RecLoRA", {**LLM, **STREAM, "lens": "DIN", "lens_config": LENS}),
    "LensPrompt stream": ("LensPrompt", {**LLM, **STREAM, "lens_config": LENS}),
    "Stream": ("Stream", {"task": "ctr", "stream_length": 16, "stream_context": 4, **NETWORK}),
    "HLLM": ("HLLM", {**TITLES, **NETWORK, "task": "next_item", "num_negatives": 3, "id_size": 0}),
    "MoRec": ("MoRec", {**TITLES, **NETWORK, "task": "ctr"}),
    "iLoRA": (
        "iLoRA",
        {**LLM, "lens_config": {"epochs": 1, **NETWORK}, "num_negatives": 3, "compare_with": None},
    ),
    "TALLRecNext": ("TALLRecNext", {**LLM, "num_negatives": 3, "compare_with": None}),
    "SASRec": ("SASRec", {"task": "next_item", "num_negatives": 3, **NETWORK}),
    "DIN": ("DIN", {"task": "ctr", "embedding_size": 4, "mlp_hidden_size": [8]}),
    "TitleKNN": ("TitleKNN", {"task": "ctr", "backbone": "tiny", "text": TEXT}),
    "BPR": ("BPR", {"task": None, "embedding_size": 4}),
}


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def finished(session_folder):
    """``finished(name)``: the folder of a finished run of :data:`RUNS`."""
    made: dict[str, Path] = {}
    data = write_dataset(session_folder / "data")

    def run(name: str) -> Path:
        if name not in made:
            model, options = RUNS[name]
            settings = {
                "data_path": str(data),
                "output_dir": str(session_folder / "runs"),
                "checkpoint_dir": str(session_folder / "runs"),
                "cache_dir": str(session_folder / "cache"),
                "show_progress": False,
                "device": "cpu",
                "bootstrap_samples": 0,
                "epochs": 1,
                "eval_rows": 20,
                **options,
            }
            if "few_shot" in options:
                settings |= {"backbone": "tiny", "text": TEXT}
            here = os.getcwd()
            os.chdir(session_folder)
            try:
                made[name] = Path(run_recbole_llm(model, "toy", config_dict=settings)["path"]).parent
            finally:
                os.chdir(here)
        return made[name]

    return run


@pytest.fixture
def served(finished, tmp_cwd):
    """``served(name, **options)``: a freshly loaded run."""
    return lambda name, **options: ServedRun.load(finished(name), device="cpu", **options)
