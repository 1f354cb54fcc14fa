"""Names of the files in a run's folder."""

from __future__ import annotations

CONFIG_FILE = "config.json"
"""The configuration of a run, written before it is trained."""
RESULT_FILE = "result.json"
"""Written last: a run whose folder has it is finished."""
TEST_ROWS_FILE = "test_rows.npz"
"""Scores or ranks of every test sample."""
VALID_ROWS_FILE = "valid_rows.npz"
"""Likewise of the validation samples, with ``score_valid``."""
BEST_FILE = "best.safetensors"
"""The weights of the best validated epoch, which are tested and loaded."""
LAST_FILE = "last.safetensors"
"""What a run resumes from."""
