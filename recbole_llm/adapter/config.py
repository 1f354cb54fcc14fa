"""What an adapter is made of: a mixer, a gate and the sizes of both."""

from __future__ import annotations

from dataclasses import dataclass, field

MIXERS = ("identity", "expert", "factor", "output", "dense")
GATES = ("mlp60", "linear", "mlp", "cnn", "cnn_groupnorm", "token", "uniform", "random", "shuffled")


@dataclass(frozen=True)
class AdapterConfig:
    r"""Settings of ``y = W0 x + s B M(z) A x``.

    The shapes are ``A [R, d_in]`` and ``B [d_out, R]``; the scale is ``s = alpha / (R / K)``.

    ============ ======= =========================================== ===============
    mixer        R       M(z)                                        s
    ============ ======= =========================================== ===============
    ``identity`` r       I (plain LoRA; no gate)                     alpha / r
    ``expert``   r       diag(g) (x) I, K slices of r / K (iLoRA)    alpha / (r / K)
    ``output``   K r     diag(g) (x) I, i.e. sum_k g_k B_k A_k       alpha / r
    ``factor``   K r     (g g^T) (x) I, i.e. (sum g B)(sum g A)      alpha / r
    ``dense``    r       r x r matrix, I + Delta(z) (CFLoRA)         alpha / r
    ============ ======= =========================================== ===============

    Attributes:
        mixer: a row of the table.
        instance_size: width H of the instance representation ``z [B, H]``; not used by ``identity``.
        num_experts: K; not used by ``identity`` and ``dense``.
        r: rank of one expert (``factor``, ``output``) or of the whole pair (the others).
        lora_alpha: alpha.
        lora_dropout: dropout on x before A.
        target_modules: names (or name endings) of the linear layers to adapt, as in PEFT.
        gate: ``mlp60``, ``mlp``, ``linear``, ``cnn``, ``cnn_groupnorm`` and ``token`` are learned
            (:func:`~recbole_llm.adapter.gate.build_gate` has the networks). ``cnn`` normalises over the batch
            while it trains, and keeps running statistics as buffers; ``token`` is for a z that the caller
            makes of the LLM's own token embeddings, H being their width. The rest are controls: ``uniform``
            (g = 1/K, no parameters), ``random`` (a frozen, seeded random linear map of z: individual, but
            learned from nothing), ``shuffled`` (``mlp60``, fed with the z of the batch's previous row: right
            capacity, wrong person).
        gate_dropout: dropout inside ``mlp60`` (softmax gates only) and ``mlp``.
        temperature: the softmax is taken of ``logits / temperature``; not used by ``identity`` and ``dense``.
        top_k: keep the k largest gates of each row, renormalised; ``None`` keeps all.
        share_gate: one gate for all projections instead of one for each. It is evaluated once for each
            ``set_instance``, so all projections get the same mixture, in training, too.
        seed: seed of the ``random`` gate. Everything else is drawn from torch's global generator.
        layers: first and last decoder layer that is adapted, counted from 0; ``None``: all.

    Raises:
        ValueError: if a value is not possible, or two values contradict each other.
    """

    mixer: str
    instance_size: int
    num_experts: int = 1
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    gate: str = "mlp60"
    gate_dropout: float = 0.1
    temperature: float = 1.0
    top_k: int | None = None
    share_gate: bool = False
    seed: int = 0
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer is {self.mixer!r}; choose one of {', '.join(MIXERS)}")
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}; choose one of {', '.join(GATES)}")
        for name in ("instance_size", "num_experts", "r"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        for name in ("lora_dropout", "gate_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.gate == "cnn" and self.mixer != "identity" and self.instance_size < 5:
            raise ValueError(
                "gate 'cnn' halves the instance representation twice and normalises what is left, which "
                f"needs an instance_size of at least 5, got {self.instance_size}; choose gate cnn_groupnorm "
                "or linear"
            )
        modules = self.target_modules
        if (
            not isinstance(modules, (list, tuple))
            or not modules
            or not all(isinstance(m, str) for m in modules)
        ):
            raise ValueError(f"target_modules must be a non-empty list of layer names, got {modules!r}")
        layers = self.layers
        if layers is not None and not (
            isinstance(layers, (list, tuple))
            and len(layers) == 2
            and all(isinstance(number, int) and not isinstance(number, bool) for number in layers)
            and 0 <= layers[0] <= layers[1]
        ):
            raise ValueError(
                f"layers (lora_layers) must be the first and the last adapted layer, e.g. [10, 29], got {layers!r}"
            )
        if self.mixer == "expert" and self.r % self.num_experts:
            raise ValueError(
                f"mixer 'expert' cuts r into num_experts equal slices, but r={self.r} is not divisible by "
                f"num_experts={self.num_experts}"
            )
        if self.top_k is not None:
            if self.mixer in ("identity", "dense") or self.gate == "uniform":
                raise ValueError(
                    f"top_k has no meaning with mixer {self.mixer!r} and gate {self.gate!r}; leave it out"
                )
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise ValueError(f"top_k must be a whole number or None, got {self.top_k!r}")
            if not 1 <= self.top_k <= self.num_experts:
                raise ValueError(
                    f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k!r}"
                )

    @property
    def experts(self) -> int:
        """K; 1 for the mixers without experts."""
        return 1 if self.mixer in ("identity", "dense") else self.num_experts

    @property
    def rank(self) -> int:
        """R, the rank of the stacked pair."""
        return self.r * self.experts if self.mixer in ("factor", "output") else self.r

    @property
    def scale(self) -> float:
        """s = alpha / (R / K)."""
        return self.lora_alpha * self.experts / self.rank
