import csv
import sys

import pytest
import yaml

import sltt
from sltt.commands import main
from tests.commands.tiny import edit
from tests.training.blobs import stop_at, train


def logger(folder):
    from lightning_fabric.loggers import CSVLogger

    return CSVLogger(folder, name="logs")


def logged(folder):
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [(int(row["epoch"]), float(row["validation_accuracy"])) for row in csv.DictReader(file)]


def expected(result):
    return [(row["epoch"], row["validation_accuracy"]) for row in result.history]


def test_a_logger_gets_every_epoch_once(tmp_path):
    _, result = train(tmp_path / "run", loggers=[logger(tmp_path)])
    assert logged(tmp_path) == expected(result)


def test_fabrics_tensorboard_logger_gets_every_epoch_once(tmp_path):
    from lightning_fabric.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result = train(tmp_path / "run", loggers=[TensorBoardLogger(tmp_path, name="logs", version="1")], epochs=2)
    events = EventAccumulator(str(tmp_path / "logs" / "1")).Reload()
    values = [(event.step, event.value) for event in events.Scalars("validation_accuracy")]
    assert values == [(epoch, pytest.approx(accuracy)) for epoch, accuracy in expected(result)]


def test_the_log_of_a_resumed_run_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", rule=stop_at(10), loggers=[logger(tmp_path)])
    assert len(logged(tmp_path)) == 2
    from lightning_fabric.loggers import CSVLogger

    again = CSVLogger(tmp_path, name="logs", version=0)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        _, result = train(tmp_path / "run", rule=sltt.SLTT(k=2), loggers=[again], resume=True)
    assert logged(tmp_path) == expected(result)


def test_a_logger_hears_the_settings_and_how_the_training_ended(tmp_path):
    class Heard:  # any class with these methods is a logger
        def __init__(self):
            self.heard = []

        def log_hyperparams(self, params):
            self.heard.append(params["steps"])

        def log_metrics(self, metrics, step):
            assert None not in metrics.values()
            self.heard.append(step)

        def save(self):
            pass

        def finalize(self, status):
            self.heard.append(status)

    found = Heard()
    train(tmp_path / "run", loggers=[found], epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "part", rule=stop_at(6), loggers=[found], epochs=2)
    assert found.heard == [4, 1, 2, "success", 4, 1, "failed"]


def test_the_command_line_names_callbacks_and_loggers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    words = ["train", "digits", "--model.width", "2", "--steps", "1", "--batch_size", "512", "--device", "cpu"]
    callback = ["--callbacks+=EarlyStopping", "--callbacks.patience", "1", "--optimizer.lr", "0"]
    csv_logger = ["--loggers+=lightning_fabric.loggers.CSVLogger", "--loggers.root_dir", ".", "--loggers.name", "logs"]
    assert main([*words, *callback, *csv_logger, "--epochs", "9", "--ema", "0.5", "--run", "run"]) == 0
    out = capsys.readouterr().out
    assert "stopped after epoch 2: no better validation accuracy in 1 epochs" in out
    assert len(logged(tmp_path)) == 2
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["callbacks"][0]["init_args"] == {"patience": 1, "by": "metric", "least": 0.0}
    edit(tmp_path / "run", loggers=[{"class_path": "not_here.Logger"}])  # made where its package is installed
    assert main(["train", "--resume", "run"]) == 1
    assert "name not_here, which is neither of sltt and" in capsys.readouterr().err
    assert main(["eval", "run"]) == 0
    assert main(["train", "--resume", "run", "--loggers", "null"]) == 0
    assert main([*words, "--callbacks+=EarlyStoping"]) == 2
    assert "EarlyStopping" in capsys.readouterr().err
    assert not {"wandb", "mlflow", "lightning.pytorch"} & (sys.modules.keys() - before)
