"""Published models by their names, from a server of this test: cached, resumed, checked, and read by the programs."""

import hashlib
import io
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_config import PROGRAMS
from test_download import Server, http
from test_programs import done, refused, run

from evaluations.features import make_extractor
from guided_diffusion import checkpoint, config, identify, logger, presets, published, script_util

ROOT = Path(__file__).parent.parent
TINY = config.defaults(*identify.GROUPS["diffusion"]) | {
    "image_size": 8, "num_channels": 32, "num_heads": 1, "image_channels": 1, "channel_mult": "1", "num_res_blocks": 1,
    "diffusion_steps": 30, "attention_resolutions": "4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def printed(monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)


@pytest.fixture
def content():
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(script_util.create_model_and_diffusion(**TINY)[0].state_dict(), file)
    return file.getvalue()


@pytest.fixture
def preset(monkeypatch):
    """A published model of a tiny network, in the place of that of 64x64."""
    whole = {name: value for name, value in TINY.items() if name not in ("use_fp16",)}
    count = 182_817
    tiny = presets.PRESETS["imagenet64"]._replace(flags=whole, parameters=count, classifier="", steps="3")
    monkeypatch.setitem(presets.PRESETS, "imagenet64", tiny)
    return tiny


@pytest.fixture
def server(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        served.files, served.asked, served.limit, served.resumes = {"/64x64_diffusion.pt": content}, [], None, True
        served.headers = {}
        monkeypatch.setenv("GD_MODELS_URL", f"http://127.0.0.1:{served.server_port}/")
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_the_publishers_addresses(monkeypatch):
    monkeypatch.delenv("GD_MODELS_URL", raising=False)
    base = "https://openaipublic.blob.core.windows.net/diffusion/"
    assert presets.by_name("imagenet64").url == f"{base}jul-2021/64x64_diffusion.pt"
    assert presets.by_name("lsun_cat.pt") is presets.by_name("lsun-cat") is presets.PRESETS["lsun-cat"]
    assert presets.by_name("cifar10_uncond_50M_500K").url == f"{base}march-2021/cifar10_uncond_50M_500K.pt"
    assert presets.by_name("64x64_diffusion.pt").size == (4 * 295_904_454 + 1000, 4 * 295_904_454 + 2**21)
    assert presets.by_name("model010000.pt") is None
    monkeypatch.setenv("GD_MODELS_URL", "http://mirror/models/")
    assert presets.by_name("imagenet64").url == "http://mirror/models/64x64_diffusion.pt"


def test_a_name_is_fetched_once_and_read_from_the_cache_afterwards(server, preset, content, tmp_path, capsys):
    for name in ("imagenet64", "64x64_diffusion", "64x64_diffusion.pt"):
        path = published.locate(name, progress=False)
        assert path == str(tmp_path / "cache" / "guided-diffusion" / "64x64_diffusion.pt")
    assert Path(path).read_bytes() == content and len(server.asked) == 1
    server.shutdown()
    model, _, flags = script_util.open_diffusion("imagenet64")
    assert flags == TINY and torch.equal(model.out[2].weight, torch.load(io.BytesIO(content))["out.2.weight"])
    assert "the published 64x64_diffusion.pt, by its name and its tensors" in capsys.readouterr().out


def test_the_home_folder_has_the_cache_if_nothing_else_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.cache_folder() == tmp_path / ".cache" / "guided-diffusion"


def test_a_download_that_breaks_off_is_no_checkpoint_and_goes_on_later(server, preset, content, tmp_path):
    server.limit = len(content) // 10
    with pytest.raises(OSError, match=r"broke off after .* bytes are kept for the next attempt"):
        published.locate("imagenet64", progress=False)
    assert names(tmp_path / "cache") == ["64x64_diffusion.pt.part"]
    server.limit = None
    assert Path(published.locate("imagenet64", progress=False)).read_bytes() == content
    assert server.asked[-1] == ("/64x64_diffusion.pt", f"bytes={5 * (len(content) // 10)}-")
    assert names(tmp_path / "cache") == ["64x64_diffusion.pt"]


@pytest.mark.parametrize("change", ["cut", "page", "false"])
def test_what_is_not_the_model_is_not_kept(server, preset, content, tmp_path, monkeypatch, change):
    """A file that its server holds in part, a page of a hotel's wireless net, or false bytes of the right size."""
    if change == "false":
        known = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(presets.PRESETS, "imagenet64", preset._replace(sha256=known))
    changed = {"cut": content[:-1000], "page": b"<html>pay here</html>", "false": content[::-1]}[change]
    server.files["/64x64_diffusion.pt"] = changed
    expected = {"cut": "is an archive without its end", "page": "has 21 bytes, not from", "false": "has sha256"}[change]
    with pytest.raises(ValueError, match=rf"64x64_diffusion.pt.part {expected}.* is deleted"):
        published.locate("imagenet64", progress=False)
    assert names(tmp_path / "cache") == []
    server.files["/64x64_diffusion.pt"] = content
    path = Path(published.locate("imagenet64", progress=False))
    path.write_bytes(content[:-1])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"64x64_diffusion.pt has .* delete it, and it is fetched again from http"):
        published.locate("imagenet64", progress=False)


def test_a_server_that_is_down(server, preset, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"cannot fetch http.*_diffusion.pt: .*refused.*save it as .*64x64_diffusion"):
        published.locate("imagenet64", progress=False)
    assert names(tmp_path / "cache") == []


def test_paths_stay_paths(server, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", "model000010.pt", "gs://bucket/64x64_diffusion.pt", "64x64_diffusion.safetensors",
                 "https://a.blob.core.windows.net/b/64x64_diffusion.pt"):
        assert published.locate(path) == path
    with pytest.raises(FileNotFoundError, match=r"no checkpoint models/64x64_diffusion.pt; 64x64_diffusion.pt without"):
        published.locate("models/64x64_diffusion.pt")
    Path("64x64_diffusion.pt").write_bytes(b"mine")
    assert published.locate("64x64_diffusion.pt") == "64x64_diffusion.pt" and not server.asked


def test_an_address_is_fetched_as_well(server, preset, content):
    address = f"http://127.0.0.1:{server.server_port}/64x64_diffusion.pt"
    path = published.locate(address, progress=False)
    assert Path(path).read_bytes() == content and Path(path).name == "64x64_diffusion.pt"
    assert published.locate(address, progress=False) == path and len(server.asked) == 1


def test_many_processes_fetch_it_once(server, preset, content, tmp_path, capfd):
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=published.locate, args=("imagenet64",)) for _ in range(4)]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    assert [each.exitcode for each in started] == [0] * 4 and len(server.asked) == 1
    assert names(tmp_path / "cache") == ["64x64_diffusion.pt"]
    assert "64x64_diffusion.pt: 100%" in capfd.readouterr().err  # a bar of progress


SAMPLE = "--num_samples 2 --batch_size 2 --grid False"


def test_a_preset_is_enough_to_sample(server, preset, tmp_path):
    said = done("image_sample", f"--preset imagenet64 {SAMPLE} --log_dir {tmp_path}/a").out
    assert (tmp_path / "a" / "samples_2x8x8x1.npz").exists() and "timestep_respacing 3\n" in said
    said = done("image_sample", f"--preset imagenet64 --timestep_respacing 2 {SAMPLE} --log_dir {tmp_path}/b").out
    assert "--timestep_respacing 2, as typed, instead of the 3 of --preset imagenet64" in said
    wrong = f"--preset imagenet64 --num_channels 64 {SAMPLE} --log_dir {tmp_path}/c"
    refused("image_sample", wrong, "--num_channels 64 contradicts the weights of .*64x64_diffusion.pt")
    refused("image_sample", f"--preset imagenet65 {SAMPLE}", "invalid choice: 'imagenet65' .*imagenet64")


def test_a_published_name_is_enough_to_sample_and_to_go_on_from(server, preset, content, tmp_path):
    steps = f"--timestep_respacing 2 {SAMPLE} --log_dir {tmp_path}"
    assert "sampling: " in run("image_sample", f"--model_path 64x64_diffusion {steps}").err
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(images / f"{i}.png")
    train = f"--data_dir {images} --batch_size 2 --iterations 1 --num_workers 0 --log_dir {tmp_path}/tuned"
    said = done("image_train", f"--resume_checkpoint 64x64_diffusion.pt --lr 0 --learn_sigma False {train}").out
    assert "the published 64x64_diffusion.pt, by its name and its tensors" in said
    tuned = checkpoint.load(tmp_path / "tuned" / "model000001.pt")
    assert all(torch.equal(tuned[name], value) for name, value in torch.load(io.BytesIO(content)).items())
    assert checkpoint.read_config(tmp_path / "tuned" / "model000001.pt")["flags"] == TINY


def test_a_published_classifier_scores_by_its_name(server, monkeypatch, tmp_path):
    flags = config.defaults(*identify.GROUPS["classifier"]) | {
        "image_size": 8, "image_channels": 1, "num_classes": 3, "classifier_width": 32, "classifier_depth": 1,
        "classifier_channel_mult": "1,1", "classifier_attention_resolutions": "4", "classifier_num_head_channels": 16,
    }  # fmt: skip
    file = io.BytesIO()
    network = script_util.build("classifier", flags)
    torch.save(network.state_dict(), file)
    server.files["/64x64_classifier.pt"] = file.getvalue()
    count = sum(each.numel() for each in network.parameters())
    tiny = presets.PRESETS["classifier64"]._replace(flags=flags, parameters=count)
    monkeypatch.setitem(presets.PRESETS, "classifier64", tiny)
    assert make_extractor("classifier64").dim == make_extractor("64x64_classifier.pt").dim == 32
    assert len(server.asked) == 1


def test_a_preset_trains_its_network_anew(preset, tmp_path):
    args = config.parse("", *PROGRAMS["image_train"][0], argv=["--preset", "imagenet128", "--num_heads", "8"])
    assert (args.num_channels, args.num_heads, args.image_size, args.learn_sigma) == (256, 8, 128, True)
    assert not args.use_fp16 and args.timestep_respacing == "" and args.explicit == {"preset", "num_heads"}
    args = config.parse("", *PROGRAMS["classifier_train"][0], argv=["--preset", "imagenet128"])
    assert (args.image_size, args.classifier_depth, args.noise_schedule) == (128, 2, "linear")
    args = config.parse("", *PROGRAMS["classifier_sample"][0], argv=["--preset", "imagenet512"])
    assert (args.model_path, args.classifier_path, args.classifier_scale) == ("imagenet512", "classifier512", 4.0)
    assert args.timestep_respacing == "250" and config.explicit_flags(args) == {
        "preset": "imagenet512", "timestep_respacing": "250",
    }  # fmt: skip


def test_a_program_takes_a_name_and_a_preset(server, tmp_path, content):
    """The true preset: a name that was fetched is read, and what it holds is not what it should be."""
    server.files["/64x64_diffusion.pt"] = content
    command = [sys.executable, ROOT / "scripts" / "image_sample.py", "--preset", "imagenet64", "--log_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert f"64x64_diffusion.pt.part has {len(content)} bytes, not from 1183618816 to" in done.stderr
    assert checkpoint.names_in(tmp_path / "cache" / "guided-diffusion") == ["64x64_diffusion.pt.lock"]
