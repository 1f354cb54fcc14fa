"""The folder of a run: making it, finding it again, and whether it may be resumed."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import is_default_count, lasting_configuration
from recbole_llm.trainer.checkpoint import CheckpointError
from recbole_llm.utils.run_files import CONFIG_FILE, LAST_FILE

logger = logging.getLogger(__name__)

FREE_BYTES_NEEDED = 1 << 30


def open_run_folder(config: Config) -> Path:
    """A new, writable folder for this run, or the one to resume.

    Raises:
        OSError: if the folder cannot be written or its disk is full; checked before anything is computed.
        CheckpointError: if ``resume`` finds nothing to resume.
    """
    root = Path(config["output_dir"] or config["checkpoint_dir"])
    if config["dry_run"]:
        return root
    if config["resume"]:
        folder = find_run(root, config)
        check_same_configuration(folder, config)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise OSError(f"cannot write to the output folder {root.resolve()} (output_dir): {error}") from error
    free = shutil.disk_usage(root).free
    if free < FREE_BYTES_NEEDED:
        raise OSError(
            f"only {free / 2**20:.0f} MiB are free on the disk of the output folder {root.resolve()} (output_dir); "
            f"a run needs up to {FREE_BYTES_NEEDED / 2**20:.0f} MiB for its checkpoints"
        )
    name = f"{config['model']}-{config['dataset']}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        folder = root / (name + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise OSError(f"could not find a free name for this run in {root.resolve()}")


def find_run(root: Path, config: Config) -> Path:
    """The folder named by ``resume``, or (``resume: True``) the newest run of this model and dataset below ``root``.

    Raises:
        CheckpointError: if there is no run with a checkpoint.
    """
    if config["resume"] is not True:
        folder = Path(config["resume"])
        if not (folder / LAST_FILE).is_file():
            raise CheckpointError(f"--resume={folder}: there is no {LAST_FILE} in that folder")
        return folder
    wanted = {key: config[key] for key in ("model", "dataset")}
    for file in sorted(root.glob(f"*/{LAST_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True):
        # The folder's name does not tell: that of ml-100k is also the beginning of ml-100k-small.
        saved = read_configuration(file.parent)
        if saved is not None and {key: saved.get(key) for key in wanted} == wanted:
            return file.parent
    raise CheckpointError(
        f"--resume: no run of {config['model']} on {config['dataset']} with a checkpoint in {root.resolve()}"
    )


def read_configuration(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, ``None`` where there is none or it is not JSON."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        logger.debug("%s has no readable %s", folder, CONFIG_FILE, exc_info=True)
        return None


def check_same_configuration(folder: Path, config: Config) -> None:
    """Refuse to resume under another configuration, before anything is computed.

    Raises:
        CheckpointError: naming every key that differs and can change a result.
    """
    saved, current = read_configuration(folder), lasting_configuration(config)
    if saved is None:
        raise CheckpointError(f"the run {folder} cannot be resumed: its {CONFIG_FILE} is missing or damaged")
    if is_default_count(config, "few_shot"):  # capped at the size of the data where it is saved
        current.pop("few_shot", None)
    different = [key for key, value in current.items() if saved.get(key) != value]
    if different:
        values = "\n  ".join(f"{key}: {saved.get(key)!r} there, {current[key]!r} here" for key in different)
        raise CheckpointError(f"the run {folder} cannot be resumed with another configuration:\n  {values}")
