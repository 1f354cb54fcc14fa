"""The personalised LoRA layer, through PEFT's own extension points.

Three pieces, all of them documented by PEFT as ways in (and as "prone to change", hence the pin
``peft>=0.20,<0.22``): a :class:`LoraConfig` with one field more that selects a variant, a subclass of PEFT's
``Linear`` that knows the variant (``_register_custom_module``), and the :class:`LoraVariant` itself.
Freezing, dtypes, devices and switching the adapter on and off stay PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.gate import Gate, build_gate
from recbole_llm.adapter.mixer import MIXERS, Mixer
from recbole_llm.utils.causal_lm import PROJECTIONS


class Router:
    """Hands the instances of the current batch to every adapted layer of *one* model.

    Not global: two models in one process, or two replicas, must not see each other's instances. The instance
    stays until the next one is set, because gradient checkpointing runs the layers again during the backward
    pass.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.instance: Tensor | None = None
        self.tokens: Tensor | None = None
        self.version = torch.tensor(0, device="cpu")
        self._shape: torch.Size | None = None  # [B, T] of the decoder layer that runs
        self._shared_gate: Gate | None = None
        self._value: Tensor | None = None  # of the shared gate, for the instances that are set
        self._computed_from: tuple | None = None

    def set(self, z: Tensor | None, tokens: Tensor | None = None) -> None:
        """Set the instances of the next forward pass, or ``None``.

        ``z [B, H]`` has one per sequence; with ``tokens [B, T]`` it is ``[N, H]``, and token t of sequence b has
        instance ``tokens[b, t]``.
        """
        self.instance, self.tokens = z, tokens
        self.version = self.version + 1  # a new tensor: the old one may be saved for a backward pass
        self._value = self._computed_from = None
        gate = self._shared_gate
        if z is not None and gate is not None and gate.training and torch.is_grad_enabled():
            # Here and not in the first layer that asks: gradient checkpointing would run that layer again.
            self._value = gate(like_weights(z, gate))

    def follow(self, layers: nn.ModuleList) -> None:
        """Note the shape of each decoder layer's input: OPT's feed-forward part sees tokens ``[B T, d]`` in a row.

        Args:
            layers: the decoder layers.
        """

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._shape = args[0].shape[:2]

        for layer in layers:
            layer.register_forward_pre_hook(note)

    def by_sequence(self, x: Tensor) -> Tensor:
        """``x`` as ``[B, T, features]``, where a layer that is followed has put its tokens in a row."""
        flat = x.dim() == 2 and self._shape is not None and x.shape[0] == self._shape.numel()
        return x.unflatten(0, self._shape) if flat else x

    def gate_for(self, name: str) -> Gate:
        """The gate of the projection ``name``: its own, or the one that all share."""
        if not self.config.share_gate:
            return build_gate(self.config, name)
        if self._shared_gate is None:
            self._shared_gate = build_gate(self.config, "shared")
        return self._shared_gate

    def gate_value(self, gate: Gate, z: Tensor) -> Tensor:
        """What ``gate`` makes of the instances ``z [B, H]``; a shared gate computes it once for all projections."""
        if gate is not self._shared_gate:
            return gate(z)
        if self._value is not None and self._computed_from is None:  # by `set`, with its graph
            return self._value.to(z.device)
        if torch.is_grad_enabled() and any(p.requires_grad for p in gate.parameters()):
            return gate(z)
        state = tuple(t._version for t in (*gate.parameters(), *gate.buffers()))
        if self._value is None or self._computed_from != (state, gate.training):
            self._value, self._computed_from = gate(z), (state, gate.training)
        return self._value.to(z.device)

    def read(self, x: Tensor, layer: Linear) -> Tensor:
        """The instances that belong to the input ``x`` of ``layer``: ``[B, H]``, or of its tokens, ``[N, H]``.

        Raises:
            ValueError: if none was set, or if ``x`` is not ``[B, T, d_in]`` with the same B (and T).
        """
        z = self.instance
        if z is None:
            raise ValueError(
                "the personalised adapter has no instance: call set_instance(z) with one row per sequence "
                "before the forward pass, or run the base model inside `with adapter.disabled():`"
            )
        if x.dim() != 3:
            raise ValueError(
                f"{layer.name}: a personalised projection needs inputs [batch, tokens, features], got shape "
                f"{tuple(x.shape)}; without the batch axis tokens cannot be matched with instances"
            )
        if self.tokens is not None:
            if x.shape[:2] != self.tokens.shape:
                raise ValueError(
                    f"{layer.name}: the input has {x.shape[0]} sequences of {x.shape[1]} tokens, but set_instance was "
                    f"given the interactions of {tuple(self.tokens.shape)} tokens"
                )
            return z
        if x.shape[0] != z.shape[0]:
            raise ValueError(
                f"{layer.name}: the input has batch size {x.shape[0]}, but set_instance was given "
                f"{z.shape[0]} rows. One row per sequence is needed: call set_instance for every batch, and "
                "where one instance has several sequences (candidates, beams) repeat it with "
                "z.repeat_interleave(n, dim=0)"
            )
        return z


def like_weights(z: Tensor, gate: Gate) -> Tensor:
    """``z`` on the device and in the format of the gate's own tensors."""
    tensor = next(chain(gate.parameters(), gate.buffers()), None)
    return z if tensor is None or not tensor.is_floating_point() else z.to(tensor.device, tensor.dtype)


class SameInstance(torch.autograd.Function):
    """The identity; its backward pass refuses gradients that belong to other instances than the forward pass.

    Non-reentrant gradient checkpointing runs a layer again during backward, with the instance set *last*. If
    another one was set in between (two forward passes, then one backward), shapes agree and gradients would
    be wrong in silence. ``ctx.version`` is written by the forward pass proper; the saved tensor is what
    checkpointing recomputed.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, version: Tensor) -> Tensor:
        """``update`` of any shape, returned as it is; ``version``: the router's, a scalar on the CPU."""
        ctx.version = int(version)
        ctx.save_for_backward(version)
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``grad`` as it is, or ValueError."""
        if int(ctx.saved_tensors[0]) != ctx.version:
            raise ValueError(
                "gradient checkpointing recomputed a layer with instances other than those of its forward "
                "pass: set_instance was called in between. Run backward after each micro-batch, before the "
                "next set_instance"
            )
        return grad, None


@dataclass
class PersonalizedLoraConfig(LoraConfig):
    """PEFT's LoRA settings plus the personalisation.

    Attributes:
        personalization: the adapter's configuration; its presence selects :class:`PersonalizedVariant`.
    """

    personalization: AdapterConfig | None = field(
        default=None, metadata={"is_lora_variant": True, "help": "mixer and gate of a personalised LoRA"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.personalization is None:
            raise ValueError("a personalised LoRA needs the settings of its mixer and gate (personalization)")
        self.router = Router(self.personalization)
        self._register_custom_module(dict.fromkeys(PROJECTIONS, PersonalizedLinear))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Refused: PEFT would write peft_type LORA, and load the folder as a plain LoRA without a word."""
        raise ValueError(
            f"cannot write a personalised adapter to {save_directory} with PEFT's save_pretrained: it would "
            "come back as a plain LoRA. A run's checkpoint holds the adapter; recbole-llm export writes the plain "
            "LoRA of one user"
        )


class PersonalizedVariant(LoraVariant):
    """``result + s B M(z) A dropout(x)``, the mixer and the gate being those of the layer."""

    def supports_lora_conversion(self) -> bool:
        """No: there is one LoRA per instance."""
        return False

    @staticmethod
    def init(
        module: PersonalizedLinear, adapter_name: str, config: PersonalizedLoraConfig, **kwargs: Any
    ) -> None:
        """Add the gate. A and B are PEFT's own.

        Kaiming-uniform with a = sqrt(5) has the bound 1/sqrt(d_in), whatever the number of rows, so PEFT's
        start of the stacked A is the start of each block A_k on its own; and B = 0.
        """
        weight = module.lora_A[adapter_name].weight
        module.name = kwargs.get("target_name", "")
        module.router = config.router
        module.last_gate = None
        module.mixer = MIXERS[config.router.config.mixer]
        if not hasattr(
            module, "lora_gate"
        ):  # PEFT's constructor calls this before a subclass's own could add it
            module.lora_gate = nn.ModuleDict()
        # Never below float32; float64 where the whole model is float64.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        module.lora_gate[adapter_name] = config.router.gate_for(module.name).to(weight.device, dtype)

    @staticmethod
    def forward(
        module: PersonalizedLinear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """``x [B, T, d_in], result [B, T, d_out] -> [B, T, d_out]``."""
        shape, x = result.shape, module.router.by_sequence(x)
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        z = module.router.read(x, module).to(a.device, a.dtype)
        gate = module.router.gate_value(module.lora_gate[active_adapter], z)
        module.last_gate = gate.detach()
        x = module.lora_dropout[active_adapter](x)
        tokens, scale = module.router.tokens, module.scaling[active_adapter]
        if tokens is None:
            update = module.mixer.update(x, a, b, gate, scale)
        else:
            update = module.mixer.token_update(x, a, b, gate, tokens.to(a.device), scale)
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            update = SameInstance.apply(update, module.router.version)
        return result + update.reshape(shape)

    @staticmethod
    def merge_safe(module: PersonalizedLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused."""
        raise _merge_error(module)

    @staticmethod
    def merge_unsafe(module: PersonalizedLinear, active_adapter: str, orig_weight: Tensor) -> None:
        """Refused."""
        raise _merge_error(module)

    @staticmethod
    def unmerge(module: PersonalizedLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused."""
        raise _merge_error(module)


def _merge_error(module: PersonalizedLinear) -> ValueError:
    return ValueError(
        f"{module.name}: a personalised LoRA has one weight update per instance and cannot be merged into "
        "the base weights. The plain LoRA of one user, which recbole-llm export writes, can be merged"
    )


class PersonalizedLinear(Linear):
    """PEFT's LoRA ``Linear`` plus a gate, named ``lora_gate`` so that PEFT counts it among the adapter.

    Attributes:
        name: the projection's name in the model.
        router: where the instances come from.
        mixer: how the gate acts on A and B.
        last_gate: the gate of the last forward pass, detached.
    """

    name: str
    router: Router
    mixer: type[Mixer]
    last_gate: Tensor | None
    adapter_layer_names = (*Linear.adapter_layer_names, "lora_gate")

    @property
    def lora_variants(self) -> dict:
        """PEFT's variants and the personalised one."""
        return {**super().lora_variants, ("personalization",): PersonalizedVariant}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Refused: there is no single update."""
        raise _merge_error(self)
