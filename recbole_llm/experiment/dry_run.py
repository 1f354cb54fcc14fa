"""What a run would do, before it does it."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data.prompts.ctr import PromptBuilder
from recbole_llm.data.prompts.next_item import TitlePromptBuilder
from recbole_llm.data.prompts.stream import StreamPrompts
from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.utils.causal_lm import layer_sizes

PROMPTS = 1000
EXAMPLES = 3


def describe(parts: LLMAssembly) -> str:
    """A page of text: device, samples, labels, prompts, memory, and three full prompts."""
    config = parts.config
    lines = [
        f"dry run: {config['model']} on {config['dataset']} (nothing is trained; the lens has random weights)",
        *decisions(parts),
    ]
    rng = np.random.default_rng(config["seed"])
    examples = np.sort(rng.permutation(len(parts.train))[:EXAMPLES])
    interaction = parts.train[torch.from_numpy(examples)]
    for i, row in enumerate(examples):
        lines += [
            f"--- prompt of few_shot sample {row}, {_answer(parts, interaction, i)} ---",
            parts.prompts.text(interaction, i),
        ]
    return "\n".join(lines)


def _answer(parts: LLMAssembly, interaction: Interaction, i: int) -> str:
    """The answer that sample ``i`` teaches."""
    if parts.config["task"] == "ctr":
        label = int(interaction[parts.config["LABEL_FIELD"]][i])
        of_labels = cast(PromptBuilder | StreamPrompts, parts.prompts)
        return f"label {label} ({of_labels.answer_to(interaction, i)!r})"
    titles = cast(TitlePromptBuilder, parts.prompts)
    return f"answer {titles.answer_text(int(interaction[parts.dataset.iid_field][i]))!r}"


def _task_decisions(parts: LLMAssembly) -> list[str]:
    """What only one of the tasks has: label balance, or candidates."""
    config = parts.config
    if config["task"] == "ctr":
        lines = []
        for name, rows in (("few_shot", parts.train), ("valid", parts.valid), ("test", parts.test)):
            labels = rows.inter_feat[config["LABEL_FIELD"]].float()
            if not len(labels):  # few_shot: 0
                continue
            lines.append(f"label balance, {name}: {labels.mean():.4f} positive of {len(labels):,}")
        return lines
    width = parts.candidates["test"].items.shape[1] if parts.candidates else 0
    among = {
        "candidates": f"{width} stored candidates ({config['negatives']})",
        "full": f"all {parts.dataset.item_num - 1:,} items"
        + (f", of which the LLM ranks the lens's first {config['two_stage']}" if config["two_stage"] else ""),
    }.get(config["eval_mode"], f"RecBole's {config['eval_mode']}, drawn again at every evaluation")
    prompts = cast(TitlePromptBuilder, parts.prompts)
    digests = {name: found.sha256[:16] for name, found in (parts.candidates or {}).items()}
    return [
        f"targets are ranked among {among}" + (f", hashes {digests}" if digests else ""),
        f"prompts list the candidates: {prompts.lists_candidates}; item vectors behind titles: "
        f"{prompts.item_slots}; curriculum: {config['curriculum']}",
    ]


def decisions(parts: LLMAssembly) -> list[str]:
    """What was decided for a run, a line each: device, backbone, samples, label balance, prompt lengths, memory."""
    config, sizes = parts.config, parts.sizes
    rng = np.random.default_rng(config["seed"])
    preparation = parts.dataset.preparation
    lines = [
        f"device: {config['device']}; dtype: {parts.backbone.dtype}; "
        f"backbone: {parts.backbone.name}, {parts.backbone.source}, sha256 {parts.backbone.sha256[:16]}",
        f"lens: {parts.lens.name + ', state width ' + str(parts.lens.width) if parts.lens else 'none'}",
        f"samples with at least {config['min_history']} earlier interactions: {sizes['all']:,}; split "
        f"{sizes['train']:,} / {sizes['valid']:,} / {sizes['test']:,} (train / valid / test, "
        f"order {config['eval_args']['order']}, group_by {config['eval_args']['group_by']})",
        f"samples used: {sizes['few_shot']:,} to tune the LLM (few_shot), {sizes['valid_used']:,} valid, "
        f"{sizes['test_used']:,} test" + (" (bounded by eval_rows)" if config["eval_rows"] else ""),
        f"data prepared in {preparation['seconds']:.1f} s with {preparation['peak_bytes'] / 2**30:.2f} GiB more "
        "than before at the peak",
    ]
    lines += _task_decisions(parts)
    steps = -(-len(parts.train) // config["train_batch_size"])
    lines.append(
        f"an epoch: {len(parts.train):,} samples"
        + (
            " (each of few_shot with its recent and its retrieved history)"
            if config["mixed_training"]
            else ""
        )
        + f" in {steps:,} optimizer steps of {config['train_batch_size']}; epochs: {config['epochs']}"
    )
    longest = 0
    for name, rows in (("few_shot", parts.train), ("test", parts.test)):
        picked = np.sort(rng.permutation(len(rows))[:PROMPTS])
        if not len(picked):  # few_shot: 0
            continue
        encoded = parts.model.encode(rows[torch.from_numpy(picked)])
        lengths = np.array([len(ids) for ids in encoded.input_ids])
        longest = max(longest, int(lengths.max()))
        quantiles = ", ".join(f"{q}%: {np.percentile(lengths, q):.0f}" for q in (5, 25, 50, 75, 95, 100))
        lines.append(
            f"prompt tokens, {name} ({len(picked):,} of {len(rows):,} samples): mean {lengths.mean():.1f}; "
            f"{quantiles}; shortened to {config['max_prompt_tokens']} tokens: {encoded.n_shortened}"
        )
    return [*lines, *memory_estimate(parts, longest), parts.model.summary()]


def memory_estimate(parts: LLMAssembly, longest: int) -> list[str]:
    """Bytes of weights, trained state and activations of one training micro-batch.

    Activations are estimated as the tensors a decoder layer keeps for its backward pass without checkpointing: about
    ``16 hidden + 6 intermediate`` values per token and layer, and one layer's worth plus the hidden states with it.
    """
    model, config = parts.backbone.model, parts.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for group in parts.model.parameter_groups().values() for p in group.values())
    sizes = layer_sizes(model)
    per_token = (16 * sizes.hidden + 6 * sizes.intermediate) * torch.finfo(parts.backbone.dtype).bits // 8
    layers = 1 if config["gradient_checkpointing"] else sizes.layers
    tokens = min(config["micro_batch_size"], config["train_batch_size"]) * longest
    activations = tokens * per_token * layers
    trained_bytes = trained * 16  # float32: value, gradient, two Adam moments
    gib = 2**30
    return [
        f"memory estimate: weights {weights / gib:.2f} GiB, trained parameters {trained:,} with gradients and "
        f"optimizer {trained_bytes / gib:.2f} GiB, activations of one micro-batch ({tokens:,} tokens) "
        f"{activations / gib:.2f} GiB; together {(weights + trained_bytes + activations) / gib:.2f} GiB"
    ]
