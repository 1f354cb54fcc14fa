"""Attach a personalised LoRA to a causal language model, and hold on to it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.layer import PersonalizedLoraConfig, Router, like_weights
from recbole_llm.adapter.targets import resolve_targets, stores_transposed
from recbole_llm.utils.causal_lm import decoder_layers

logger = logging.getLogger(__name__)

_NAME = "default"  # PEFT's name of the adapter; one adapter per model here


class PersonalizedAdapter:
    """A causal LM whose adapted projections compute ``y = W0 x + s B M(z) A x``.

    Made by :func:`attach_adapter`. Usage::

        adapter = attach_adapter(model, AdapterConfig(mixer="factor", instance_size=64, num_experts=8))
        adapter.set_instance(z)                                  # [B, 64], one row per sequence of the batch
        loss = criterion(adapter.peft_model(input_ids).logits)
        loss.backward()                                          # before the next set_instance

    Attributes:
        config: the settings.
        peft_model: PEFT's wrapper.
        model: the causal LM inside it, with adapted projections.
    """

    def __init__(self, peft_model: PeftModel, config: AdapterConfig, router: Router | None) -> None:
        self.config = config
        self.peft_model = peft_model
        self.model: PreTrainedModel = peft_model.get_base_model()
        self._router = router
        self._layers: dict[str, LoraLayer] = {
            name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)
        }
        self._warned_single_row = False

    # ------------------------------------------------------------------ the instance

    def set_instance(self, z: Tensor | None, tokens: Tensor | None = None, *, shuffle: bool = True) -> None:
        """Say whose batch comes next. Stays until the next call. Has no effect with mixer ``identity``.

        In training, gate ``cnn`` counts the rows of each call once in its running statistics.

        Args:
            z: instance representations ``[B, H]``, row i for sequence i; ``None`` forgets the last ones. With
                gate ``shuffled`` sequence i gets row i - 1 (cyclic); a batch of one row cannot be shuffled.
                With ``tokens``: ``[B, S, H]``, an instance per interaction of each sequence; padding interactions,
                which no token belongs to, are never looked at. With gate ``shuffled`` the caller gives the instances
                of other users: the sequence before may be a later one of the same user.
            tokens: which interaction of its sequence each token belongs to, int64 ``[B, T]`` in ``[0, S)``.
            shuffle: ``False``: with gate ``shuffled`` the caller gave the instances of others, as he does with
                ``tokens``.

        Raises:
            ValueError: if ``z`` is not a floating-point tensor ``[B, H]`` with H = ``config.instance_size``, or
                ``tokens`` do not belong to it.
        """
        if self._router is None:
            return
        if z is not None:
            z = self._checked(z, per_token=tokens is not None)
            if tokens is not None:
                # Only interactions that tokens belong to: padding must not enter statistics and penalties.
                tokens = self._checked_tokens(tokens, z)
                places = tokens + z.shape[1] * torch.arange(len(z), device=tokens.device).unsqueeze(1)
                used, tokens = torch.unique(places, return_inverse=True)
                z = z.flatten(0, 1)[used.to(z.device)]
            elif self.config.gate == "shuffled" and shuffle:
                if z.shape[0] == 1 and not self._warned_single_row:
                    self._warned_single_row = True
                    logger.warning("gate 'shuffled': a batch of one row keeps its own instance")
                z = z.roll(1, dims=0)
            for gate in self._gates().values():
                gate.observe(z)
        self._router.set(z, None if z is None else tokens)

    @staticmethod
    def _checked_tokens(tokens: Tensor, z: Tensor) -> Tensor:
        fits = tokens.dim() == 2 and len(tokens) == len(z) and tokens.dtype == torch.int64
        if not fits or not bool(((tokens >= 0) & (tokens < z.shape[1])).all()):
            raise ValueError(
                f"tokens must be an int64 tensor [{len(z)}, T] with interactions in [0, {z.shape[1]}), got "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}"
                + (f" from {int(tokens.min())} to {int(tokens.max())}" if fits and tokens.numel() else "")
            )
        return tokens

    def _checked(self, z: Tensor, per_token: bool = False) -> Tensor:
        dims, axes = (3, "batch, interactions") if per_token else (2, "batch")
        if z.dim() != dims or z.shape[-1] != self.config.instance_size or not z.is_floating_point():
            raise ValueError(
                "the instance representation must be a floating-point tensor "
                f"[{axes}, {self.config.instance_size}], got {z.dtype} of shape {tuple(z.shape)}"
            )
        # A lens may run in inference mode, whose tensors autograd refuses to save.
        return z.clone() if z.is_inference() else z

    def gate_values(self) -> dict[str, Tensor]:
        """Gates ``[B, K]`` of the last forward pass by projection; empty for ``identity`` and ``dense``.

        Where tokens have instances of their own: ``[N, K]``, of the interactions that occur, in the order of the batch.
        """
        if self.config.mixer in ("identity", "dense"):
            return {}
        return {name: layer.last_gate for name, layer in self._layers.items() if layer.last_gate is not None}

    @torch.no_grad()
    def mean_gate(self, z: Tensor) -> Tensor | None:
        """The gate of each instance, mean over projections, ``[B, K]``; ``None`` where there are no experts to weigh.

        Nothing goes through the language model; call it in eval mode. Gate ``shuffled`` is that of the instance itself.

        Args:
            z: instance representations ``[B, H]``.
        """
        if self._router is None or self.config.mixer in ("identity", "dense"):
            return None
        z = self._checked(z)
        gates = self._gates().values()
        return torch.stack([gate(like_weights(z, gate)).float().cpu() for gate in gates]).mean(dim=0)

    def gate_penalty(self, balance: float, entropy: float) -> Tensor:
        """A loss on the mixtures of the batch last set, mean over gates; differentiable in the gates, a scalar.

            balance * (K sum_k m_k^2 - 1)  +  entropy * (log K - mean_b H(g_b)),        m = mean_b g_b

        The first is the squared coefficient of variation of the experts' mean weights (Shazeer et al., "Outrageously
        Large Neural Networks", ICLR 2017), the second the mean divergence from equal weights. Both are 0 for equal
        weights, and both are of the batch at hand.

        Args:
            balance, entropy: their weights.

        Raises:
            ValueError: if no instance was set.
        """
        z = None if self._router is None else self._router.instance
        if z is None:
            raise ValueError("the gate's penalty is of a batch: call set_instance before")
        total, gates = z.new_zeros(()), self._gates().values()
        for gate in gates:
            g = gate(like_weights(z, gate)).to(z.device)
            k = g.shape[-1]
            unequal = k * g.mean(dim=0).square().sum() - 1
            peaked = math.log(k) + torch.special.xlogy(g, g).sum(dim=-1).mean()
            total = total + balance * unequal + entropy * peaked
        return total / len(gates)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone; needs no instance. Not for use between a forward and its backward."""
        parameters = list(self.peft_model.parameters())
        trained = [parameter.requires_grad for parameter in parameters]
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            # On the way out PEFT sets requires_grad for the whole adapter; keep what was frozen frozen.
            for parameter, flag in zip(parameters, trained, strict=True):
                parameter.requires_grad_(flag)

    # ------------------------------------------------------------------ parameters and tensors

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every projection, by stable name."""
        found = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A"] = layer.lora_A[_NAME].weight
            found[f"{name}.lora_B"] = layer.lora_B[_NAME].weight
        return found

    def gate_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the gates, by stable name; empty where the gate has none."""
        return {
            f"{prefix}.{n}": p for prefix, gate in self._gates().items() for n, p in gate.named_parameters()
        }

    def _gates(self) -> dict[str, nn.Module]:
        gates = {
            n: layer.lora_gate[_NAME] for n, layer in self._layers.items() if hasattr(layer, "lora_gate")
        }
        if gates and self.config.share_gate:
            return {"lora_gate": next(iter(gates.values()))}
        return {f"{name}.lora_gate": gate for name, gate in gates.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """A, B, gates and the gates' buffers, by stable name; detached, sharing storage with the model."""
        state = {name: parameter.detach() for name, parameter in self.lora_parameters().items()}
        for prefix, gate in self._gates().items():
            state |= {f"{prefix}.{name}": tensor.detach() for name, tensor in gate.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the adapter. Nothing is changed if it does not fit.

        Raises:
            ValueError: if names are missing or unknown, or shapes differ.
        """
        own = self.state_dict()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        wrong = [
            f"{name}: {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ]
        if missing or unknown or wrong:
            problems = [
                f"{len(names)} {title} (first: {sorted(names)[0]})"
                for title, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
                if names
            ]
            raise ValueError(
                f"these tensors do not fit an adapter with {self.config}: {'; '.join(problems)}. "
                "Load them into the same base model with the same adapter settings"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def load_lora(self, tensors: dict[str, Tensor]) -> None:
        """Copy A and B of every projection, named as in :meth:`state_dict`; the gates keep what they have.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        own = self.lora_parameters()
        self.load_state_dict({name: t for name, t in self.state_dict().items() if name not in own} | tensors)

    def train_lora(self, trained: bool) -> None:
        """Whether A and B get gradients."""
        for parameter in self.lora_parameters().values():
            parameter.requires_grad_(trained)

    # ------------------------------------------------------------------ one instance's LoRA

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weights are stored transposed (GPT-2's Conv1D)."""
        return bool(self.peft_model.peft_config[_NAME].fan_in_fan_out)

    @torch.no_grad()
    def gate_weights(self, z: Tensor | None) -> dict[str, Tensor]:
        """What the gate of every projection gives for instances ``z [n, H]``, without dropout; by projection.

        ``[n, K]``, or for mixer ``dense`` ``[n, r, r]``. Means over instances are gates, too: those of a group.

        Raises:
            ValueError: if the gate is ``shuffled``, which gives an instance another one's adapter.
        """
        if self.config.mixer == "identity":
            return {}
        if self.config.gate == "shuffled":
            raise ValueError("gate 'shuffled' gives an instance another row's adapter: nothing to export")
        z, found = self._checked(z), {}
        for name, layer in self._layers.items():
            gate = layer.lora_gate[_NAME]
            training = gate.training
            gate.eval()
            found[name] = gate(like_weights(z, gate))
            gate.train(training)
        return found

    @torch.no_grad()
    def plain_pairs(self, weights: dict[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """``A' [R', d_in]`` and ``B' [d_out, R']`` of every projection for fixed gates; the scale is ``config.scale``.

        Args:
            weights: one row of :meth:`gate_weights` by projection, ``[1, ...]``; not needed with mixer ``identity``.
        """
        pairs, gates = {}, weights or {}
        for name, layer in self._layers.items():
            a, b = layer.lora_A[_NAME].weight.detach(), layer.lora_B[_NAME].weight.detach()
            pairs[name] = (a, b) if self.config.mixer == "identity" else layer.mixer.fold(a, b, gates[name])
        return pairs


def attach_adapter(
    model: PreTrainedModel, config: AdapterConfig, *, strict: bool = True
) -> PersonalizedAdapter:
    """Adapt ``model`` in place: freeze it and give its target projections a (personalised) LoRA.

    A and B start as in PEFT (A kaiming-uniform, B zero: the model starts as it was) and are kept, like the
    gates, in float32 also where the base is in half precision or quantised. Mixer ``identity`` is PEFT's own
    LoRA layer.

    Args:
        model: a causal LM without an adapter.
        config: the settings.
        strict: whether to refuse Llama's names of projections where the model has others, see
            :func:`~recbole_llm.adapter.targets.resolve_targets`.

    Returns:
        the adapter; its ``config`` names the projections that it adapts.

    Raises:
        ValueError: if ``model`` has an adapter already, or a target module is not one of its linear layers.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model already has a PEFT adapter; attach to a freshly loaded base model")
    config = replace(config, target_modules=resolve_targets(model, config.target_modules, strict=strict))
    settings: dict[str, Any] = dict(
        r=config.rank,
        lora_alpha=config.scale * config.rank,  # PEFT scales by lora_alpha / r, which must be s
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out=stores_transposed(model, config.target_modules),
    )
    if config.layers is not None:
        settings["layers_to_transform"] = checked_layers(model, config.layers)
    router = None
    if config.mixer == "identity":
        peft_config = LoraConfig(**settings)
    else:
        peft_config = PersonalizedLoraConfig(**settings, personalization=config)
        router = peft_config.router
        if model.config.model_type == "opt":
            router.follow(decoder_layers(model))
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers for a name that transformers 5.23 wants to rename; nobody here can change that.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft_model = get_peft_model(model, peft_config)
    return PersonalizedAdapter(peft_model, config, router)


def checked_layers(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Numbers of the layers from the first to the last; PEFT itself leaves out in silence what is not there.

    Raises:
        ValueError: if the model has fewer.
    """
    first, last, there = *layers, len(decoder_layers(model))
    if last >= there:
        raise ValueError(
            f"lora_layers: [{first}, {last}] of a model with {there} layers; they are numbered 0 to {there - 1}"
        )
    return list(range(first, last + 1))
