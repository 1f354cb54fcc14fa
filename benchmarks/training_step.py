"""A training step of RecLoRA and iLoRA against PEFT's plain LoRA with the same targets, and against the released way.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --backbone random-7b --dtype bfloat16

RecLoRA: factor, K 16, r 8, q and v. iLoRA: K 4, r 8, all seven projections. Prompts of 123 tokens with one label each;
streams with a label every 8 tokens. "Released way": our stand-in (:class:`adapters.Released`): one sample per pass,
gradients accumulated, every expert expanded (iLoRA), logits of the whole vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from adapters import PROMPT_TOKENS, Prompts, Streams, base_model, plain, released, trained
from measure import Row, in_turn, parser, peak_bytes, rate, ratio, saved_bytes, start

NAMES = {"factor": "RecLoRA", "expert": "iLoRA"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--backbone", default="smollm2-135m-instruct", help="a name, a folder, or e.g. random-1b"
    )
    options.add_argument("--dtype", default="float32")
    options.add_argument("--prompts", type=int, default=8, help="in a batch")
    options.add_argument("--chunks", default="2x512", help="of a batch of streams: sequences x tokens")
    options.add_argument("--without_released", action="store_true")
    arguments = options.parse_args()
    if arguments.tiny:
        arguments.backbone, arguments.prompts, arguments.chunks, arguments.rounds = (
            "random-tiny",
            2,
            "2x64",
            1,
        )
    table = start("training_step", arguments)
    device, clock, limit = (
        arguments.device,
        arguments.clock,
        "<= 1.10" if arguments.device == "cpu" else "<= 1.05",
    )
    count, length = map(int, arguments.chunks.split("x"))
    batches = {
        "prompts": Prompts(arguments.prompts, PROMPT_TOKENS, device),
        "streams": Streams(count, length, device),
    }

    def model():
        return base_model(arguments.backbone, device, getattr(torch, arguments.dtype))

    for kind, name in NAMES.items():
        ours, peft = trained(model(), kind), plain(model(), kind)
        theirs = None if arguments.without_released else released(model(), kind)
        labels = {}
        for layout, batch in batches.items():
            runs = {"ours": partial(ours.step, batch), "peft": partial(peft.step, batch)}
            if theirs is not None:
                runs["released"] = partial(theirs.step, batches["prompts"])
            times = in_turn(runs, arguments.rounds)
            title = f"{name}, {layout}"
            tokens = batch.ids.numel()
            table.add(rate(f"{title}: tokens", tokens, times["ours"], clock, "tokens/s"))
            labels[layout] = rate(f"{title}: labels", batch.labels, times["ours"], clock, "labels/s")
            table.add(labels[layout])
            table.add(ratio(f"{title}: time to plain LoRA", times["ours"], times["peft"], clock, goal=limit))
            if device != "cpu" or not arguments.tiny:
                peaks = [peak_bytes(run, device) for run in (runs["ours"], runs["peft"])]
                note = f"{peaks[0] / 1e9:.2f} and {peaks[1] / 1e9:.2f} GB above the model"
                table.add(
                    Row(
                        f"{title}: peak memory to plain LoRA",
                        peaks[0] / max(1, peaks[1]),
                        "x",
                        goal=limit,
                        note=note,
                    )
                )
            for m in (ours, peft):
                m.model.train()
            saved = [saved_bytes(partial(m.loss, batch), m.model) for m in (ours, peft)]
            note = f"{saved[0] / 1e6:.0f} and {saved[1] / 1e6:.0f} MB"
            table.add(
                Row(
                    f"{title}: saved activations to plain LoRA",
                    saved[0] / saved[1],
                    "x",
                    goal=limit,
                    note=note,
                )
            )
            if theirs is not None:
                scale = batch.labels / batches["prompts"].labels
                table.add(
                    ratio(
                        f"{title}: labels per second to the released way",
                        times["released"],
                        times["ours"],
                        clock,
                        scale=scale,
                        goal=">= 10" if layout == "streams" else "",
                    )
                )
    table.write()


if __name__ == "__main__":
    main()
