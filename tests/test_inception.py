"""The Inception network against torch-fidelity's, its resizes, its weights file; and whole scores against theirs."""

import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from evaluations import features, metrics
from evaluations import inception as inception_module

ROOT = Path(__file__).resolve().parents[1]
FIDELITY = importlib.util.find_spec("torch_fidelity")
needs_fidelity = pytest.mark.skipif(FIDELITY is None, reason="needs torch-fidelity")


def random_images(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def fidelity_class():
    """torch-fidelity's class, which needs no torchvision: imported inside an empty package of the same name."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "torch_fidelity"}
    sys.modules["torch_fidelity"] = bare = types.ModuleType("torch_fidelity")
    bare.__path__ = list(FIDELITY.submodule_search_locations)
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] == "torch_fidelity":
                del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def theirs(inception_file):
    """(torch-fidelity's network, the input of its Mixed_6d, its layers by name, the images) of 2 images."""
    kind = fidelity_class()
    layers = list(kind.get_provided_features_list())
    network = kind("own", layers, feature_extractor_weights_path=str(inception_file))
    inputs = []
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    images = random_images(0, 2, 40, 48, 3)
    outputs = dict(zip(layers, network(torch.tensor(images).permute(0, 3, 1, 2))))
    return network, inputs[0], outputs, images


# ---------------------------------------------------------------------------------------------------------- the network


@needs_fidelity
def test_all_six_layers_are_those_of_torch_fidelity(theirs, inception_file, inception):
    network, _, outputs, images = theirs
    ours = inception_module.load(inception_file)
    assert list(ours.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        layers = ours(inception_module.resize_tf1(torch.tensor(images).permute(0, 3, 1, 2).float()))
    assert set(layers) == {*outputs, "spatial"}
    for name, expected in outputs.items():
        assert expected.std() > 0.1  # the random network is alive, so that equality says something
        torch.testing.assert_close(layers[name], expected, rtol=1e-5, atol=1e-5)
    said = inception(images)
    np.testing.assert_allclose(said.pool, outputs["2048"], rtol=1e-5, atol=1e-5)
    assert [a.dtype for a in said] == [np.float32] * 3
    assert [a.shape for a in said] == [(2, 2048), (2, 1008), (2, 2023)]


@needs_fidelity
def test_s08_60_spatial_channels_layout_bias_free_logits_n_minus_1_and_splits_of_5000(theirs, inception):
    network, x, outputs, images = theirs
    ours = inception(images)
    branch = network.Mixed_6d.branch1x1
    y = np.einsum("nchw,oc->nhwo", x.double().numpy(), branch.conv.weight.double().numpy()[:, :, 0, 0])
    scale, shift, mean, variance = (
        p.double().numpy() for p in (branch.bn.weight, branch.bn.bias, branch.bn.running_mean, branch.bn.running_var)
    )
    expected = np.maximum(0, (y - mean) / np.sqrt(variance + 1e-3) * scale + shift)  # [N,17,17,192]
    np.testing.assert_allclose(ours.spatial, expected[..., :7].reshape(2, 2023), rtol=1e-4, atol=1e-5)
    assert (ours.spatial == 0).mean() > 0.1  # after the ReLU

    unbiased = softmax(outputs["logits_unbiased"].double().numpy(), axis=1)
    np.testing.assert_allclose(ours.probabilities, unbiased, rtol=1e-5, atol=1e-12)
    assert np.abs(ours.probabilities - softmax(outputs["logits"].numpy(), axis=1)).max() > 0.01

    assert metrics.moments([[0.0, 0.0], [2.0, 0.0]])[1][0, 0] == 2  # divisor N-1
    classes = np.eye(2)[[0] * 5000 + [1] * 5000]
    assert metrics.inception_score(classes) == pytest.approx(1)  # two splits of one class each
    assert metrics.inception_score(classes[1:]) > 1.0001  # the first split reaches into the second class


def test_batches_grey_images_and_autocast_change_nothing_at_all(inception):
    images = random_images(1, 5, 20, 20, 1)
    together = inception(images)
    with torch.autocast("cpu", torch.bfloat16):
        apart = features.extract(inception, np.repeat(images, 3, axis=3), batch_size=2)
    for a, b in zip(together, apart):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="4 channels, but Inception reads grey or RGB"):
        inception(random_images(1, 3, 20, 20, 4))
    with pytest.raises(ValueError, match=r"float64 of shape \[5, 20, 20, 1\]: expected uint8"):
        inception(images / 255)


def test_float64_is_float64_and_float32_is_near_it(inception, inception_file):
    exact = features.InceptionExtractor(inception_file, dtype="float64", allow_other_weights=True)
    assert {p.dtype for p in exact.network.parameters()} == {torch.float64}
    images = random_images(3, 2, 24, 24, 3)
    x = torch.tensor(images).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        pool = exact.network(exact.resize(x))["2048"]
        in_float32 = inception.network(inception.resize(x.float()))["2048"]
    assert pool.dtype == torch.float64
    difference = (in_float32 - pool).abs().max() / pool.abs().max()
    assert 1e-9 < difference < 1e-5  # torch-fidelity's float64 is float32, difference 0


def test_full_precision_switches_off_tf32_and_gradients_and_back_on():
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(allow_tf32=True), features.full_precision("cpu"):
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.is_grad_enabled() and torch.backends.cudnn.allow_tf32 == before


def test_the_network_is_in_evaluation_mode_whoever_switches(inception):
    images = random_images(4, 2, 16, 16, 3)
    expected = inception(images).pool
    inception.network.train()
    np.testing.assert_array_equal(inception(images).pool, expected)
    assert not inception.network.training and not any(p.requires_grad for p in inception.network.parameters())


def test_it_needs_neither_torch_fidelity_nor_torchvision_be_they_whole_or_broken(tmp_path, inception_file):
    for name in ("torchvision", "torch_fidelity"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('operator does not exist')\n")
    code = (
        "import sys, numpy; from evaluations.features import InceptionExtractor;"
        f"e = InceptionExtractor({str(inception_file)!r}, allow_other_weights=True);"
        "print(e(numpy.zeros((1, 9, 9, 3), numpy.uint8)).pool.shape,"
        " {m for m in sys.modules if m.startswith(('torch_fidelity', 'torchvision'))})"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 2048) set()", done.stderr


# -------------------------------------------------------------------------------------------------------------- resizes


def test_the_published_resize_is_that_of_tensorflow_1(monkeypatch):
    """Asymmetric grid, no antialias: pixel j of the result reads j * old / new, the last ones repeat the edge."""
    monkeypatch.setattr(inception_module, "SIZE", 4)
    ramp = torch.tensor([[0.0, 10.0], [20.0, 30.0]])[None, None]
    expected = [[0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    np.testing.assert_array_equal(inception_module.resize_tf1(ramp)[0, 0], expected)


@needs_fidelity
@pytest.mark.parametrize("size", [(32, 64), (299, 299), (311, 500)])
def test_the_published_resize_is_torch_fidelitys_bit_for_bit(size):
    resize = fidelity_class().forward.__globals__["interpolate_bilinear_2d_like_tensorflow1x"]
    x = torch.tensor(random_images(0, 1, *size, 3)).permute(0, 3, 1, 2).float()
    assert torch.equal(inception_module.resize_tf1(x), resize(x, size=(299, 299), align_corners=False))


@pytest.mark.parametrize("size", [64, 500])
def test_the_other_resizes_are_what_they_are_named_after(size):
    pixels = random_images(0, size, size)
    x = torch.tensor(pixels)[None, None].float()
    got = {name: resize(x)[0, 0].numpy() for name, resize in inception_module.RESIZES.items()}
    picture = Image.fromarray(pixels.astype(np.float32))
    by_pillow = {
        name: np.asarray(picture.resize((299, 299), how)).clip(0, 255)
        for name, how in (("bicubic", Image.Resampling.BICUBIC), ("antialias", Image.Resampling.BILINEAR))
    }
    for name, expected in by_pillow.items():
        np.testing.assert_allclose(got[name], expected, atol=1e-2)
    at = (np.arange(299) + 0.5) * size / 299 - 0.5  # half-pixel centres, by hand in one dimension
    low = np.floor(at).clip(0).astype(int)
    high = np.minimum(low + 1, size - 1)
    share = (at.clip(0) - low)[:, None]
    rows = pixels[low] * (1 - share) + pixels[high] * share
    expected = rows[:, low] * (1 - share.T) + rows[:, high] * share.T
    np.testing.assert_allclose(got["half_pixel"], expected, atol=2e-2)
    assert all(np.abs(got["tf1"] - other).mean() > 1 for name, other in got.items() if name != "tf1")


def test_options_that_are_none(inception_file):
    with pytest.raises(ValueError, match="resize is 'lanczos'; choose one of tf1, half_pixel, antialias, bicubic"):
        features.InceptionExtractor(inception_file, resize="lanczos", allow_other_weights=True)
    with pytest.raises(ValueError, match="dtype is 'half'; choose one of float32, float64, bfloat16, float16"):
        features.InceptionExtractor(inception_file, dtype="half", allow_other_weights=True)


# ------------------------------------------------------------------------------------------- the file of its weights


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A file standing for the published one at its address, an empty torch hub folder, and the file it would get."""
    original = tmp_path / "server" / "original.pth"
    original.parent.mkdir()
    original.write_bytes(b"weights")
    monkeypatch.setattr(inception_module, "WEIGHTS_URL", original.as_uri())
    monkeypatch.setattr(inception_module, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(inception_module.WEIGHTS_VARIABLE, raising=False)
    return original, tmp_path / "torch/hub/checkpoints" / inception_module.WEIGHTS_NAME


def test_weights_are_downloaded_once_and_their_content_is_checked(served):
    original, file = served
    assert inception_module.find_weights() == (file, hashlib.sha256(b"weights").hexdigest())
    assert file.read_bytes() == b"weights"
    original.unlink()
    assert inception_module.find_weights()[0] == file  # from the cache
    file.write_bytes(b"damaged")
    for allowed in (False, True):  # the published name must have the published content
        with pytest.raises(ValueError, match=r"has sha256 .* it is damaged or another network; fetch"):
            inception_module.find_weights(allow_other=allowed)


@pytest.mark.parametrize("damage", ["no network", "another content"])
def test_a_failed_download_says_which_file_to_put_where_and_leaves_nothing(served, damage):
    original, file = served
    if damage == "no network":
        original.unlink()
    else:
        original.write_bytes(b"something else")
    with pytest.raises(FileNotFoundError) as error:
        inception_module.find_weights()
    for part in (original.as_uri(), str(file), "--weights", inception_module.WEIGHTS_VARIABLE):
        assert part in str(error.value)
    assert list(file.parent.iterdir()) == []


def test_other_weights_by_path_or_environment_are_refused_unless_asked_for(served, tmp_path, monkeypatch, capsys):
    own, other = tmp_path / "own.pth", tmp_path / "other.pth"
    own.write_bytes(b"mine")
    other.write_bytes(b"weights")
    monkeypatch.setenv(inception_module.WEIGHTS_VARIABLE, str(own))
    with pytest.raises(ValueError, match=r"own\.pth has sha256 .*--allow_other_weights"):
        inception_module.find_weights()
    assert inception_module.find_weights(allow_other=True)[0] == own
    assert "warning: " + str(own) in capsys.readouterr().err
    assert inception_module.find_weights(other)[0] == other  # the argument comes first
    assert capsys.readouterr().err == ""
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at nowhere\.pth"):
        inception_module.find_weights("nowhere.pth")


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_weights_that_are_not_weights_are_refused_and_never_executed(tmp_path, inception_file):
    file, sprung = tmp_path / "weights.pth", tmp_path / "sprung"
    contents = [b"", b"not a checkpoint", pickle.dumps(Trap(sprung), protocol=2), b"PK\x03\x04 cut off"]
    contents.append(inception_file.read_bytes()[:-1000])  # cut off at the end
    for weights in ({"key": Trap(sprung)}, {"fc.weight": torch.zeros(3)}, [1, 2]):
        torch.save(weights, file)
        contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pth does not hold the Inception network"):
            features.InceptionExtractor(file, allow_other_weights=True)
    assert not sprung.exists()


def test_the_converted_file_has_no_counts_of_batches_and_loads(tmp_path, inception_file):
    weights = torch.load(inception_file, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, tmp_path / "converted.pth")
    loaded = inception_module.load(tmp_path / "converted.pth").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items() if "num_batches" not in key)


# ------------------------------------------------------------------------------- whole scores against torch-fidelity's

# torch-fidelity imports torchvision for six small things. Where there is none, stand-ins of those that a folder of
# images needs; the rest stays missing.
STAND_INS = """
import sys, types
try:
    import torch_fidelity
except Exception:
    import numpy, torch
    class Missing:
        def __init__(self, *args, **more): pass
    class Compose:
        def __init__(self, transforms): self.transforms = transforms
        def __call__(self, x):
            for transform in self.transforms: x = transform(x)
            return x
    def pil_to_tensor(picture):
        return torch.tensor(numpy.array(picture)).permute(2, 0, 1)
    class Module(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith('__'): raise AttributeError(name)
            return Missing
    for name in [n for n in sys.modules if n.split('.')[0] in ('torchvision', 'torch_fidelity')]: del sys.modules[name]
    for name in ('', '.datasets', '.transforms', '.transforms.functional', '.models', '.ops', '.io', '.utils'):
        sys.modules['torchvision' + name] = Module('torchvision' + name)
    top = sys.modules['torchvision']; top.__path__ = []; top.__version__ = '0'
    top.transforms = sys.modules['torchvision.transforms']
    top.transforms.functional = sys.modules['torchvision.transforms.functional']
    top.transforms.Compose, top.transforms.functional.pil_to_tensor = Compose, pil_to_tensor
    import torch_fidelity
"""


def run_fidelity(folders, **options):
    """torch_fidelity.calculate_metrics in a process of its own."""
    code = STAND_INS + (
        "\nimport json\nfrom torch_fidelity import calculate_metrics\n"
        f"said = calculate_metrics(input1={str(folders[1])!r}, input2={str(folders[0])!r}, cuda=False, batch_size=4, "
        f"cache=False, verbose=False, feature_extractor='inception-v3-compat', **{options!r})\n"
        "print('said', json.dumps(said))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("said ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0][5:])


@pytest.fixture
def folders(tmp_path, request):
    """Two folders of pictures, smooth noise of other contrast in each."""
    made = []
    for seed, name in enumerate(("reference", "sample")):
        (tmp_path / name).mkdir()
        noise = np.random.RandomState(seed).standard_normal((request.param, 4, 4, 3))
        for i, picture in enumerate(np.clip(128 + (40 + 25 * seed) * noise, 0, 255).astype(np.uint8)):
            Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC).save(tmp_path / name / f"{i:03d}.png")
        made.append(tmp_path / name)
    return made


@needs_fidelity
@pytest.mark.parametrize("folders", [8], indirect=True)
def test_scores_of_two_folders_are_those_of_calculate_metrics(folders, inception, inception_file):
    from evaluations import evaluator, kernel, sources

    theirs = run_fidelity(
        folders, isc=True, fid=True, kid=True, prc=True, isc_splits=3, kid_subsets=4, kid_subset_size=4,
        feature_extractor_weights_path=str(inception_file),
    )  # fmt: skip
    ours = evaluator.evaluate(*folders, inception, settings=evaluator.Settings(splits=3, shuffle=2020))
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    # Below full rank its eigenvalues of a product of covariances lose digits; the full-rank test is the slow one.
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours["notes"] == []
    pools = [features.extract(inception, next(sources.open_source(folder).blocks()).images).pool for folder in folders]
    kid = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert kernel.kid_of_subsets(*pools, subsets=4, size=4) == pytest.approx(kid, rel=1e-4)


@needs_fidelity
@pytest.mark.slow
@pytest.mark.parametrize("folders", [100], indirect=True)
def test_frechet_distance_at_full_rank_is_that_of_calculate_metrics(folders, inception, inception_file):
    from evaluations import sources

    theirs = run_fidelity(
        folders, fid=True, feature_layer_fid="64", feature_extractor_weights_path=str(inception_file)
    )["frechet_inception_distance"]
    layers = []
    for folder in folders:
        images = next(sources.open_source(folder).blocks()).images
        x = torch.tensor(images).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            layers.append(torch.cat([inception.network(inception.resize(part))["64"] for part in x.split(4)]).numpy())
    assert metrics.frechet_distance_from_features(*layers) == pytest.approx(theirs, rel=1e-6)
