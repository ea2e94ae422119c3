"""Data sets: what is loaded is what it says, and nothing missing or damaged is trained on."""

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import bpfree
from bpfree.data import Data, data_root

pytestmark = pytest.mark.processes
DIGITS_SHA256 = "c919f97cc7cf8133853f56193dc9589ed8f33e5f10ffbf06498a10cd52b2179b"


def test_digits_are_scikit_learns_with_every_fifth_image_for_testing(digits):
    bunch = load_digits()
    images, labels = torch.tensor(bunch.images), torch.tensor(bunch.target)
    test = [i for i in range(1797) if i % 5 == 4]
    train = [i for i in range(1797) if i % 5 != 4]
    for x, y, index in (
        (digits.train_x, digits.train_y, train),
        (digits.test_x, digits.test_y, test),
    ):
        assert x.shape == (len(index), 1, 8, 8)
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert torch.equal(x[:, 0].double(), images[index])
        assert torch.equal(y, labels[index])
    assert digits.name == "digits"
    assert digits.num_classes == 10


def test_digits_are_the_default():
    assert bpfree.load().name == "digits"


def test_inputs_are_in_zero_to_one_in_the_dtype_asked_for(digits):
    x = digits.inputs(digits.train_x)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(digits.inputs(digits.train_x, torch.float64), digits.train_x.double() / 16)


def test_a_shift_is_added_to_the_scaled_inputs_and_kept(digits):
    moved = dataclasses.replace(digits, shift=-0.5)
    for data in (moved, moved.to("cpu"), moved.holdout(200)):
        x = data.inputs(data.train_x, torch.float64)
        torch.testing.assert_close(x, data.train_x.double() / 16 - 0.5)
    assert digits.shift == 0


def test_the_checksum_is_over_images_and_labels_and_known(digits):
    tensors = (digits.train_x, digits.train_y, digits.test_x, digits.test_y)
    whole = b"".join(t.numpy().tobytes() for t in tensors)
    assert digits.checksum == hashlib.sha256(whole).hexdigest() == DIGITS_SHA256
    assert bpfree.load("digits").checksum == digits.checksum


def test_the_checksum_changes_with_one_pixel_or_one_label(digits):
    x, y = digits.train_x.clone(), digits.train_y.clone()
    x[3, 0, 4, 4] += 1
    y[3] = (y[3] + 1) % 10
    for train_x, train_y in ((x, digits.train_y), (digits.train_x, y)):
        changed = Data("digits", train_x, train_y, digits.test_x, digits.test_y, digits.scale)
        assert changed.checksum != digits.checksum


def test_a_holdout_is_the_end_of_the_training_set_and_never_the_test_set(digits):
    part = digits.holdout(200)
    assert torch.equal(part.train_x, digits.train_x[:-200])
    assert torch.equal(part.train_y, digits.train_y[:-200])
    assert torch.equal(part.test_x, digits.train_x[-200:])
    assert torch.equal(part.test_y, digits.train_y[-200:])
    assert part.scale == digits.scale
    assert part.name == "digits-holdout200"
    assert part.checksum != digits.checksum


@pytest.mark.parametrize("n", [0, -1, 1438, 5000])
def test_a_holdout_that_leaves_nothing_is_refused(n, digits):
    with pytest.raises(ValueError, match=rf"1\.\.1437, got {n}"):
        digits.holdout(n)


def test_data_moves_with_to(digits):
    moved = digits.to("meta")
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert getattr(moved, name).device.type == "meta"
    assert (moved.name, moved.scale) == (digits.name, digits.scale)


# ---- where data sets are looked for --------------------------------------------------------------


def test_the_root_is_the_argument_else_the_variable_else_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BPFREE_DATA", str(tmp_path / "variable"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root(tmp_path) == tmp_path
    assert data_root() == tmp_path / "variable"
    monkeypatch.delenv("BPFREE_DATA")
    assert data_root() == tmp_path / "cache" / "bpfree"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "bpfree"


@pytest.mark.parametrize("where", ["argument", "variable"])
def test_a_tilde_is_the_home_folder(where, monkeypatch):
    monkeypatch.setenv("BPFREE_DATA", "~/data")
    assert data_root("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert data_root("~/data" if where == "argument" else None) == Path.home() / "data"
    assert bpfree.results.path("x", "~/runs") == Path.home() / "runs" / "x.json"


# ---- data of one's own ---------------------------------------------------------------------------


def mine(**changes):
    x, y = np.zeros((6, 1, 2, 2), np.uint8), np.arange(6) % 3
    fields = dict(train_x=x, train_y=y, test_x=x[:2], test_y=y[:2].tolist(), scale=1.0)
    return Data("mine", **fields | changes)


@pytest.mark.parametrize("kind", [np.int64, np.uint16, np.uint8])
def test_arrays_and_lists_become_tensors_that_train(kind):
    data = mine(train_y=(np.arange(6) % 3).astype(kind))
    assert data.train_x.dtype == torch.uint8
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    make = lambda g: bpfree.Backprop(bpfree.mlp(4, 3, 3, generator=g))  # noqa: E731
    assert bpfree.fit(make, data.to("cpu"), epochs=1, batch_size=3).train_loss.shape == (1, 1)


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"train_x": [["a"]]}, TypeError, "train_x must be a tensor or an array of numbers"),
        ({"train_x": np.zeros(6)}, ValueError, r"train_x must be \(N >= 1, ...\), got \(6,\)"),
        ({"train_x": np.zeros((0, 4))}, ValueError, r"train_x must be.*got \(0, 4\)"),
        ({"train_x": np.zeros((6, 4), complex)}, TypeError, "train_x must hold real.*complex128"),
        ({"test_x": np.zeros((2, 1, 3, 3))}, ValueError, r"test_x.*\(1, 2, 2\).*\(1, 3, 3\)"),
        ({"train_y": np.zeros(6)}, TypeError, "train_y must hold integer.*float64"),
        ({"train_y": np.zeros((6, 3), int)}, ValueError, r"train_y .*\(6,\), got \(6, 3\)"),
        ({"test_y": [0]}, ValueError, r"test_y must have shape \(2,\), got \(1,\)"),
        ({"test_y": [0, -1]}, ValueError, "test_y must hold classes >= 0, got -1"),
        ({"scale": math.nan}, ValueError, "scale.*nan"),
        ({"scale": None}, ValueError, "scale must be a finite number, got None"),
        ({"test_x": np.full((2, 1, 2, 2), np.inf)}, ValueError, "test_x must be finite"),
    ],
)
def test_data_that_cannot_be_used_are_refused_when_they_are_made(changes, exception, message):
    with pytest.raises(exception, match=message):
        mine(**changes)


# ---- refusals ------------------------------------------------------------------------------------

FIRST_FILES = {  # data set -> its first file, by torchvision's layout
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion-mnist": "FashionMNIST/raw/train-images-idx3-ubyte",
    "cifar10": "cifar-10-batches-py/data_batch_1",
    "cifar100": "cifar-100-python/train",
    "svhn": "train_32x32.mat",
}
every_download = pytest.mark.parametrize("name", FIRST_FILES)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'minst'.*digits, mnist, fashion-mnist, cifar10"):
        bpfree.load("minst")


@every_download
def test_a_missing_file_is_named_with_the_command_that_fetches_it(name, tmp_path):
    with pytest.raises(FileNotFoundError) as refusal:
        bpfree.load(name, tmp_path)
    message = str(refusal.value)
    assert str(tmp_path / FIRST_FILES[name]) in message
    assert f"bpfree.load('{name}', root='{tmp_path}', download=True)" in message


def test_the_fetch_command_is_a_python_program(tmp_path):
    with pytest.raises(FileNotFoundError) as refusal:
        bpfree.load("mnist", tmp_path)
    program = str(refusal.value).split("python -c ")[1]
    compile(program.strip().strip('"'), "fetch", "exec")


@every_download
def test_a_damaged_file_is_named_and_not_loaded(name, tmp_path):
    path = tmp_path / FIRST_FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x00\x00\x08\x03 this is no data set")
    with pytest.raises(ValueError) as refusal:
        bpfree.load(name, tmp_path)
    assert str(path) in str(refusal.value)
    assert "damaged" in str(refusal.value)


# ---- the real ones, where they are ---------------------------------------------------------------

ROOT = os.environ.get("BPFREE_DATA")
real = pytest.mark.skipif(not ROOT, reason="BPFREE_DATA is not set: no real data sets here")

REAL = {  # name -> train images, shape, labels per class, first label, mean of the training pixels
    "mnist": (60000, (1, 28, 28), None, 5, [0.1307]),
    "fashion-mnist": (60000, (1, 28, 28), 6000, 9, [0.2860]),
    "cifar10": (50000, (3, 32, 32), 5000, 6, [0.4914, 0.4822, 0.4465]),
    "cifar100": (50000, (3, 32, 32), 500, 19, [0.5071, 0.4865, 0.4409]),
}


@real
@pytest.mark.parametrize("name", REAL)
def test_a_real_data_set_has_its_known_contents(name):
    count, shape, per_class, first, means = REAL[name]
    data = bpfree.load(name)
    assert data.train_x.shape == (count, *shape)
    assert data.test_x.shape == (10000, *shape)
    classes = 100 if name == "cifar100" else 10
    assert data.num_classes == classes
    assert int(data.train_y[0]) == first
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.dtype == torch.uint8
        assert (int(x.min()), int(x.max())) == (0, 255)
        assert y.dtype == torch.int64
        assert y.shape == (len(x),)
    if per_class:
        assert data.train_y.bincount().tolist() == [per_class] * classes
    pixels = data.train_x.sum((0, 2, 3)) / (data.train_x.numel() / shape[0]) * data.scale
    torch.testing.assert_close(pixels, torch.tensor(means), atol=1e-4, rtol=0)


@real
def test_one_flipped_bit_in_a_real_file_is_found(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (Path(ROOT) / "MNIST" / "raw").glob("*-ubyte"):
        (raw / file.name).symlink_to(file)
    assert len(bpfree.load("mnist", tmp_path).train_x) == 60000
    victim = raw / "t10k-labels-idx1-ubyte"
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.unlink()
    victim.write_bytes(content)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is damaged"):
        bpfree.load("mnist", tmp_path)
