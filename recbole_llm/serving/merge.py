"""Several runs, or exported adapters, of one base model merged into one LoRA; see :mod:`recbole_llm.adapter.merge`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from recbole_llm.adapter.export import write_plain_lora
from recbole_llm.adapter.merge import (
    BY_INPUTS,
    METHODS,
    Batch,
    PlainLora,
    check_mergeable,
    merge_inputs,
    merge_weights,
    padded,
    truncate,
    truncation_error,
)
from recbole_llm.backbone.answers import pad_right
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.serving.export import DESCRIPTION, engine_rank, scores_with
from recbole_llm.serving.run import ServedRun
from recbole_llm.trainer.checkpoint import load_checkpoint
from recbole_llm.utils.files import read_json, read_tensors, write_json
from recbole_llm.utils.run_files import BEST_FILE, CONFIG_FILE

logger = logging.getLogger(__name__)

PROMPTS = 50
"""Prompts of every run that ``regmean`` and ``iteris`` read, as in IterIS."""


@dataclass
class Merged:
    """What was merged.

    Attributes:
        lora: as it was written.
        folder: PEFT's files.
        lines: what the user should know.
        auc: of every run's test samples, by ``own`` and ``merged``; empty unless evaluated.
    """

    lora: PlainLora
    folder: Path
    lines: list[str]
    auc: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Source:
    """A LoRA to merge.

    Attributes:
        lora: its tensors.
        base: name or path of the base model.
        targets: names of the adapted layers.
        prompt: the template it was trained with, if known.
        transposed: whether the base weights are stored transposed (GPT-2's Conv1D).
    """

    lora: PlainLora
    base: str
    targets: list[str]
    prompt: str | None
    transposed: bool = False


def read_lora(folder: str | Path) -> Source:
    """The plain LoRA of a run's folder, or of a PEFT folder that :mod:`recbole_llm.serving.export` wrote.

    Raises:
        ValueError: if it is neither, or has a gate.
    """
    folder = Path(folder)
    if (folder / BEST_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        config = read_json(folder / CONFIG_FILE)
        tensors, meta = load_checkpoint(folder / BEST_FILE)
        pairs = _pairs({n.removeprefix("adapter."): t for n, t in tensors.items()}, ".lora_A", ".lora_B")
        if not pairs:
            raise ValueError(f"{folder} is a run of {config['model']}, which has no LoRA to merge")
        if config["mixer"] != "identity":
            raise ValueError(
                f"{folder} has a gate (mixer: {config['mixer']}), so its LoRA differs between users; export its "
                "clusters, and merge their folders"
            )
        lora = PlainLora(
            pairs, config["lora_alpha"] / config["lora_r"], meta["identities"]["backbone"], str(folder)
        )
        return Source(lora, str(config["backbone"]), list(config["target_modules"]), config["prompt"])
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} is neither a finished run nor a PEFT folder")
    config = read_json(path)
    facts = folder / DESCRIPTION
    if not facts.is_file():
        raise ValueError(f"{folder} does not say which base model it belongs to: it has no {DESCRIPTION}")
    about = read_json(facts)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    pairs = _pairs(named, ".lora_A.weight", ".lora_B.weight")
    lora = PlainLora(pairs, config["lora_alpha"] / config["r"], about["base_model"]["sha256"], str(folder))
    return Source(
        lora,
        about["base_model"]["name"],
        sorted(config["target_modules"]),
        about.get("prompt"),
        bool(config["fan_in_fan_out"]),
    )


def _pairs(tensors: dict[str, Tensor], a: str, b: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removesuffix(a): (tensor, tensors[name.removesuffix(a) + b])
        for name, tensor in tensors.items()
        if name.endswith(a)
    }


def merge_runs(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    alpha: float = 1e-6,
    prompts: int = PROMPTS,
    rounds: int = 10,
    seed: int = 0,
    evaluate: bool = False,
) -> Merged:
    """Merge and write one PEFT folder.

    Args:
        folders: of runs with a plain LoRA; for methods that need no prompts, also of exported adapters.
        output: a new or empty folder.
        method, weights, density, alpha, rounds, seed: see :mod:`recbole_llm.adapter.merge`.
        rank: truncate the result to it. By default ``linear``, ``cat`` keep theirs, ``svd``, ``ties``, ``dare`` take
            that of the runs, and ``regmean``, ``iteris`` the sum of the runs' ranks.
        prompts: training prompts of every run that ``regmean`` and ``iteris`` read.
        evaluate: the AUC on every run's test samples, of its own LoRA, of the merged one, and (``regmean``, ``iteris``)
            of the merged one before it was truncated.

    Raises:
        ValueError: if the LoRAs cannot be merged: other bases, other projections, gates.
        OSError: if ``output`` is in use.
    """
    folders, output = [Path(folder) for folder in folders], Path(output)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if len(folders) < 2:
        raise ValueError("name at least two runs to merge")
    if output.exists() and any(output.iterdir()):
        raise OSError(f"{output} is not empty; name a new folder")
    sources = [read_lora(folder) for folder in folders]
    loras = [source.lora for source in sources]
    check_mergeable(loras, weights)
    lines = []
    if len({source.prompt for source in sources}) > 1:
        lines.append("the runs have different prompts: the merged LoRA has to serve all of them")
    runs = [ServedRun.load(folder) for folder in folders] if evaluate or method in BY_INPUTS else []
    uncut: dict[str, Tensor] | None = None
    if method in BY_INPUTS:
        refuse_slots(runs)
        first = runs[0].model.adapter
        read = [prompt_batches(run, prompts) for run in runs]
        with first.disabled():
            uncut = merge_inputs(
                first.model, loras, read, method, weights=weights, alpha=alpha, rounds=rounds
            )
        merged = truncate(uncut, rank or sum(lora.rank for lora in loras), base=loras[0].base)
        lines.append(f"truncated to rank {merged.rank}: relative error {truncation_error(uncut, merged):.4f}")
    else:
        merged = merge_weights(loras, method, weights=weights, rank=rank, density=density, seed=seed)
    written = padded(merged, engine_rank(merged.rank))
    write_merged(written, sources, output, {"method": method, "merged": [str(folder) for folder in folders]})
    auc = {}
    if evaluate:
        for run in runs:
            auc[run.folder.name] = compare(
                run, {"merged": merged.updates()} | ({"uncut": uncut} if uncut else {})
            )
    return Merged(written, output, lines, auc)


def refuse_slots(runs: Sequence[ServedRun]) -> None:
    """Raise ValueError where prompts are not text alone."""
    for run in runs:
        if run.model.slots:
            raise ValueError(
                f"{run.folder} has prompts with slots for vectors of the lens; use a method without prompts"
            )


def prompt_batches(run: ServedRun, n: int, size: int = 4) -> list[Batch]:
    """The first ``n`` training prompts of a run, as batches of token ids and lengths."""
    samples = run.parts.train[np.arange(min(n, len(run.parts.train)))]
    encoded = run.model.encode(samples).input_ids
    device, batches = run.model.device, []
    for start in range(0, len(encoded), size):
        ids, lengths = pad_right(encoded[start : start + size], run.model.pad_id)
        batches.append((ids.to(device), lengths.to(device)))
    return batches


def write_merged(lora: PlainLora, sources: Sequence[Source], folder: Path, facts: dict) -> None:
    """Write the merged LoRA as a PEFT folder."""
    first = sources[0]
    write_plain_lora(
        replace(lora, pairs={name: (a.float(), b.float()) for name, (a, b) in lora.pairs.items()}),
        folder,
        target_modules=first.targets,
        base_model_name=first.base,
        fan_in_fan_out=first.transposed,
    )
    about = {"base_model": {"name": first.base, "sha256": lora.base}, "prompt": first.prompt, **facts}
    write_json(folder / DESCRIPTION, about)


@torch.no_grad()
def compare(run: ServedRun, others: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """The AUC of a run's test samples, with its own LoRA (``own``) and with other updates, by their names.

    Raises:
        ValueError: if the run has no labels.
    """
    if not isinstance(run.model, AnswerCTR):
        raise ValueError(f"{run.folder} has no labels, so there is no AUC; merge without --evaluate")
    scores: dict[str, list[np.ndarray]] = {name: [] for name in ("own", *others)}
    labels = []
    for batch, *_ in run.parts.test_data:
        labels.append(batch[run.config["LABEL_FIELD"]].numpy())
        scores["own"].append(run.model.predict(batch).double().cpu().numpy())
        for name, updates in others.items():
            scores[name].append(scores_with(run, batch, updates))
    truth = np.concatenate(labels)
    return {name: float(roc_auc_score(truth, np.concatenate(parts))) for name, parts in scores.items()}
