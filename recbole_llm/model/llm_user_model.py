"""A language model's layers as the user model of a vector stream: vectors in, states out, no token is ever read."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel


class LLMUserModel(nn.Module):
    """The first layers of a causal language model on ``inputs_embeds``.

        h = norm( layers_{1..n}( gain * x ) )          [B, S, w], w the hidden size of the language model

    ``gain`` is trained and starts at the standard deviation of the token embeddings, which ``x`` takes the place of.
    Attention is causal and positions count from 0; sequences are padded on the right, so there is no mask.

    Args:
        model: the language model; ``pretrained`` changes it in place.
        layers: how many of its layers are kept, from the first; ``None``: all.
        pretrained: ``False``: the same architecture with random weights, drawn from torch's generator.
        lora: trains this adapter and freezes the weights; ``None``: trains all weights, in float32.

    Raises:
        ValueError: if there are fewer layers, or full training is asked of quantised weights.
    """

    def __init__(
        self, model: PreTrainedModel, *, layers: int | None, pretrained: bool, lora: LoraConfig | None
    ) -> None:
        super().__init__()
        decoder = model.base_model
        there = len(decoder.layers)
        kept = layers or there
        if kept > there:
            raise ValueError(f"backbone_layers: {kept}, but the backbone has {there} layers")
        if lora is None and getattr(model, "is_quantized", False):
            raise ValueError(
                "tune: full is not possible with quantised weights; set tune: lora or quantization: ~"
            )
        self.gain = nn.Parameter(model.get_input_embeddings().weight.detach().float().std())
        if not pretrained:
            config = copy.deepcopy(decoder.config)
            config.num_hidden_layers = kept
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:kept]
            decoder = type(decoder)(config).to(device=self.gain.device, dtype=decoder.dtype)
        decoder.layers = decoder.layers[:kept]
        decoder.config.use_cache = False
        self.width: int = decoder.config.hidden_size
        decoder.set_input_embeddings(nn.Embedding(1, self.width, dtype=decoder.dtype))  # never looked up
        self.dtype = decoder.dtype
        if lora is None:
            decoder = decoder.float().requires_grad_(True)
            decoder.get_input_embeddings().requires_grad_(False)
            self.dtype = torch.float32
            self.decoder = decoder
        else:
            self.decoder = get_peft_model(decoder.requires_grad_(False), lora)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors ``[B, S, w]`` to states ``[B, S, w]`` of the same dtype; state ``t`` sees ``x_1 ... x_t``."""
        out = self.decoder(inputs_embeds=(self.gain * x).to(self.dtype), use_cache=False)
        return out.last_hidden_state.to(x.dtype)
