"""One run in several processes, as ``torchrun`` starts them: who computes what, and how it is put together.

    torchrun --nproc_per_node=4 run_recbole_llm.py --model=RecLoRA --dataset=ml-1m

All processes build the same model and draw the same batches. Of a batch each takes its share of the micro-batches; the
sums of their gradients are the gradient of one process. The first process writes all files.
"""

from __future__ import annotations

import atexit
import datetime
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recbole_llm.utils.memory import is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for the others, e.g. while the first one scores the untrained model. Of a process that ends
the others learn at once."""


class ProcessLost(ValueError):
    """Another process of the run has ended."""


class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def mine(self, n: int) -> slice:
        """Which of ``n`` things this process takes: a stretch of them; the first processes take one more."""
        size, rest = divmod(n, self.count)
        start = self.rank * size + min(self.rank, rest)
        return slice(start, start + size + (self.rank < rest))

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` gives, in which all processes take part.

        Raises:
            ProcessLost: if another one has ended.
            RuntimeError: if the work fails in this one, also for lack of memory.
        """
        try:
            return work()
        except RuntimeError as error:
            if is_out_of_memory(error) or not _of_communication(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ProcessLost(
                f"another of the {self.count} processes of this run has ended ({reason}); its own message says why"
            ) from error

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.several:
            self.together(lambda: dist.all_reduce(tensor))
        return tensor

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        if not self.several:
            return number
        tensor = torch.tensor(number, device=device)
        self.together(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
        return int(tensor)

    def all(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        found: list[Any] = [None] * self.count
        if not self.several:
            return [value]
        self.together(lambda: dist.all_gather_object(found, value))
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` gives in the first process, where alone it is called; or the error that it raises.

        Raises:
            ValueError: in the other processes, for an error in the first one.
        """
        if not self.several:
            return make()
        found: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                found[0] = make()
            except Exception as raised:  # of any kind: raised below, after the others were told
                error, found[1] = raised, str(raised)
        self.together(lambda: dist.broadcast_object_list(found))
        if error is not None:
            raise error
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def wait(self) -> None:
        """Until all are here."""
        self.all(None)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over the processes.

        A parameter that no process has a gradient of stays without one: an optimizer treats 0 and none differently.
        """
        if not self.several or not parameters:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        has = self.add_up(has.to(parameters[0].device)).cpu()
        for kind in sorted({(p.dtype, str(p.device)) for p in parameters}, key=str):
            alike = [
                p
                for p, n in zip(parameters, has.tolist(), strict=True)
                if n and (p.dtype, str(p.device)) == kind
            ]
            if not alike:
                continue
            for p in alike:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            flat = self.add_up(torch.cat([p.grad.flatten() for p in alike]))
            for p, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                p.grad.copy_(part.view_as(p))


def _of_communication(error: RuntimeError) -> bool:
    """Whether the other processes cannot be reached; gloo raises plain errors that only their text tells."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        name in text for name in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    )


def shard_layers(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process a share of the frozen weights of each layer, on ``device``.

    A layer's weights are gathered when it runs, forward or backward, and given up behind it. So all processes have to
    run the same layers in the same order. What is trained stays whole in every process. This is FSDP2,
    ``torch.distributed.fsdp.fully_shard``.

    Raises:
        ValueError: if this torch cannot leave out what is trained (before 2.7).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"shard_backbone: True needs torch 2.7 or later, this is {torch.__version__}")
    mesh = init_device_mesh(device.type, (launched().count,))
    own = whole = 0
    for layer in layers:
        frozen = [p for p in layer.parameters() if not p.requires_grad]
        whole += sum(p.nbytes for p in frozen)
        fully_shard(layer, mesh=mesh, ignored_params=set(layer.parameters()) - set(frozen))
        own += sum(p.to_local().nbytes for p in layer.parameters() if isinstance(p, DTensor))
    logger.info(
        "shard_backbone: this process keeps %s of the %s bytes of the decoder layers' frozen weights",
        *(f"{own:,}", f"{whole:,}"),
    )


def launched() -> Processes:
    """The processes that ``torchrun`` has started; one, if it has not."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def join(device: torch.device) -> None:
    """Get in touch with the other processes, once."""
    if not launched().several or dist.is_initialized():
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    logger.info("process %d of %d", dist.get_rank() + 1, dist.get_world_size())
