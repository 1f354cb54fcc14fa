"""quick_start_loader.py: RecBole's own quick start works without ray, in a process that only imported recbole_llm."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

without_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")


def run_python(code: str, folder: Path) -> str:
    """The standard output of a fresh interpreter in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@without_ray
def test_without_the_finder_recbole_s_quick_start_needs_ray(tmp_path):
    out = run_python(
        """
        try:
            import recbole.quick_start
        except ModuleNotFoundError as error:
            print(error.name)
        """,
        tmp_path,
    )
    assert out.strip() == "ray"


def test_recbole_s_quick_start_runs_saves_and_loads(atomic_data, tmp_path):
    """`run_recbole`, `load_data_and_model` and `recbole.utils.case_study`, as RecBole's documentation has them."""
    out = run_python(
        f"""
        import sys
        import recbole_llm
        print("torch" in sys.modules)
        from recbole.quick_start import load_data_and_model, objective_function, run_recbole
        from recbole.utils.case_study import full_sort_topk
        print(sorted({{name for name in sys.modules if name.split(".")[0] == "ray"}}) if {_ray()} else [])
        config = {{"data_path": {str(atomic_data)!r}, "epochs": 1, "show_progress": False, "use_gpu": False}}
        config |= {{"state": "ERROR", "load_col": {{"inter": ["user_id", "item_id"]}}, "checkpoint_dir": "saved"}}
        result = run_recbole("BPR", "small", config_dict=config)
        print(0 <= result["test_result"]["recall@10"] <= 1)
        from pathlib import Path
        (saved,) = Path("saved").glob("BPR*.pth")
        _, model, dataset, _, _, test_data = load_data_and_model(str(saved))
        users = dataset.token2id("user_id", ["u1", "u2"])
        print(tuple(full_sort_topk(users, model, test_data, k=3)[1].shape))
        import torch
        try:
            torch.load(saved)
        except Exception as error:
            print(type(error).__name__)
        """,
        tmp_path,
    )
    assert out.splitlines()[:1] == ["False"]  # importing recbole_llm is cheap
    assert [line for line in out.splitlines() if line in ("[]", "True", "(2, 3)", "UnpicklingError")] == [
        "[]",
        "True",
        "(2, 3)",
        "UnpicklingError",
    ]


def _ray() -> bool:
    return importlib.util.find_spec("ray") is None


@without_ray
def test_tuning_says_that_it_needs_ray(tmp_path):
    out = run_python(
        """
        import recbole_llm
        from recbole.quick_start import quick_start
        try:
            quick_start.tune.report(recall=1)
        except ImportError as error:
            print(error)
        import importlib.util
        print(importlib.util.find_spec("ray"))
        """,
        tmp_path,
    )
    assert "ray is not installed" in out and "objective_function" in out and out.splitlines()[-1] == "None"


def test_a_real_ray_is_left_alone(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    (tmp_path / "ray" / "tune.py").write_text("def report(**results):\n    return results\n")
    out = run_python(
        """
        import recbole_llm
        from recbole.quick_start import quick_start
        print(quick_start.tune.report(recall=1))
        """,
        tmp_path,
    )
    assert out.splitlines()[-1] == "{'recall': 1}"
