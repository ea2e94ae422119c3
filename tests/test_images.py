"""Folders of images: the standard pictures, the same ones in any number of processes."""

import numpy as np
import pytest
import torch
from oracles import generator, global_generator_untouched
from PIL import Image
from torchvision.transforms.functional import center_crop, resize, to_tensor

from bpfree.data import data_root
from bpfree.experiments.record import record
from bpfree.experiments.staged import StagesRecipe
from bpfree.images import MEAN, STD, Images
from bpfree.training.fit import OutOfTime

pytestmark = pytest.mark.processes
CLASSES = ("ant", "bee", "cow")


def folder_of_images(root, classes=CLASSES, train=6, val=3):
    """An ImageFolder of noise, pictures of several shapes, grey ones among them."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in classes:
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                shape = (20 + 2 * i, 30 - i, 3) if i else (25, 25)
                picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                picture.save(root / part / label / f"{label}_{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def images(folder):
    return Images(str(folder), side=14, workers=0)


def test_labels_are_the_sorted_folders(images):
    assert images.num_classes == 3
    assert images.train_y.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert images.test_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_test_pictures_are_resized_by_the_shorter_side_and_cut_in_the_centre(images, folder):
    (x,) = images.batches("test", [torch.tensor([0, 4])], dtype=torch.float64)
    assert x.shape == (2, 3, 14, 14)
    assert x.dtype == torch.float64
    for picture, file in zip(x, ("ant/ant_0", "bee/bee_1"), strict=True):
        given = Image.open(folder / "val" / f"{file}.JPEG").convert("RGB")
        cut = to_tensor(center_crop(resize(given, 16), 14))
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        torch.testing.assert_close(picture, ((cut - mean) / std).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_befalls_a_picture_is_decided_by_its_number_and_the_draw(workers, folder, images):
    order = torch.randperm(18, generator=generator())
    expected = torch.cat([*images.batches("train", order.split(6), draw=7)])
    with global_generator_untouched():
        other = Images(str(folder), side=14, workers=workers)
        again = torch.cat([*other.batches("train", order.split(2), draw=7)])
    assert torch.equal(again, expected)
    anew = torch.cat([*images.batches("train", order.split(6), draw=8)])
    assert all(not torch.equal(a, b) for a, b in zip(anew, expected, strict=True))


def test_training_pictures_are_cropped_and_mirrored(tmp_path):
    ramp = np.linspace(0, 255, 60)[None, :, None].repeat(40, 0).repeat(3, 2)
    for part in ("train", "val"):
        (tmp_path / part / "one").mkdir(parents=True)
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / part / "one" / "ramp.png")
    images = Images(str(tmp_path), side=8, workers=0)
    seen = [next(images.batches("train", [torch.tensor([0])], draw))[0, 0] for draw in range(40)]
    widths = {round(float((x[:, -1] - x[:, 0]).mean().abs()), 2) for x in seen}
    assert len(widths) > 20
    rising = sum(bool(x[0, 0] < x[0, -1]) for x in seen)
    assert 8 <= rising <= 32


def test_the_checksum_changes_with_a_file_and_with_the_side(tmp_path):
    root = folder_of_images(tmp_path)
    images = Images(str(root), side=14)
    assert images.checksum is images.checksum  # of a million files, asked for once
    before = images.checksum
    assert Images(str(root), side=14).checksum == before
    assert Images(str(root), side=15).checksum != before
    with open(root / "val" / "ant" / "ant_0.JPEG", "ab") as file:
        file.write(b"\0")
    assert Images(str(root), side=14).checksum != before


def test_what_is_missing_or_misused_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*imagenet/train"):
        Images("imagenet", root=tmp_path)
    root = folder_of_images(tmp_path / "a")
    (root / "val" / "cow").rename(root / "val" / "dog")
    with pytest.raises(ValueError, match="same classes"):
        Images(str(root))
    with pytest.raises(ValueError, match="got 0 and 4"):
        Images(str(root), side=0)
    with pytest.raises(ValueError, match="got 14 and -1"):
        Images(str(root), side=14, workers=-1)


@pytest.mark.skipif(
    not (data_root() / "tiny-imagenet-200" / "train").is_dir(), reason="no Tiny-ImageNet here"
)
def test_tiny_imagenet_is_read_by_workers():
    images = Images("tiny-imagenet", workers=2)
    order = torch.randperm(len(images.train_y), generator=generator())[:256]
    seen = [*images.batches("train", order.split(64), draw=1)]
    assert [x.shape for x in seen] == [(64, 3, 64, 64)] * 4
    x = torch.cat(seen)
    assert x.isfinite().all()
    assert x.std(0).mean() > 0.5  # normalised pictures, not all the same
    assert len(images.test_y) == 50 * images.num_classes


def test_a_recipe_of_stages_is_recorded_from_a_folder_of_images(tmp_path):
    folder_of_images(tmp_path / "tiny-imagenet-200")
    options = {"n": 2, "local": True, "weights": (0.5, 1.0)}
    recipe = StagesRecipe(
        "small", "tiny-imagenet", ("resnet8", (3,), {"width": 2}), "Stages", options,
        epochs=2, lr=0.05, batch_size=6,
    )  # fmt: skip
    result = record(recipe, [3], data_root=tmp_path, folder=tmp_path)
    (run,) = result["runs"].values()
    assert [len(run[k]) for k in ("train_loss", "test_accuracy", "stage_accuracy")] == [2, 2, 2]
    assert all(len(stages) == 2 for stages in run["stage_loss"])
    assert run["test_accuracy"] == [stages[-1] for stages in run["stage_accuracy"]]
    again = recipe.fit(recipe.load(tmp_path), [3])
    assert again.test_accuracy[0].tolist() == pytest.approx(run["test_accuracy"], abs=1e-4)
    with pytest.raises(OutOfTime, match="after epoch 0 of 2"):
        recipe.fit(recipe.load(tmp_path), [3], deadline=0.0)
    with pytest.raises(FileNotFoundError, match="tiny-imagenet: no folder"):
        recipe.load(tmp_path / "elsewhere")
