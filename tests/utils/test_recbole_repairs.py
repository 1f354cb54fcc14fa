"""Every repair of RecBole: what fails without it, that it works with it, and that it can be applied twice."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recbole.trainer.trainer as trainer_module
import scipy.sparse
import torch
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.evaluator.metrics import MRR
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer

import recbole_llm
from recbole_llm.config.configurator import Config
from recbole_llm.utils import recbole_repairs

dataset_module = importlib.import_module("recbole.data.dataset.dataset")

SMALL = {"epochs": 1, "show_progress": False, "train_batch_size": 256, "load_col": None, "device": "cpu"}


def small_config(model: str, data_path: Path, **keys) -> Config:
    return Config(model, "small", config_dict={**SMALL, "data_path": str(data_path), **keys})


def prepare(config: Config):
    """The three loaders, the model and the trainer, as RecBole's quick start builds them."""
    loaders = data_preparation(config, create_dataset(config))
    model = config.model_class(config, loaders[0]._dataset)
    return (*loaders, model, Trainer(config, model))


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_twice_changes_nothing_the_second_time():
    recbole_repairs.install()
    assert recbole_repairs.install() == []


def test_numpy_names(monkeypatch):
    recbole_repairs.numpy_names()
    for name in recbole_repairs.NUMPY_NAMES:
        monkeypatch.delattr(np, name)
    hits = np.array([[False, True, True]])
    with pytest.raises(AttributeError, match="float"):
        MRR.metric_info(None, hits)
    assert recbole_repairs.numpy_names() is True
    assert MRR.metric_info(None, hits).tolist() == [[0.0, 0.5, 0.5]]
    assert recbole_repairs.numpy_names() is False


def test_numpy_names_that_exist_stay(monkeypatch):
    marker = type("marker", (), {})
    monkeypatch.setattr(np, "float", marker, raising=False)
    recbole_repairs.numpy_names()
    assert np.float is marker


def test_recbole_s_own_config_works_with_numpy_names(monkeypatch):
    from recbole.config import Config as RecBoleConfig

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # RecBole's own Config overwrites it
    recbole_repairs.numpy_names()
    assert RecBoleConfig("BPR", "ml-100k")["learning_rate"] == 0.001
    monkeypatch.delattr(np, "float_")
    with pytest.raises(AttributeError, match="float_"):
        RecBoleConfig("BPR", "ml-100k")


def test_dok_matrix_update(monkeypatch, atomic_data, tmp_cwd):
    config = small_config("LightGCN", atomic_data)
    train_data = data_preparation(config, create_dataset(config))[0]
    monkeypatch.delattr(scipy.sparse.dok_matrix, "_update")
    if hasattr(scipy.sparse.dok_matrix, "_update"):
        pytest.skip("this SciPy still has dok_matrix._update")
    with pytest.raises(AttributeError, match="_update"):
        config.model_class(config, train_data._dataset)
    assert recbole_repairs.dok_matrix_update() is True
    model = config.model_class(config, train_data._dataset)
    assert torch.isfinite(model.calculate_loss(next(iter(train_data))))
    assert recbole_repairs.dok_matrix_update() is False


def test_anomaly_detection():
    stock, repaired, before, kept = run_python(
        """
        import torch
        import recbole.model.sequential_recommender.sasrec
        print(torch.is_anomaly_enabled())
        from recbole_llm.utils import recbole_repairs
        recbole_repairs.anomaly_detection()
        print(torch.is_anomaly_enabled())
        torch.autograd.set_detect_anomaly(True)  # the user's own wish, after the repair
        print(recbole_repairs.anomaly_detection())
        print(torch.is_anomaly_enabled())
        """
    ).split()
    assert (stock, repaired) == ("True", "False")
    assert (before, kept) == ("False", "True")


def test_fresh_process_keeps_anomaly_state_and_imports_no_ray():
    out = run_python(
        """
        import sys
        import torch
        from recbole_llm.config.configurator import Config
        print(torch.is_anomaly_enabled())
        torch.autograd.set_detect_anomaly(True)
        Config("SASRec", "ml-100k", config_dict={"device": "cpu"})
        print(torch.is_anomaly_enabled())
        torch.autograd.set_detect_anomaly(False)
        import recbole.model.sequential_recommender.din
        print(torch.is_anomaly_enabled())
        print([name for name in sys.modules if name.split(".")[0] == "ray" or name == "recbole.quick_start"])
        """
    ).splitlines()
    assert out == ["False", "True", "False", "[]"]


def test_checkpoint_loading(monkeypatch, atomic_data, tmp_cwd):
    config = small_config("SASRec", atomic_data, n_layers=1, hidden_size=8, inner_size=8)
    train_data, valid_data, test_data, model, trainer = prepare(config)
    trainer.fit(train_data, valid_data, saved=True, show_progress=False)

    monkeypatch.setattr(trainer_module, "torch", torch)
    with pytest.raises(pickle.UnpicklingError):
        trainer.evaluate(test_data, load_best_model=True)
    with pytest.raises(pickle.UnpicklingError):
        trainer.resume_checkpoint(trainer.saved_model_file)

    assert recbole_repairs.checkpoint_loading() is True
    assert recbole_repairs.checkpoint_loading() is False
    result = trainer.evaluate(test_data, load_best_model=True)
    assert 0 <= result["recall@10"] <= 1
    trainer.resume_checkpoint(trainer.saved_model_file)
    assert trainer.start_epoch == 1
    assert recbole_repairs.load_recbole_checkpoint(trainer.saved_model_file)["config"]["model"] == "SASRec"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trainer.saved_model_file)  # everybody else's torch.load keeps its safe default


def test_light_checkpoints(monkeypatch, atomic_data, tmp_cwd):
    config = small_config("DIN", atomic_data, mlp_hidden_size=[8])
    train_data, valid_data, test_data, model, trainer = prepare(config)
    with monkeypatch.context() as stock:
        stock.setattr(AbstractRecommender, "other_parameter", AbstractRecommender.other_parameter.__wrapped__)
        assert list(model.other_parameter()) == ["embedding_layer"]  # which holds the dataset
        assert recbole_repairs.light_checkpoints() is True
    assert recbole_repairs.light_checkpoints() is False
    assert model.other_parameter() == {}
    assert any(name.startswith("embedding_layer.") for name in model.state_dict())

    trainer.fit(train_data, valid_data, saved=True, show_progress=False)
    batch = next(iter(test_data))[0]
    model.eval()
    scores = model.predict(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer.evaluate(test_data, load_best_model=True)
    assert torch.equal(model.predict(batch), scores)


def test_other_parameters_that_are_no_modules_stay(monkeypatch):
    model = AbstractRecommender()
    model.table, model.layer = torch.ones(2), torch.nn.Linear(1, 1)
    model.other_parameter_name = ["table", "layer"]
    recbole_repairs.light_checkpoints()
    assert list(model.other_parameter()) == ["table"]


@pytest.fixture
def downloadable(atomic_data, monkeypatch):
    """A dataset that RecBole 'downloads' from a file, and a configuration with a data_path that lacks it."""
    archive = atomic_data / "small.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (atomic_data / "small").iterdir():
            file.write(path, path.name)
    monkeypatch.setattr(Dataset, "_get_download_url", lambda self, *a, **k: archive.as_uri())
    return small_config("BPR", atomic_data / "empty"), archive


def test_download_barrier(monkeypatch, downloadable, tmp_cwd):
    config, _ = downloadable
    with monkeypatch.context() as stock:
        stock.setattr(dataset_module, "torch", torch)
        with pytest.raises(ValueError, match="process group"):
            create_dataset(config)
        for path in Path(config["data_path"]).iterdir():
            path.unlink()
        Path(config["data_path"]).rmdir()
        assert recbole_repairs.download_barrier() is True
        assert recbole_repairs.download_barrier() is False
        assert len(create_dataset(config)) == 180


def test_folders_made_together(monkeypatch, tmp_path):
    """The other process makes the folder between a look and its making: as if the look had not seen it."""
    utils = importlib.import_module("recbole.utils.utils")
    with monkeypatch.context() as stock:
        stock.setattr(utils, "os", os)
        stock.setattr(os.path, "exists", lambda path: False)
        with pytest.raises(FileExistsError):
            utils.ensure_dir(str(tmp_path))
        assert recbole_repairs.folders_made_together() is True
        assert recbole_repairs.folders_made_together() is False
        utils.ensure_dir(str(tmp_path))


def test_download_error(downloadable, monkeypatch, tmp_cwd):
    config, archive = downloadable
    archive.unlink()
    with monkeypatch.context() as stock:
        stock.setattr(Dataset, "_download", Dataset._download.__wrapped__)
        with pytest.raises(OSError) as raised:
            create_dataset(config)
        assert not isinstance(raised.value, FileNotFoundError) and "data_path" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="data_path .*small/small.inter"):
        create_dataset(config)
    assert not Path(config["data_path"]).exists()


def users_in_wrong_order(config: Config, exact: dict[str, list[str]]) -> int:
    """Users whose interactions RecBole does not bring into the exact order (ties in file order).

    The order is that of the first step of RecBole's augmentation: histories and targets are cut from it.
    """
    dataset = create_dataset(config)
    dataset._change_feat_format()
    feat = dataset.inter_feat
    items = pd.Series(dataset.id2token("item_id", feat["item_id"].numpy()))
    by_user = items.groupby(dataset.id2token("user_id", feat["user_id"].numpy())).agg(list)
    assert set(by_user.index) == set(exact)
    return sum(by_user[user] != exact[user] for user in exact)


def stock_order(monkeypatch) -> None:
    for owner in (Dataset, SequentialDataset):
        monkeypatch.setattr(owner, "_change_feat_format", owner._change_feat_format.__wrapped__)


@pytest.mark.parametrize(("normalize", "stock_wrong"), [(False, 908), (True, 83)])
def test_exact_time_order_of_ml_100k(monkeypatch, tmp_cwd, normalize, stock_wrong):
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    config = Config("SASRec", "ml-100k", config_dict={"normalize_all": normalize, "load_col": columns})
    names = ["user_id", "item_id", "rating", "timestamp"]
    raw = pd.read_csv(Path(config["data_path"]) / "ml-100k.inter", sep="\t", dtype=str, header=0, names=names)
    raw = raw.astype({"timestamp": float}).sort_values("timestamp", kind="stable")
    exact = raw.groupby("user_id")["item_id"].agg(list).to_dict()
    monkeypatch.setattr(
        SequentialDataset, "data_augmentation", lambda self: self.sort(by=[self.uid_field, self.time_field])
    )
    with monkeypatch.context() as stock:
        stock_order(stock)
        assert users_in_wrong_order(config, exact) == stock_wrong
        assert recbole_repairs.exact_time_order() is True
        assert recbole_repairs.exact_time_order() is False
        assert users_in_wrong_order(config, exact) == 0


def exact_times(dataset, split) -> list[int]:
    """The real times of a split's rows, from the file (user and item name a row of the small dataset)."""
    lines = Path(dataset.config["data_path"], "small.inter").read_text().splitlines()[1:]
    times = {tuple(line.split("\t")[:2]): int(line.split("\t")[3]) for line in lines}
    feat = split.inter_feat
    users = dataset.id2token("user_id", feat["user_id"].numpy())
    items = dataset.id2token("item_id", feat["item_id"].numpy())
    return [times[pair] for pair in zip(users, items, strict=True)]


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_exact_time_order_of_a_global_split(monkeypatch, atomic_data, tmp_cwd, model):
    split = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": None, "mode": "full"}
    config = small_config(model, atomic_data, eval_args=split, repeatable=True)

    def leaks() -> bool:
        dataset = create_dataset(config)
        times = [time for part in dataset.build() for time in exact_times(dataset, part)]
        return times != sorted(times)

    assert not leaks()
    stock_order(monkeypatch)
    assert leaks()


def test_random_order_is_recbole_s_own(monkeypatch, atomic_data, tmp_cwd):
    """Where RecBole shuffles, its seeded split must stay the one that others get."""
    config = small_config("BPR", atomic_data)

    def train_items() -> list[int]:
        torch.manual_seed(0)
        return create_dataset(config).build()[0].inter_feat["item_id"].tolist()

    ours = train_items()
    stock_order(monkeypatch)
    assert ours == train_items()


def test_quiet_warnings(atomic_data, tmp_cwd):
    config = small_config("DIN", atomic_data, mlp_hidden_size=[8])

    def from_recbole() -> list:
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.simplefilter("always")
            if quiet:
                recbole_repairs.quiet_warnings()
                count = len(warnings.filters)
                assert recbole_repairs.quiet_warnings() is False
                assert len(warnings.filters) == count
            train_data, valid_data, *_, trainer = prepare(config)
            trainer.fit(train_data, valid_data, saved=False, show_progress=False)
            warnings.warn("ours", FutureWarning, stacklevel=1)
        assert any(str(w.message) == "ours" for w in caught)
        kinds = (FutureWarning, DeprecationWarning)
        return [
            w for w in caught if issubclass(w.category, kinds) and "recbole/" in w.filename.replace("\\", "/")
        ]

    quiet = False
    assert from_recbole()
    quiet = True
    assert from_recbole() == []


def test_pandas_3_is_refused(monkeypatch):
    monkeypatch.setattr(pd, "__version__", "3.0.1")
    with pytest.raises(ImportError, match="pip install 'pandas<3'"):
        Config("BPR", "ml-100k")


def test_another_recbole_is_warned_about(monkeypatch, caplog):
    import recbole

    monkeypatch.setattr(recbole, "__version__", "1.3.0")
    recbole_repairs.supported_versions()
    assert "tested with RecBole 1.2.1, this is 1.3.0" in caplog.text


def test_recbole_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "recbole", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps recbole==1\.2\.1\n.*ray<=2\.6\.3"):
        importlib.reload(recbole_llm)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (Dataset, ["_change_feat_format", "_download", "_get_download_url", "_dataframe_to_interaction"]),
        (SequentialDataset, ["_change_feat_format", "data_augmentation"]),
        (AbstractRecommender, ["other_parameter", "load_other_parameter"]),
        (Trainer, ["evaluate", "resume_checkpoint", "_save_checkpoint"]),
    ],
)
def test_recbole_still_has_what_is_repaired(owner, names):
    for name in names:
        assert name in owner.__dict__


def test_no_tensorboard_writes_nothing_and_gives_the_writer_back(tmp_cwd):
    from recbole.trainer import trainer as module

    original = module.get_tensorboard
    with recbole_repairs.no_tensorboard():
        writer = module.get_tensorboard(logging.getLogger())
        writer.add_scalar("loss", 1.0, 0)
        writer.add_hparams({}, {})
    assert module.get_tensorboard is original
    assert not list(tmp_cwd.iterdir())


def test_popularity_counts_every_interaction_and_no_negative():
    """Stock Pop adds one to an item however often it comes in a batch, and counts sampled negatives."""
    module = importlib.import_module("recbole.model.general_recommender.pop")
    recbole_repairs.popularity_counts(module)
    assert not recbole_repairs.popularity_counts(module)  # once is enough
    model = module.Pop.__new__(module.Pop)
    torch.nn.Module.__init__(model)
    model.ITEM_ID, model.LABEL, model.device = "item_id", "label", "cpu"
    model.item_cnt, model.max_cnt = torch.zeros(5, 1, dtype=torch.long), None
    items = torch.tensor([1, 1, 1, 2, 3, 4])
    batch = Interaction({"item_id": items, "label": torch.tensor([1.0, 1, 1, 1, 0, 0])})
    model.calculate_loss(batch)
    model.calculate_loss(batch)
    assert model.item_cnt.flatten().tolist() == [0, 6, 2, 0, 0] and int(model.max_cnt) == 6
