"""Fuzzing guided by coverage:  python tests/fuzz/run_atheris.py [TARGET ...] --seconds=3600

Needs ``pip install atheris``, which has wheels for Linux and Python 3.11 to 3.13. Every target runs in a process of its
own for its share of the time. What breaks a target is written to ``tests/fuzz/found/`` and printed; the exit code
counts such targets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def fuzz(name: str) -> None:
    """Fuzz one target in this process, as the options behind it say."""
    import atheris

    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    with atheris.instrument_imports(include=["recbole_llm"]):
        from parser_targets import TARGETS
    atheris.Setup([sys.argv[0], *sys.argv[3:]], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    """Fuzz all targets one after the other; the number of those that broke."""
    parser = argparse.ArgumentParser(description="Fuzz the parsers of recbole_llm with atheris.")
    parser.add_argument("targets", nargs="*", default=list(SEEDS))
    parser.add_argument("--seconds", type=int, default=3600, help="in all")
    arguments = parser.parse_args()
    found = HERE / "found"
    broken = 0
    for name in arguments.targets:
        seconds = arguments.seconds // len(arguments.targets)
        with tempfile.TemporaryDirectory() as scratch:
            corpus = Path(scratch)
            for number, text in enumerate(SEEDS[name]):
                (corpus / f"seed{number}").write_text(text, encoding="utf-8")
            found.mkdir(exist_ok=True)
            command = [sys.executable, __file__, "--fuzz", name, str(corpus), f"-max_total_time={seconds}"]
            command += [
                "-max_len=600",
                "-timeout=20",
                "-rss_limit_mb=4096",
                f"-artifact_prefix={found}/{name}-",
            ]
            started = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = done.stderr.splitlines()
        runs = next((line for line in reversed(lines) if line.startswith(("stat::", "Done", "#"))), "")
        print(f"{name:13} {time.monotonic() - started:6.0f} s  exit {done.returncode}  {runs}", flush=True)
        if done.returncode:
            print("\n".join(lines[-40:]), flush=True)
        broken += done.returncode != 0
    return broken


SEEDS = {
    "atomic": [
        "1\t2\t3\t4\n",
        'u\t"a\tb"\t\tNA\n',
        "1\t2\t3\t2011-06-26 10:16:34\0item_id:token\ttitle:token_seq\n2\tHeat\n",
    ],
    "header": ["item_id:token\ttitle:token_seq\n1\tHeat\n", "\ufeffitem_id:float\tprice:float\n1.0\t-\n"],
    "template": [
        (HERE.parents[1] / "properties" / "prompt" / f"{name}.yaml").read_text(encoding="utf-8")[:600]
        for name in ("ctr", "next_item_text", "stream_ctr")
    ],
    "text_section": [
        "{noun: book, verb: [reads, read], rating_scale: [1, 5], user_fields: {age: 'aged {}'}}"
    ],
    "models": [
        "DIN, RecLoRA target_modules=[q_proj, v_proj] gate=uniform,Pop",
        "--model=RecLoRA\n--few_shot=3\n--seed=1",
    ],
    "search_space": ["learning_rate loguniform -8,-4\nk quniform 1,9,2\ngate choice ['a', 'b']\n"],
    "titles": ["City of Lost Children, The (Cité des enfants perdus, La) (1995)", "a &amp;amp; b\u202e"],
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        fuzz(sys.argv[2])
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.exit(main())
