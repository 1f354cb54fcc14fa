"""Tokens per second of a backbone, forward and forward + backward, by dtype and with compiled layers.

    python benchmarks/backbone_speed.py --backbone smollm2-135m-instruct --batch 8 --length 192

Rounds alternate between the variants, so that whatever else the machine does falls on all of them; the best
round of each counts. Ratios are to the first variant. The backward pass is that of LoRA: through every layer,
with weight gradients of the rank-8 pairs beside q and v only.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model

from recbole_llm.backbone.answers import answer_logits
from recbole_llm.backbone.loader import load_backbone
from recbole_llm.backbone.store import DEFAULT_BACKBONE

logger = logging.getLogger("backbone_speed")


def build(name: str, device: str, dtype: str, compiled: bool) -> torch.nn.Module:
    """A backbone with plain LoRA on q and v; ``compiled``: each decoder layer by ``torch.compile``."""
    model = get_peft_model(
        load_backbone(name, device=device, dtype=dtype).model,
        LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )
    if compiled:
        for layer in model.get_base_model().get_decoder().layers:
            layer.compile(dynamic=False)
    return model


def step(model: torch.nn.Module, input_ids: torch.Tensor, lengths: torch.Tensor, backward: bool) -> None:
    """One scoring or one training pass."""
    with torch.set_grad_enabled(backward):
        logits = answer_logits(model, input_ids, lengths, [1, 2])
        if backward:
            (logits[:, 0] - logits[:, 1]).square().mean().backward()
            model.zero_grad()


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call, the device's queue included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measures and logs the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=192, help="tokens per prompt, no padding")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["float32", "bfloat16", "float32+compile", "bfloat16+compile"],
        help="dtype, or dtype+compile; the first is what ratios refer to",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)

    models = {
        variant: build(arguments.backbone, arguments.device, *parse(variant))
        for variant in arguments.variants
    }
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 1000, (arguments.batch, arguments.length), generator=generator)
    lengths = torch.full((arguments.batch,), arguments.length)
    tokens = input_ids.numel()
    logger.info(
        "%s on %s, %d threads, batch %d x %d tokens, best of %d rounds",
        *(arguments.backbone, arguments.device, torch.get_num_threads()),
        *(arguments.batch, arguments.length, arguments.rounds),
    )
    for backward in (False, True):

        def timed(model: torch.nn.Module, backward: bool = backward) -> float:
            return seconds(lambda: step(model, input_ids, lengths, backward), arguments.device)

        first = {variant: timed(model) for variant, model in models.items()}  # warm-up, and compilation
        best = dict.fromkeys(models, float("inf"))
        for _ in range(arguments.rounds):
            for variant, model in models.items():
                best[variant] = min(best[variant], timed(model))
        reference = best[arguments.variants[0]]
        logger.info("forward + backward" if backward else "forward")
        for variant, taken in best.items():
            logger.info(
                "  %-18s %9.0f tokens/s  %5.2fx  (first pass %.1f s)",
                *(variant, tokens / taken, reference / taken, first[variant]),
            )


def parse(variant: str) -> tuple[str, bool]:
    """``float32+compile`` -> ``("float32", True)``."""
    dtype, _, extra = variant.partition("+")
    if extra not in ("", "compile"):
        raise ValueError(f"variant {variant!r}: a dtype, or a dtype with +compile")
    return dtype, bool(extra)


if __name__ == "__main__":
    main()
