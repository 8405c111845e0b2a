import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from guided_diffusion import dist_util
from guided_diffusion.dist_util import Place, resolve

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for variables in dist_util.LAUNCHERS.values():
        for name in (*variables, "MASTER_ADDR", "MASTER_PORT"):
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


def test_several_nodes_need_an_address(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"8 ranks on several nodes .*export MASTER_ADDR .* and MASTER_PORT"):
        dist_util.setup_dist("cpu")


def test_ranks_that_do_not_come_end_the_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(dist_util.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(dist_util, "ARRIVAL_TIMEOUT", dist_util.timedelta(seconds=0.2))
    for name, value in PMI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"the 2 ranks did not meet at .* within 0:00:00.2.*; export MASTER_ADDR"):
        dist_util.setup_dist("cpu")


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
