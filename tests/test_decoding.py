"""Every kind of picture that Pillow writes comes back as grey, RGB or RGBA of 8 bits, upright."""

import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_image_datasets import take

from guided_diffusion import decoding
from guided_diffusion.decoding import UnreadableImage, check_background, decode
from guided_diffusion.image_datasets import ImageDataset, load_data

RED, HALF, GONE = (255, 0, 0, 255), (0, 0, 0, 128), (7, 200, 99, 0)


def saved(image, path, **how):
    image.save(path, **how)
    return str(path)


def pixels(path, mode="RGB", **how):
    return np.asarray(decode(path, mode, **how)).tolist()


@pytest.fixture
def glass(tmp_path):
    """Opaque red, half-transparent black, and a green that alpha hides: [1,3]."""
    image = Image.new("RGBA", (3, 1))
    for x, colour in enumerate((RED, HALF, GONE)):
        image.putpixel((x, 0), colour)
    return saved(image, tmp_path / "glass.png")


def test_rgba_lies_on_the_background(glass):
    assert pixels(glass) == [[[255, 0, 0], [127, 127, 127], [255, 255, 255]]]
    assert pixels(glass, background="#0000ff") == [[[255, 0, 0], [0, 0, 127], [0, 0, 255]]]
    assert pixels(glass, background="black") == [[[255, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert pixels(glass, "L") == [[76, 127, 255]]  # 76 = 0.299 * 255


def test_alpha_is_kept_if_asked_for_and_dropped_by_none_as_in_the_original(glass):
    assert pixels(glass, "RGBA") == [[list(RED), list(HALF), list(GONE)]]
    assert pixels(glass, background="none") == [[list(RED[:3]), list(HALF[:3]), list(GONE[:3])]]
    np.testing.assert_array_equal(pixels(glass, background="none"), np.asarray(Image.open(glass).convert("RGB")))


def test_transparency_of_palettes_grey_and_single_colours(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(saved(palette, tmp_path / "p.png", transparency=1)) == [[[255, 0, 0], [255, 255, 255]]]
    assert pixels(saved(palette, tmp_path / "p.gif", transparency=1)) == [[[255, 0, 0], [255, 255, 255]]]
    assert pixels(saved(palette, tmp_path / "opaque.png")) == [[[255, 0, 0], [0, 255, 0]]]
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (100, 0))
    assert pixels(saved(grey, tmp_path / "la.png"), "L") == [[100, 255]]
    key = Image.new("RGB", (2, 1), (9, 8, 7))
    key.putpixel((1, 0), (1, 2, 3))
    assert pixels(saved(key, tmp_path / "key.png", transparency=(1, 2, 3))) == [[[9, 8, 7], [255, 255, 255]]]
    for name in ("glass.webp", "glass.tif"):
        image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
        how = {"lossless": True} if name.endswith("webp") else {}
        assert pixels(saved(image, tmp_path / name, **how)) == [[[255] * 3] * 2] * 2


def test_cmyk_and_one_bit(tmp_path):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert pixels(saved(cyan, tmp_path / "cmyk.tif"))[0][0] == [0, 255, 255]
    assert np.abs(np.array(pixels(saved(cyan, tmp_path / "cmyk.jpg", quality=100))) - [0, 255, 255]).max() <= 2
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(saved(bits, tmp_path / "bits.png")) == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits_are_scaled_and_do_not_saturate(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 40000, 65535]], dtype=np.uint16)
    assert pixels(saved(Image.fromarray(values), tmp_path / name), "L") == [[0, 0, 1, 1, 156, 255]]
    assert pixels(str(tmp_path / name))[0][4] == [156] * 3


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_16_bit_colour_made_by_hand(tmp_path):
    header = (1).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])  # 1 x 1, 16 bits, RGB
    data = zlib.compress(b"\0" + np.array([65535, 257 * 77, 0], ">u2").tobytes())
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    (tmp_path / "rgb48.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert pixels(str(tmp_path / "rgb48.png")) == [[[255, 77, 0]]]


def test_floats_and_32_bits_are_refused(tmp_path):
    for name, kind in (("f.tif", np.float32), ("i.tif", np.int32)):
        saved(Image.fromarray(np.ones((2, 2), kind)), tmp_path / name)
        with pytest.raises(UnreadableImage, match=f"{name}: its pixels are .*32 bits of no known range"):
            decode(str(tmp_path / name), "RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, kind):
    """Stored so that a reader who obeys the tag sees [[1, 2, 3], [4, 5, 6]] times 40."""
    upright = np.array([[1, 2, 3], [4, 5, 6]]) * 40
    # EXIF 2.32, tag 0x0112: where the stored row 0 and column 0 lie in the picture that is seen.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[orientation].astype(np.uint8)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if kind == "webp" else {}
    path = saved(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), tmp_path / f"x.{kind}", exif=exif, **how)
    assert np.asarray(decode(path, "L")).tolist() == upright.tolist()


def test_a_camera_jpeg_and_damaged_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.new("L", (30, 10)), tmp_path / "x.jpg", exif=exif)
    assert decode(path, "RGB").size == (10, 30)
    damaged = Image.Exif()
    damaged[0x0112] = 6
    saved(Image.new("L", (30, 10)), tmp_path / "bad.jpg", exif=damaged.tobytes()[:14] + b"\xff" * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(str(tmp_path / "bad.jpg"), "L").size == (30, 10)


def test_a_film_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("film.gif", "film.webp", "film.tif", "film.png"):
        how = {"lossless": True} if name.endswith("webp") else {}
        path = saved(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **how)
        assert pixels(path)[0][0] == [255, 0, 0]


def test_bombs_threads_and_nothing(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    for side in (10000, 30000):  # 100 megapixels, of which Pillow only warns, and 900, which it refuses
        header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
        bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        with pytest.raises(UnreadableImage, match=rf"bomb.png: .*{side**2} pixels\) exceeds limit .*; make it smaller"):
            decode(str(bomb), "RGB")
    saved(Image.new("L", (2, 201)), tmp_path / "thread.png")
    with pytest.raises(UnreadableImage, match="2 x 201 pixels are more than 100 times as long as wide"):
        decode(str(tmp_path / "thread.png"), "RGB")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"empty.png: not a picture"):
        decode(str(tmp_path / "empty.png"), "RGB")
    with pytest.raises(ValueError, match="no pixels, 0 x 4"):
        decoding._check_sides(0, 4)
    monkeypatch.setattr(Image, "open", lambda file: Image.new("L", (0, 3)))
    with pytest.raises(UnreadableImage, match="no pixels, 0 x 3"):
        decode(str(tmp_path / "empty.png"), "RGB")


def test_an_open_file_or_a_function_that_opens_one(tmp_path):
    Image.new("L", (1, 1), 9).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    assert pixels("some name", "L", file=io.BytesIO(content)) == [[9]]
    assert pixels("some name", "L", file=lambda: io.BytesIO(content)) == [[9]]
    with pytest.raises(UnreadableImage, match=r"cannot read image some name: "):
        decode("some name", "L", file=io.BytesIO(content[:40]))


def test_the_background_reaches_every_source(glass, tmp_path):
    np.savez(tmp_path / "glass.npz", arr_0=np.asarray(Image.open(glass))[None])
    for data in (tmp_path, tmp_path / "glass.npz"):
        how = {"data_dir": str(data), "batch_size": 1, "image_size": 1, "random_flip": False, "num_workers": 0}
        middle = [take(load_data(**how, **more), 1)[0][0][0, :, 0, 0] for more in ({}, {"background": "#0000ff"})]
        assert [((x + 1) * 127.5).round().tolist() for x in middle] == [[127] * 3, [0, 0, 127]]
    with pytest.raises(ValueError, match="background is 'blurple'; choose a colour"):
        load_data(**how, background="blurple")
    check_background("none")
    x, _ = ImageDataset(1, [glass], random_flip=False, background="none")[0]
    assert ((x + 1) * 127.5).round().ravel().tolist() == [0, 0, 0]
