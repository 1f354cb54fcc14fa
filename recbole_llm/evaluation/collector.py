"""RecBole's Collector, which also keeps the rows it has evaluated.

The stock Collector joins a tensor per batch onto all earlier ones (quadratic in the number of batches), sends
labels to the accelerator to fetch them back, and knows no users. Here batches are listed and joined once, on
the device they were made on, and copied to the host once.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from recbole.evaluator.collector import Collector, DataStruct

from recbole_llm.evaluation.ranking import target_ranks
from recbole_llm.utils.fields import ROW_ID


class RowCollector(Collector):
    """Collects what the metrics need, and the rows: user, item, row_id, and label and score or the rank.

    It takes the place of RecBole's collector for any model, ours or RecBole's:

        trainer.eval_collector = RowCollector(config)
        trainer.evaluate(test_data)
        rows = trainer.eval_collector.rows()

    Metrics may ask for 'data.user' beside RecBole's resources. What metrics get in ranking evaluations is
    RecBole's own. Their rows are kept where each ranking has one target (leave-one-out, and every evaluation
    of a sequential model), whether all items are ranked or drawn candidates. A ranking with several targets,
    as general models have with ratio splits, has no rank to speak of and leaves no rows.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.data_struct = _ListStruct()
        self._row_parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._rows: dict[str, np.ndarray] | None = None
        self._rankings: str | None = None  # why those of this evaluation leave no rows
        self._no_rows: str | None = "no evaluation has been finished"

    def reset(self) -> None:
        """Forgets an evaluation that an error or Ctrl-C cut off; a finished one is forgotten by itself."""
        self.data_struct.reset()
        self._row_parts.clear()
        self._rankings = None

    def eval_batch_collect(self, scores_tensor: torch.Tensor, interaction, positive_u, positive_i) -> None:
        """Takes one batch, as RecBole's Trainer hands it over.

        Args:
            scores_tensor: labelled: [B] (or [B, 1]), one score per row. Ranking: [B, n_items], -inf for what
                is no candidate.
            interaction: [B] rows, or [B x C] where candidates were drawn: the C candidates of each ranking in
                turn.
            positive_u, positive_i: [P] row and item of every target, None in labelled evaluation.

        Raises:
            ValueError: labelled: if the scores are not one per row, or the label field is missing. Ranking:
                if a score is NaN, or a target has the score -inf.
        """
        if not self.register.need("rec.score"):  # ranking; RecBole allows only one kind of metrics in a run
            self._collect_ranks(scores_tensor, interaction, positive_u, positive_i)
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
            return
        scores = scores_tensor.reshape(-1)
        if len(scores) != len(interaction):
            raise ValueError(
                f"the model's predict gave scores of the shape {tuple(scores_tensor.shape)} "
                f"for {len(interaction)} rows; it must give one per row"
            )
        label_field = self.config["LABEL_FIELD"]
        if self.register.need("data.label") and label_field not in interaction:
            raise ValueError(
                f"labelled evaluation needs the field [{label_field}] (config LABEL_FIELD), "
                "which the batch lacks; set `threshold` to make labels from ratings"
            )
        part = {"score": scores}
        for name, field in (
            ("user", self.config["USER_ID_FIELD"]),
            ("item", self.config["ITEM_ID_FIELD"]),
            ("row_id", ROW_ID),
            ("label", label_field),
        ):
            if field in interaction:
                part[name] = interaction[field]
        for name, value in part.items():
            # A copy, because a model may write the next batch into the same tensor.
            self._row_parts[name].append(value.detach().clone())

    def eval_collect(self, eval_pred: torch.Tensor, data_label: torch.Tensor) -> None:
        """Takes a whole evaluation at once (RecBole's tree models); its rows have only label and score."""
        if self.register.need("rec.score"):
            self._row_parts["score"].append(eval_pred.reshape(-1).detach().clone())
        if self.register.need("data.label"):
            self._row_parts["label"].append(data_label.reshape(-1).detach().clone())

    def get_data_struct(self) -> DataStruct:
        """Ends the evaluation: everything collected, on the host, for RecBole's Evaluator.

        Raises:
            ValueError: if a score is NaN, which RecBole's AUC would silently sort to one end.
        """
        rows = {name: torch.cat(parts).cpu() for name, parts in self._row_parts.items()}
        struct = self.data_struct.finish()
        self._rows, self._no_rows = None, self._rankings or "the last evaluation had none"
        self.reset()
        if "rank" in rows:
            self._rows = {name: value.numpy() for name, value in rows.items()}
        elif rows:
            if rows["score"].dtype in (torch.bfloat16, torch.float16):
                rows["score"] = rows["score"].float()  # the metrics read NumPy arrays, which have no bfloat16
            missing = torch.isnan(rows["score"])
            if missing.any():
                raise ValueError(
                    f"the model's predict gave NaN for {int(missing.sum())} of {len(missing)} rows, "
                    f"the first being row {int(missing.int().argmax())} of the evaluation"
                )
            struct.set("rec.score", rows["score"])
            for name in ("label", "user"):
                if name in rows and self.register.need(f"data.{name}"):
                    struct.set(f"data.{name}", rows[name])
            self._rows = {name: value.numpy() for name, value in rows.items()}
            for name in ("score", "label"):
                if name in self._rows:
                    self._rows[name] = self._rows[name].astype(np.float64)
        return struct

    def rows(self) -> dict[str, np.ndarray]:
        """The last finished evaluation, in the order evaluated.

        Returns:
            'user', 'item' [n] internal ids (of a ranking, the target), 'row_id' [n] if the dataset has it;
            labelled: 'label', 'score' [n] float64;
            ranking: 'rank' [n] int64 of the target, ties against the model, and 'candidates' [n] int64: how
            many items were ranked (those with a score other than -inf); where the same number C was ranked in each,
            as drawn candidates are, 'candidate_items' [n, C] internal ids and 'candidate_scores' [n, C].

        Raises:
            ValueError: if there was none, or the last evaluation's rankings had several targets each.
        """
        if self._rows is None:
            raise ValueError(f"there are no rows: {self._no_rows}")
        return dict(self._rows)

    def _collect_ranks(self, scores: torch.Tensor, interaction, positive_u, positive_i) -> None:
        if self._rankings:
            return
        n = len(scores)
        if not torch.equal(positive_u.cpu(), torch.arange(n)):
            self._rankings = "a ranking of the last evaluation had several targets, or none"
            self._row_parts.clear()
            return
        user_field = self.config["USER_ID_FIELD"]
        # Candidates of one ranking lie side by side, so that each C-th row speaks for its ranking.
        each, rest = divmod(len(interaction), n)
        user = interaction[user_field]
        if rest or not torch.equal(user, user[::each].repeat_interleave(each)):
            raise ValueError(
                f"{len(interaction)} rows were scored for {n} rankings, but they are not the same number of "
                f"rows of one [{user_field}] for each ranking in turn, as candidates of a ranking must be"
            )
        part = {
            "user": user[::each],
            "item": positive_i,
            "rank": target_ranks(scores, positive_i),
            "candidates": (scores > -torch.inf).sum(dim=1),
        }
        if ROW_ID in interaction:
            part["row_id"] = interaction[ROW_ID][::each]
        if each > 1:
            items = interaction[self.config["ITEM_ID_FIELD"]].view(n, each)
            part["candidate_items"] = items
            part["candidate_scores"] = scores.gather(1, items.to(scores.device))
        for name, value in part.items():
            self._row_parts[name].append(value.detach().clone())


class _ListStruct(DataStruct):
    """A DataStruct whose `update_tensor` lists the batches, to be joined once by `finish`."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def update_tensor(self, name: str, value: torch.Tensor) -> None:
        self._parts[name].append(value.detach().clone())

    def reset(self) -> None:
        self._parts.clear()

    def finish(self) -> DataStruct:
        """What `set` stored (kept for the next evaluation, not all of it tensors) and the joined batches."""
        struct = DataStruct()
        for name, value in self._data_dict.items():
            struct.set(name, value.cpu() if isinstance(value, torch.Tensor) else value)
        for name, parts in self._parts.items():
            struct.set(name, torch.cat(parts).cpu())
        return struct
