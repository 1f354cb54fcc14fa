"""A finished run, ready to predict: also for a user and an item that are no sample of its data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType, init_seed
from torch import Tensor

from recbole_llm.config.configurator import Config
from recbole_llm.data.dataset import HISTORY_END, HistoryDataset
from recbole_llm.data.prompts.next_item import TitlePromptBuilder
from recbole_llm.experiment.assembly import Assembly
from recbole_llm.experiment.llm_assembly import LLMAssembly
from recbole_llm.experiment.run import experiment_class
from recbole_llm.experiment.run_folder import read_configuration
from recbole_llm.trainer.checkpoint import CheckpointError
from recbole_llm.utils.fields import ROW_ID
from recbole_llm.utils.run_files import BEST_FILE, CONFIG_FILE

PAIRS = 256
"""Pairs per call where a model without ``full_sort_predict`` scores all items."""


def load_run(
    folder: Path,
    *,
    model: type | None = None,
    device: str | None = None,
    changes: dict[str, Any] | None = None,
) -> Assembly:
    """The data and the trained model of a finished run; see :func:`recbole_llm.quick_start.load_data_and_model`."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give that of a finished run")
    saved = read_configuration(folder)
    if saved is None or not (folder / BEST_FILE).is_file():
        missing = CONFIG_FILE if saved is None else BEST_FILE
        raise CheckpointError(
            f"{folder} is no run that can be loaded: it has no {missing}; repeat the run with this version"
        )
    values = {**saved, "device": device or "auto", "resume": None, **(changes or {})}
    config = Config.from_dict(values if model is None else {**values, "model": model})
    init_seed(config["seed"], config["reproducibility"])
    kind = experiment_class(config)
    parts = kind.assemble(config, saved=folder)
    kind.load_trained(parts, folder)
    parts.model.eval()
    answer_pairs(parts)
    for loader in (parts.valid_data, parts.test_data):
        # What recbole.utils.case_study asks of a loader, and only RecBole's loader of the full ranking has.
        if not hasattr(loader, "is_sequential"):
            loader.is_sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    return parts


def answer_pairs(parts: Assembly) -> None:
    """Let ``predict`` and ``full_sort_predict`` of a model also take interactions that are no samples of the data.

    ``Interaction({user_id, item_id})``, or ``{user_id}`` for all items, is completed by features of user and item and
    by all interactions of the user in the data: what is predicted comes after the end of the data, whatever the split.
    Batches of the run's loaders are predicted as before. Where prompts list candidates, these list none: nothing is
    stored for what is still to come.
    """
    model, dataset = parts.model, parts.dataset
    predict, full_sort_predict = model.predict, model.full_sort_predict
    ranks_items = type(model).full_sort_predict is not AbstractRecommender.full_sort_predict

    @torch.no_grad()
    def predict_pairs(interaction: Interaction, **options: Any) -> Tensor:
        """The score of every pair, ``[B]``."""
        if is_complete(parts, interaction):
            return predict(interaction, **options)
        with no_candidates_listed(parts):
            return predict(complete(parts, interaction), **options)

    @torch.no_grad()
    def predict_all(interaction: Interaction, **options: Any) -> Tensor:
        """The scores of all items for every user, ``[B, n_items]``; the padding item has ``-inf``."""
        whole = is_complete(parts, interaction)
        if whole and (ranks_items or HISTORY_END not in interaction):
            return full_sort_predict(interaction, **options)
        if not ranks_items:
            return torch.stack([of_catalogue(interaction[i : i + 1].cpu()) for i in range(len(interaction))])
        with no_candidates_listed(parts):
            scores = full_sort_predict(complete(parts, interaction), **options)
        scores = scores.view(len(interaction), -1).clone()
        scores[:, 0] = -torch.inf
        return scores

    def of_catalogue(row: Interaction) -> Tensor:
        """The scores of all items by ``predict`` in the place of one sample's, or after a user's end, ``[n_items]``."""
        scores = [torch.full((1,), -torch.inf)]
        kept = [name for name in (dataset.uid_field, HISTORY_END, ROW_ID) if name in row]
        for items in torch.arange(1, dataset.item_num).split(PAIRS):
            columns = {name: row[name].repeat(len(items)) for name in kept} | {dataset.iid_field: items}
            pairs = Interaction(columns)
            pairs = dataset.join(pairs).to(model.device) if HISTORY_END in row else pairs
            scores.append(predict_pairs(pairs).cpu().reshape(-1))
        return torch.cat([part.to(scores[-1].dtype) for part in scores])

    model.predict, model.full_sort_predict = predict_pairs, predict_all


def is_complete(parts: Assembly, interaction: Interaction) -> bool:
    """Whether an interaction is a batch of the run's loaders, with everything that the model reads."""
    if isinstance(parts.dataset, HistoryDataset):
        return HISTORY_END in interaction
    return bool({*interaction.columns} - {parts.dataset.uid_field, parts.dataset.iid_field})


def complete(parts: Assembly, interaction: Interaction) -> Interaction:
    """Add features, and the user's whole history, to users ``[B]`` and items ``[B]`` (the padding item where none).

    Raises:
        ValueError: for ids that are not in the data, or a model whose history only RecBole's own loaders make.
    """
    dataset, model = parts.dataset, parts.model
    users = interaction[dataset.uid_field].cpu()
    items = (
        interaction[dataset.iid_field].cpu() if dataset.iid_field in interaction else torch.zeros_like(users)
    )
    for field, ids, lowest in ((dataset.uid_field, users, 1), (dataset.iid_field, items, 0)):
        size = dataset.num(field)
        if bool(((ids < lowest) | (ids >= size)).any()):
            raise ValueError(
                f"{field}: internal ids go from {lowest} to {size - 1} here; dataset.token2id({field!r}, token) gives "
                "the id of a token"
            )
    columns = {dataset.uid_field: users, dataset.iid_field: items}
    if isinstance(dataset, HistoryDataset):
        ends = torch.from_numpy(dataset.history.user_start)[users + 1]
        columns |= {HISTORY_END: ends, ROW_ID: -users}  # pairs of one user share their history, so one number
    elif model.type == ModelType.SEQUENTIAL:
        raise ValueError(
            f"{parts.config['model']} needs the history of a user, which RecBole's own protocol keeps for its samples "
            "only: predict batches of test_data, or train with task: ctr or task: next_item"
        )
    return dataset.join(Interaction(columns)).to(model.device)


@contextmanager
def no_candidates_listed(parts: Assembly) -> Iterator[None]:
    """Let prompts list no candidates."""
    prompts = parts.prompts if isinstance(parts, LLMAssembly) else None
    if not isinstance(prompts, TitlePromptBuilder):
        yield
        return
    listed, prompts.candidates = prompts.candidates, None
    try:
        yield
    finally:
        prompts.candidates = listed
