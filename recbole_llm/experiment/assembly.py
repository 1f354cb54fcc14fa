"""What a run is made of, before it is trained; training, dry runs and loading a saved run all start here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from recbole.data.dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_llm.backbone.answers import mean_pooled_vectors
from recbole_llm.backbone.loader import Backbone, load_backbone
from recbole_llm.backbone.store import default_cache_dir
from recbole_llm.config.configurator import Config
from recbole_llm.config.keys import VOLATILE_KEYS
from recbole_llm.data.candidates import CandidateSet
from recbole_llm.experiment.result import Ingredients
from recbole_llm.utils.files import load_array, locked, save_array, write_json
from recbole_llm.utils.run_files import CONFIG_FILE


@dataclass(kw_only=True, repr=False)
class Assembly:
    """The data, the model and RecBole's loaders of one run.

    Attributes:
        trainer_config: what the trainer evaluates with: ``topk`` reaches no further than the catalogue.
        train, valid, test: the samples that the model is trained and evaluated on (after ``few_shot``,
            ``mixed_training`` and ``eval_rows``); ``sizes`` has their numbers before and after.
        full_train: all training samples.
        candidates: what the targets are ranked among, by split; ``None`` without stored candidates.
        identities: hashes of data, backbone, lens and configuration, by name.
        ingredients: the language model and the lens, as the result describes them.
        seconds: wall time of each stage so far, by name.
    """

    config: Config
    trainer_config: Config
    dataset: Dataset
    train: Dataset
    valid: Dataset
    test: Dataset
    full_train: Dataset
    model: AbstractRecommender
    train_data: AbstractDataLoader
    valid_data: AbstractDataLoader
    test_data: AbstractDataLoader
    candidates: dict[str, CandidateSet] | None
    sizes: dict[str, int | None]
    identities: dict[str, str]
    ingredients: Ingredients
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        model, dataset = self.config["model"], self.config["dataset"]
        return f"{type(self).__name__}({model} on {dataset}: {len(self.train)} / {len(self.valid)} / {len(self.test)})"

    def configuration(self) -> dict[str, Any]:
        """The configuration as it is kept: every default resolved, the data's folder as an absolute path."""
        resolved = {**self.config.as_dict(), "data_path": str(Path(self.config["data_path"]).resolve())}
        if is_default_count(self.config, "few_shot") and self.sizes.get("few_shot"):
            resolved["few_shot"] = self.sizes["few_shot"]
        return resolved


def is_default_count(config: Config, key: str) -> bool:
    """Whether a key is a number of samples that nobody asked for, so that it is capped at the size of the data."""
    return key not in config.origins and isinstance(config[key], int)


# ---------------------------------------------------------------------- configuration and identity


def lasting_configuration(config: Config) -> dict:
    """Every key that can change a result, with its value."""
    return {key: value for key, value in config.as_dict().items() if key not in VOLATILE_KEYS}


def configuration_hash(config: Config) -> str:
    """Hash of :func:`lasting_configuration`."""
    return hashlib.sha256(json.dumps(lasting_configuration(config), sort_keys=True).encode()).hexdigest()


def write_configuration(run_folder: Path, parts: Assembly) -> None:
    """Keep the configuration beside what a run leaves, so that it is not resumed with another one."""
    write_json(run_folder / CONFIG_FILE, parts.configuration())


# ---------------------------------------------------------------------- the language model


def cache_folder(config: Config) -> Path:
    """Where backbones, lenses, item vectors and zero-shot scores are kept between runs."""
    return Path(config["cache_dir"]) if config["cache_dir"] else default_cache_dir()


def backbone_of(config: Config, texts: list[str]) -> Backbone:
    """The language model of a run; ``texts`` make the tokenizer of the backbone ``tiny``."""
    return load_backbone(
        config["backbone"],
        # Sharded weights go to the devices layer by layer.
        device="cpu" if config["shard_backbone"] else config["device"],
        dtype=config["dtype"],
        quantization=config["quantization"],
        gradient_checkpointing=config["gradient_checkpointing"] if config.spec.is_llm else False,
        cache_dir=cache_folder(config),
        texts=texts,
        seed=config["seed"],
        layers=config["backbone_layers"] if config.spec.is_llm else None,
    )


def described(backbone: Backbone) -> dict[str, str]:
    """The language model as the result describes it."""
    return {
        "name": backbone.name,
        "sha256": backbone.sha256,
        "source": backbone.source,
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def item_vectors(backbone: Backbone, tokens: list[np.ndarray], cache_dir: Path) -> np.ndarray:
    """The LLM's mean-pooled vector of every item's text, ``[n_items, d]``; row 0 is the padding item.

    Cached by the weights and the texts. Source: the semantic user behaviour retrieval of ReLLa (Lin et al., WWW 2024).

    Args:
        tokens: token ids of every item's text, ``n_items`` arrays.
    """
    digest = hashlib.sha256(f"{backbone.sha256} {backbone.dtype}".encode())
    for ids in tokens:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    path = cache_dir / "item_vectors" / f"{digest.hexdigest()[:32]}.npy"
    with locked(path):
        if (kept := load_array(path)) is not None:
            return kept
        vectors = mean_pooled_vectors(backbone.model, tokens)
        save_array(path, vectors)
    return vectors
