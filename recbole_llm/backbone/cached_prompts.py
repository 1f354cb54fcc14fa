"""Prompts that went through a causal language model once, their keys and values kept for texts behind them.

The one place that knows what models want to be told beside token embeddings: masks in two or four dimensions, sliding
windows, position ids, or positions that follow from a mask of padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from recbole_llm.backbone.head import at_places, precise_head, unwrapped
from recbole_llm.utils.causal_lm import check_length

KeptPrompt = list[tuple[Tensor, Tensor]]
"""Keys and values ``[heads, P, d]`` of one prompt, layer by layer."""


class CachedPrompts:
    """Prompts that went through the model, with their keys and values, ready for tokens behind them.

    Args:
        model: see ``score_titles``; so are the next two.
        longest: the most tokens that will stand behind a prompt, the last of which is no input.
        token_ids: [w] the tokens whose logits are wanted; ``None``: all of the vocabulary.
        attention: see ``score_titles``.

    Attributes:
        lengths: [B].
        logits: [B, 1, V] those behind each prompt, or [B, 1, w].
    """

    logits: Tensor

    def __init__(
        self,
        model: nn.Module,
        embeds: Tensor,
        lengths: Tensor,
        longest: int,
        token_ids: Tensor | None = None,
        attention: Mapping[str, Tensor] | None = None,
    ) -> None:
        if embeds.dim() != 3 or lengths.shape != embeds.shape[:1] or not len(lengths):
            raise ValueError(
                f"prompt_embeds [B, P, d] and prompt_lengths [B] expected, got {list(embeds.shape)} and "
                f"{list(lengths.shape)}"
            )
        if not bool(((lengths >= 1) & (lengths <= embeds.shape[1])).all()):
            raise ValueError(
                f"prompt_lengths must lie between 1 and the prompts' width {embeds.shape[1]}, got "
                f"{lengths.tolist()}"
            )
        self._prepare(model, lengths, longest, token_ids)
        inner = unwrapped(model)
        embeds = embeds[:, : self._width].to(self._device, self._dtype)
        last = self.lengths[:, None] - 1
        own: dict[str, Any] = {}
        if attention:
            if self._chained:
                raise ValueError(
                    f"{type(_base(inner)).__name__} takes positions from a mask of padding alone, so parts of a text "
                    "cannot be hidden from others (history_ties: strict): set history_ties: order"
                )
            places = attention["position_ids"].to(self._device)
            mask = attention["attention_mask"][:, 0].to(self._device)
            own = {"attention_mask": self._as_model_wants(mask, places, places), "position_ids": places}
        with self._precise(embeds, last):
            self.logits = self._run(embeds, **own)
        if self._cache.get_seq_length() != self._width:
            raise ValueError(
                f"{type(inner).__name__} left {self._cache.get_seq_length()} of {self._width} positions in the cache: "
                "titles need a model that keeps the keys and values of its prompt (with gradient "
                "checkpointing, call model.eval() first)"
            )

    def _prepare(self, model: nn.Module, lengths: Tensor, longest: int, token_ids: Tensor | None) -> None:
        inner = unwrapped(model)
        _check_model(inner)
        check_length(inner, int(lengths.max()) + longest - 1)
        self._model = model
        self._chained = reads_positions_from_mask(inner)
        self._cache_argument = "cache" if "cache" in _forward_arguments(inner) else "past_key_values"
        self._config = inner.config.get_text_config()
        self._embedding = inner.get_input_embeddings()
        self._device, self._dtype = self._embedding.weight.device, self._embedding.weight.dtype
        self.lengths = lengths.to(self._device)
        self._width = int(lengths.max())
        self._token_ids = None if token_ids is None else token_ids.to(self._device)
        # Told nothing of the architecture, it keeps all keys also of layers with a sliding window.
        self._cache = DynamicCache()

    def _precise(self, embeds: Tensor, places: Tensor) -> AbstractContextManager[None]:
        return precise_head(
            self._model, embeds.shape[:2], lambda hidden: at_places(hidden, places), self._token_ids
        )

    def kept(self) -> list[KeptPrompt]:
        """The keys and values of each prompt, without its padding, as :meth:`restored` takes them."""
        return [
            [
                (layer.keys[row, :, :size].clone(), layer.values[row, :, :size].clone())
                for layer in self._cache.layers
            ]
            for row, size in enumerate(self.lengths.tolist())
        ]

    @classmethod
    def restored(
        cls, model: nn.Module, kept: Sequence[KeptPrompt], longest: int, token_ids: Tensor | None = None
    ) -> CachedPrompts:
        """Prompts that went through the model earlier, whatever their batch was; they have no ``logits``.

        Args:
            model, longest, token_ids: as of the class.
            kept: B prompts of :meth:`kept`.
        """
        found = cls.__new__(cls)
        lengths = torch.tensor([prompt[0][0].shape[1] for prompt in kept])
        found._prepare(model, lengths, longest, token_ids)
        for layer in range(len(kept[0])):
            keys, values = (
                nn.utils.rnn.pad_sequence(
                    [prompt[layer][part].transpose(0, 1) for prompt in kept], batch_first=True
                ).transpose(1, 2)
                for part in (0, 1)
            )
            found._cache.update(keys, values, layer)
        return found

    def forward(self, tokens: Tensor, depth: Tensor, key_depth: Tensor, sees: Tensor, keep: Tensor) -> Tensor:
        """Logits behind ``tokens``, whose keys and values join the cache. All b are 1 (the same for each row) or B.

        Args:
            tokens: [b, q].
            depth: [b, q] the number of tokens between the prompt and each.
            key_depth: [b, k] the same for all tokens behind the prompt that are in the cache, these included.
            sees: [b, q, k] which of those each of ``tokens`` attends to; it sees all of its prompt.
            keep: [b, o] the places, among the q, whose logits are wanted.

        Returns:
            [B, o, V].
        """
        batch = len(self.lengths)
        tokens, depth, key_depth, sees, keep = (
            tensor.to(self._device).expand(batch, *tensor.shape[1:])
            for tensor in (tokens, depth, key_depth, sees, keep)
        )
        embeds = self._embedding(tokens).to(self._dtype)
        precise = self._precise(embeds, keep)
        places, key_places = self.lengths[:, None] + depth, self.lengths[:, None] + key_depth
        width = torch.arange(self._width, device=self._device).expand(batch, -1)
        real = width < self.lengths[:, None]
        if self._chained:  # the mask of padding [B, P + k]; positions count its ones
            behind = real.new_ones(batch, sees.shape[2])
            with precise:
                return self._run(embeds, attention_mask=torch.cat([real, behind], dim=1).long())
        mask = torch.cat([real[:, None].expand(-1, sees.shape[1], -1), sees], dim=2)  # [B, q, P + k]
        masks = self._as_model_wants(mask, places, torch.cat([width, key_places], dim=1))
        with precise:
            return self._run(embeds, attention_mask=masks, position_ids=places)

    def forget(self, size: int) -> None:
        """Takes the last ``size`` tokens out of the cache."""
        self._cache.crop(-size)

    def _run(self, embeds: Tensor, **arguments: Any) -> Tensor:
        arguments[self._cache_argument] = self._cache
        return self._model(inputs_embeds=embeds, use_cache=True, return_dict=True, **arguments).logits

    def _as_model_wants(self, mask: Tensor, places: Tensor, key_places: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask [B, q, keys] in four dimensions; one per kind of layer where a sliding window matters."""

        def four(mask: Tensor) -> Tensor:
            mask = mask[:, None]
            if self._config._attn_implementation == "sdpa":
                return mask
            closed = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device)
            return closed.masked_fill_(~mask, torch.finfo(self._dtype).min)

        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        slides = kinds is None or "sliding_attention" in kinds
        if window is None or not slides or int(places.max()) < window:
            return four(mask)
        near = mask & (key_places[:, None, :] > places[:, :, None] - window)
        if kinds is None:
            return four(near)
        return {"full_attention": four(mask), "sliding_attention": four(near)}


def takes_branches(model: nn.Module) -> bool:
    """Whether several texts can stand behind one prompt in one pass (:meth:`CachedPrompts.forward`)."""
    try:
        _check_model(unwrapped(model))
    except ValueError:
        return False
    return not reads_positions_from_mask(unwrapped(model))


def _check_model(model: nn.Module) -> None:
    """Refuses what would ignore the mask or the positions, or cannot be rolled back."""
    name, config = type(_base(model)).__name__, model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"titles need an attention that takes any mask, but {name} uses {config._attn_implementation!r}: load "
            "it with attn_implementation='sdpa' or 'eager'"
        )
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"titles cannot be scored with {name}: its layers {sorted(others)} take no mask")
    takes_positions = "position_ids" in _forward_arguments(model) and not getattr(config, "alibi", False)
    if not takes_positions and not reads_positions_from_mask(model):
        raise ValueError(
            f"titles cannot be scored with {name}: it takes no position_ids, and its positions do not follow from "
            "the mask of padding"
        )


def _base(model: nn.Module) -> PreTrainedModel:
    """The causal LM of transformers inside a ``PeftModel``, else ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forward_arguments(model: nn.Module) -> Collection[str]:
    return inspect.signature(_base(model).forward).parameters.keys()


def reads_positions_from_mask(model: nn.Module) -> bool:
    """Whether positions are linear biases (ALiBi) that count the ones of a two-dimensional mask of padding."""
    config = model.config.get_text_config()
    return config.model_type == "bloom" or (config.model_type == "falcon" and config.alibi)
