"""A run's capsule told and run again to the same end; averages of any width put together from a run's snapshots."""

import json
import shutil

import pytest
import torch as th
from test_programs import MPIEXEC, NET, done, refused, same, samples, stranger

from guided_diffusion import checkpoint, runs

POWERS = "--ema_rate 0.9 --ema_power 0.05,0.1"
STEPS = 20


def words(data, log_dir, more=""):
    return (f"--data_dir {data} {NET} --num_workers 0 --batch_size 8 --lr 1e-2 --log_interval 5 --iterations {STEPS}"
            f" --save_interval 2 --log_dir {log_dir} {more}")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    stranger("datasets/digits.py", "digits", folder)
    stranger("scripts/image_train.py", words("digits/train", "run", f"{POWERS} --class_cond --num_classes=10"), folder)
    return folder


def edited(home, target, change):
    """A copy of the run's capsule alone, after `change` of its content."""
    target.mkdir(exist_ok=True)
    content = json.loads((home / "run/run.json").read_text())
    change(content)
    (target / "run.json").write_text(json.dumps(content))
    return target


# ------------------------------------------------------------------------------------------------------------ replay


@pytest.mark.parametrize("given, left", [
    ("--a 1 --log_dir x --b 2", "--a 1 --b 2"),
    ("--log_dir=x --b=2", "--b=2"),
    ("--force --log_dir x", "--force"),
    ("--log_dir x --force", "--force"),
    ("--log_dir --force", "--force"),  # a flag alone: what follows is no value
    ("--resume never --a -1 --log_dir -x", "--a -1"),
    ("--log_dir=", ""),
    ("--log_dir=x y", "y"),
    ("--log_dir_of x --log x", "--log_dir_of x --log x"),
    ("--prompts a b --log_dir --resume=auto", "--prompts a b"),
    ("--a=--log_dir --log_dir=--a", "--a=--log_dir"),
    ("--a x --log_dir", "--a x"),
])  # fmt: skip
def test_flags_are_taken_out_of_a_command_however_they_are_written(given, left):
    assert runs._without(given.split(), "log_dir", "resume") == left.split()


def start_of(home, *, command=None, ranks=1, **options):
    start = json.loads((home / "run/run.json").read_text())["starts"][0]
    start["command"], start["ranks"] = command or start["command"], ranks
    start["options"].update(options)
    return start


def test_the_command_of_a_replay(home):
    program = start_of(home)["command"][0]
    single = runs.replay_command(start_of(home), "/new")
    assert single[1:4] == [program, "--data_dir", "digits/train"] and single[-2:] == ["--log_dir", "/new"]
    assert single.count("--log_dir") == 1
    several = runs.replay_command(start_of(home, ranks=3), "/new")
    assert several[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    assert several[6:] == single[1:]
    other = start_of(home, command=[program, "--resume_checkpoint=a/model000002.pt", "--resume", "never", "--lr", "-1"],
                     resume_checkpoint="a/model000002.pt")  # fmt: skip
    assert runs.replay_command(other, "/new")[1:] == [
        program, "--lr", "-1", "--resume_checkpoint", "a/model000002.pt", "--log_dir", "/new",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"program of the run, /gone.py, is not there"):
        runs.replay_command(start_of(home, command=["/gone.py"]), "/new")


def assert_equal_runs(one, other):
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names and names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        assert same(checkpoint.load(one / name), checkpoint.load(other / name)), name


def test_a_replayed_run_ends_bit_for_bit_as_the_first(home, tmp_path):
    said = stranger("scripts/replay.py", f"{home}/run --log_dir again", tmp_path).stdout
    assert "start 1: " in said and "software, source, machine and data are as they were" in said
    assert_equal_runs(home / "run", tmp_path / "again")
    before, after = (json.loads((folder / "run.json").read_text()) for folder in (home / "run", tmp_path / "again"))
    assert before["identity"] == after["identity"] and len(after["starts"]) == 1
    refused("replay", f"{home}/run --log_dir {tmp_path}/again", "again holds the checkpoints of a run")


@pytest.mark.slow
@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_a_run_of_two_processes_is_replayed_with_two(home):
    """Launched by MPI, replayed by torchrun, from a network that another run left, in the default folder."""
    line = words("digits/train", "pair", "--batch_size 4 --resume_checkpoint run/model000018.pt --dropout 0.1"
                 " --class_cond True --num_classes 10 --ema_rate 0.9 --random_flip False")  # fmt: skip
    stranger("scripts/image_train.py", line, home, [MPIEXEC, "-n", "2"])
    said = stranger("scripts/replay.py", "pair", home).stdout
    assert "2 process(es) by" in said and "--nproc_per_node 2" in said
    assert_equal_runs(home / "pair", home / "pair_replay")
    assert not same(checkpoint.load(home / "pair/model000020.pt"), checkpoint.load(home / "run/model000020.pt"))


def test_a_capsule_is_told_with_what_changed_since(home, tmp_path):
    def change(content):
        start = content["starts"][0]
        start["packages"]["numpy"] = "1.0"
        start["git"] = {"commit": "f00", "changed": True}
        start["machine"]["threads"] = 77
        content["identity"]["num_images"] = 5
        content["starts"].append({**start, "resumed_from": "run/model000002.pt", "launcher": "torchrun", "ranks": 2,
                                  "options": {**start["options"], "lr": 0.5, "log_dir": "elsewhere"}})  # fmt: skip

    said = done("replay", f"{edited(home, tmp_path / 'run', change)} --run False").out
    for text in (
        "num_images: 5", "start 2: ", "going on from run/model000002.pt", "2 process(es) by torchrun",
        "changed   lr 0.01 -> 0.5", "numpy 1.0", "77 threads", "commit f00 with changes not committed",
        "not as then: numpy 1.0 -> ", "not as then: source: commit f00 with changes not committed -> ",
        "not as then: data: 5 images", "-> 1438 images", "replay: cd ",
    ):  # fmt: skip
        assert text in said, text
    assert said.count("  changed   ") == 1 and "torch 2" in said  # not that of log_dir
    assert not (tmp_path / "run_replay").exists()
    assert "are as they were" in done("replay", f"{home}/run/run.json --run False").out


@pytest.mark.parametrize("harm, message", [
    (lambda folder, content: (folder / "run.json").unlink(), "no run.json in .*/run; did you mean run2"),
    (lambda folder, content: (folder / "run.json").write_text("{"), "run.json cannot be read .*mend it, or move it"),
    (lambda folder, content: (folder / "run.json").write_text("[]"), "run.json cannot be read"),
    (lambda folder, content: content.update(format=9), "its format is 9, not 1"),
    (lambda folder, content: content.update(starts=[]), "it tells of no start"),
    (lambda folder, content: content.update(starts=["x"]), "run.json cannot be read"),
    (lambda folder, content: content["starts"][0].pop("machine"), "it lacks 'machine'"),
    (lambda folder, content: content["starts"][0].update(command=[]), "does not tell the command"),
    (lambda folder, content: content["starts"][0].update(command="ls"), "does not tell command"),
    (lambda folder, content: content["starts"][0]["options"].update(data_dir="x"), "data of the run, .*x, are not"),
    (lambda folder, content: content["starts"][0].update(command=["/x.py"]), "program of the run, /x.py, is not there"),
])  # fmt: skip
def test_what_cannot_be_replayed(home, tmp_path, harm, message):
    edited(home, tmp_path / "run2", lambda content: None)
    folder = edited(home, tmp_path / "run", lambda content: None)
    content = json.loads((folder / "run.json").read_text())
    untouched = json.dumps(content)
    harm(folder, content)
    if json.dumps(content) != untouched:
        (folder / "run.json").write_text(json.dumps(content))
    refused("replay", str(folder), message)
    assert not (tmp_path / "run_replay").exists()


def test_a_replay_needs_a_folder_and_one_process(monkeypatch):
    refused("replay", "", "required: FOLDER")
    refused("replay", "a b", "unknown flag b")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("replay", "a", "runs in one process, not in 2")


# ---------------------------------------------------------------------------------------- averages, put together later


def flat(path):
    return th.cat([value.flatten() for value in checkpoint.load(path).values()])


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_averages_put_together_are_those_tracked_directly(home):
    more = "--ema_power 0.08,0.12 --class_cond --num_classes 10"
    done("image_train", words(home / "digits/train", home / "tracked", more))
    assert th.equal(flat(home / "run/model000020.pt"), flat(home / "tracked/model000020.pt"))
    said = done("posthoc_ema", f"{home}/run --sigma_rel 0.05,0.08,0.12").out
    assert said.startswith("20 snapshots of widths 0.05, 0.1\n")
    assert "run/ema_posthoc0.05_000020.pt: relative error of the profile 0.00%" in said and "warning" not in said
    own = flat(home / "run/ema_power0.05_000020.pt")
    assert distance(flat(home / "run/ema_posthoc0.05_000020.pt"), own) < 1e-6
    last, near = flat(home / "run/model000020.pt"), {}
    for width in ("0.08", "0.12"):
        direct = flat(home / f"tracked/ema_power{width}_000020.pt")
        near[width] = distance(flat(home / f"run/ema_posthoc{width}_000020.pt"), direct)
        assert near[width] < 0.02 * distance(last, direct), near
    assert distance(flat(home / "run/ema_posthoc0.08_000020.pt"), own) > 0.05 * distance(last, own)

    stranger("scripts/posthoc_ema.py", "run --sigma_rel 0.08 --step 16 --out apart/average.pt", home)
    direct = flat(home / "tracked/ema_power0.08_000016.pt")
    assert distance(flat(home / "apart/average.pt"), direct) < 0.03 * distance(last, direct)
    assert (home / "apart/config.json").read_text() == (home / "run/config.json").read_text()
    done("image_sample", f"--model_path {home}/apart/average.pt --num_samples 2 --batch_size 2 --timestep_respacing 2"
         f" --log_dir {home}/drawn")  # fmt: skip
    assert samples(home / "drawn")[1].shape == (2, 8, 8, 1)


def test_a_doubtful_profile_is_said(home, tmp_path):
    for name in ("config.json", "ema_power0.1_000020.pt"):
        shutil.copy(home / "run" / name, tmp_path / name)
    said = done("posthoc_ema", f"{tmp_path} --sigma_rel 0.05").out
    assert "1 snapshots of widths 0.1\n" in said and "warning: the profile of width 0.05 is off by" in said
    # One snapshot alone, as weights add up to 1: itself.
    assert th.equal(flat(tmp_path / "ema_posthoc0.05_000020.pt"), flat(tmp_path / "ema_power0.1_000020.pt"))


@pytest.mark.parametrize("given, message", [
    ("run", "give --sigma_rel, as 0.08"),
    ("run --sigma_rel x", "cannot read ema_power 'x'"),
    ("run --sigma_rel 0.5", "relative width .*not 0.5"),
    ("run --sigma_rel 0.08 --step 7", "no snapshot ends at update 7; there are those of updates 2, 4"),
    ("run --sigma_rel 0.08 --step -2", "--step of 0 or more"),
    ("run --sigma_rel 0.08,0.1 --out x.pt", "--out only for one width"),
    ("digits --sigma_rel 0.08", "no ema_powerWIDTH_NNNNNN.pt in .*train with --ema_power"),
    ("nowhere --sigma_rel 0.08", "no ema_powerWIDTH_NNNNNN.pt in .*nowhere"),
])  # fmt: skip
def test_averages_that_cannot_be_put_together(home, given, message):
    before = sorted((home / "run").iterdir())
    refused("posthoc_ema", f"{home}/{given}", message)
    assert sorted((home / "run").iterdir()) == before


@pytest.mark.parametrize("harm, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:500]), "000018.pt is not a checkpoint, or an incomplete one"),
    (lambda path: checkpoint.save({"w": th.zeros(3)}, path), "holds another network than .*ema_power0"),
    (lambda path: checkpoint.save([1, 2], path), "000018.pt is no state dict"),
    (lambda path: checkpoint.save({k: v / 0 for k, v in checkpoint.load(path).items()}, path), "weights .* not finite"),
])  # fmt: skip
def test_snapshots_that_do_not_fit_are_named(home, tmp_path, harm, message):
    for path in [*(home / "run").glob("ema_power*_0000[12]*.pt"), home / "run/config.json"]:
        shutil.copy(path, tmp_path / path.name)
    harm(tmp_path / "ema_power0.1_000018.pt")
    refused("posthoc_ema", f"{tmp_path} --sigma_rel 0.08", message)
    assert not list(tmp_path.glob("*posthoc*"))


@pytest.mark.parametrize("name, program", [
    ("ema_power0.1_000018.pt", "posthoc_ema {}/damaged --sigma_rel 0.08"),
    ("model000020.pt", "image_sample --model_path {}/damaged/model000020.pt --num_samples 2 --log_dir {}/drawn2"),
])  # fmt: skip
def test_a_flipped_bit_is_noticed_before_weights_are_used(home, tmp_path, name, program):
    """Amid the weights, where torch itself opens the file."""
    shutil.copytree(home / "run", tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged" / name).write_bytes(content)
    checkpoint.load(tmp_path / "damaged" / name)
    program, words = program.format(tmp_path, tmp_path).split(" ", 1)
    refused(program, words, f"{name} is damaged: its SHA-256 is not")


def test_a_folder_of_another_network_takes_no_average(home, tmp_path):
    content = json.loads((home / "run/config.json").read_text())
    content["flags"]["num_channels"] = 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused("posthoc_ema", f"{home}/run --sigma_rel 0.08 --out {tmp_path}/a.pt", "describes another network")
