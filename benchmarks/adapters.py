"""Models for the benchmarks: personalised and plain adapters on one backbone, and batches of both layouts.

Tokens and instances are random: speed and memory depend on shapes alone. A batch has the shapes of runs on
MovieLens: prompts of 123 tokens with one answer, streams of 8 tokens per interaction, each with an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from measure import sharing_weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.adapter.config import AdapterConfig
from recbole_llm.adapter.personalized import attach_adapter
from recbole_llm.backbone.answers import logits_at
from recbole_llm.backbone.loader import load_backbone

WIDTH = 64
"""Of the instances."""
PROMPT_TOKENS, LINE_TOKENS = 123, 8
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANDOM = {
    "random-tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2),
    "random-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "random-7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
}
"""Llamas with random weights: the shapes of Llama-3.2-1B and Llama-2-7B, with a vocabulary of 32,000."""
SETTINGS = {
    "factor": dict(mixer="factor", gate="mlp60", num_experts=16, r=8, temperature=5.0),
    "expert": dict(mixer="expert", gate="linear", num_experts=4, r=8, share_gate=True, target_modules=SEVEN),
}
"""RecLoRA and iLoRA."""


@cache
def _loaded(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    if name not in RANDOM:
        return load_backbone(name, device=device, dtype=dtype).model
    sizes = dict(vocab_size=32_000 if name != "random-tiny" else 256, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, **RANDOM[name]), dtype=dtype)
    return model.requires_grad_(False).eval()


def base_model(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A frozen causal language model; models of one name share their weights."""
    return sharing_weights(_loaded(name, device, dtype))


class Prompts:
    """``count`` prompts of ``length`` tokens; the answer follows the last one."""

    def __init__(self, count: int, length: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 200, (count, length), generator=generator).to(device)
        self.z = torch.randn(count, WIDTH, generator=generator).to(device)
        self.tokens = None
        self.rows = torch.arange(count, device=device)
        self.places = torch.full((count,), length - 1, device=device)

    @property
    def labels(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Prompts:
        found = object.__new__(Prompts)
        found.ids, found.z, found.tokens = self.ids[part], self.z[part], None
        found.rows, found.places = torch.arange(len(found.ids)), self.places[part]
        return found


class Streams(Prompts):
    """``count`` chunks of ``length`` tokens; an answer follows the last token of each interaction."""

    def __init__(self, count: int, length: int, device: str) -> None:
        super().__init__(count, length, device)
        n = length // LINE_TOKENS
        self.tokens = (torch.arange(length, device=device) // LINE_TOKENS).clamp(max=n - 1).repeat(count, 1)
        self.z = torch.randn(count, n, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
        self.rows = torch.arange(count, device=device).repeat_interleave(n)
        self.places = (torch.arange(n, device=device) * LINE_TOKENS + LINE_TOKENS - 1).repeat(count)


@dataclass
class Trained:
    """An adapted model and its optimizer.

    Attributes:
        model: what is called with token ids.
        adapter: the personalised one; ``None`` for PEFT's own.
    """

    model: nn.Module
    adapter: object = None

    def __post_init__(self) -> None:
        own = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(own, lr=1e-4)

    def logits(self, batch: Prompts) -> Tensor:
        """Two answers' logits at every place that one follows."""
        if self.adapter is not None:
            self.adapter.set_instance(batch.z, batch.tokens)
        return logits_at(self.model, batch.ids, batch.rows, batch.places, [1, 2])

    def loss(self, batch: Prompts) -> Tensor:
        logits = self.logits(batch)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 2)

    def step(self, batch: Prompts) -> None:
        """One optimizer step."""
        self.model.train()
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, batch: Prompts) -> None:
        self.model.eval()
        with torch.no_grad():
            self.logits(batch)


def trained(model: nn.Module, kind: str, layers: list[int] | None = None) -> Trained:
    """RecLoRA (``factor``) or iLoRA (``expert``) on a model."""
    torch.manual_seed(0)
    adapter = attach_adapter(model, AdapterConfig(instance_size=WIDTH, layers=layers, **SETTINGS[kind]))
    return Trained(adapter.peft_model.to(next(model.parameters()).device), adapter)


def plain(model: nn.Module, kind: str) -> Trained:
    """PEFT's own LoRA with the same targets and the rank r of ``kind``."""
    settings = SETTINGS[kind]
    targets = settings.get("target_modules", ["q_proj", "v_proj"])
    torch.manual_seed(0)
    return Trained(get_peft_model(model, LoraConfig(r=settings["r"], lora_alpha=16, target_modules=targets)))


class ReleasedLinear(nn.Module):
    """A projection as the released repositories compute it.

    RecLoRA (factor): the pairs of all experts are summed for the sample, A(z) and B(z), in front of every use.
    iLoRA (expert): every expert's output is made, ``[B, T, K, d_out]``, then weighted and summed.
    """

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        settings = SETTINGS[kind]
        self.base, self.kind, self.k = base, kind, settings["num_experts"]
        r = settings["r"] if kind == "factor" else settings["r"] // self.k
        self.a = nn.Parameter(torch.randn(self.k, r, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(self.k, base.out_features, r))
        self.scale = 16 / r
        self.gate = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 60), nn.ReLU(), nn.Linear(60, self.k))
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(self.z).softmax(-1)  # [B, K]
        if self.kind == "factor":
            a, b = torch.einsum("bk,krd->brd", g, self.a), torch.einsum("bk,kor->bor", g, self.b)
            update = torch.einsum("bor,btr->bto", b, torch.einsum("brd,btd->btr", a, x))
        else:
            each = torch.einsum("kor,btkr->btko", self.b, torch.einsum("krd,btd->btkr", self.a, x))
            update = (each * g[:, None, :, None]).sum(dim=2)
        return self.base(x) + self.scale * update


class Released(Trained):
    """The released way: one sample per pass, gradients accumulated, logits of the whole vocabulary at every token."""

    def step(self, batch: Prompts) -> None:
        self.model.train()
        for row in range(len(batch.ids)):
            one = batch[row : row + 1]
            for module in self.model.modules():
                if isinstance(module, ReleasedLinear):
                    module.z = one.z
            logits = self.model(input_ids=one.ids).logits.float()
            labels = torch.full_like(one.ids, -100)
            labels[0, -1] = 1
            (F.cross_entropy(logits[0], labels[0], ignore_index=-100) / len(batch.ids)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def released(model: nn.Module, kind: str) -> Released:
    """The stand-in for the released training code of RecLoRA or iLoRA."""
    torch.manual_seed(0)
    targets = tuple(SETTINGS[kind].get("target_modules", ["q_proj", "v_proj"]))
    device = next(model.parameters()).device
    for name, module in list(model.named_modules()):
        if name.endswith(targets) and isinstance(module, nn.Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ReleasedLinear(module, kind).to(device))
    return Released(model)
