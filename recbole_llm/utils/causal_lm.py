"""What the modules of a causal language model show, whatever its configuration calls it: layers, projections, sizes.

GPT-2 has ``n_embd`` and no ``intermediate_size``, BLOOM ``n_layer``, OPT ``ffn_dim`` and embeddings narrower than its
layers: names differ between architectures, modules do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PROJECTIONS = (nn.Linear, Conv1D)
"""Classes of a layer's projections; quantised ones inherit from ``nn.Linear``, Conv1D is GPT-2's, stored transposed."""


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the states between layers.
        intermediate: width of the widest input of a projection, that of the feed-forward part's second one.
    """

    layers: int
    hidden: int
    intermediate: int


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """The linear projections inside ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, PROJECTIONS)}


def projection_size(projection: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a projection."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order.

    Raises:
        ValueError: if the model has none, so that it is no decoder of transformers.
    """
    lists = [
        (name.count("."), child)
        for name, child in model.get_decoder().named_modules()
        if isinstance(child, nn.ModuleList) and projections(child)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return min(lists, key=lambda found: found[0])[1]  # lists inside a layer, such as experts, lie deeper


def layer_sizes(model: PreTrainedModel) -> LayerSizes:
    """Sizes as the first decoder layer's projections have them."""
    layers = decoder_layers(model)
    inputs = [projection_size(projection)[0] for projection in projections(layers[0]).values()]
    return LayerSizes(layers=len(layers), hidden=inputs[0], intermediate=max(inputs))


def position_limit(model: PreTrainedModel) -> int | None:
    """The most positions a model can have: the size of its table of learned ones; ``None`` without such a table.

    Rotary and linear position biases have no limit at which a model fails, only one up to which it was trained.
    """
    for name, table in model.get_decoder().named_children():
        if isinstance(table, nn.Embedding) and (name == "wpe" or "position" in name):
            return table.num_embeddings - getattr(table, "offset", 0)  # OPT's first two rows are no positions
    return None


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse more positions than the model has.

    Args:
        model: the causal language model.
        length: positions of a prompt, together with what stands behind it.

    Raises:
        ValueError: if the model's table of positions is shorter.
    """
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"{type(model).__name__} has {limit} learned positions, but prompt and answer have {length}: set "
            f"max_prompt_tokens so that both fit into {limit}, or use a backbone with a longer context"
        )
