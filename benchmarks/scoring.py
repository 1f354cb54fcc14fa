"""Scoring many titles of one user: one pass over the shared prompt, against a full prompt for every title.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --device cuda --backbone random-7b --dtype bfloat16 --full_prompts 20

Prompts of 384 tokens, titles of 12. Full prompts do not depend on each other: ``--full_prompts`` of them are timed,
and the time of all is that many times more. The most that sharing can give is the ratio of floating-point operations
(projections, attention and output head); the goal is 0.8 of it. The whole catalogue is counted in tokens, not seconds:
what went through the model against the least that is needed, the prompt's tokens and the edges of the tree of titles.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from adapters import WIDTH, base_model, trained
from measure import Row, Times, in_turn, parser, ratio, start

from recbole_llm.backbone.answers import pad_right
from recbole_llm.backbone.title_trie import TitleTrie
from recbole_llm.backbone.titles import answer_log_likelihood, score_titles
from recbole_llm.utils.causal_lm import decoder_layers, projections


def operations(model, prompt: int, answer: int, count: int, shared: bool) -> float:
    """Floating-point operations of ``count`` answers behind one prompt."""
    weights = sum(c.weight.numel() for layer in decoder_layers(model) for c in projections(layer).values())
    config = model.config
    tokens = prompt + count * answer if shared else count * (prompt + answer)
    seen = (1 if shared else count) * prompt * (prompt + 1) / 2  # by the prompt's tokens
    seen += count * (answer * prompt + answer * (answer + 1) / 2)
    attention = 4 * config.num_hidden_layers * config.hidden_size * seen
    head = 2 * config.vocab_size * config.hidden_size * count * answer
    return 2 * weights * tokens + attention + head


def titles(count: int, length: int, vocabulary: int) -> list[np.ndarray]:
    """Random titles, the last token being the line break of all."""
    draw = np.random.default_rng(0).integers(4, vocabulary, (count, length))
    draw[:, -1] = 3
    return list(draw)


def full_prompts(
    model, adapter, prompt: torch.Tensor, z: torch.Tensor, answers: list[np.ndarray]
) -> torch.Tensor:
    """Log-likelihoods of answers, each behind a prompt of its own."""
    rows = [np.concatenate([prompt[0].cpu().numpy(), answer[:-1]]) for answer in answers]
    ids, _ = pad_right(rows, 0)
    embeds = adapter.model.get_input_embeddings()(ids.to(prompt.device))
    lengths = torch.full((len(rows),), prompt.shape[1], device=prompt.device)
    adapter.set_instance(z.expand(len(rows), -1))
    with torch.no_grad():
        return answer_log_likelihood(model, embeds, lengths, answers)


def shared_prompt(
    model, adapter, prompt: torch.Tensor, z: torch.Tensor, answers: list[np.ndarray]
) -> torch.Tensor:
    """The same from one pass over the prompt."""
    adapter.set_instance(z)
    embeds = adapter.model.get_input_embeddings()(prompt)
    lengths = torch.tensor([prompt.shape[1]], device=prompt.device)
    return score_titles(model, embeds, lengths, [TitleTrie(answers)], max_nodes=2048).log_likelihood[0]


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--backbone", default="smollm2-135m-instruct", help="a name, a folder, or e.g. random-1b"
    )
    options.add_argument("--dtype", default="float32")
    options.add_argument("--prompt", type=int, default=384)
    options.add_argument("--title", type=int, default=12)
    options.add_argument("--candidates", type=int, nargs="+", default=[20, 100])
    options.add_argument("--full_prompts", type=int, default=5, help="full prompts that are timed")
    arguments = options.parse_args()
    if arguments.tiny:
        arguments.backbone, arguments.prompt, arguments.rounds = "random-tiny", 48, 1
    table = start("scoring", arguments)
    device = arguments.device
    made = trained(base_model(arguments.backbone, device, getattr(torch, arguments.dtype)), "expert")
    made.model.eval()
    adapter, vocabulary = made.adapter, min(1000, made.adapter.model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, vocabulary, (1, arguments.prompt), generator=generator).to(device)
    z = torch.randn(1, WIDTH, generator=generator).to(device)
    for count in arguments.candidates:
        answers = titles(count, arguments.title, vocabulary)
        some = answers[: arguments.full_prompts]
        given = (made.model, adapter, prompt, z)
        runs = {
            "full": partial(full_prompts, *given, some),
            "shared": partial(shared_prompt, *given, answers),
        }
        times = in_turn(runs, arguments.rounds)
        times["full"] = [Times(t.wall * count / len(some), t.cpu * count / len(some)) for t in times["full"]]
        shape = (adapter.model, arguments.prompt, arguments.title - 1, count)
        bound = operations(*shape, shared=False) / operations(*shape, shared=True)
        difference = (runs["full"]() - runs["shared"]()[: len(some)]).abs().max().item()
        note = f"operations {bound:.1f}x, largest difference of a log-likelihood {difference:.0e}"
        goal = f">= {0.8 * bound:.1f}"
        what = f"{count} candidates: full prompts to a shared one"
        table.add(ratio(what, times["full"], times["shared"], arguments.clock, goal=goal, note=note))

    # Counting tokens needs no large model.
    small = base_model("random-tiny", device, torch.float32)
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 14, 200 if arguments.tiny else 3706)
    many = [np.append(rng.zipf(1.3, size).clip(4, 250), 3) for size in sizes]
    tree = TitleTrie(many)
    short = torch.randint(4, 250, (1, 384), generator=generator).to(device)
    with torch.no_grad():
        embeds = small.get_input_embeddings()(short)
        found = score_titles(small, embeds, torch.tensor([384], device=device), tree, max_nodes=512)
    least = 384 + tree.n_edges
    note = (
        f"{found.tokens:,} tokens computed, {least:,} = 384 + {tree.n_edges:,} edges of {len(many):,} titles"
    )
    table.add(
        Row("whole catalogue: tokens to prompt + edges", found.tokens / least, "x", goal="<= 1.10", note=note)
    )
    table.write()


if __name__ == "__main__":
    main()
