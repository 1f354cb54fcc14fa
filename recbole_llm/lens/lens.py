"""The frozen lens, and how it is written to disk and read back."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import torch
from recbole.data.interaction import Interaction
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from recbole_llm.lens.next_item import NextItemSequence
from recbole_llm.lens.settings import build_model, lens_settings, lens_task
from recbole_llm.utils.files import DAMAGED, write_atomically
from recbole_llm.utils.random_state import random_state_kept

FORMAT = 1
TENSORS, DESCRIPTION = "lens.safetensors", "lens.json"


class LensError(ValueError):
    """A saved lens cannot be used here; the message names the file and what is wrong with it."""


class Lens(nn.Module):
    """A trained model of RecBole, frozen: no gradients, no dropout, no autocast, whatever is done around it.

    Only a :meth:`tunable` copy has gradients.

    Args:
        model: a lens model (:class:`LensDIN`, :class:`LensSASRec`, :class:`NextItemSequence`, ...).
        name: its name in the configuration.
        gate_scope: ``user_item`` if the state depends on the target, ``user`` if it does not.
        identity: hash of everything that determined the weights.
        info: how it was trained: seconds, epochs, validation metrics, numbers of samples.

    Attributes:
        width: size of the state.
        tuned: whether the parameters are to be trained further.
    """

    def __init__(self, model: nn.Module, *, name: str, gate_scope: str, identity: str, info: dict) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.model.zero_grad()  # what its last training step left
        self.name = name
        self.gate_scope = gate_scope
        self.identity = identity
        self.info = info
        self._output = gate_scope if gate_scope in model.widths else "user"
        self.width: int = model.widths[self._output]
        self.tuned = False
        self.training = False

    def tunable(self) -> Lens:
        """A copy whose parameters an optimizer can change; this lens stays as it is. Still without dropout."""
        other = copy.deepcopy(self)
        other.model.requires_grad_(True)
        other.tuned = True
        return other

    def train(self, mode: bool = True) -> Lens:
        """Does nothing: a lens stays in evaluation mode while the model around it trains.

        In the released code of RecLoRA the conventional model's dropout was active while the LLM was tuned.
        """
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def represent(self, interaction: Interaction) -> tuple[Tensor, Tensor]:
        """What the lens makes of each sample; with gradients only where it is :attr:`tuned` and they are on.

        Args:
            interaction: a joined batch of ``B`` samples, on any device.

        Returns:
            The state ``[B, width]`` and the logit of a positive label ``[B]`` (next-item task: the score of the
            sample's item, its logit among all items), float32, on the lens's device.
        """
        device = self.device
        gradients = torch.set_grad_enabled(self.tuned and torch.is_grad_enabled())
        with gradients, torch.autocast(device.type, enabled=False):
            state, logit = self.model.represent(interaction.to(device), self._output)
        return state.float(), logit.float()

    forward = represent

    def probability(self, interaction: Interaction) -> Tensor:
        """What the lens itself predicts for each sample of labelled data, ``[B]`` float64, on its device."""
        return torch.sigmoid(self.represent(interaction)[1].double())

    @torch.no_grad()
    def score_items(self, interaction: Interaction) -> Tensor:
        """How well every item would follow each sample's history, in the next-item task.

        Args:
            interaction: a joined batch of ``B`` samples, on any device; their own items are not looked at.

        Returns:
            ``[B, n_items]`` float32, on the lens's device; column 0, the padding item, is -inf. Items of the
            history keep their scores, as in RecBole's full ranking of sequential models.

        Raises:
            LensError: if the lens was trained on labels.
        """
        if not isinstance(self.model, NextItemSequence):
            raise LensError(
                f"the lens {self.name} was trained on labels, so it ranks no items; set task: next_item"
            )
        device = self.device
        with torch.autocast(device.type, enabled=False):
            return self.model.score_items(interaction.to(device)).float()

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """The lens's vector of every item, ``[n_items, d]`` float32; row 0 is the padding item."""
        return self.model.item_vectors().float()

    def save(self, folder: Path) -> None:
        """Write ``lens.safetensors`` and ``lens.json`` into ``folder``, each atomically, the json last."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict()
        content = save_tensors(
            {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
        )
        description = {
            "format": FORMAT,
            "name": self.name,
            "identity": self.identity,
            "gate_scope": self.gate_scope,
            "info": self.info,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        description["own sha256"] = _own_hash(description)
        write_atomically(folder / TENSORS, lambda file: file.write(content))
        text = json.dumps(description, indent=2) + "\n"
        write_atomically(folder / DESCRIPTION, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: Path, config, dataset, *, gate_scope: str | None = None) -> Lens:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder given to :meth:`save`.
            config: the run's configuration; its ``task``, ``lens``, ``lens_config`` and ``lens_ratings`` must
                be those that the lens was trained with.
            dataset: the training samples (sizes of the vocabularies, fields of users and items).
            gate_scope: read another state than the one saved with (a DIN has two).

        Raises:
            LensError: if a file is missing or damaged, or does not fit the configuration or the data.
        """
        description, tensors = _read(folder)
        if description["name"] != config["lens"]:
            found = description["name"]
            raise LensError(
                f"{folder / DESCRIPTION} is a {found}, the configuration has lens: {config['lens']}"
            )
        task = description["info"].get("task", "ctr")
        if task != lens_task(config):
            raise LensError(
                f"{folder / DESCRIPTION} is a lens of the task {task}, the configuration has task: {config['task']}"
            )
        with random_state_kept(0):
            model = build_model(lens_settings(config, dataset), dataset)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if expected != found:
            name = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise LensError(
                f"{folder / TENSORS} does not fit this configuration and dataset: {name} has shape "
                f"{found.get(name, 'none')}, expected {expected.get(name, 'none')}"
            )
        model.load_state_dict(tensors)
        return cls(
            model,
            name=description["name"],
            gate_scope=gate_scope or description["gate_scope"],
            identity=description["identity"],
            info=description["info"],
        ).to(config["device"])


def _own_hash(description: dict) -> str:
    """Hash of a description, which earlier versions have not kept."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise LensError(f"{path} has format {description['format']}, this version reads format {FORMAT}")
        missing = {"name", "identity", "gate_scope", "info", "sha256"} - description.keys()
        if missing:
            raise LensError(f"{path} is damaged: it has no {', '.join(sorted(missing))}")
        if description.pop("own sha256", None) not in (None, _own_hash(description)):
            raise LensError(f"{path} is damaged: its content has not the SHA-256 that it was saved with")
        path = folder / TENSORS
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != description["sha256"]:
            raise LensError(f"{path} is damaged: its SHA-256 is not the one in {DESCRIPTION}")
        return description, load_tensors(content)
    except FileNotFoundError as error:
        raise LensError(f"no lens at {folder}: {path} is missing") from error
    except LensError:
        raise
    except (SafetensorError, *DAMAGED) as error:
        raise LensError(f"{path} is damaged: {error}") from error
