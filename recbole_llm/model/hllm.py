"""HLLM: items by a language model's vectors of their texts, users by a second model over these vectors.

Reference: Junyi Chen et al. "HLLM: Enhancing Sequential Recommendations via Hierarchical Large Language Models for Item
and User Modeling", arXiv 2409.12740.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from recbole_llm.backbone.loader import Backbone
from recbole_llm.config.keys import Choice, Flag, Key, Whole
from recbole_llm.config.model_spec import ModelSpec
from recbole_llm.data.stream_batches import VectorStreamLoader
from recbole_llm.model.llm_user_model import LLMUserModel
from recbole_llm.model.stream import STREAM_KEYS, NextItemStream, Stream, StreamRecommender


class HierarchicalStream(StreamRecommender):
    """What HLLM adds to a stream, to be inherited before the class of a task.

        e(i)         = P v(i) + W E(i)          v: the LLM's vector of title and genres, frozen; E: an optional table
        user model   = backbone     the first ``backbone_layers`` layers of the language model
                       random       the same layers with random weights: no language model, as a control
                       small        the transformer of the model Stream: likewise

    ``tune``: the layers get a LoRA, or are trained in full.
    """

    def build_user_model(self, config, backbone: Backbone | None) -> nn.Module:
        """The user model that the configuration names."""
        if config["user_model"] == "small":
            return super().build_user_model(config, backbone)
        pretrained = config["user_model"] == "backbone"
        lora = LoraConfig(
            r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            target_modules=list(config["target_modules"]),
        )
        model = LLMUserModel(
            cast(Backbone, backbone).model,
            layers=config["backbone_layers"],
            pretrained=pretrained,
            lora=lora if config["tune"] == "lora" else None,
        )
        # Frozen weights of the backbone come back with the backbone; random ones are nowhere else.
        self._not_saved = (
            {f"user_model.{name}" for name, value in model.named_parameters() if not value.requires_grad}
            if pretrained
            else set()
        )
        return model

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Everything but the backbone's own frozen weights."""
        tensors = super().state_dict(*args, **kwargs)
        left_out = getattr(self, "_not_saved", ())
        return {name: tensor for name, tensor in tensors.items() if name not in left_out}

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load what :meth:`state_dict` gave."""
        own = super().state_dict()
        kept: dict[str, torch.Tensor] = {name: own[name] for name in getattr(self, "_not_saved", ())}
        return super().load_state_dict({**kept, **state_dict}, strict=strict, assign=assign)


class LabelledHLLM(HierarchicalStream, Stream):
    """The labelled task: :class:`Stream` with the items and user models of :class:`HierarchicalStream`."""


def has_backbone(config: Mapping[str, Any]) -> bool:
    """Whether the user model has the language model's layers; no lambda, as RecBole pickles the configuration."""
    return config["user_model"] != "small"


class HLLM(HierarchicalStream, NextItemStream):
    """The next-item task: :class:`NextItemStream` with the items and user models of :class:`HierarchicalStream`."""

    spec = ModelSpec(
        "conventional",
        tasks=("next_item", "ctr"),
        reads=(
            *("lens_ratings", "backbone", "dtype", "quantization"),
            *("lora_r", "lora_alpha", "lora_dropout", "target_modules"),
        ),
        keys={
            **STREAM_KEYS,
            "item_vectors": Key("items are known by the LLM's vectors of their texts", Flag()),
            "user_model": Key("what reads the items", Choice("small", "random", "backbone")),
            "backbone_layers": Key("layers of the user model, from the first", Whole(1), optional=True),
            "tune": Key("how the layers of the backbone are trained", Choice("lora", "full")),
        },
        learns_from="next_item",
        takes_item_vectors=True,
        wants_backbone=has_backbone,
        training_loader=VectorStreamLoader,
        task_classes={"ctr": LabelledHLLM},
    )
