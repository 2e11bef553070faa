"""Fashion-MNIST and labels made wrong on purpose: what is loaded is what it should be, and damage is told."""

import gzip
import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel.data import fashion_mnist as module
from bilevel.data import load_fashion_mnist, mislabelled, root
from bilevel.errors import UsageError


def packed(values):
    """An IDX file of unsigned bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.numpy().tobytes())


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder with four small files in place of the real ones, and nothing installed."""
    images = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3)
    contents = {"images": packed(images), "labels": packed(torch.tensor([7, 2], dtype=torch.uint8))}
    folder = tmp_path / "data" / module.FOLDER
    folder.mkdir(parents=True)
    files = {}
    for key, file in module.FILES.items():
        content = contents[key.partition("_")[2]]
        (folder / file.name).write_bytes(content)
        sha256 = hashlib.sha256(gzip.decompress(content)).hexdigest()
        files[key] = module.File(file.name, hashlib.md5(content).hexdigest(), sha256)
    monkeypatch.setattr(module, "FILES", files)
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "installed")
    return folder


def test_the_real_files_are_what_they_should_be(fashion_mnist):
    assert fashion_mnist.train_images.shape == (60000, 28, 28, 1) and fashion_mnist.train_images.dtype == torch.uint8
    assert fashion_mnist.test_images.shape == (10000, 28, 28, 1)
    assert fashion_mnist.train_labels.bincount().tolist() == [6000] * 10
    assert (
        fashion_mnist.test_labels.bincount().tolist() == [1000] * 10 and fashion_mnist.test_labels.dtype == torch.int64
    )


def test_files_of_the_data_folder_come_before_installed_ones(small, monkeypatch):
    found = load_fashion_mnist(small.parent)
    assert found.train_images[1].flatten().tolist() == list(range(9, 18)) and found.test_labels.tolist() == [7, 2]
    installed = small.parent / "elsewhere"
    monkeypatch.setattr(module, "DEBIAN", installed)
    small.rename(installed)
    assert load_fashion_mnist(small.parent).train_labels.tolist() == [7, 2]


def test_a_missing_file_says_how_to_get_it(small, monkeypatch):
    def offline(address, timeout):
        raise OSError("no network here")

    monkeypatch.setattr(root.urllib.request, "urlopen", offline)
    (small / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        UsageError, match=r"train-labels-idx1-ubyte.gz is not in .* cannot be downloaded .*no network here.*data.root"
    ):
        load_fashion_mnist(small.parent)


def test_damage_is_told_in_one_sentence(small):
    path = small / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match=r"t10k-images.* is damaged: its MD5 was expected to be .* remove it"):
        load_fashion_mnist(small.parent)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no archive", r"is damaged \(Not a gzipped file.*\): remove it"),
        (
            packed(torch.zeros(2, 3, 3, dtype=torch.uint8)),
            r"is damaged: the SHA-256 of what is packed in it was expected to be",
        ),
    ],
)
def test_installed_files_are_checked_by_what_is_packed_in_them(small, monkeypatch, content, said):
    monkeypatch.setattr(module, "DEBIAN", small)
    (small / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        load_fashion_mnist(small.parent / "none")


@given(st.integers(0, 60), st.integers(2, 10), st.floats(0, 1), st.integers(0, 2**32))
def test_an_exact_share_of_labels_becomes_another_class(num, num_classes, share, seed):
    labels = torch.arange(num) % num_classes
    changed = mislabelled(labels, share, num_classes, seed)
    assert int((changed != labels).sum()) == round(share * num)
    assert num == 0 or (0 <= int(changed.min()) and int(changed.max()) < num_classes)
    torch.testing.assert_close(changed, mislabelled(labels, share, num_classes, seed))


def test_each_of_the_other_classes_is_as_likely():
    changed = mislabelled(torch.full((90000,), 3), 1.0, 10, 0)
    counts = changed.bincount(minlength=10)
    assert counts[3] == 0
    expected = torch.tensor([10000.0] * 9)
    others = torch.cat([counts[:3], counts[4:]]).float()
    assert float(((others - expected).square() / expected).sum()) < 26.1  # the 0.999 quantile of chi-square with 8


def test_a_share_is_from_0_to_1():
    with pytest.raises(UsageError, match=r"share of wrong labels was expected to be from 0 to 1, but is 1.5"):
        mislabelled(torch.zeros(3, dtype=torch.int64), 1.5, 2, 0)
