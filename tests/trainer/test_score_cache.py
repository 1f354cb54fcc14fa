"""Evaluations that were cut off go on, with the same scores, counts and identity."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from recbole_llm.trainer import score_cache as kept_scores
from recbole_llm.trainer.score_cache import KeptScores, batch_key
from recbole_llm.utils.distributed import Processes

BATCHES = {f"batch {n}": torch.arange(3.0, dtype=torch.float64) / (n + 3) for n in range(6)}


class Scorer:
    """Scores a batch at a time; ends in the middle of one where it is told to."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.counts, self.scored, self.stop_at = Counter(tokens=100), [], stop_at

    def __call__(self, key: str) -> torch.Tensor:
        self.counts["tokens"] += 4
        if key == self.stop_at:
            raise KeyboardInterrupt
        self.counts["tokens"] += 6
        self.scored.append(key)
        return BATCHES[key]

    def run(
        self, file: Path, identity: str = "model and rows", keys=tuple(BATCHES), seconds: float = 1e9
    ) -> list:
        with KeptScores(file, identity, self.counts, seconds) as self.kept:
            return [self.kept(key, lambda key=key: self(key)) for key in keys]


@pytest.fixture
def cut_off(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "scores" / "a.safetensors"
    scorer = Scorer(stop_at="batch 4")
    with pytest.raises(KeyboardInterrupt):
        scorer.run(file)
    monkeypatch.setattr(kept_scores, "PROCESS", "another one")
    return file


def test_goes_on_where_it_was_cut_off_and_counts_what_all_of_it_cost(cut_off):
    scorer = Scorer()
    scores = scorer.run(cut_off)
    assert scorer.scored == ["batch 4", "batch 5"] and scorer.kept.seconds_before > 0
    assert scorer.counts["tokens"] == 100 + 6 * 10  # what was spent on the batch that was cut off is lost
    assert all(torch.equal(found, wanted) for found, wanted in zip(scores, BATCHES.values(), strict=True))
    again = Scorer()
    again.run(cut_off)
    assert again.scored == []


class Two(Processes):
    """One of two processes, here threads; each call brings both together."""

    def __init__(self, rank: int, meeting: threading.Barrier, said: list) -> None:
        super().__init__(rank, 2)
        self.meeting, self.said = meeting, said

    def all(self, value):
        self.said[self.rank] = value
        self.meeting.wait(timeout=30)
        found = copy.deepcopy(self.said)
        self.meeting.wait(timeout=30)
        return found

    def from_first(self, make):
        return self.all(make() if self.is_first else None)[0]


def run_in_two(file: Path, work) -> list:
    """What ``work(kept, counts)`` gives in each of two processes that score together."""
    meeting, said, found = threading.Barrier(2), [None, None], [None, None]

    def one(rank: int) -> None:
        counts = Counter[str]()
        with KeptScores(file, "model and rows", counts, 1e9, Two(rank, meeting, said)) as kept:
            found[rank] = (work(kept, counts), counts, kept)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_two_processes_go_on_together_and_what_both_spent_counts_once(tmp_path, monkeypatch):
    file, scored = tmp_path / "a.safetensors", []

    def score(keys):
        def work(kept, counts):
            def compute(key):
                counts["tokens"] += 5 if kept.processes.is_first else 6
                scored.append(key)
                return BATCHES[key]

            return [kept(key, lambda key=key: compute(key)) for key in keys]

        return work

    keys = list(BATCHES)
    run_in_two(file, score(keys[:4]))
    assert sorted(scored) == sorted(keys[:4] * 2)
    monkeypatch.setattr(kept_scores, "PROCESS", "another one")
    scored.clear()
    first, second = run_in_two(file, score(keys))
    assert sorted(scored) == sorted(keys[4:] * 2)
    for scores, _, _ in (first, second):
        assert all(torch.equal(found, wanted) for found, wanted in zip(scores, BATCHES.values(), strict=True))
    assert first[1]["tokens"] + second[1]["tokens"] == 6 * 11
    assert first[2].seconds_before > 0 == second[2].seconds_before


def test_the_same_process_does_not_count_its_work_twice(tmp_path):
    file, scorer = tmp_path / "a.safetensors", Scorer()
    scorer.run(file)
    scorer.run(file)
    assert scorer.scored == list(BATCHES)
    assert scorer.counts["tokens"] == 160 and scorer.kept.seconds_before == 0


def test_another_identity_and_other_batches_are_scored_anew(cut_off):
    other = Scorer()
    other.run(cut_off, identity="other parameters")
    assert other.scored == list(BATCHES)
    drawn = Scorer()
    drawn.run(cut_off, identity="other parameters", keys=["batch 5", "batch 1"])
    assert drawn.scored == []


def test_a_damaged_file_is_passed_over_with_a_warning(cut_off, caplog):
    cut_off.write_bytes(cut_off.read_bytes()[:100])
    scorer = Scorer()
    scorer.run(cut_off)
    assert scorer.scored == list(BATCHES) and "damaged" in caplog.text


def test_written_after_a_while_for_those_who_are_killed(tmp_path):
    file = tmp_path / "a.safetensors"
    scorer = Scorer()
    with KeptScores(file, "identity", scorer.counts, 0.0) as kept:
        kept("batch 0", lambda: scorer("batch 0"))
        assert file.is_file()
    assert scorer.scored == ["batch 0"]


def test_keys_tell_batches_apart():
    rows, items = torch.tensor([1, 2]), torch.tensor([3, 4])
    keys = {
        batch_key(rows, items),
        batch_key(items, rows),
        batch_key(rows, rows),
        batch_key(rows[:1], items[:1]),
    }
    assert len(keys) == 4
