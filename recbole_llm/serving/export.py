"""Adapters of a run as standard PEFT folders: of one user, of clusters of users, of all users together.

With a fixed gate every adapter here is a plain LoRA ``W0 + s B' A'``. Which LoRA:

    users        the user's own gate, at the end of the data
    clusters     k-means (scikit-learn) of the users' gates; each cluster's mean gate
    mean         the mean gate of all users
    (no gate)    the one LoRA that the run has

``vllm`` and ``sglang`` take LoRAs of some ranks only, so A' and B' are filled up with zeros to the next of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.metrics import roc_auc_score
from torch import Tensor

from recbole_llm.adapter.export import plain_tensors, write_plain_lora
from recbole_llm.adapter.merge import PlainLora, applied, padded
from recbole_llm.backbone.loader import DEQUANTISED
from recbole_llm.model.answer_ctr import AnswerCTR
from recbole_llm.serving.run import ServedRun, report_unknown
from recbole_llm.utils.files import read_json, write_json

logger = logging.getLogger(__name__)

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``max_lora_rank`` that vLLM accepts (vllm/config/lora.py)."""
DESCRIPTION = "recbole_llm.json"
"""Beside the files of PEFT: what the adapter was made of."""
INDEX, SHARD = "index.json", "shard-{:05d}.safetensors"
SHARD_USERS = 256
"""Users per file where many are exported."""
MOST_FOLDERS = 64
"""More users than that go into shards."""


@dataclass
class Exported:
    """What was written.

    Attributes:
        folders: PEFT folders by the adapter's name.
        rank: of all of them.
        base: name or path of the base model.
        index: of shards, if the users went there.
        lines: what the user should know, e.g. what clustering costs.
        unknown: users that are not in the data.
    """

    folders: dict[str, Path]
    rank: int
    base: str
    index: Path | None
    lines: list[str]
    unknown: list[str]

    def start_lines(self) -> list[str]:
        """Commands that start ``vllm`` and ``sglang`` with these adapters."""
        if not self.folders:
            return []
        named = " ".join(f"{name}={path}" for name, path in self.folders.items())
        return [
            f"vllm serve {self.base} --enable-lora --max-lora-rank {self.rank} --lora-modules {named}",
            f"python -m sglang.launch_server --model-path {self.base} --max-lora-rank {self.rank} "
            f"--lora-paths {named}",
        ]


def engine_rank(rank: int, wanted: int | None = None) -> int:
    """The rank to write: ``wanted``, or the smallest that serving engines accept.

    Raises:
        ValueError: if no engine takes a rank as high, or ``wanted`` is none of theirs or too small.
    """
    if wanted is not None:
        if wanted not in ENGINE_RANKS or wanted < rank:
            raise ValueError(
                f"rank: {wanted} must be one of {', '.join(map(str, ENGINE_RANKS))} (the ranks that vLLM accepts) "
                f"and at least {rank}, the adapter's own"
            )
        return wanted
    if rank > ENGINE_RANKS[-1]:
        raise ValueError(
            f"the adapter has rank {rank}, and serving engines take {ENGINE_RANKS[-1]} at most; truncate it (merge "
            "--rank), or train with a smaller lora_r or fewer experts"
        )
    return next(accepted for accepted in ENGINE_RANKS if accepted >= rank)


def export(
    run: ServedRun,
    folder: str | Path,
    *,
    users: Iterable[object] | None = None,
    clusters: int | None = None,
    mean: bool = False,
    item: object | None = None,
    rank: int | None = None,
    evaluate: bool = False,
    seed: int = 0,
) -> Exported:
    """Write adapters of a run; exactly one of ``users``, ``clusters`` and ``mean``.

    Args:
        run: of an LLM recommender.
        folder: new or empty; gets one folder per adapter, or shards.
        users: ids as in the data's files; ``["all"]`` for all users of the data. More than 64 go into shards.
        clusters: number of clusters.
        mean: the mean gate of all users.
        item: for a gate that sees the target: the item of whose pairs the gates are.
        rank: to write, by default the smallest that engines accept.
        evaluate: with ``clusters`` or ``mean``: the AUC of the run's test samples with their own gates and with these.
        seed: of k-means.

    Raises:
        ValueError: if the adapter is no LoRA that serving engines can load: see the messages.
        OSError: if the folder is in use.
    """
    folder, model = Path(folder), run.model
    check_exportable(run, item)
    if sum([users is not None, clusters is not None, mean]) != 1:
        raise ValueError("name the users, or a number of clusters, or the mean: exactly one of them")
    if folder.exists() and any(folder.iterdir()):
        raise OSError(f"{folder} is not empty; name a new folder")
    config = model.adapter.config
    final = engine_rank(config.r if config.mixer != "output" else config.rank, rank)
    known, unknown = _users(run, users)
    lines: list[str] = []
    names, gates, member = _gates(run, known, clusters, mean, item, seed)
    if len(names) > MOST_FOLDERS:
        index = _write_shards(run, folder, names, gates, final)
        return Exported({}, final, base_name(run), index, lines, unknown)
    folders = {}
    for row, name in enumerate(names):
        one = None if gates is None else {key: value[row : row + 1] for key, value in gates.items()}
        write_adapter(run, lora_of(run, one, final, name), folder / name)
        folders[name] = (folder / name).resolve()
    if member is not None:
        sizes = np.bincount(member, minlength=len(names))
        lines.append(
            "users per adapter: " + ", ".join(f"{n} {size}" for n, size in zip(names, sizes, strict=True))
        )
        tokens = run.tokens(run.dataset.uid_field, known)
        write_json(folder / "users.json", {u: names[m] for u, m in zip(tokens, member, strict=True)})
        if evaluate:
            lines.append(_cost(run, dict(zip(known.tolist(), member.tolist(), strict=True)), gates))
    return Exported(folders, final, base_name(run), None, lines, unknown)


def check_exportable(run: ServedRun, item: object | None = None) -> None:
    """Refuse what cannot be a plain LoRA on text prompts.

    Raises:
        ValueError: saying why and what to do.
    """
    model = run.model
    if not run.config.spec.is_llm:
        raise ValueError(f"{run.config['model']} tunes no language model, so there is no adapter to export")
    if model.slots:
        raise ValueError(
            f"the prompts of {run.config['model']} have slots for vectors of the lens, which serving engines do not "
            "fill; export a run whose template is text alone"
        )
    if not model.gated:
        return
    if run.config["layout"] == "stream":
        raise ValueError(
            "layout: stream gives every interaction a gate of its own, so there is no adapter of a user; train with "
            "layout: prompt"
        )
    if run.config["gate"] == "token":
        raise ValueError(
            "gate: token reads each prompt, so there is no adapter of a user; train with another gate"
        )
    if model.lens.gate_scope != "user" or model.gate_reads_logit:
        if item is None:
            raise ValueError(
                "the gate has seen the target item (gate_scope: user_item), so a user has one adapter per item; train "
                "with --gate_scope=user, or name the item whose adapter to export (--item)"
            )


def base_name(run: ServedRun) -> str:
    """What PEFT and serving engines load: the base model's name; of packed weights the folder of their plain copy."""
    path = run.backbone.model.name_or_path
    return path if Path(path).parent.name == DEQUANTISED else run.backbone.name


def _users(run: ServedRun, users: Iterable[object] | None) -> tuple[np.ndarray, list[str]]:
    tokens = None if users is None else [str(user) for user in users]
    if tokens is None or tokens == ["all"]:
        start = run.dataset.history.user_start
        return np.flatnonzero(np.diff(start) > 0), []
    found = run.ids(run.dataset.uid_field, tokens)
    report_unknown("users", found.unknown, run.folder)
    if not len(found.known):
        raise ValueError(f"none of the users is in the data of {run.folder}: {', '.join(found.unknown[:10])}")
    return np.array(list(dict.fromkeys(found.known.tolist()))), found.unknown


@torch.no_grad()
def _gates(
    run: ServedRun, users: np.ndarray, clusters: int | None, mean: bool, item: object | None, seed: int
) -> tuple[list[str], dict[str, Tensor] | None, np.ndarray | None]:
    """Names of the adapters, their gates ``[n, ...]`` by projection, and the adapter of each user (clusters, mean)."""
    adapter = run.model.adapter
    if not run.model.gated:
        if clusters is not None:
            raise ValueError(
                f"{run.config['model']} has one LoRA for all users: nothing to cluster; export --mean"
            )
        return ["adapter"], None, None
    run.check_users(users)
    target = 0
    if item is not None:
        found = run.ids(run.dataset.iid_field, [item])
        if found.unknown:
            raise ValueError(f"item {item} is not in the data of {run.folder}")
        target = int(found.known[0])
    parts = []
    for start in range(0, len(users), 512):
        some = users[start : start + 512]
        state, logit = run.model.lens.represent(run.samples(some, np.full(len(some), target)))
        parts.append(adapter.gate_weights(run.model.gate_instance(state, logit)))
    gates = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if clusters is None and not mean:
        return [f"user-{token}" for token in run.tokens(run.dataset.uid_field, users)], gates, None
    if clusters is None:
        return (
            ["mean"],
            {n: g.mean(dim=0, keepdim=True) for n, g in gates.items()},
            np.zeros(len(users), dtype=int),
        )
    if not 1 <= clusters <= len(users):
        raise ValueError(f"clusters: {clusters} must be between 1 and {len(users)}, the number of users")
    flat = np.concatenate([gate.flatten(1).double().cpu().numpy() for gate in gates.values()], axis=1)
    member = KMeans(clusters, n_init=10, random_state=seed).fit_predict(flat)
    centred = {
        name: torch.stack([gate[torch.from_numpy(member == c)].mean(dim=0) for c in range(clusters)])
        for name, gate in gates.items()
    }
    return [f"cluster-{c}" for c in range(clusters)], centred, member


def lora_of(run: ServedRun, gates: dict[str, Tensor] | None, rank: int | None, name: str) -> PlainLora:
    """The plain LoRA of fixed gates, padded with zeros to ``rank``."""
    adapter = run.model.adapter
    lora = PlainLora(
        adapter.plain_pairs(gates), adapter.config.scale, run.backbone.sha256, f"{name} of {run.folder}"
    )
    return lora if rank is None else padded(lora, rank)


def write_adapter(run: ServedRun, lora: PlainLora, folder: Path, **more: object) -> None:
    """Write a PEFT folder, and beside PEFT's files what the adapter was made of."""
    config = run.model.adapter.config
    write_plain_lora(
        lora,
        folder,
        target_modules=config.target_modules,
        layers=config.layers,
        lora_dropout=config.lora_dropout,
        base_model_name=base_name(run),
        fan_in_fan_out=run.model.adapter.fan_in_fan_out,
    )
    facts = {
        "base_model": {"name": base_name(run), "sha256": run.backbone.sha256},
        "run": run.folder.name,
        "model": run.config["model"],
        "prompt": run.config["prompt"],
        "adapter": lora.name.split(" of ")[0],
        **more,
    }
    write_json(folder / DESCRIPTION, facts)


# ---------------------------------------------------------------------- many users


def _write_shards(
    run: ServedRun, folder: Path, names: Sequence[str], gates: dict[str, Tensor], rank: int
) -> Path:
    """One file per :data:`SHARD_USERS` users, tensors ``<name>/<projection>.lora_A.weight``; and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for number, start in enumerate(range(0, len(names), SHARD_USERS)):
        tensors: dict[str, Tensor] = {}
        for row in range(start, min(start + SHARD_USERS, len(names))):
            lora = lora_of(run, {key: value[row : row + 1] for key, value in gates.items()}, rank, names[row])
            tensors |= plain_tensors(lora, f"{names[row]}/")
            where[names[row]] = SHARD.format(number)
        save_file(tensors, folder / SHARD.format(number))
    config = run.model.adapter.config
    index = {
        "base_model": {"name": base_name(run), "sha256": run.backbone.sha256},
        "rank": rank,
        "scale": config.scale,
        "target_modules": list(config.target_modules),
        "fan_in_fan_out": run.model.adapter.fan_in_fan_out,
        "adapters": where,
    }
    write_json(folder / INDEX, index)
    return folder / INDEX


def unpack(index: str | Path, name: str, folder: str | Path) -> None:
    """Write one adapter of a sharded export as a PEFT folder.

    Args:
        index: the file ``index.json``.
        name: of the adapter, e.g. ``user-42``.
        folder: to write.

    Raises:
        ValueError: if the index has no such adapter.
    """
    index = Path(index)
    content = read_json(index)
    if name not in content["adapters"]:
        raise ValueError(f"{index} has no adapter {name}")
    pairs: dict[str, list[Tensor]] = {}
    with safe_open(index.with_name(content["adapters"][name]), framework="pt") as file:
        for key in sorted(file.keys()):
            owner, _, rest = key.partition("/")
            if owner == name:
                pairs.setdefault(rest.rsplit(".lora_", 1)[0], []).append(file.get_tensor(key))
    write_plain_lora(
        PlainLora({projection: (a, b) for projection, (a, b) in pairs.items()}, content["scale"]),
        folder,
        target_modules=content["target_modules"],
        base_model_name=content["base_model"]["name"],
        fan_in_fan_out=content["fan_in_fan_out"],
    )


# ---------------------------------------------------------------------- what it costs


@torch.no_grad()
def _cost(run: ServedRun, member: dict[int, int], gates: dict[str, Tensor]) -> str:
    """The AUC of the test samples with the users' own gates and with those of their adapter, in a sentence."""
    if not isinstance(run.model, AnswerCTR):
        return "what it costs was not evaluated: the run has no labels"
    own, shared, labels = [], [], []
    for batch, *_ in run.parts.test_data:
        own.append(run.model.predict(batch).double().cpu().numpy())
        labels.append(batch[run.config["LABEL_FIELD"]].numpy())
        adapters = np.array([member.get(int(user), 0) for user in batch[run.dataset.uid_field]])
        found = np.empty(len(batch))
        for one in np.unique(adapters):
            at = np.flatnonzero(adapters == one)
            weights = {name: gate[one : one + 1] for name, gate in gates.items()}
            found[at] = scores_with(
                run, batch[torch.from_numpy(at)], lora_of(run, weights, None, str(one)).updates()
            )
        shared.append(found)
    truth = np.concatenate(labels)
    before, after = (roc_auc_score(truth, np.concatenate(part)) for part in (own, shared))
    return (
        f"AUC of {len(truth)} test samples: {before:.4f} with a gate per sample, {after:.4f} with these adapters "
        f"({after - before:+.4f})"
    )


@torch.no_grad()
def scores_with(run: ServedRun, batch, updates: dict[str, Tensor]) -> np.ndarray:
    """The run's scores of samples with fixed updates in the place of its adapter, float64 ``[B]``."""
    with run.model.adapter.disabled(), applied(run.model.adapter.model, updates):
        return run.model.predict(batch).double().cpu().numpy()
