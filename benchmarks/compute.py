"""What the processor makes of a language model: tokens per second, as a share of its rate of matrix products.

    python benchmarks/compute.py                                   # this machine, one thread
    python benchmarks/compute.py --chunks 4x512 --variants float32 float32+compile
    python benchmarks/compute.py --threads 2 --competitor          # beside a process that keeps one processor busy

RecLoRA (factor, K 16, r 8, q and v of the upper 20 layers of 30) on micro-batches of streams, forward and training. A
share of 100% would be a step that is made of nothing but matrix products, of the backbone's own weights, at the rate
that large square ones reach here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from adapters import Streams, base_model, trained
from measure import Row, in_turn, once, parser, rate, ratio, start
from torch.profiler import ProfilerActivity, profile

from recbole_llm.utils.causal_lm import decoder_layers, projections


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min((once(lambda: a @ b) for _ in range(12)), key=lambda times: times.wall)
    return 2 * size**3 / best.wall


def layer_flops(model) -> list[float]:
    """Operations per token of each decoder layer's frozen projections, forward."""
    return [
        2 * sum(child.weight.numel() for child in projections(layer).values())
        for layer in decoder_layers(model)
    ]


def shares(run: Callable[[], object]) -> str:
    """Where the time of a call goes, by operation, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    groups = {
        "matrix products": ("::mm", "::addmm", "::bmm"),
        "attention": ("attention",),
        "copies": ("copy", "cat"),
    }
    times = dict.fromkeys([*groups, "other"], 0.0)
    for event in found.key_averages():
        kind = next((k for k, parts in groups.items() if any(part in event.key for part in parts)), "other")
        times[kind] += event.self_cpu_time_total
    return ", ".join(f"{kind} {value / sum(times.values()):.0%}" for kind, value in times.items())


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--backbone", default="smollm2-135m-instruct", help="a name, a folder, or e.g. random-1b"
    )
    options.add_argument("--chunks", nargs="+", default=["2x1024", "4x512"], help="sequences x tokens")
    options.add_argument("--variants", nargs="+", default=["float32"], help="dtype, or dtype+compile")
    options.add_argument("--competitor", action="store_true", help="keep the first processor busy meanwhile")
    arguments = options.parse_args()
    if arguments.tiny:
        arguments.backbone, arguments.chunks, arguments.rounds = "random-tiny", ["2x64"], 1
    table = start("compute", arguments)
    busy = None
    if arguments.competitor:
        loop = "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nwhile True: pass"
        busy = subprocess.Popen([sys.executable, "-c", loop])
    try:
        measure(table, arguments)
    finally:
        if busy is not None:
            busy.kill()
    table.write()


def measure(table, arguments: argparse.Namespace) -> None:
    device, clock = arguments.device, arguments.clock
    dtypes = {variant: getattr(torch, variant.partition("+")[0]) for variant in arguments.variants}
    peak = {d: matmul_rate(device, d, 512 if arguments.tiny else 2048) for d in set(dtypes.values())}
    for dtype, found in peak.items():
        table.add(Row(f"matrix product 2048^3, {str(dtype).removeprefix('torch.')}", found / 1e9, "GFLOP/s"))
    waits = {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "KMP_", "GOMP_"))}
    models = {}
    for variant, dtype in dtypes.items():
        model = base_model(arguments.backbone, device, dtype)
        layers = len(decoder_layers(model))
        models[variant] = trained(model, "factor", layers=[layers // 3, layers - 1])
        if variant.endswith("+compile"):
            for layer in decoder_layers(models[variant].adapter.model):
                layer.compile()
    flops = layer_flops(next(iter(models.values())).adapter.model)
    needed = {"forward": sum(flops), "training": sum(flops) + sum(flops[len(flops) // 3 :])}
    for chunks in arguments.chunks:
        count, length = map(int, chunks.split("x"))
        streams = Streams(count, length, device)
        for what in ("forward", "training"):
            runs = {
                variant: partial(m.forward if what == "forward" else m.step, streams)
                for variant, m in models.items()
            }
            times = in_turn(runs, arguments.rounds)
            first = arguments.variants[0]
            for variant in runs:
                tokens = count * length
                row = rate(f"{what}, {chunks} tokens, {variant}", tokens, times[variant], clock, "tokens/s")
                share = row.value * needed[what] / peak[dtypes[variant]]
                row.note = f"{share:.0%} of the matrix products' rate; {waits or ''}"
                table.add(row)
                if variant != first:
                    table.add(ratio(f"  time, {variant} to {first}", times[variant], times[first], clock))
            if device == "cpu":
                table.add(Row(f"  profile of {what}, {chunks}, {first}", 1, "", note=shares(runs[first])))


if __name__ == "__main__":
    main()
