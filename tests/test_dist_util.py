import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_programs import NET, stranger

from guided_diffusion import dist_util
from guided_diffusion.dist_util import Place, resolve

OPENMPI = os.environ.get("GD_OPENMPI_MPIEXEC")  # an mpiexec of Open MPI, beside which another may be installed
AS_ROOT = "env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for variables in dist_util.LAUNCHERS.values():
        for name in (*variables, "MASTER_ADDR", "MASTER_PORT", "GD_ARRIVAL_MINUTES", "GD_TIMEOUT_MINUTES"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist_util, "_device", None)


# ---------------------------------------------------------------------------------------------------- the environment


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place(0, 1, 0, True, None)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Place(5, 8, 1, False, "torchrun"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place(3, 4, 1, False, "Open MPI"),
        ),
        (PMI, Place(1, 2, 1, True, "MPI")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, 1, True, "MPI")),  # gforker says no more
        ({"PMI_RANK": "1"}, Place()),
        (SLURM, Place(5, 8, 1, False, "SLURM")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8"}, Place(5, 8, 1, True, "SLURM")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}, Place(5, 8, 1, False, "SLURM")),
        # A batch script, or a shell of salloc, is no rank of the tasks that the job has reserved.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Place()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Place()),
        # mpiexec inside a job; torchrun inside an MPI launch
        (PMI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Place(1, 2, 1, True, "MPI")),
        (PMI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 1, 0, True, "torchrun")),
    ],
)
def test_resolve(env, place):
    assert resolve(env) == place


def test_a_rank_takes_a_visible_gpu_by_its_place_on_the_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    choose = dist_util._choose_device
    assert [str(choose("cuda", Place(rank, 8, rank % 4))) for rank in range(6)] == [
        "cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:0", "cuda:1",
    ]
    assert str(choose(None, Place(0, 1, 1))) == "cuda:1" and str(choose("cpu", Place())) == "cpu"
    assert str(choose("cuda:2", Place())) == "cuda:2"
    with pytest.raises(ValueError, match="device 'cuda:3' is not available here; choose from cpu, cuda, cuda:0"):
        choose("cuda:3", Place())
    with pytest.raises(ValueError, match="2 ranks cannot share device 'cuda:1'; choose cuda"):
        choose("cuda:1", Place(0, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0", "gpu"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available here; choose from cpu"):
            dist_util.setup_dist(name)
    assert str(choose("", Place())) == "cpu"


def test_ranks_that_share_a_gpu_are_named():
    dist_util._refuse_shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-2")])
    with pytest.raises(ValueError, match="ranks 1 and 3 share a GPU of a: start no more processes on a node than"):
        dist_util._refuse_shared_gpus([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("a", "GPU-2")])


def test_several_nodes_need_an_address(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"8 ranks on several nodes .*export MASTER_ADDR .* and MASTER_PORT"):
        dist_util.setup_dist("cpu")


def test_an_mpi4py_without_mpi_is_none(monkeypatch, tmp_path):
    for name, value in {**PMI, "MPI_LOCALNRANKS": "1"}.items():
        monkeypatch.setenv(name, value)
    for error in ("ImportError", "RuntimeError('cannot load MPI library')"):
        (tmp_path / "mpi4py").mkdir(exist_ok=True)
        (tmp_path / "mpi4py/__init__.py").write_text("class rc: pass\n")
        (tmp_path / "mpi4py/MPI.py").write_text(f"raise {error}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("mpi4py", "mpi4py.MPI"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ValueError, match=r"2 ranks on several nodes .*export MASTER_ADDR"):
            dist_util.setup_dist("cpu")
    sys.modules.pop("mpi4py", None)


def test_ranks_that_do_not_come_end_the_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(dist_util.tempfile, "gettempdir", lambda: str(tmp_path))
    for name, value in {**PMI, "GD_ARRIVAL_MINUTES": "0.005"}.items():
        monkeypatch.setenv(name, value)
    told = rf"rank 1 waited up to 0:00:00.3\d* for 2 ranks to meet at {tmp_path}.*, without rank 0: see .* MASTER_ADDR"
    with pytest.raises(ConnectionError, match=told):
        dist_util.setup_dist("cpu")


@pytest.fixture
def address(monkeypatch):
    """Addresses as torchrun sets them: `address(rank, port)`, of two ranks that are waited for 0.3 seconds."""

    def exported(rank, port, host="127.0.0.1"):
        told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": host, "MASTER_PORT": port}
        for name, value in {**told, "GD_ARRIVAL_MINUTES": 0.005}.items():
            monkeypatch.setenv(name, str(value))

    return exported


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def said(kind=ConnectionError):
    """What `setup_dist` says when it fails, which is one line."""
    with pytest.raises(kind) as raised:
        dist_util.setup_dist("cpu")
    assert not torch.distributed.is_initialized() and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("rank", "told"), [
    (0, r"waited up to 0:00:00.3\d* for 2 ranks to meet at MASTER_ADDR 127.0.0.1, MASTER_PORT \d+, without rank 1:"),
    (1, r"MASTER_PORT \d+: rank 1 did not find rank 0 there within 0:00:00.3\d*; see what that one says"),
])  # fmt: skip
def test_a_rank_alone_at_its_address_leaves(rank, told, address):
    address(rank, free_port())
    assert re.search(told, said())


@pytest.mark.parametrize(("rank", "told"), [
    (0, "another program uses that port: export another MASTER_PORT to all ranks"),
    (1, r"rank 1 did not find rank 0 there within 0:00:00.3\d*; see what that one says \(no answer\)"),
])  # fmt: skip
def test_a_port_in_use(rank, told, address):
    """By a program that listens and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address(rank, other.getsockname()[1])
        assert re.search(told, said())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "", "a" * 70])
def test_a_host_that_nobody_knows(host, address):
    address(1, 29500, host)
    assert re.search(f"MASTER_ADDR {host}, MASTER_PORT 29500: no host of that name is known here", said(ValueError))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", ""])
def test_a_port_that_is_none(port, address):
    address(1, port)
    assert f"MASTER_PORT {port}: a port is a number from 1 to 65535" in said(ValueError)


@pytest.mark.parametrize("name", ["GD_ARRIVAL_MINUTES", "GD_TIMEOUT_MINUTES"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan"])
def test_times_that_are_none(name, value, address, monkeypatch):
    address(0, free_port())
    monkeypatch.setenv(name, value)
    assert re.match(rf"{name} is a number of minutes above 0, as \d+, not '{value}'", said(ValueError))


@pytest.mark.parametrize(("env", "told"), [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' and WORLD_SIZE is '2': the ranks of so many processes are 0 to 1"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1' and WORLD_SIZE is '2': the ranks"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is '0' and WORLD_SIZE is '0': the ranks"),
    ({"PMI_RANK": "one", "PMI_SIZE": "2"}, "PMI_RANK is 'one' and PMI_SIZE is '2': these, and MPI_LOCALRANKID"),
    ({**PMI, "MPI_LOCALRANKID": ""}, "PMI_RANK is '1' .*, and MPI_LOCALRANKID, must be whole numbers"),
])  # fmt: skip
def test_ranks_that_are_none(env, told):
    with pytest.raises(ValueError, match=told):
        resolve(env)


STUCK = """
import time
from guided_diffusion import dist_util, program

def main():
    dist_util.setup_dist("cpu")
    dist_util.barrier()
    if dist_util.rank() == 1:
        time.sleep(100)
    dist_util.largest(0)

program.run(main)
"""


def test_a_rank_that_is_stuck_ends_the_others(tmp_path):
    (tmp_path / "worker.py").write_text(STUCK)
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                        "GD_TIMEOUT_MINUTES": "0.05"}  # fmt: skip
    ranks = [subprocess.Popen([sys.executable, "worker.py"], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
                              env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]  # fmt: skip
    try:
        _, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 2 and err.count("\n") == 1
        assert err.startswith("error: rank 0 lost another process of this run, which has died or is stuck")
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# -------------------------------------------------------------------------------------------------------- one process


def test_a_single_process_needs_no_group():
    dist_util.setup_dist("cpu")
    assert not torch.distributed.is_initialized()
    assert (dist_util.rank(), dist_util.world_size(), dist_util.is_main()) == (0, 1, True)
    assert dist_util.dev() == torch.device("cpu")
    assert dist_util.gather_objects({"a": 1}) == [{"a": 1}]
    dist_util.sync_params([torch.zeros(2)])
    dist_util.barrier()
    dist_util.finish()


LEAVING = """
import atexit, sys
from guided_diffusion import dist_util

class Held:
    def __del__(self):
        sys.stdout.write("torn down")

held = Held()
atexit.register(print, "closed")
dist_util._has_met = {met}
with dist_util.leaving():
    {end}
"""


@pytest.mark.parametrize(("met", "end", "code", "told"), [
    (True, "sys.exit(75)", 75, "closed\n"), (True, "pass", 0, "closed\n"),
    (False, "sys.exit(75)", 75, "closed\ntorn down"),
])  # fmt: skip
def test_a_process_that_was_in_a_group_leaves_without_being_torn_down(met, end, code, told):
    """Threads of torch may then still run; what is registered for the exit is done."""
    code_text = LEAVING.format(met=met, end=end)
    done = subprocess.run([sys.executable, "-c", code_text], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, told), done.stderr


def test_a_single_process_touches_neither_mpi_nor_the_environment():
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from guided_diffusion import dist_util, logger, image_datasets\n"
        "dist_util.setup_dist(); dist_util.finish()\n"
        "assert 'mpi4py' not in sys.modules and os.environ == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ------------------------------------------------------------------------------------------------------ two processes

WORKER = """
import json, os, sys
import torch
from guided_diffusion import dist_util, logger

cuda = os.environ.get("CUDA_VISIBLE_DEVICES")
dist_util.setup_dist("cpu")
dist_util.setup_dist("cpu")  # a second call does nothing
rank = dist_util.rank()
params = [torch.nn.Parameter(torch.full((2, 3), float(rank + 1))), torch.full((4,), float(rank))]
dist_util.sync_params(params)
logger.configure(format_strs=["log"])
if rank == 1:  # reading is not collective
    torch.save({"w": torch.arange(3)}, "one.pt")
    assert dist_util.load_state_dict("one.pt", map_location="cpu")["w"].tolist() == [0, 1, 2]
result = {
    "place": [rank, dist_util.world_size(), dist_util.is_main(), torch.distributed.get_backend()],
    "objects": dist_util.gather_objects([rank, "x" * (rank + 1)]),
    "params": [float(param.sum()) for param in params],
    "log_dir": logger.get_dir(),
    "cuda_untouched": cuda == os.environ.get("CUDA_VISIBLE_DEVICES"),
}
dist_util.barrier()
dist_util.finish()
with open(f"result{rank}.json", "w") as file:
    json.dump(result, file)
"""


def run_two(tmp_path, *command, **extra):
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", **extra}
    env.pop("OPENAI_LOGDIR", None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        assert result["place"] == [rank, 2, rank == 0, "gloo"]
        assert result["objects"] == [[0, "x"], [1, "xx"]]
        assert result["params"] == [6.0, 0.0]
        assert result["cuda_untouched"]
    assert results[0]["log_dir"] == results[1]["log_dir"]
    assert sorted(os.listdir(results[0]["log_dir"])) == ["log-rank001.txt", "log.txt"]
    return list(tmp_path.glob("guided-diffusion-*"))


def test_two_processes_by_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run_two(tmp_path, *launcher, "worker.py") == []


@pytest.mark.skipif(not MPIEXEC, reason="needs mpiexec (the extra [mpi])")
class TestMpiexec:
    def test_two_processes(self, tmp_path):
        (meeting,) = run_two(tmp_path, MPIEXEC, "-n", "2", sys.executable, "worker.py")
        assert os.listdir(meeting) == []  # nothing stays behind

    def test_two_processes_below_wrapper_scripts(self, tmp_path):
        command = f"{sys.executable} worker.py; exit $?"  # a shell that stays: every rank has its own parent
        assert run_two(tmp_path, MPIEXEC, "-n", "2", "bash", "-c", command)

    def test_two_processes_that_meet_through_mpi(self, tmp_path):
        pytest.importorskip("mpi4py")
        as_if_on_two_nodes = ["env", "MPI_LOCALNRANKS=1", "OMPI_COMM_WORLD_LOCAL_SIZE=1"]
        assert run_two(tmp_path, MPIEXEC, "-n", "2", *as_if_on_two_nodes, sys.executable, "worker.py") == []


@pytest.mark.skipif(not OPENMPI, reason="needs GD_OPENMPI_MPIEXEC, the path of an Open MPI mpiexec")
class TestOpenMpi:
    LAUNCHER = (*AS_ROOT, OPENMPI, "-n", "2")

    def test_two_processes(self, tmp_path):
        (meeting,) = run_two(tmp_path, *self.LAUNCHER, sys.executable, "worker.py")
        assert os.listdir(meeting) == []

    def test_training(self, tmp_path):
        stranger("datasets/digits.py", "digits", tmp_path)
        words = f"--data_dir digits/train {NET} --batch_size 4 --iterations 3 --num_workers 0 --log_dir run"
        stranger("scripts/image_train.py", words, tmp_path, self.LAUNCHER)
        (start,) = json.loads((tmp_path / "run/run.json").read_text())["starts"]
        assert (start["launcher"], start["ranks"]) == ("Open MPI", 2)
        assert (tmp_path / "run/model000003.pt").exists()
