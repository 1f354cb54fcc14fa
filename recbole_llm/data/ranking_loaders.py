"""Samples with what their targets are ranked among, as the evaluation of RecBole's Trainer takes them."""

from __future__ import annotations

import numpy as np
import torch
from recbole.data.dataloader import AbstractDataLoader, FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.candidates import CandidateSet
from recbole_llm.data.dataset import HistoryDataset
from recbole_llm.utils.fields import ROW_ID


class CandidateDataLoader(AbstractDataLoader):
    """Samples times their candidates, for the negative-sampling evaluation of RecBole's Trainer, with any model.

    A batch of ``B`` samples is ``(interaction, row_idx, positive_u, positive_i)``, as RecBole's NegSampleEvalDataLoader
    gives it: the interaction has ``B * C`` entries, sample by sample in the stored order of the candidates, each with
    the fields of its sample, the candidate in the item field, the candidate's features and label 1 for the target and 0
    else; ``row_idx`` ``[B * C]`` numbers the samples of the batch, ``positive_u`` is ``0 ... B - 1`` and ``positive_i``
    ``[B]`` the targets. ``row_id`` and ``history_end`` stay those of the sample. Histories are joined *per candidate*:
    a retriever that looks at the item sees the candidate, so that no history gives the target away.

    ``eval_batch_size`` counts candidates, as in RecBole; a batch has at least one sample.

    Args:
        dataset: the samples to evaluate, in this order.
        candidates: their candidates, of the same or of more samples.

    Raises:
        ValueError: if a sample has no candidates, or has another target than the one they were drawn for.
    """

    def __init__(self, config, dataset: HistoryDataset, candidates: CandidateSet) -> None:
        self.candidates = candidates
        row_ids = dataset.inter_feat[ROW_ID].numpy()
        wrong = candidates.targets[candidates.find(row_ids)] != dataset.inter_feat[dataset.iid_field].numpy()
        if wrong.any():
            raise ValueError(
                f"the candidates were drawn for other samples: row_id {row_ids[wrong.argmax()]} has another target "
                f"item now ({int(wrong.sum())} of {len(row_ids)} samples); draw them for this dataset"
            )
        self.sample_size = len(dataset)
        super().__init__(config, dataset, sampler=None, shuffle=False)

    def _init_batch_size_and_step(self) -> None:
        width = self.candidates.items.shape[1]
        self.step = max(1, self.config["eval_batch_size"] // width)
        self.set_batch_size(self.step * width)

    def collate_fn(self, index: list[int]) -> tuple[Interaction, Tensor, Tensor, Tensor]:
        """The batch of the samples at ``index``."""
        dataset = self._dataset
        rows = dataset.__getitem__(np.asarray(index), join=False)
        targets = rows[dataset.iid_field]
        items = torch.from_numpy(self.candidates.of(rows[ROW_ID].numpy()))
        count, width = items.shape
        flat = {name: values.repeat_interleave(width, dim=0) for name, values in rows.interaction.items()}
        flat[dataset.iid_field] = items.flatten()
        flat[self.config["LABEL_FIELD"]] = (items == targets[:, None]).flatten().float()
        interaction = self.transform(dataset, dataset.join(Interaction(flat)))
        return interaction, torch.arange(count).repeat_interleave(width), torch.arange(count), targets


class RankedItemsDataLoader(FullSortEvalDataLoader):
    """Samples whose target is ranked among all items but ``dataset.not_ranked``, for RecBole's Trainer, with any model.

    A batch is that of RecBole's loader for sequential models, ``(interaction, excluded, positive_u, positive_i)``.
    The Trainer sets scores at ``excluded``, a pair of indices into ``[B, n_items]``, to -inf.
    """

    # RecBole's class ranks once per user where the model is not sequential, and sets this by the model.
    is_sequential = property(lambda self: True, lambda self, value: None)

    def __init__(self, config, dataset: HistoryDataset) -> None:
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        self.sample_size = len(dataset)
        super(FullSortEvalDataLoader, self).__init__(config, dataset, None, shuffle=False)

    def collate_fn(self, index: list[int]) -> tuple[Interaction, tuple[Tensor, Tensor], Tensor, Tensor]:
        """The batch of the samples at ``index``."""
        interaction, _, positive_u, positive_i = super().collate_fn(index)
        return interaction, self._dataset.not_ranked(interaction), positive_u, positive_i
