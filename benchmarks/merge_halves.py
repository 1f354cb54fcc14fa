"""Do merged LoRAs reach joint training? Two runs on disjoint halves of the users, one on both, and every merge.

    python benchmarks/merge_halves.py --output benchmarks/results/ml-100k-merge-halves.json --folder /tmp/halves

TALLRec with ``layout: stream`` (one plain LoRA) on ml-100k. The training users are cut into two halves at random; of
each half whole users are drawn until there are ``--labels`` labels. One run is trained on each draw, one on both. Every
method of ``recbole-llm merge`` makes one LoRA of the first two. All are tested on the same samples: whole test users,
at most ``--test`` samples. 95% intervals are percentiles of 1,000 bootstrap draws of users, differences are paired.

``--folder`` keeps LoRAs and scores, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from recbole.utils import init_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_llm.adapter.merge import (
    BY_INPUTS,
    METHODS,
    Batch,
    PlainLora,
    applied,
    merge_inputs,
    merge_weights,
)
from recbole_llm.backbone.answers import pad_right
from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.data.streams import StreamLoader, draw_by_user
from recbole_llm.evaluation.bootstrap import bootstrap
from recbole_llm.experiment.llm_assembly import LLMAssembly, assemble
from recbole_llm.trainer.llm_trainer import LLMTrainer
from recbole_llm.utils.files import write_json
from recbole_llm.utils.machine import environment

logger = logging.getLogger("merge_halves")

RUNS = ("half A", "half B", "joint")


def settings(args: argparse.Namespace) -> dict:
    """The configuration of all three runs."""
    return {
        "layout": "stream",
        "backbone": args.backbone,
        "device": "cpu",
        "seed": args.seed,
        "few_shot": 16,  # replaced by the draws below
        "lens": None,
        "zero_shot": False,
        "eval_step": 0,
        "show_progress": False,
        "lora_r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "lora_layers": args.lora_layers,
        "train_batch_size": args.batch,
        "epochs": args.epochs,
    }


def draw_halves(train: HistoryDataset, labels: int, seed: int) -> dict[str, np.ndarray]:
    """Samples of each run, by its name: whole users, disjoint between the halves."""
    users = train.inter_feat[train.uid_field].numpy()
    names = np.random.default_rng(seed).permutation(np.unique(users))
    found = {}
    for name, half in zip(RUNS, np.array_split(names, 2), strict=False):
        mine = np.flatnonzero(np.isin(users, half))
        found[name] = mine[draw_by_user(users[mine], labels, seed)]
    assert not {*users[found["half A"]]} & {*users[found["half B"]]}
    return {**found, "joint": np.sort(np.concatenate([*found.values()]))}


def whole_users(samples: HistoryDataset, most: int, seed: int) -> HistoryDataset:
    """Samples of whole users in a random order, until the next one would exceed ``most``."""
    users = samples.inter_feat[samples.uid_field].numpy()
    names, counts = np.unique(users, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen = names[order[np.cumsum(counts[order]) <= most]]
    return samples.subset(np.flatnonzero(np.isin(users, chosen)))


def train(parts: LLMAssembly, samples: HistoryDataset, name: str, folder: Path) -> tuple[PlainLora, dict]:
    """Train the run's model on samples; its LoRA and what it cost."""
    run_folder = folder / name.replace(" ", "-")
    run_folder.mkdir(exist_ok=True)
    trainer = LLMTrainer(parts.config, parts.model, run_folder=run_folder, identities=parts.identities)
    trainer.fit(StreamLoader(parts.config, samples, parts.prompts.cutter), None, saved=False)
    cost = {
        **trainer.trained_on,
        "users": len(np.unique(samples.inter_feat[samples.uid_field].numpy())),
        "seconds": trainer.seconds["train"],
        "tokens": trainer.tokens["train"],
    }
    state = {n.removeprefix("adapter."): t.detach().clone() for n, t in parts.model.trained_state().items()}
    names = [n.removesuffix(".lora_A") for n in state if n.endswith(".lora_A")]
    pairs = {n: (state[f"{n}.lora_A"], state[f"{n}.lora_B"]) for n in names}
    scale = parts.config["lora_alpha"] / parts.config["lora_r"]
    return PlainLora(pairs, scale, parts.backbone.sha256, name), cost


def chunk_batches(parts: LLMAssembly, samples: HistoryDataset, n: int) -> list[Batch]:
    """``n`` chunks of training samples, evenly spread, as batches of token ids and lengths."""
    encoded = parts.model.encode(samples[np.arange(len(samples))]).input_ids
    chosen = [encoded[i] for i in np.unique(np.linspace(0, len(encoded) - 1, n).astype(int))]
    return [pad_right(chosen[start : start + 4], parts.model.pad_id) for start in range(0, len(chosen), 4)]


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a file, made and written where it is not there."""
    if not path.is_file():
        started = time.monotonic()
        save_file({name: t.contiguous() for name, t in make().items()}, path)
        logger.info("%s: %.0f s", path.stem, time.monotonic() - started)
    return load_file(path)


def main() -> None:
    """Train, merge, test, write the json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="json")
    parser.add_argument("--folder", type=Path, required=True, help="for LoRAs and scores")
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--labels", type=int, default=1536, help="of each half")
    parser.add_argument("--test", type=int, default=1500, help="samples, at most")
    parser.add_argument("--batch", type=int, default=64, help="labels per optimizer step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lora_layers", type=int, nargs="*", default=[10, 29])
    parser.add_argument("--chunks", type=int, default=16, help="of each half, for regmean and iteris")
    parser.add_argument("--rounds", type=int, default=3, help="of iteris, at most")
    parser.add_argument("--seed", type=int, default=2020)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.folder.mkdir(parents=True, exist_ok=True)
    args.lora_layers = args.lora_layers or None

    def build() -> tuple[LLMAssembly, HistoryDataset]:
        config = Config(model="TALLRec", dataset="ml-100k", config_dict=settings(args))
        init_seed(config["seed"], config["reproducibility"])
        parts = assemble(config)
        return parts, parts.full_train

    parts, full_train = build()
    draws = draw_halves(full_train, args.labels, args.seed)
    loras, costs = {}, {}
    for name in RUNS:
        path = args.folder / f"{name}.safetensors"

        def trained(name: str = name) -> dict[str, Tensor]:
            fresh, samples = build()
            lora, cost = train(fresh, samples.subset(draws[name]), name, args.folder)
            write_json(args.folder / f"{name}.json", cost)
            return {
                f"{n}.{ab}": t for n, pair in lora.pairs.items() for ab, t in zip("AB", pair, strict=True)
            }

        tensors = kept(path, trained)
        pairs = {n[:-2]: (tensors[n], tensors[f"{n[:-2]}.B"]) for n in tensors if n.endswith(".A")}
        scale = parts.config["lora_alpha"] / parts.config["lora_r"]
        loras[name] = PlainLora(pairs, scale, parts.backbone.sha256, name)
        costs[name] = (args.folder / f"{name}.json").read_text(encoding="utf-8")

    halves = [loras["half A"], loras["half B"]]
    updates: dict[str, dict[str, Tensor]] = {"untrained": {}}
    updates |= {name: lora.updates() for name, lora in loras.items()}
    model = parts.model.adapter.model
    for method in METHODS:

        def merged(method: str = method) -> dict[str, Tensor]:
            if method not in BY_INPUTS:
                return merge_weights(halves, method, seed=args.seed).updates()
            read = [chunk_batches(parts, full_train.subset(draws[n]), args.chunks) for n in RUNS[:2]]
            with parts.model.adapter.disabled():
                return merge_inputs(model, halves, read, method, rounds=args.rounds)

        updates[method] = kept(args.folder / f"{method}.updates.safetensors", merged)

    test = whole_users(parts.test, args.test, args.seed)
    batch = test[np.arange(len(test))]
    scores = {}
    parts.model.eval()
    for name, update in updates.items():

        def scored(update: dict[str, Tensor] = update) -> dict[str, Tensor]:
            with torch.no_grad(), parts.model.adapter.disabled(), applied(model, update):
                return {"scores": parts.model.score_rows(batch).cpu()}

        scores[name] = kept(args.folder / f"{name}.scores.safetensors", scored)["scores"].numpy()
        users = batch[test.uid_field].numpy()
        labels = batch[parts.config["LABEL_FIELD"]].numpy()
        found = bootstrap(users, labels, scores, metrics=("auc", "logloss"), seed=args.seed)
        joint = found.to_dict("joint")
        norms = {
            n: float(sum(u.square().sum() for u in us.values()) ** 0.5) for n, us in updates.items() if us
        }
        distance = {
            n: float(sum((us[p] - updates["joint"][p]).square().sum() for p in us) ** 0.5)
            for n, us in updates.items()
            if us
        }
        write_json(
            args.output,
            {
                "what": "LoRAs of two disjoint halves of the users, merged, against joint training: TALLRec, layout: "
                f"stream, ml-100k; {len(test):,} of {len(parts.test):,} test samples, all those of "
                f"{len(np.unique(users))} users drawn with seed {args.seed}; percentile intervals, 1,000 bootstrap "
                "draws of users, differences paired",
                "command": "python benchmarks/merge_halves.py "
                + " ".join(f"--{k}={v}" for k, v in vars(args).items() if k not in ("output", "folder")),
                **environment(),
                "backbone": {"name": parts.backbone.name, "sha256": parts.backbone.sha256},
                "runs": {name: json.loads(cost) for name, cost in costs.items()},
                "norms": norms,
                "distance_to_joint": distance,
                "intervals": joint,
            },
        )


if __name__ == "__main__":
    main()
