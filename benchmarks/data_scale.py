"""Data of ML-25M's size: prepared, split and iterated, in seconds and memory, at growing sizes.

    python benchmarks/data_scale.py --interactions 1e6 5e6 25e6

The data is made up: 25 million interactions of 160,000 users with 60,000 items (smaller sizes in proportion),
popularity by Zipf's law, titles, genres, times over 20 years. Every size is prepared in a process of its own, so that
peaks are its own; a size of which the file exists is not made again. "Iterated" is the first batches of a training
epoch with their histories, as prompts' tokens are made of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from measure import Row, parser, start

from recbole_llm.utils.machine import peak_memory, reset_peak_memory

WORDS = (
    "river night stone garden winter letter bridge mirror harvest signal island summer shadow captain".split()
)
GENRES = ("Drama", "Comedy", "Horror", "Western", "Romance", "Thriller")


def write_data(folder: Path, interactions: int, chunk: int = 1_000_000) -> Path:
    """Write ``folder/zipf-N/zipf-N.{inter,item}``; returns their folder."""
    name = f"zipf-{interactions}"
    target = folder / name
    if (target / f"{name}.item").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    users, items = (
        max(50, interactions * 160 // 25_000),
        max(100, min(60_000, interactions * 60 // 25_000 * 5)),
    )
    popularity = np.cumsum(1 / np.arange(1, items + 1) ** 0.9)
    activity = np.cumsum(rng.lognormal(0, 1.2, users))
    with (target / f"{name}.inter").open("w", newline="\n") as file:
        file.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        for begin in range(0, interactions, chunk):
            n = min(chunk, interactions - begin)
            table = pd.DataFrame(
                {
                    "user": np.searchsorted(activity, rng.random(n) * activity[-1]) + 1,
                    "item": np.searchsorted(popularity, rng.random(n) * popularity[-1]) + 1,
                    "rating": rng.integers(1, 11, n) / 2,
                    "time": rng.integers(900_000_000, 1_500_000_000, n),
                }
            )
            table.to_csv(file, sep="\t", header=False, index=False, lineterminator="\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    words = rng.choice(WORDS, (items, 3))
    genres = rng.choice(GENRES, items)
    lines += [
        f"{i + 1}\t{' '.join(words[i]).title()} {i}\t{1950 + i % 70}\t{genres[i]}" for i in range(items)
    ]
    (target / f"{name}.item").write_text("\n".join(lines) + "\n", newline="\n")
    return target


def resident() -> float:
    """Gigabytes of this process now."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1e6


def prepare(folder: Path, task: str, batches: int) -> dict:
    """Seconds and peak gigabytes above the bare process of each stage."""
    from recbole_llm.config.configurator import Config
    from recbole_llm.data.prompts.ctr import CTR_TEMPLATE, PromptBuilder
    from recbole_llm.data.prompts.next_item import TITLE_TEMPLATE, TitlePromptBuilder
    from recbole_llm.data.retriever import RecentRetriever
    from recbole_llm.experiment.splits import prepare_splits

    text = {"title": "movie_title", "year": "release_year", "genre": "class"}
    config = Config(
        "TALLRec" if task == "ctr" else "TALLRecNext",
        folder.name,
        config_dict={
            "data_path": str(folder.parent),
            "text": text,
            "few_shot": None,
            "device": "cpu",
            "eval_rows": None,
            "backbone": "tiny",
        },
    )
    bare, found = resident(), {}

    def stage(name: str, run):
        reset_peak_memory()
        began = (time.perf_counter(), time.process_time())
        result = run()
        peak = (peak_memory()["host_bytes"] or 0) / 1e9 - bare
        found[name] = {
            "seconds": time.perf_counter() - began[0],
            "cpu": time.process_time() - began[1],
            "gigabytes": peak,
        }
        return result

    splits = stage("prepared", lambda: prepare_splits(config))

    def prompts():
        from recbole_llm.backbone.tiny import tiny_backbone

        _, tokenizer, _ = tiny_backbone(splits.dataset.item_texts()[:2000])
        retriever = RecentRetriever(splits.dataset.history, 10)
        given = {"max_prompt_tokens": 512, "retriever": retriever}
        if task == "ctr":
            return PromptBuilder(splits.dataset, tokenizer, CTR_TEMPLATE.load("ctr"), **given)
        return TitlePromptBuilder(splits.dataset, tokenizer, TITLE_TEMPLATE.load("next_item_text"), **given)

    builder = stage("tokenised", prompts)

    given = {} if task == "ctr" else {"slots": False}  # titles as text

    def iterate() -> None:
        order = np.random.default_rng(0).permutation(len(splits.train))
        for begin in range(0, min(len(order), batches * 1024), 1024):
            builder.encode(splits.train[order[begin : begin + 1024]], **given)

    stage("iterated", iterate)
    samples = {"train": len(splits.train), "valid": len(splits.valid), "test": len(splits.test)}
    return {"stages": found, "samples": samples, "bare": bare}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--interactions", type=float, nargs="+", default=[1e6])
    options.add_argument("--tasks", nargs="+", default=["ctr", "next_item"])
    options.add_argument("--batches", type=int, default=50, help="of 1,024 samples that are iterated")
    options.add_argument("--folder", type=Path, help="where the data is written; default: a temporary folder")
    options.add_argument("--only", help="prepare this one folder, and print json")
    arguments = options.parse_args()
    if arguments.only:
        print(json.dumps(prepare(Path(arguments.only), arguments.tasks[0], arguments.batches)))
        return
    if arguments.tiny:
        arguments.interactions, arguments.batches = [2e4], 2
    table = start("data_scale", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        for size in map(int, arguments.interactions):
            data = write_data(arguments.folder or Path(scratch), size)
            for task in arguments.tasks:
                measure(table, data, task, size, arguments)
    table.write()


def measure(table, data: Path, task: str, size: int, arguments) -> None:
    """The rows of one size and task, from a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--only",
        str(data),
        "--tasks",
        task,
        "--batches",
        str(arguments.batches),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    title = f"{size / 1e6:g} M, {task}"
    large = size >= 25_000_000
    for name, stage in found["stages"].items():
        goal = ""
        if name == "prepared":
            goal = "<= 600" if large else "<= 30" if size <= 1_000_000 else ""
        note = (
            f"{stage['seconds']:.1f} s wall; {stage['cpu'] / size * 1e6:.2f} us of processor per interaction"
        )
        if name == "iterated":
            rows = min(arguments.batches * 1024, found["samples"]["train"])
            note = (
                f"{stage['seconds']:.1f} s wall; {stage['cpu'] / rows * 1e6:.0f} us of processor per sample"
            )
        table.add(Row(f"{title}: {name}", stage["cpu"], "s", goal=goal, note=note))
    peak = max(stage["gigabytes"] for stage in found["stages"].values())
    goal = "<= 6" if large else "<= 1" if size <= 1_000_000 else ""
    table.add(
        Row(
            f"{title}: peak above the bare process",
            peak,
            "GB",
            goal=goal,
            note=f"bare {found['bare']:.2f} GB",
        )
    )


if __name__ == "__main__":
    main()
