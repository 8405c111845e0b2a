"""Images that are not square: cut, trained on, drawn, guided, scored and refused where squares are needed."""

import argparse
import json

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_image_datasets import save
from test_programs import CLASSIFIER, NET, TRAIN, done, refused

from evaluations import evaluator
from evaluations.features import make_extractor
from guided_diffusion import config, sizes
from guided_diffusion.image_datasets import ImageDataset, center_crop_arr, random_crop_arr
from guided_diffusion.network_options import ModelOptions
from guided_diffusion.script_util import create_classifier, create_model, open_classifier, open_diffusion
from guided_diffusion.unet import UNetModel

WIDE, WIDE_CLASSIFIER = (words.replace("--image_size 8", "--image_size 8x16") for words in (NET, CLASSIFIER))


def test_sizes_are_typed_as_a_side_or_height_by_width():
    assert [sizes.parse_size(text) for text in ("64", "64x64", "48x64", "48X64", 48)] == [64, 64, "48x64", "48x64", 48]
    assert sizes.sides("48x64") == (48, 64) and sizes.sides(48) == (48, 48)
    for wrong in ("48x", "x64", "48x64x3", "big"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number expected"):
            sizes.parse_size(wrong)
    args = config.parse("a program", ModelOptions, argv=["--image_size", "48x64"])
    assert args.image_size == "48x64" and sizes.size_of(vars(args)) == (48, 64) and sizes.side_of(vars(args)) == 48
    assert sizes.levels("", "64x128") == sizes.levels("", 64)
    assert sizes.attention_downsampling("16,8", "64x128") == (4, 8)


def test_a_rectangle_is_cut_from_the_centre_of_what_covers_it():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    # 30 x 40 is twice 10 x 20 or more, and halved is 15 x 20; of 15 rows 2 go above and 3 below.
    expected = np.asarray(Image.fromarray(pixels).resize((20, 15), Image.Resampling.BOX))[2:12]
    assert np.array_equal(center_crop_arr(Image.fromarray(pixels), (10, 20)), expected)
    # 20 x 10: the height is the tighter side, and is not halved; the width becomes 27, of which 8 go left and 9 right.
    expected = np.asarray(Image.fromarray(pixels).resize((27, 20), Image.Resampling.BICUBIC))[:, 8:18]
    assert np.array_equal(center_crop_arr(Image.fromarray(pixels), (20, 10)), expected)
    large = Image.fromarray(pixels.repeat(2, 0).repeat(2, 1))  # whose halving by means is what it was
    assert np.array_equal(center_crop_arr(large, (20, 10)), expected)
    assert np.array_equal(center_crop_arr(large, (20, 20)), center_crop_arr(large, 20))


def test_random_rectangles_are_everywhere_and_of_every_scale():
    rows, columns = np.mgrid[:60, :60].astype(np.uint8) * 4
    picture, rng = Image.fromarray(np.stack([rows, columns, rows], -1)), np.random.default_rng(0)
    crops = np.stack([random_crop_arr(picture, (8, 16), rng=rng) for _ in range(500)]).astype(int)
    assert crops.shape == (500, 8, 16, 3)
    spans = crops[:, 0, -1, 1] - crops[:, 0, 0, 1]  # of 236, at most the whole width, at least 4/5 of it
    assert spans.max() > 210 and 160 < spans.min() < 190
    tops = crops[:, 0, 0, 0]
    assert tops.min() < 12 and tops.max() > 110


def test_the_loader_gives_rectangles(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    x, _ = ImageDataset((8, 16), [save(tmp_path / "x.png", pixels)], random_flip=False)[0]
    assert np.array_equal(x, pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def test_networks_of_rectangles():
    how = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1,1"}
    model = create_model("8x16", **how)
    assert isinstance(model, UNetModel) and model.image_size == (8, 16)
    assert model(th.zeros(1, 3, 8, 16), th.tensor([1])).shape == (1, 3, 8, 16)
    with pytest.raises(ValueError, match=r"image_size 8x18 is not divisible by 4.*use 8x16 or 8x20"):
        create_model("8x18", **how)
    with pytest.raises(ValueError, match="images of 8x12 cannot be halved 3 times"):
        create_model("8x12", 32, 1, "1,1,1", network="film")
    of_classes = {"classifier_use_fp16": False, "classifier_width": 32, "classifier_depth": 1,
                  "classifier_attention_resolutions": "4", "classifier_use_scale_shift_norm": True,
                  "classifier_resblock_updown": True, "classifier_channel_mult": "1,1",
                  "classifier_num_head_channels": 16}  # fmt: skip
    with pytest.raises(ValueError, match="attention pool takes square images only, not 8x16: choose another pool"):
        create_classifier("8x16", classifier_pool="attention", **of_classes)
    logits = create_classifier("8x16", classifier_pool="adaptive", num_classes=3, **of_classes)
    assert logits(th.zeros(2, 3, 8, 16), th.tensor([1, 2])).shape == (2, 3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Wide pictures, a model and a classifier of them."""
    folder = tmp_path_factory.mktemp("wide")
    rng = np.random.default_rng(0)
    for number in range(24):
        save(folder / "data" / f"{'ab'[number % 2]}_{number:02d}.png", rng.integers(0, 256, (9, 17)))
    how = f"{TRAIN} --num_classes 2 --iterations 2 --save_interval 2 --data_dir {folder}/data"
    done("image_train", f"{WIDE} {how} --class_cond True --log_dir {folder}/model")
    done("classifier_train", f"{WIDE_CLASSIFIER} {how} --classifier_pool spatial --log_dir {folder}/classifier")
    return folder


def test_training_remembers_the_rectangle_and_goes_on(home):
    flags = json.loads((home / "model" / "config.json").read_text())["flags"]
    assert flags["image_size"] == "8x16"
    said = done("image_train", f"{TRAIN} --iterations 3 --save_interval 1 --class_cond True --data_dir {home}/data"
                f" --log_dir {home}/model")  # fmt: skip
    assert "going on from" in said.out and (home / "model" / "model000003.pt").exists()
    assert open_diffusion(home / "model" / "model000003.pt")[2]["image_size"] == "8x16"
    assert open_classifier(home / "classifier" / "model000002.pt")[1]["image_size"] == "8x16"
    with pytest.raises(ValueError, match="image_size must be int, not '8xx16'"):
        broken = json.loads((home / "model" / "config.json").read_text())
        broken["flags"]["image_size"] = "8xx16"
        (home / "broken").mkdir()
        (home / "broken" / "config.json").write_text(json.dumps(broken))
        (home / "broken" / "model000002.pt").write_bytes((home / "model" / "model000002.pt").read_bytes())
        open_diffusion(home / "broken" / "model000002.pt")


def test_every_program_draws_or_reads_rectangles(home):
    model = f"--model_path {home}/model/model000002.pt"
    drawing = f"{model} --num_samples 3 --batch_size 3 --timestep_respacing 3"
    done("image_sample", f"{drawing} --frames 2 --log_dir {home}/drawn")
    with np.load(home / "drawn" / "samples_3x8x16x1.npz") as drawn:
        assert drawn["arr_0"].shape == (3, 8, 16, 1)
    done("classifier_sample", f"{drawing} --classifier_path {home}/classifier/model000002.pt --log_dir {home}/guided")
    assert (home / "guided" / "samples_3x8x16x1.npz").exists()
    done("image_nll", f"{model} --data_dir {home}/data --num_samples 2 --timestep_respacing 3 --log_dir {home}/nll")
    some = f"{model} --data_dir {home}/data --num_images 2 --timestep_respacing 5"
    done("invert", f"{some} --steps 3 --log_dir {home}/inverted")
    done("inpaint", f"{some} --steps 3 --num_samples 1 --log_dir {home}/inpainted")


def test_rectangles_are_scored_by_a_classifier_of_rectangles(home, capsys):
    classifier = str(home / "classifier" / "model000002.pt")
    extractor = make_extractor(classifier)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 16, 1), np.uint8)
    network, x = open_classifier(classifier)[0], th.tensor(images / 127.5 - 1, dtype=th.float32).permute(0, 3, 1, 2)
    with th.no_grad():
        np.testing.assert_allclose(extractor(images).pool, network.features(x, th.zeros(5)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"images are \[16, 8\] pixels, but .* reads \[8, 16\]"):
        extractor(images.transpose(0, 2, 1, 3))
    words = [str(home / "data"), str(home / "data"), "--extractor", classifier, "--image_size", "8x16", "--no_errors"]
    assert evaluator.main(words) == 0 and "Precision: 1.0" in capsys.readouterr().out


def test_what_needs_squares_says_so(home):
    words = f"{WIDE_CLASSIFIER} {TRAIN} --num_classes 2 --iterations 1 --data_dir {home}/data"
    refused("classifier_train", f"{words} --log_dir {home}/none", "attention pool takes square images only, not 8x16")
    refused("image_train", f"{NET} --image_size 8x {TRAIN} --data_dir {home}/data", "image_size.*whole number expected")
