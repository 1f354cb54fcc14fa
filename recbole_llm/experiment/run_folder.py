"""The folder of a run: making it, finding it again, and whether it may be resumed."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

from recbole_llm.config.configurator import Config
from recbole_llm.experiment.assembly import (
    CONFIG_FILE,
    lasting_configuration,
)
from recbole_llm.trainer.checkpoint import LAST_FILE, CheckpointError

logger = logging.getLogger(__name__)

FREE_BYTES_NEEDED = 1 << 30
RESULT_FILE = "result.json"


def open_run_folder(config: Config) -> Path:
    """A new, writable folder for this run, or the one to resume.

    Raises:
        OSError: if the folder cannot be written or its disk is full; checked before anything is computed.
        CheckpointError: if ``resume`` finds nothing to resume.
    """
    root = Path(config["output_dir"] or config["checkpoint_dir"])
    name = f"{config['model']}-{config['dataset']}"
    if config["dry_run"]:
        return root
    if config["resume"]:
        folder = find_run(root, name, config["resume"])
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
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        folder = root / (f"{name}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise OSError(f"could not find a free name for this run in {root.resolve()}")


def find_run(root: Path, name: str, resume: str | bool) -> Path:
    """The folder named by ``resume``, or (``resume: True``) the newest unfinished run of this model and dataset."""
    if resume is not True:
        folder = Path(resume)
        if not (folder / LAST_FILE).is_file():
            raise CheckpointError(f"--resume={resume}: there is no {LAST_FILE} in that folder")
        return folder
    found = sorted(root.glob(f"{name}-*/{LAST_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"--resume: no run of {name} with a checkpoint in {root.resolve()}")
    return found[-1].parent


def check_same_configuration(folder: Path, config: Config) -> None:
    """Refuse to resume under another configuration, before anything is computed.

    Raises:
        CheckpointError: naming every key that differs and can change a result.
    """
    saved, current = json.loads((folder / CONFIG_FILE).read_text()), lasting_configuration(config)
    if (
        "few_shot" not in config.origins
    ):  # a default is cut to the size of the data; the checkpoint's hash is of that
        current.pop("few_shot", None)
    different = [key for key, value in current.items() if saved.get(key) != value]
    if different:
        values = "\n  ".join(f"{key}: {saved.get(key)!r} there, {current[key]!r} here" for key in different)
        raise CheckpointError(f"the run {folder} cannot be resumed with another configuration:\n  {values}")
