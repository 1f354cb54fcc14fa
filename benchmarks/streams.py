"""Labels per second of streams against prompts, in the whole program: data, tokens, lens, language model, optimizer.

    python benchmarks/streams.py
    python benchmarks/streams.py --model TALLRec --dataset ml-1m --data_path dataset/

RecBole's packaged ml-100k by default. Prompts show 10 earlier interactions, as they do by default; streams show more
(25 to about 50 with 512 tokens), so a second comparison is with prompts of that many. Lens and adapter have random
weights: the time does not depend on them. Training takes one optimizer step, scoring the first test samples.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import recbole
from measure import Row, in_turn, once, parser, rate, ratio, start

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.llm_assembly import assemble
from recbole_llm.trainer.llm_trainer import LLMTrainer


def built(arguments: argparse.Namespace, folder: Path, **options):
    """The parts of a run, untrained, and its trainer."""
    tiny = {"backbone": "tiny"} if arguments.tiny else {}
    if arguments.backbone:
        tiny = {"backbone": arguments.backbone}
    settings = {
        "data_path": arguments.data_path or str(Path(recbole.__file__).parent / "dataset_example"),
        "device": arguments.device,
        "few_shot_by": "user",
        "few_shot": 4096,
        "zero_shot": False,
        "show_progress": False,
        **tiny,
        **options,
    }
    config = Config(arguments.model, arguments.dataset, config_dict=settings)
    parts = assemble(config, fit=False)
    return parts, LLMTrainer(config, parts.model, run_folder=folder, identities=parts.identities)


def training(parts, trainer, labels: int):
    """One optimizer step of at least ``labels`` labels, as the trainer takes it; and how many there are."""
    batches = trainer._epoch_batches(parts.train_data, 0)[0]
    batch = parts.train_data.collate_fn(batches[:labels])

    def step() -> None:
        parts.model.train()
        trainer._backward(batch, 0)
        trainer._update()

    return step, len(batch)


def scoring(parts, labels: int):
    """Scoring the first ``labels`` test samples."""
    samples = parts.test[np.arange(min(labels, len(parts.test)))]

    def score() -> None:
        parts.model.eval()
        parts.model.score_rows(samples)

    return score, len(samples)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="RecLoRA")
    options.add_argument("--dataset", default="ml-100k")
    options.add_argument("--data_path")
    options.add_argument("--backbone")
    options.add_argument("--tokens", type=int, default=512, help="longest chunk")
    options.add_argument("--prompts", type=int, default=16, help="prompts that are timed")
    options.add_argument("--labels", type=int, default=256, help="labels of streams that are timed")
    arguments = options.parse_args()
    if arguments.tiny:
        arguments.prompts, arguments.labels, arguments.rounds = 4, 64, 1
    table = start("streams", arguments)
    clock = arguments.clock
    with tempfile.TemporaryDirectory() as folder:
        layouts = {
            "streams": dict(
                layout="stream", max_prompt_tokens=arguments.tokens, train_batch_size=arguments.labels
            ),
            "prompts of 10": dict(layout="prompt", train_batch_size=arguments.prompts),
            "prompts of 37": dict(
                layout="prompt",
                text_history_length=37,
                train_batch_size=arguments.prompts,
                micro_batch_size=8,
                max_prompt_tokens=1024,
            ),
        }
        runs = {name: built(arguments, Path(folder), **options) for name, options in layouts.items()}
        for what, goal in (("training", 10), ("scoring", 20)):
            steps, labels = {}, {}
            for name, (parts, trainer) in runs.items():
                count = arguments.labels if name == "streams" else arguments.prompts
                made = training(parts, trainer, count) if what == "training" else scoring(parts, count)
                steps[name], labels[name] = made
            times = in_turn(steps, arguments.rounds)
            for name, (parts, _) in runs.items():
                before = parts.model.counts["tokens"]
                once(steps[name])
                tokens = parts.model.counts["tokens"] - before
                note = f"{tokens / labels[name]:.1f} tokens per label"
                table.add(rate(f"{what}, {name}", labels[name], times[name], clock, "labels/s", note=note))
            for name in list(runs)[1:]:
                scale = labels["streams"] / labels[name]
                of = f"{what}: streams to {name}, labels per second"
                wanted = f">= {goal}" if name == "prompts of 10" else ""
                table.add(ratio(of, times[name], times["streams"], clock, scale=scale, goal=wanted))
        parts, trainer = runs["streams"]
        batch = parts.train_data.collate_fn(trainer._epoch_batches(parts.train_data, 0)[0])
        cutting = once(partial(list, parts.model.micro_batches(batch)))
        whole = once(training(parts, trainer, arguments.labels)[0])
        share = getattr(cutting, clock) / getattr(whole, clock)
        table.add(Row("making tokens of chunks, share of a training step", share, "", goal="<= 0.02"))
    table.write()


if __name__ == "__main__":
    main()
