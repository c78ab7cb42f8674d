import copy
import json
import os
import socket
import sys

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_manifold_mixup.evaluation import (
    AttackCallback,
    CalibrationCallback,
    DeformationCallback,
    RepresentationCallback,
)
from lightning_manifold_mixup.evaluation.report import scalars
from tests.evaluation.classifier import MEAN, STD, Classifier, loader, trainer

FAMILIES = ("attacks", "deformations", "calibration", "representations")


def all_callbacks(**kwargs):
    return [
        AttackCallback(["4/255"], MEAN, STD, pgd_steps=2, **kwargs),
        DeformationCallback(**kwargs),
        CalibrationCallback(lams=[0.5], **kwargs),
        RepresentationCallback(["model.3"], **kwargs),
    ]


def test_numbers_pictures_and_tensorboard_side_by_side(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    t = trainer(*all_callbacks(), logger=logger)
    t.test(Classifier(), loader(), verbose=False)
    assert {path.name for path in (tmp_path / "run/version_0").glob("test_*")} == {
        f"test_{family}.{suffix}" for family in FAMILIES for suffix in ("csv", "json", "png")
    }
    printed = capsys.readouterr().out
    assert all(f"test {family}" in printed for family in FAMILIES)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "run/version_0"), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"test_{family}" for family in FAMILIES}
    rows = json.loads((tmp_path / "run/version_0/test_attacks.json").read_text())["rows"]
    assert copy.deepcopy(t.callbacks[0]).rows == rows
    logged = events.Scalars("test_attacks/pgd_4_255_accuracy")[0].value
    assert logged == pytest.approx(rows[2]["accuracy"])


def test_other_batches_and_outputs(tmp_path):
    class Dicts(Classifier):
        def forward(self, x):
            return {"logits": super().forward(x)}

        def test_step(self, batch, batch_idx):
            pass

    def collate(samples):
        return {"image": torch.stack([x for x, _ in samples]), "label": torch.stack([y for _, y in samples])}

    class OfDict(CalibrationCallback):
        def logits(self, pl_module, images):
            return pl_module(images)["logits"]

    keys = {"input_key": "image", "target_key": "label", "dirname": str(tmp_path)}
    trainer(OfDict(**keys)).test(Dicts(), loader(collate_fn=collate), verbose=False)
    assert (tmp_path / "test_calibration.csv").exists()
    with pytest.raises(TypeError, match=r"Dicts.forward\(images\)` to give logits .*got dict: override"):
        trainer(CalibrationCallback(**keys)).test(Dicts(), loader(collate_fn=collate), verbose=False)
    trainer(OfDict(dirname=str(tmp_path / "found"))).test(Dicts(), loader(collate_fn=collate), verbose=False)
    assert (tmp_path / "found" / "test_calibration.csv").read_text() == (tmp_path / "test_calibration.csv").read_text()
    nested = OfDict(input_key="labelled.0", target_key="labelled.1", dirname=str(tmp_path / "nested"))
    trainer(nested).test(Dicts(), loader(collate_fn=lambda s: {"labelled": list(collate(s).values())}), verbose=False)
    assert (tmp_path / "nested" / "test_calibration.csv").read_text() == (tmp_path / "test_calibration.csv").read_text()
    with pytest.raises(ValueError, match=r"`target_key='labels'` is not in the batch: .* Did you mean label"):
        trainer(CalibrationCallback(target_key="labels")).test(Dicts(), loader(collate_fn=collate), verbose=False)


def test_fast_dev_run_leaves_nothing_behind(tmp_path):
    callbacks = all_callbacks(dirname=str(tmp_path / "out"))
    trainer(*callbacks, fast_dev_run=True).test(Classifier(), loader(), verbose=False)
    assert not (tmp_path / "out").exists()


def test_first_of_several_dataloaders_is_evaluated(tmp_path):
    class Two(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx):
            pass

    for name, loaders in {"one": loader(), "two": [loader(), loader(16)]}.items():
        model = Classifier() if name == "one" else Two()
        trainer(DeformationCallback(dirname=str(tmp_path / name))).test(model, loaders, verbose=False)
    one, two = ((tmp_path / name / "test_deformations.csv").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, which renames things
def test_arguments_go_through_yaml():
    """What is printed can be read, and the callbacks that come out have the arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    text = """
    callbacks:
    - class_path: lightning_manifold_mixup.evaluation.AttackCallback
      init_args: {epsilons: [0.01, 8/255], mean: [0.4, 0.5, 0.6], std: 0.25}
    - class_path: lightning_manifold_mixup.evaluation.DeformationCallback
      init_args: {seed: 3, input_key: image}
    - class_path: lightning_manifold_mixup.evaluation.CalibrationCallback
    - class_path: lightning_manifold_mixup.evaluation.RepresentationCallback
      init_args: {layers: [model.3]}
    """
    for _ in range(2):
        config = parser.parse_string(text)
        text = parser.dump(config)
    attack, deformation, calibration, representation = parser.instantiate_classes(config).callbacks
    assert attack.epsilons == pytest.approx([0.01, 8 / 255])
    assert (list(attack.mean), attack.std) == ([0.4, 0.5, 0.6], 0.25)
    assert (deformation.seed, deformation.input_key, deformation.target_key) == (3, "image", None)
    assert calibration.lams == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert representation.layers == ["model.3"]


def evaluate(dirname, devices=1):
    callbacks = [
        AttackCallback(["4/255"], MEAN, STD, pgd_steps=0, dirname=dirname),
        CalibrationCallback(lams=[], dirname=dirname),
        RepresentationCallback(["model.3"], dirname=dirname),
    ]
    t = trainer(*callbacks, devices=devices, strategy="ddp" if devices > 1 else "auto")
    t.test(Classifier(), loader(batch_size=8), verbose=False)


def _rank(rank, port, dirname):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    evaluate(dirname, devices=2)


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path):
    """Metrics are reduced over ranks: what is not random is the same, though each rank sees half of the data."""
    evaluate(str(tmp_path / "1"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path / "2")), nprocs=2)
    for family, rows in {"attacks": slice(None), "calibration": slice(1), "representations": slice(None)}.items():
        one, two = (json.loads((tmp_path / n / f"test_{family}.json").read_text())["rows"][rows] for n in ("1", "2"))
        assert scalars(two) == pytest.approx(scalars(one), rel=1e-5)


def test_missing_extra_is_said_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-manifold-mixup\[cli\]"'):
        trainer(CalibrationCallback()).test(Classifier(), loader(), verbose=False)


def test_is_a_callback_of_lightning():
    assert all(isinstance(callback, L.Callback) for callback in all_callbacks())
