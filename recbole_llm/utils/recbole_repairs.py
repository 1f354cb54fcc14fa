"""Repairs of RecBole 1.2.1 for today's libraries: one function each, the reason stated.

Every repair is idempotent, is applied only where it is needed, and returns whether it changed anything.
`install` applies them all; :class:`recbole_llm.config.configurator.Config` calls it first, and so does an import of
``recbole.quick_start`` (:mod:`recbole_llm.utils.quick_start_loader`), so that importing recbole_llm has no other side
effects. Line numbers are those of the RecBole 1.2.1 wheel.

What can be repaired by subclassing is not patched here but in :mod:`recbole_llm.config.configurator`:
``CUDA_VISIBLE_DEVICES`` overwritten, the forced ``data_path`` of ml-100k, `eval` of the command line, reading
another program's ``sys.argv``, module-wide lists and yaml loaders changed by every Config.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch

logger = logging.getLogger(__name__)

RECBOLE_VERSION = "1.2.1"


class ModuleView:
    """A module under another face: the given names are replaced, all others are the module's own.

    Put in the place of a module that RecBole's code refers to, it changes a call there and nowhere else.
    """

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _wrap_method(owner: type, name: str, make: Callable[[Callable], Callable]) -> bool:
    """Replace ``owner.name`` by ``make(original)`` once; the original stays reachable as ``__wrapped__``."""
    original = owner.__dict__[name]
    if getattr(original, "recbole_llm_repair", False):
        return False
    repaired: Any = functools.wraps(original)(make(original))
    repaired.recbole_llm_repair = True
    setattr(owner, name, repaired)
    return True


def supported_versions() -> bool:
    """Refuse pandas 3, and warn where RecBole is not the version that was tested.

    pandas 3 copies on write: ``feat[field].fillna(inplace=True)`` (data/dataset/dataset.py:501, 648, 650) has
    no effect, the padding row stays NaN and becomes a huge negative index; ``Series.agg(len)``
    (dataset.py:1217) returns the length of the column. Both fail deep inside with messages that name neither.

    Raises:
        ImportError: under pandas 3 or later.
    """
    import recbole

    if int(pd.__version__.split(".")[0]) >= 3:
        raise ImportError(
            f"RecBole {RECBOLE_VERSION} does not work with pandas {pd.__version__} (it fills missing values "
            "in place, which pandas 3 no longer does). Install an earlier one:\n    pip install 'pandas<3'"
        )
    if recbole.__version__ != RECBOLE_VERSION:
        logger.warning(
            "recbole_llm was tested with RecBole %s, this is %s", RECBOLE_VERSION, recbole.__version__
        )
    return False


NUMPY_NAMES = {
    "bool": np.bool_,
    "float": np.float64,
    "float_": np.float64,
    "complex_": np.complex128,
    "str": np.str_,
    "long": np.int_,
    "unicode_": np.str_,
}


def numpy_names() -> bool:
    """Give back the aliases that RecBole uses and numpy has removed, each only if it is missing.

    ``np.float`` in evaluator/metrics.py:90, 128, 131, 190, 196, data/interaction.py:31 and
    data/dataset/dataset.py:652;
    ``np.str`` in trainer/hyper_tuning.py:386; ``np.bool`` and ``np.long`` (gone from numpy 1.24, back in 2)
    in metrics.py:287 and model/layers.py:932; ``np.float_``, ``np.complex_`` and ``np.unicode_`` (gone from
    numpy 2) in RecBole's own Config.compatibility_settings (config/configurator.py:630-635).
    """
    missing = {name: alias for name, alias in NUMPY_NAMES.items() if name not in np.__dict__}
    for name, alias in missing.items():
        setattr(np, name, alias)
    return bool(missing)


def dok_matrix_update() -> bool:
    """Give back ``dok_matrix._update``, removed from SciPy 1.13.

    LightGCN (model/general_recommender/lightgcn.py:111), NGCF, NCL, GCMC, SpectralCF, KGIN and MCCLK fill
    their adjacency matrix with it.
    """
    if hasattr(scipy.sparse.dok_matrix, "_update"):
        return False

    def _update(self, data: dict) -> None:
        self._dict.update(data)

    scipy.sparse.dok_matrix._update = _update
    return True


@contextmanager
def anomaly_detection_kept() -> Iterator[None]:
    """Put autograd's anomaly detection back to what it was before the block."""
    enabled, check_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(enabled, check_nan)


def anomaly_detection() -> bool:
    """Undo what importing any sequential model does: ``torch.autograd.set_detect_anomaly(True)`` for the
    process.

    It is a statement of model/sequential_recommender/sine.py:25, which the package's ``__init__`` imports,
    and makes training 1.5 to 2 times slower. The package is imported here once under guard, so that no later
    import runs the line again. Where it has been imported before, detection is switched off: switch it on
    after creating the Config if you want it.
    """
    package = "recbole.model.sequential_recommender"
    if f"{package}.sine" in sys.modules:
        if getattr(sys.modules[package], "_recbole_llm_anomaly_repaired", False):
            return False
        torch.autograd.set_detect_anomaly(False)
    else:
        with anomaly_detection_kept():
            importlib.import_module(package)
    vars(sys.modules[package])["_recbole_llm_anomaly_repaired"] = True
    return True


def checkpoint_loading(module: ModuleType | None = None) -> bool:
    """Let ``module`` (RecBole's trainer by default) read RecBole's own checkpoints again.

    RecBole pickles its Config and numpy numbers into a checkpoint; `torch.load` refuses that since torch 2.6,
    whose default is ``weights_only=True``. ``Trainer.evaluate`` (trainer/trainer.py:583) and
    ``resume_checkpoint`` (323) then fail, as do models that start from a pre-trained file (NeuMF, S3Rec,
    ConvNCF, ...: see `model_module`). Only the name ``torch`` inside that
    module is replaced: `torch.load` elsewhere keeps its safe default.

    Warning:
        Reading such a file runs the code pickled in it. They are local files that RecBole wrote in this or an
        earlier run; do not load one from an untrusted source. Checkpoints of the built-in models are safetensors
        files.
    """
    names = vars(module or importlib.import_module("recbole.trainer.trainer"))
    if names.get("torch") is not torch:
        return False
    names["torch"] = ModuleView(torch, load=load_recbole_checkpoint)
    return True


def model_module(module: ModuleType) -> None:
    """Apply the repairs that belong to the module of one of RecBole's models (`registry.get_model` calls this)."""
    checkpoint_loading(module)
    if module.__name__ == "recbole.model.general_recommender.pop":
        popularity_counts(module)


def model_class(model: type) -> None:
    """`model_module` for the modules of a class and of its bases, where they are RecBole's."""
    for module in _modules_of(model):
        model_module(module)


def _modules_of(model: type) -> list[ModuleType]:
    """The modules of RecBole's that define a class and its bases."""
    names = [base.__module__ for base in model.__mro__ if base.__module__.startswith("recbole.model.")]
    return [sys.modules[name] for name in names]


def popularity_counts(module: ModuleType) -> bool:
    """Let Pop count every interaction, and positive ones only.

    ``item_cnt[item] = item_cnt[item] + 1`` (general_recommender/pop.py:44) adds one to an item however often it comes
    in a batch, and sampled negatives come in the same batches: with 2,048 samples per batch popular items are alike.
    """

    def make_init(original: Callable) -> Callable:
        def __init__(self, config, dataset) -> None:
            original(self, config, dataset)
            self.LABEL = config["LABEL_FIELD"]

        return __init__

    def make(original: Callable) -> Callable:
        def calculate_loss(self, interaction) -> torch.Tensor:
            items = interaction[self.ITEM_ID]
            if self.LABEL in interaction:
                items = items[interaction[self.LABEL] > 0]
            self.item_cnt.index_add_(
                0, items, torch.ones(len(items), 1, dtype=torch.long, device=items.device)
            )
            self.max_cnt = torch.max(self.item_cnt, dim=0)[0]
            return torch.nn.Parameter(torch.zeros(1)).to(self.device)

        return calculate_loss

    changed = _wrap_method(module.Pop, "__init__", make_init)
    return _wrap_method(module.Pop, "calculate_loss", make) or changed


class _Absent(ModuleType):
    """Stands in for a package that is not installed; using anything of it raises ImportError."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__}.{name} was asked for, but ray is not installed. RecBole needs it for hyper-parameter "
            "tuning by ray only: install it with pip install 'ray[tune]', or search with recbole_llm's key `search`"
        )


def _report_to_nobody(**metrics: Any) -> None:
    """What ``tune.report`` does outside of a trial of ray: nothing."""


@contextmanager
def ray_when_used() -> Iterator[None]:
    """Inside the block ``from ray import tune`` succeeds without ray; tuning with what it gives raises ImportError.

    For the import of quick_start/quick_start.py, whose line 20 it is. Its one use of ``tune`` is that
    ``objective_function`` reports its result to a trial of ray (line 223). Without ray there is no trial, and the
    function trains, evaluates and returns its result as ever. Where ray is installed nothing changes.
    """
    if "ray" in sys.modules or importlib.util.find_spec("ray") is not None:
        yield
        return
    absent = {name: _Absent(name) for name in ("ray", "ray.tune")}
    vars(absent["ray"])["tune"] = absent["ray.tune"]
    vars(absent["ray.tune"])["report"] = _report_to_nobody
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def quick_start(module: ModuleType) -> bool:
    """Let ``run_recbole`` run without thop, and it and ``load_data_and_model`` read RecBole's own checkpoints.

    ``get_flops`` (utils/utils.py:262, called by quick_start/quick_start.py:141) imports thop, which needs distutils,
    gone from Python 3.12. ``torch.load`` (quick_start/quick_start.py:250) refuses the pickled Config since torch 2.6,
    see `checkpoint_loading`; it is imported inside the function, so the function's one call is redirected.
    Models that start from a pre-trained file (S3Rec, NeuMF, ..) read it themselves.
    `RepairedLoader` calls this for the module.
    """
    if getattr(module, "recbole_llm_repair", False):
        return False
    original_flops, original_load = module.get_flops, module.load_data_and_model
    original_model = module.get_model

    @functools.wraps(original_flops)
    def get_flops(*args: Any, **kwargs: Any) -> Any:
        missing = [name for name in ("thop", "distutils") if importlib.util.find_spec(name) is None]
        return f"unknown, {missing[0]} is not installed" if missing else original_flops(*args, **kwargs)

    @functools.wraps(original_model)
    def get_model(name: str) -> type:
        model = original_model(name)
        for part in _modules_of(model):
            checkpoint_loading(part)
        return model

    @functools.wraps(original_load)
    def load_data_and_model(model_file: str | Path) -> tuple:
        safe = torch.load

        def load_once(path: str | Path, **options: Any) -> dict:
            torch.load = safe
            return load_recbole_checkpoint(path, **options)

        torch.load = load_once
        try:
            return original_load(model_file)
        finally:
            torch.load = safe

    repaired = {"get_flops": get_flops, "load_data_and_model": load_data_and_model, "get_model": get_model}
    vars(module).update(repaired, recbole_llm_repair=True)
    return True


def load_recbole_checkpoint(path: str | Path, map_location: Any = "cpu", **kwargs: Any) -> dict:
    """Read a ``.pth`` file that RecBole's Trainer wrote: a dict with ``config``, ``state_dict``,
    ``optimizer``, ...

    Trusted local files only, see `checkpoint_loading`.
    """
    return torch.load(path, map_location=map_location, **{"weights_only": False, **kwargs})


def light_checkpoints() -> bool:
    """Keep modules out of a checkpoint's ``other_parameter``: their weights are in the state_dict already.

    DIN, DIEN, GRU4RecF, SASRecF and FDSA list their embedding layer there (e.g. din.py:104), and the layer
    holds the
    dataset: 85 MB and a pickled copy of the data for 330 thousand parameters, written at every improvement
    (model/abstract_recommender.py:67).
    """
    from recbole.model.abstract_recommender import AbstractRecommender

    def make(original: Callable) -> Callable:
        def other_parameter(self) -> dict:
            return {k: v for k, v in original(self).items() if not isinstance(v, torch.nn.Module)}

        return other_parameter

    return _wrap_method(AbstractRecommender, "other_parameter", make)


def download_barrier() -> bool:
    """Skip ``torch.distributed.barrier()`` in a single process.

    After a download RecBole calls it unconditionally (data/dataset/dataset.py:252), which fails with "Default
    process group has not been initialized": the first run on a downloaded dataset always dies, the second
    works.
    """
    module = importlib.import_module("recbole.data.dataset.dataset")
    if module.torch is not torch:
        return False

    def barrier(*args: Any, **kwargs: Any) -> Any:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.barrier(*args, **kwargs)

    vars(module)["torch"] = ModuleView(torch, distributed=ModuleView(torch.distributed, barrier=barrier))
    return True


def folders_made_together() -> bool:
    """Let several processes make the same folder at the same time.

    ensure_dir (utils/utils.py:44) looks whether it is there and then makes it. Of two processes that start together,
    runs side by side or those of torchrun, the second one dies of FileExistsError, e.g. for ``log/MODEL``.
    """
    module = importlib.import_module("recbole.utils.utils")
    if module.os is not os:
        return False
    vars(module)["os"] = ModuleView(os, makedirs=functools.partial(os.makedirs, exist_ok=True))
    return True


def download_error() -> bool:
    """Name the missing folder where RecBole cannot download a dataset, and leave no empty folder behind.

    Dataset._download (data/dataset/dataset.py:225) creates the folder first; when the network fails, the user
    sees a URLError, and the next run "File ... not exist".
    """
    from recbole.data.dataset import Dataset

    def make(original: Callable) -> Callable:
        def _download(self) -> None:
            try:
                original(self)
            except OSError as error:
                if os.path.isdir(self.dataset_path) and not os.listdir(self.dataset_path):
                    os.rmdir(self.dataset_path)
                raise FileNotFoundError(
                    f"the data folder {self.dataset_path} does not exist, and downloading "
                    f"{self.dataset_name} failed ({error}). Set data_path to the folder that holds "
                    f"{self.dataset_name}/{self.dataset_name}.inter"
                ) from error

        return _download

    return _wrap_method(Dataset, "_download", make)


def _sorts_by_time(dataset: Any) -> bool:
    """Whether RecBole will sort this dataset by time. Built-in ones are left alone: they keep exact times."""
    return (
        not type(dataset).__module__.startswith("recbole_llm.")
        and dataset.config["benchmark_filename"] is None
        and dataset.config["eval_args"]["order"] == "TO"
        and dataset.time_field in dataset.inter_feat
    )


def exact_time_order() -> bool:
    """Sort by the exact timestamps before RecBole rounds them to float32.

    `Dataset._dataframe_to_interaction` (data/dataset/dataset.py:2207) makes float32 of every float column:
    seconds since 1970 are then rounded to 64 or 128 of them, and sorting leaves a user's interactions in file
    order within such a step. On ml-100k 908 of 943 users get a wrong order (83 with ``normalize_all``).
    Rounding is monotone and RecBole's own sort is stable, so an exact stable sort of the DataFrame beforehand
    is enough for every order within a user and for datasets without augmentation. Sequential datasets are cut
    by user first; their samples are put in exact global order again, so that a split in time is exact across
    users too. Random order (RO) and given splits stay as they are.
    """
    from recbole.data.dataset import Dataset, SequentialDataset

    def make(original: Callable) -> Callable:
        def _change_feat_format(self) -> None:
            if _sorts_by_time(self):
                self.inter_feat = self.inter_feat.sort_values(
                    self.time_field, kind="stable", ignore_index=True
                )
            original(self)

        return _change_feat_format

    def make_sequential(original: Callable) -> Callable:
        def _change_feat_format(self) -> None:
            times = None
            if _sorts_by_time(self):
                by_user = self.inter_feat[[self.uid_field, self.time_field]]
                by_user = by_user.sort_values([self.uid_field, self.time_field], kind="stable")
                # Augmentation makes one row of every interaction but each user's first, in this order.
                times = by_user.loc[by_user[self.uid_field].duplicated(), self.time_field].to_numpy()
            original(self)
            if times is not None and len(times) == len(self.inter_feat):
                self.inter_feat = self.inter_feat[np.argsort(times, kind="stable")]

        return _change_feat_format

    changed = _wrap_method(Dataset, "_change_feat_format", make)
    return _wrap_method(SequentialDataset, "_change_feat_format", make_sequential) or changed


class _NoTensorBoard:
    """Takes scalars and keeps none."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def no_tensorboard() -> Iterator[None]:
    """Trainers made inside the block write no TensorBoard log.

    RecBole's Trainer opens one in the working folder without an option (trainer/trainer.py:124). A lens's training is a
    part of a run, and its scalars would mix with the run's own. Not among `REPAIRS`: it is used where it is wanted.
    """
    names = vars(importlib.import_module("recbole.trainer.trainer"))
    original = names["get_tensorboard"]
    names["get_tensorboard"] = lambda logger: _NoTensorBoard()
    try:
        yield
    finally:
        names["get_tensorboard"] = original


def quiet_warnings() -> bool:
    """Hide FutureWarning and DeprecationWarning raised by lines of RecBole, which its users cannot change.

    E.g. ``torch.cuda.amp.GradScaler`` (trainer/trainer.py:235) and chained ``fillna``
    (data/dataset/dataset.py:501), at every run. Warnings of all other modules stay.
    """
    before = list(warnings.filters)
    for category in (FutureWarning, DeprecationWarning):
        if not any(f[0] == "ignore" and f[2] is category and _matches_recbole(f[3]) for f in before):
            warnings.filterwarnings("ignore", category=category, module=r"recbole\.")
    return warnings.filters != before


def _matches_recbole(pattern: Any) -> bool:
    return getattr(pattern, "pattern", pattern) == r"recbole\."


REPAIRS: tuple[Callable[[], bool], ...] = (
    supported_versions,
    quiet_warnings,
    numpy_names,
    dok_matrix_update,
    anomaly_detection,
    checkpoint_loading,
    light_checkpoints,
    download_barrier,
    folders_made_together,
    download_error,
    exact_time_order,
)


def install() -> list[str]:
    """Apply every repair that is still needed; returns the names of those applied by this call."""
    applied = [repair.__name__ for repair in REPAIRS if repair()]
    if applied:
        logger.debug("repairs of RecBole %s applied: %s", RECBOLE_VERSION, ", ".join(applied))
    return applied
