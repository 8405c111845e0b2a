import csv
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import dist_util, logger


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    for variables in dist_util.LAUNCHERS.values():
        for name in variables:
            monkeypatch.delenv(name, raising=False)


def dump(**values):
    logger.logkvs(values)
    return logger.dumpkvs()


def cells(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


# -------------------------------------------------------------------------------------------------------------- files


def test_s08_50_csv_grows_columns(tmp_path):
    logger.configure(tmp_path, ["csv"])
    dump(step=1, loss=0.5)
    dump(step=2, zeta=3, beta=4.25)
    dump(beta=1)
    assert (tmp_path / "progress.csv").read_text() == "loss,step,beta,zeta\n0.5,1,,\n,2,4.25,3\n,,1,\n"


def test_csv_of_an_earlier_run_is_continued(tmp_path):
    for start in (0, 2):
        logger.configure(tmp_path, ["csv"])
        dump(step=start, loss=1.5)
        dump(step=start + 1, **{"loss": 2.5} if start == 0 else {"acc": 0.25})
    assert cells(tmp_path / "progress.csv") == [
        ["loss", "step", "acc"],
        ["1.5", "0", ""],
        ["2.5", "1", ""],
        ["1.5", "2", ""],
        ["", "3", "0.25"],
    ]
    assert sorted(os.listdir(tmp_path)) == ["progress.csv"]


def test_the_unfinished_last_row_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "progress.csv").write_text("loss,step\n0.5,1\n0.25,1")  # the step was 1000
    (tmp_path / "progress.json").write_text('{"step": 1}\n{"ste')
    logger.configure(tmp_path, ["csv", "json"])
    dump(step=2, loss=0.125)
    assert (tmp_path / "progress.csv").read_text() == "loss,step\n0.5,1\n0.125,2\n"
    assert (tmp_path / "progress.json").read_text() == '{"step": 1}\n{"loss": 0.125, "step": 2}\n'


def test_csv_quotes_text(tmp_path):
    logger.configure(tmp_path, ["csv"])
    dump(note='a, "b"', step=1)
    dump(extra=1, step=2)
    assert cells(tmp_path / "progress.csv") == [["note", "step", "extra"], ['a, "b"', "1", ""], ["", "2", "1"]]


def test_json_is_one_object_a_line_and_appended(tmp_path):
    for step in (1, 2):
        logger.configure(tmp_path, ["json"])
        dump(step=step, loss=np.float32(0.5), ema=torch.tensor(0.25), name="x")
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert rows == [{"step": step, "loss": 0.5, "ema": 0.25, "name": "x"} for step in (1, 2)]


def test_the_human_table(tmp_path):
    logger.configure(tmp_path, ["log"])
    long = "x" * 31
    dump(step=1234567, alpha=0.123456, Beta=torch.tensor(2.0), **{long: "y" * 30}, note="z" * 31)
    table = f"""\
Logging to {tmp_path}
{"-" * 67}
| alpha                          | 0.123                          |
| Beta                           | 2                              |
| note                           | {"z" * 27}... |
| step                           | 1.23e+06                       |
| {"x" * 27}... | {"y" * 30} |
{"-" * 67}
"""
    assert (tmp_path / "log.txt").read_text() == table
    logger.configure(tmp_path, ["log"])
    logger.log("again", 3)
    assert (tmp_path / "log.txt").read_text() == f"{table}Logging to {tmp_path}\nagain 3\n"


def test_tensorboard(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, *args):
            calls.append(args)

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    logger.configure(tmp_path, ["tensorboard"])
    dump(loss=0.5, note="text")
    dump(step=70, loss=torch.tensor(0.25))
    assert calls == [str(tmp_path / "tb"), ("loss", 0.5, 1), ("step", 70, 70), ("loss", 0.25, 70)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="needs the package tensorboard: pip install tensorboard"):
        logger.configure(tmp_path, ["tensorboard"])


def test_event_files_that_tensorboard_reads(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger.configure(tmp_path, ["tensorboard"])
    for step in (10, 20):
        dump(step=step, loss=1 / step)
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(tmp_path / "a.png")
    logger.logimage("samples", tmp_path / "a.png", 20)
    logger.reset()
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {each.step: each.value for each in events.Scalars("loss")} == pytest.approx({10: 0.1, 20: 0.05})
    (shown,) = events.Images("samples")
    assert (shown.step, shown.width, shown.height) == (20, 6, 4)


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("end"))

    def init(**how):
        calls.append(how)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda path: ("image", path)))
    for _ in range(2):  # a run that goes on in its folder is the same run there
        logger.configure(tmp_path / "run", ["wandb"])
        dump(step=3, loss=0.5, note="text")
        logger.logimage("samples", "a.png", 3)
        logger.reset()
    first, *rest = calls[:4]
    assert first["name"] == "run" and first["resume"] == "allow" and first["project"] == "guided-diffusion"
    assert rest == [({"step": 3, "loss": 0.5}, 3), ({"samples": ("image", "a.png")}, 3), "end"]
    assert calls[4:] == calls[:4]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs the package wandb: pip install wandb"):
        logger.configure(tmp_path, ["wandb"])


def test_json_lines_under_their_usual_name_are_rewound_too(tmp_path):
    logger.configure(tmp_path, ["jsonl"])
    for step in (1, 2, 3):
        dump(step=step)
    logger.rewind(tmp_path, 2)
    assert (tmp_path / "progress.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# ------------------------------------------------------------------------------------------------------ the interface


def test_rows(tmp_path):
    logger.configure(tmp_path, ["csv"])
    for value in (1.0, 2.0, 6.0):
        logger.logkv_mean("mean", value)
    logger.logkv("last", 1)
    logger.record_tabular("last", 2)
    assert dict(logger.getkvs()) == {"mean": 3.0, "last": 2}
    assert logger.dump_tabular() == {"mean": 3.0, "last": 2}
    assert not logger.getkvs()
    logger.logkv_mean("mean", 5.0)
    assert logger.dumpkvs() == {"mean": 5.0}
    logger.set_level(logger.DISABLED)
    dump(mean=1)
    assert cells(tmp_path / "progress.csv") == [["last", "mean"], ["2", "3.0"], ["", "5.0"]]


def test_levels(tmp_path):
    logger.configure(tmp_path, ["log"])
    logger.debug("quiet")
    logger.info("a", 1)
    logger.set_level(logger.ERROR)
    logger.warn("quiet")
    logger.error("b")
    logger.set_level(logger.DEBUG)
    logger.debug("c")
    assert (tmp_path / "log.txt").read_text().splitlines()[1:] == ["a 1", "b", "c"]
    assert [logger.DEBUG, logger.INFO, logger.WARN, logger.ERROR, logger.DISABLED] == [10, 20, 30, 40, 50]


def test_profile_adds_seconds(tmp_path, monkeypatch):
    logger.configure(tmp_path, ["csv"])
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(logger.time, "time", lambda: next(clock))

    @logger.profile("step")
    def double(x):
        return 2 * x

    assert double(4) == 8
    with pytest.raises(KeyError), logger.profile_kv("step"):
        raise KeyError
    assert logger.getkvs() == {"wait_step": 3.5}


def test_comm_averages_by_count(tmp_path):
    class Comm:
        def __init__(self, rank):
            self.rank = rank

        def gather(self, obj):
            return [obj, {"loss": (7.0, 3), "other": (1.0, 1)}] if self.rank == 0 else None

    logger.configure(tmp_path, ["csv"], comm=Comm(0))
    logger.logkv_mean("loss", 3.0)
    assert logger.dumpkvs() == {"loss": 6.0, "other": 1.0}
    logger.set_comm(Comm(1))
    assert dump(loss=1.0) == {}
    assert cells(tmp_path / "progress.csv") == [["loss", "other"], ["6.0", "1.0"]]


def test_scoped_configure_and_reset(tmp_path):
    logger.configure(tmp_path / "outer", ["log"])
    outer = logger.get_current()
    with logger.scoped_configure(tmp_path / "inner", ["log"]):
        assert logger.get_dir() == str(tmp_path / "inner")
    assert logger.get_current() is outer
    logger.Logger.DEFAULT = default = logger.Logger(None, [])
    logger.reset()
    assert logger.get_current() is default


# ------------------------------------------------------------------------------------------------ choosing the outputs


def test_s08_63_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger.log("without configure")
    folder = Path(logger.get_dir())
    assert folder.parent == tmp_path and folder.name.startswith("openai-20")
    assert f"Logging to {folder}" in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "from_env"))
    logger.configure("")
    assert logger.get_dir() == str(tmp_path / "from_env")
    assert sorted(os.listdir(tmp_path / "from_env")) == ["log.txt"]  # progress.csv comes with the first row
    logger.configure(tmp_path / "from_argument")
    assert logger.get_dir() == str(tmp_path / "from_argument")


def test_other_ranks_write_their_own_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "2")
    monkeypatch.setenv("PMI_SIZE", "4")
    logger.configure(tmp_path)
    dump(loss=1.0)
    assert os.listdir(tmp_path) == ["log-rank002.txt"] and capsys.readouterr().out == ""
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "csv")
    logger.configure(tmp_path, log_suffix="-b")
    dump(loss=1.0)
    assert sorted(os.listdir(tmp_path)) == ["log-rank002.txt", "progress-b-rank002.csv"]


def test_formats_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,csv")
    logger.configure(tmp_path)
    dump(loss=1.0)
    assert sorted(os.listdir(tmp_path)) == ["progress.csv", "progress.json"]
    with pytest.raises(ValueError, match="unknown log format 'xml'; choose from stdout, log, json, jsonl, csv, tensor"):
        logger.configure(tmp_path, ["xml"])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    no_new_files = [Path("/proc/self")] * os.path.isdir("/proc/self")
    for folder in [tmp_path / "file", tmp_path / "file" / "below", *no_new_files]:
        with pytest.raises(OSError, match=f"cannot write to the folder {folder} .*choose another") as caught:
            logger.configure(folder)
        assert "\n" not in str(caught.value)
