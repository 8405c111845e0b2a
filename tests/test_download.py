"""Downloads from a server of this test, whole, broken off and false; and the MNIST program that lives on them."""

import base64
import gzip
import hashlib
import http.server
import importlib.util
import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from guided_diffusion import download
from guided_diffusion.image_datasets import load_data

ROOT = Path(__file__).parent.parent
CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` and notes the Range of each request; sends no more than `limit` bytes of an answer."""

    def do_GET(self):
        served = self.server
        asked = self.headers.get("Range")
        served.asked.append((self.path, asked))
        content = served.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.resumes else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        for name, value in served.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[start:][: served.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        served.files, served.asked, served.limit, served.resumes = {"/a.bin": CONTENT}, [], None, True
        served.headers = {}
        served.url = f"http://127.0.0.1:{served.server_port}"
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


def fetch(server, folder, checksum=MD5):
    return download.fetch(f"{server.url}/a.bin", folder / "b" / "a.bin", checksum, progress=False)


def test_a_file_is_fetched_once_into_a_new_folder(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT and fetch(server, tmp_path) == path
    assert server.asked == [("/a.bin", None)] and list(path.parent.iterdir()) == [path]


def test_a_broken_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.limit = 100_000  # of the 300,000, so that it takes three connections
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [("/a.bin", None), ("/a.bin", "bytes=100000-"), ("/a.bin", "bytes=200000-")]


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server, tmp_path):
    server.limit = 50_000
    with pytest.raises(OSError, match=r"broke off after 250000 of 300000 bytes \(250000 bytes are kept.*save it as"):
        fetch(server, tmp_path)  # five connections and no more
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["a.bin.part"]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[5:] == [("/a.bin", "bytes=250000-")]


def test_a_server_that_cannot_resume_sends_everything_again(server, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.bin.part").write_bytes(b"something else")
    server.resumes = False
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_more_than_the_server_has_is_thrown_away(server, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_another_content_is_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match=r"has md5 .*, not 00000000: it came from http.* and is deleted"):
        fetch(server, tmp_path, "md5:00000000")
    assert list((tmp_path / "b").iterdir()) == []
    fetch(server, tmp_path).write_bytes(b"damaged later")
    with pytest.raises(ValueError, match=r"has md5 .* delete it, and it is fetched again"):
        fetch(server, tmp_path)


def test_checksums_may_be_sha256_and_short(server, tmp_path):
    assert fetch(server, tmp_path, f"sha256:{hashlib.sha256(CONTENT).hexdigest()[:8]}").exists()
    for wrong in ("crc:12345678", "md5:", "md5:123", "12345678"):
        with pytest.raises(ValueError, match="neither md5:HEX nor sha256:HEX"):
            fetch(server, tmp_path, wrong)


def test_what_is_not_there_is_said_with_its_address_and_leaves_nothing(server, tmp_path):
    server.files.clear()
    with pytest.raises(OSError, match=r"cannot fetch http://127.0.0.1.*/a.bin: HTTP Error 404.*save it as .*a.bin"):
        fetch(server, tmp_path)
    assert list((tmp_path / "b").iterdir()) == [] and len(server.asked) == 1


def test_a_content_of_another_size_is_not_kept(server, tmp_path):
    def fetch(size):
        return download.fetch(f"{server.url}/a.bin", tmp_path / "a.bin", progress=False, size=size)

    for size in ((300_001, 400_000), (1, 299_999)):
        with pytest.raises(ValueError, match=rf"a.bin.part has 300000 bytes, not from {size[0]} to {size[1]}: it came"):
            fetch(size)
        assert list(tmp_path.iterdir()) == []
    assert fetch((300_000, 300_000)).read_bytes() == CONTENT
    with pytest.raises(ValueError, match=r"a.bin has 300000 bytes, not from 1 to 2: delete it, and it is fetched"):
        fetch((1, 2))


@pytest.mark.parametrize("name", ["Content-MD5", "x-ms-blob-content-md5"])
def test_a_checksum_that_the_server_tells_is_obeyed(server, tmp_path, name):
    server.headers = {name: base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}
    path = tmp_path / "a.bin"
    assert download.fetch(f"{server.url}/a.bin", path, progress=False).read_bytes() == CONTENT
    path.unlink()
    server.files["/a.bin"] = CONTENT[::-1]
    with pytest.raises(ValueError, match=r"a.bin.part has md5 .*: it came from .* and is deleted"):
        download.fetch(f"{server.url}/a.bin", path, progress=False)
    server.headers = {name: "no checksum"}
    assert download.fetch(f"{server.url}/a.bin", path, progress=False).read_bytes() == CONTENT[::-1]


# -------------------------------------------------------------------------------------------------------------- MNIST


@pytest.fixture(scope="module")
def mnist():
    spec = importlib.util.spec_from_file_location("mnist_program", ROOT / "datasets" / "mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)
    made = {}
    for split, count in (("train", 12), ("test", 5)):
        made[f"x_{split}"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        made[f"y_{split}"] = rng.integers(0, 10, count, np.uint8)
    return made


def write_folder(mnist, arrays, folder, packing=""):
    folder.mkdir(exist_ok=True)
    for key, name in mnist.FILES.items():
        data = idx(arrays[key])
        (folder / f"{name}{packing}").write_bytes(gzip.compress(data) if packing else data)
    return folder


def same(out, arrays):
    for split in ("train", "test"):
        with np.load(out / f"{split}.npz", allow_pickle=False) as npz:
            assert (npz["arr_0"][..., 0] == arrays[f"x_{split}"]).all() and npz["arr_0"].dtype == np.uint8
            assert (npz["arr_1"] == arrays[f"y_{split}"]).all() and npz["arr_1"].dtype == np.int64
    return True


def test_mnist_from_a_mirror(mnist, arrays, server, tmp_path):
    folder = write_folder(mnist, arrays, tmp_path / "mirror", ".gz")
    server.files = {f"/mnist/{path.name}": path.read_bytes() for path in folder.iterdir()}
    md5 = tuple(hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest() for name in mnist.FILES.values())
    original = mnist.Original(f"{server.url}/mnist/", md5)
    out = tmp_path / "out"
    assert mnist.write_mnist(out, original=original, progress=False) == {"train": 12, "test": 5}
    assert same(out, arrays) and len(server.asked) == 4
    mnist.write_mnist(out, original=original, progress=False)
    assert len(server.asked) == 4  # what is there is not fetched again
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz.part has md5 .* deleted"):
        mnist.write_mnist(tmp_path / "real", f"{server.url}/mnist", progress=False)  # these are not MNIST
    assert not list((tmp_path / "real").rglob("*.*"))


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_mnist_from_a_folder_and_into_the_loader(mnist, arrays, tmp_path, packing):
    folder = write_folder(mnist, arrays, tmp_path / "idx", packing)
    name = mnist.FILES["x_train"] + packing
    (folder / name).rename(folder / name.replace("-idx3", ".idx3"))  # as other mirrors have it
    assert mnist.write_mnist(tmp_path / "out", folder) == {"train": 12, "test": 5}
    assert same(tmp_path / "out", arrays)
    how = {"data_dir": str(tmp_path / "out" / "train.npz"), "image_size": 28, "image_channels": 1, "num_workers": 0}
    x, cond = next(load_data(**how, batch_size=12, class_cond=True, deterministic=True, random_flip=False))
    assert (((x + 1) * 127.5).round().numpy()[:, 0] == arrays["x_train"]).all()  # the whole range, -1 to 1
    assert (cond["y"].numpy() == arrays["y_train"]).all()


def test_mnist_from_an_npz_with_or_without_a_test_set(mnist, arrays, tmp_path):
    np.savez(tmp_path / "keras.npz", **arrays)
    assert mnist.write_mnist(tmp_path / "out", tmp_path / "keras.npz", mnist.FASHION) == {"train": 12, "test": 5}
    assert same(tmp_path / "out", arrays)
    with np.load(tmp_path / "out" / "train.npz") as npz:
        assert tuple(npz["class_names"]) == mnist.FASHION.class_names and len(npz["class_names"]) == 10
    np.savez(tmp_path / "some.npz", x_train=arrays["x_train"], y_train=arrays["y_train"].astype(np.int32))
    assert mnist.write_mnist(tmp_path / "some", tmp_path / "some.npz") == {"train": 12}
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["train.npz"]


def test_the_published_files_are_named(mnist):
    """Their number of bytes is unknown here; at least no checksum is given twice or cut short."""
    for original in (mnist.MNIST, mnist.FASHION):
        assert len({md5 for md5 in original.md5 if len(md5) == 32}) == 4


def damaged(kind):
    def damage(folder, names):
        path = folder / f"{names['x_test']}.gz"
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-20])
        elif kind == "short":
            path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
        elif kind == "page":
            path.write_bytes(gzip.compress(b"<html>not found</html>"))
        elif kind == "plain":
            path.write_bytes(b"<html>not found</html>")
        elif kind == "swapped":
            path.write_bytes((folder / f"{names['y_test']}.gz").read_bytes())
        elif kind == "labels":
            (folder / f"{names['y_test']}.gz").write_bytes((folder / f"{names['y_train']}.gz").read_bytes())
        else:
            path.unlink()

    return damage


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cut", r"t10k-images-idx3-ubyte.gz is damaged or not whole"),
        ("short", r"is not whole: 3919 values for the shape \[5, 28, 28\]"),
        ("page", r"is no idx file of bytes: it begins with 3c 68 74 6d, not with 00 00 08"),
        ("plain", r"is damaged or not whole: Not a gzipped file"),
        ("swapped", r"x_test is uint8 \[5\], not uint8 \[N,28,28\]"),
        ("labels", r"y_test, uint8 \[12\], gives no label 0..9 to each image"),
        ("missing", r"no t10k-images-idx3-ubyte and no t10k-images-idx3-ubyte.gz in"),
    ],
)
def test_files_that_are_not_what_they_say_write_nothing(mnist, arrays, tmp_path, kind, message):
    folder = write_folder(mnist, arrays, tmp_path / "idx", ".gz")
    damaged(kind)(folder, mnist.FILES)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mnist.write_mnist(tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_npz_files_that_do_not_do(mnist, arrays, tmp_path):
    def refused(message, **given):
        np.savez(tmp_path / "bad.npz", **given)
        with pytest.raises(ValueError, match=message):
            mnist.write_mnist(tmp_path / "out", tmp_path / "bad.npz")

    refused("has no array y_train", x_train=arrays["x_train"])
    refused("has no array y_test", **{name: array for name, array in arrays.items() if name != "y_test"})
    refused("x_train is float64", x_train=arrays["x_train"] / 255, y_train=arrays["y_train"])
    refused("y_train, uint8", x_train=arrays["x_train"], y_train=arrays["y_train"] + 200)
    refused("as an npz of plain arrays: .*holds objects instead", x_train=np.array([{}]), y_train=arrays["y_train"])
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="as an npz of plain arrays"):
        mnist.write_mnist(tmp_path / "out", tmp_path / "text.npz")
    single = io.BytesIO()
    np.save(single, arrays["x_train"])
    (tmp_path / "one.npz").write_bytes(single.getvalue())
    with pytest.raises(ValueError, match="as an npz of plain arrays"):
        mnist.write_mnist(tmp_path / "out", tmp_path / "one.npz")


def test_the_mnist_program_ends_bad_input_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "datasets" / "mnist.py"), str(tmp_path / "out"), "--source", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: source nowhere is neither an address, nor a folder, nor a file\n"
