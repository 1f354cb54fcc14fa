"""quick_start_loader.py: RecBole's own quick start works without ray, in a process that only imported recbole_llm."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recbole_llm.utils import recbole_repairs

without_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")


def run_python(code: str, folder: Path) -> list[str]:
    """The lines that a fresh interpreter prints in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_the_package_is_cheap(tmp_path):
    assert run_python("import sys, recbole_llm; print('torch' in sys.modules)", tmp_path) == ["False"]


@without_ray
def test_recbole_s_quick_start_runs_saves_and_loads(atomic_data, tmp_path):
    """`run_recbole`, `load_data_and_model` and `recbole.utils.case_study`, as RecBole's documentation has them."""
    lines = run_python(
        f"""
        import sys
        from pathlib import Path

        def tell(what, *values):
            print("::", what, *values)

        try:
            import recbole.quick_start
        except ModuleNotFoundError as error:
            tell("stock needs", error.name)
        import recbole_llm
        from recbole.quick_start import load_data_and_model, objective_function, run_recbole
        from recbole.quick_start import quick_start
        from recbole.utils.case_study import full_sort_topk
        tell("left behind", [name for name in sys.modules if name.split(".")[0] == "ray"])
        config = {{"data_path": {str(atomic_data)!r}, "epochs": 1, "show_progress": False, "use_gpu": False}}
        config |= {{"load_col": {{"inter": ["user_id", "item_id"]}}, "checkpoint_dir": "saved"}}
        result = run_recbole("BPR", "small", config_dict=config)
        tell("recall", 0 <= result["test_result"]["recall@10"] <= 1)
        (saved,) = Path("saved").glob("BPR*.pth")
        _, model, dataset, _, _, test_data = load_data_and_model(str(saved))
        users = dataset.token2id("user_id", ["u1", "u2"])
        tell("top", tuple(full_sort_topk(users, model, test_data, k=3)[1].shape))
        import pickle
        import torch
        try:
            torch.load(saved)
        except pickle.UnpicklingError as error:
            tell("everybody else's torch.load", type(error).__name__)
        tuned = objective_function({{"model": "BPR", "dataset": "small", **config}}, saved=False)
        tell("objective", sorted(tuned))
        loads = sys.modules[quick_start.get_model("S3Rec").__module__].torch.load  # of its pre-trained file
        tell("S3Rec reads", type(loads(saved)["config"]).__name__)
        try:
            quick_start.tune.run(objective_function)
        except ImportError as error:
            tell("tuning", error)
        """,
        tmp_path,
    )
    *told, tuning = [line.removeprefix(":: ") for line in lines if line.startswith(":: ")]
    assert told == [
        "stock needs ray",
        "left behind []",
        "recall True",
        "top (2, 3)",
        "everybody else's torch.load UnpicklingError",
        "objective ['best_valid_result', 'best_valid_score', 'model', 'test_result', 'valid_score_bigger']",
        "S3Rec reads Config",
    ]
    assert "ray.tune.run was asked for, but ray is not installed" in tuning


def test_an_installed_ray_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("from . import tune\n")
    (tmp_path / "ray" / "tune.py").write_text("def report(**results):\n    return results\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ray", "ray.tune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with recbole_repairs.ray_when_used():
        from ray import tune
    assert tune.report(recall=1) == {"recall": 1} and "ray" in sys.modules
    for name in ("ray", "ray.tune"):
        del sys.modules[name]
