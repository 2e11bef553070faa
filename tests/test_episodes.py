"""Few-shot tasks: drawn as they should be, the same again from the same numbers, and from data that is what it claims."""

from __future__ import annotations

import copy
import hashlib
import http.client
import io
import socket
import threading
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.data import ClassEpisodes, Omniglot, Prefetched, Sinusoid, data_root, load_omniglot, omniglot, root
from bilevel.errors import UsageError
from bilevel.meta import Classification, Mean


def marked(num_classes=12, num_examples=6, side=4):
    """Images that say what they are: the class in one pixel, the example in the next, a corner to see turns by."""
    images = torch.zeros(num_classes, num_examples, side, side, 1, dtype=torch.uint8)
    images[:, :, 1, 1, 0] = torch.arange(num_classes, dtype=torch.uint8).unsqueeze(-1)
    images[:, :, 1, 2, 0] = torch.arange(num_examples, dtype=torch.uint8)
    images[:, :, 0, 0, 0] = 255
    return images


def pixels(inputs, row, column):
    return (inputs[..., row, column, 0] * 255).round().long()


PARTS = {"train": range(7), "validation": range(7, 9), "test": range(9, 12)}


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32))
def test_a_task_has_its_classes_and_disjoint_sets(way, shot, num_query, num_tasks, seed):
    tasks = ClassEpisodes(marked(), {"train": range(7), "test": range(7, 12)}, way, shot, num_query)
    for part, classes in (("train", range(7)), ("test", range(7, 12))):
        episode = tasks.draw(part, num_tasks, seed)
        assert episode.support.inputs.shape == (num_tasks, way * shot, 4, 4, 1)
        assert episode.query.targets.shape == (num_tasks, way * num_query)
        for task in range(num_tasks):
            seen, owner = set(), {}
            for examples in episode:
                inputs, targets = examples.inputs[task], examples.targets[task]
                assert targets.bincount().tolist() == [len(targets) // way] * way
                for name, example, label in zip(pixels(inputs, 1, 1), pixels(inputs, 1, 2), targets, strict=True):
                    assert int(name) in classes and owner.setdefault(int(label), int(name)) == int(name)
                    assert (int(name), int(example)) not in seen
                    seen.add((int(name), int(example)))
            assert len(set(owner.values())) == way


def test_a_draw_is_a_function_of_its_numbers():
    tasks = ClassEpisodes(marked(), PARTS, way=2, num_query=2)
    one, again = tasks.draw("train", 8, 0, 5), tasks.draw("train", 8, 0, 5)
    assert all(
        torch.equal(a, b) for first, second in zip(one, again, strict=True) for a, b in zip(first, second, strict=True)
    )
    for other in (tasks.draw("train", 8, 0, 6), tasks.draw("train", 8, 1, 5)):
        assert not torch.equal(one.query.inputs, other.query.inputs)


def test_classes_and_examples_are_drawn_evenly():
    tasks = ClassEpisodes(marked(), {"train": range(12)}, way=3, shot=1, num_query=1)
    episode = tasks.draw("train", 4000, 0)
    for row_column, number in (((1, 1), 12), ((1, 2), 6)):
        counts = pixels(episode.support.inputs, *row_column).flatten().bincount(minlength=number)
        expected = 12_000 / number
        assert (
            float(((counts - expected).square() / expected).sum()) < 40
        )  # a chi-square of 11 and 5 degrees of freedom


@pytest.mark.parametrize(("rotated", "still"), [("train", "test"), ("test", "train")])
def test_rotations_are_classes_of_their_own_in_the_parts_named(rotated, still):
    images = marked()
    tasks = ClassEpisodes(images, PARTS, way=2, num_query=2, rotated_parts=[rotated])
    corners = {(0, 0): 0, (3, 0): 1, (3, 3): 2, (0, 3): 3}
    turns = set()
    for seed in range(40):
        inputs = tasks.draw(rotated, 4, seed).query.inputs.view(4, 2, 2, 4, 4, 1)
        lit = {turn: inputs[..., i, j, 0] == 1 for (i, j), turn in corners.items()}
        turn = sum(turn * mask.long() for turn, mask in lit.items())
        assert torch.equal(sum(mask.long() for mask in lit.values()), torch.ones_like(turn))
        assert torch.equal(turn, turn[..., :1].expand_as(turn))  # all of a class are turned alike
        turns |= set(turn.flatten().tolist())
        assert bool((tasks.draw(still, 4, seed).query.inputs[..., 0, 0, 0] == 1).all())
    assert turns == {0, 1, 2, 3}
    many = ClassEpisodes(images, {"train": range(7)}, way=20, num_query=2, rotated_parts=["train"])
    assert many.draw("train", 2, 0).support.inputs.shape[1] == 20


@pytest.mark.parametrize("largest", [1, 3])
def test_training_images_are_moved_each_by_its_own_and_others_are_not(largest):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (12, 6, 5, 6, 2), generator=draw, dtype=torch.uint8)
    still, moving = (ClassEpisodes(images, PARTS, 2, 1, 2, shift=shift) for shift in (0, largest))
    assert torch.equal(still.draw("test", 4, 0).query.inputs, moving.draw("test", 4, 0).query.inputs)
    seen = set()
    for seed in range(30):
        before, after = (tasks.draw("train", 2, seed).query for tasks in (still, moving))
        assert torch.equal(before.targets, after.targets)
        for old, new in zip(before.inputs.flatten(0, 1), after.inputs.flatten(0, 1), strict=True):
            padded = torch.nn.functional.pad(old, (0, 0, *(largest,) * 4))
            fits = {
                (down, right)
                for down in range(-largest, largest + 1)
                for right in range(-largest, largest + 1)
                if torch.equal(padded[largest + down :, largest + right :][:5, :6], new)
            }
            assert len(fits) == 1
            seen |= fits
    assert len(seen) == (2 * largest + 1) ** 2


MISTAKES = [
    (dict(images=marked().double()), r"a tensor of bytes .* but came as torch.float64 \(12, 6, 4, 4, 1\)"),
    (dict(images=marked()[..., 0]), r"\(classes, examples, H, W, C\), but came as torch.uint8 \(12, 6, 4, 4\)"),
    (dict(images=marked().numpy()), "a tensor of bytes .* but came as a ndarray"),
    (
        dict(images=marked()[:, :, :3], rotated_parts=["train"]),
        "rotations need square images, but these have 3 x 4 pixels",
    ),
    (dict(classes={"train": range(5), "test": range(9, 13)}), "class 12 of the test part is not among .* 12 classes"),
    (dict(classes={"train": [0, 1, 1]}), "a class is in the train part twice"),
    (dict(shift=4), "shift was expected to be from 0 to 3 pixels, below the images' side, but is 4"),
    (dict(shift=0.5), "shift was expected to be from 0 to 3 pixels, below the images' side, but is 0.5"),
    (
        dict(way=29, rotated_parts=["train"]),
        r"a task of 29 classes \(way\) cannot be drawn from the train part, which has 28: lower way",
    ),
    (
        dict(way=8),
        "a task of 8 classes \\(way\\) cannot be drawn from the train part, which has 7: lower way",
    ),
    (
        dict(way=3),
        "a task of 3 classes \\(way\\) cannot be drawn from the validation part, which has 2: .* more classes, or none",
    ),
    (
        dict(shot=4, num_query=3),
        "a task needs 4 \\+ 3 examples of a class .* but each class has 6: lower one of the two",
    ),
    (dict(way=1), "way was expected to be an integer of at least 2, but is 1"),
    (dict(shot=0), "shot was expected to be an integer of at least 1, but is 0"),
    (dict(num_query=1.5), "num_query was expected to be an integer of at least 1, but is 1.5"),
    (dict(classes={**PARTS, "test": range(8, 12)}), "must share no class, but class 8 is in both validation and test"),
    (dict(classes={"training": range(7)}), "one of train, validation, test, but got 'training'"),
    (dict(rotated_parts=["tests"]), "one of train, validation, test, but got 'tests'"),
    (dict(rotated_parts="test"), "rotated_parts was expected to be a list of parts, but is 'test'"),
    (dict(rotated_parts=True), "rotated_parts was expected to be a list of parts, but is True"),
]


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES)
def test_what_cannot_be_drawn_is_told_in_one_sentence(changes, sentence):
    arguments = {"images": marked(), "classes": PARTS, "way": 2, "shot": 1, "num_query": 2, **changes}
    with pytest.raises(UsageError, match=sentence):
        ClassEpisodes(**arguments)


def test_a_part_without_classes_is_told():
    tasks = ClassEpisodes(marked(), {"train": range(7), "validation": []}, way=2, num_query=2)
    assert tasks.has_part("train") and not tasks.has_part("validation")
    with pytest.raises(UsageError, match="there are no classes for the validation part"):
        tasks.draw("validation", 1, 0)


def test_sinusoids_are_waves_of_the_paper():
    episode = Sinusoid(shot=10, num_query=50).draw("train", 500, 3)
    x, y = (torch.cat([getattr(part, name) for part in episode], 1) for name in ("inputs", "targets"))
    design = torch.stack([x.sin(), x.cos()], -1).squeeze(2)  # a sin(x - p) = a cos(p) sin x - a sin(p) cos x
    coefficients = torch.linalg.lstsq(design, y).solution.squeeze(-1)
    amplitude, phase = coefficients.norm(dim=-1), torch.atan2(-coefficients[:, 1], coefficients[:, 0])
    torch.testing.assert_close(design @ coefficients.unsqueeze(-1), y, rtol=0, atol=1e-4)
    assert 0.1 <= amplitude.min() < 0.3 and 4.7 < amplitude.max() <= 5.0
    assert -1e-4 <= phase.min() < 0.1 and 3.0 < phase.max() <= np.pi + 1e-4
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    with pytest.raises(UsageError, match="data.shot was expected to be an integer of at least 1, but is 0"):
        Sinusoid(shot=0)


class TestPrefetched:
    def test_values_are_those_of_the_function_whatever_is_asked(self):
        squares = Prefetched(lambda step: step * step)
        assert [squares(step) for step in (0, 1, 1, 5, 6, 2, 2, 3)] == [0, 1, 1, 25, 36, 4, 4, 9]

    def test_the_next_value_is_made_meanwhile(self):
        made = {0: threading.Event(), 1: threading.Event()}

        def function(step):
            if step in made:
                made[step].set()
            return step

        assert Prefetched(function)(0) == 0
        assert made[1].wait(timeout=10)

    def test_steps_in_turn_are_made_once_each_and_in_another_thread(self):
        made = []

        def function(step):
            made.append((step, threading.current_thread() is threading.main_thread()))
            return step

        prefetched = Prefetched(function)
        assert [prefetched(step) for step in (0, 0, 1, 2, 2, 3)] == [0, 0, 1, 2, 2, 3]
        assert made[:4] == [(0, True), (1, False), (2, False), (3, False)]

    def test_an_exception_belongs_to_its_step(self):
        def function(step):
            if step == 1:
                raise ValueError("one")
            return step

        prefetched = Prefetched(function)
        assert prefetched(0) == 0
        with pytest.raises(ValueError, match="one"):
            prefetched(1)
        assert prefetched(2) == 2

    def test_a_copy_works_by_itself(self):
        prefetched = Prefetched(abs)
        prefetched(3)
        assert copy.deepcopy(prefetched)(-4) == 4


class TestData:
    def test_the_folder_is_given_or_from_the_environment_or_in_the_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv(root.VARIABLE, str(tmp_path))
        assert data_root("here").name == "here" and data_root() == tmp_path
        monkeypatch.delenv(root.VARIABLE)
        assert data_root().parts[-2:] == (".cache", "bilevel")

    def test_omniglot_is_what_it_should_be(self, omniglot_root):
        images = load_omniglot(omniglot_root)
        assert images.shape == (1623, 20, 28, 28, 1) and images.dtype == torch.uint8
        tasks = Omniglot(omniglot_root, num_validation=50)
        assert {part: len(classes) for part, classes in tasks.classes.items()} == {
            "train": 914,
            "validation": 50,
            "test": 659,
        }
        mixed = Omniglot(omniglot_root, split="random", num_validation=0, split_seed=1)
        assert len(mixed.classes["train"]) == 1200 and len(mixed.classes["test"]) == 423
        assert not set(mixed.classes["train"]) & set(mixed.classes["test"])
        assert set(mixed.classes["test"]) != set(range(1200, 1623))

    @pytest.mark.parametrize(("way", "known"), [(5, 0.476), (20, 0.281)])
    def test_the_nearest_pixels_are_the_known_floor(self, omniglot_root, way, known):
        episode = Omniglot(omniglot_root, way=way).draw("test", 300, 0)
        floor = Mean.of(Classification().floor(episode))
        assert abs(floor.value - known) < 2 * floor.half_width

    def test_damage_is_told_in_one_sentence(self, omniglot_root, tmp_path):
        content = (data_root(omniglot_root) / omniglot.FILE).read_bytes()
        array = io.BytesIO()
        np.save(array, np.zeros(3))
        for damaged in (content[: len(content) // 2], b"", b"no archive at all", array.getvalue()):
            (tmp_path / omniglot.FILE).write_bytes(damaged)
            with pytest.raises(UsageError, match=r"omniglot28.npz is damaged .*: remove it to have it made again"):
                load_omniglot(tmp_path)
        images = load_omniglot(omniglot_root).squeeze(-1).numpy().copy()
        images[100, 3, 5, 5] ^= 1
        np.savez(tmp_path / omniglot.FILE, images=images)
        with pytest.raises(UsageError, match=r"damaged: the SHA-256 of its images is \w+... instead of 8784741eae4c"):
            load_omniglot(tmp_path)

    def test_a_file_that_may_not_be_read_is_not_called_damaged(self, monkeypatch, tmp_path):
        def forbidden(path, allow_pickle):
            raise PermissionError(13, "Permission denied")

        (tmp_path / omniglot.FILE).write_bytes(b"what is in it does not matter")
        monkeypatch.setattr(omniglot.np, "load", forbidden)  # not by chmod: root may read everything
        with pytest.raises(UsageError, match=r"npz cannot be read \(.*Permission denied\): give yourself the right"):
            load_omniglot(tmp_path)

    def test_a_server_that_says_nothing_is_given_up(self, monkeypatch, tmp_path):
        monkeypatch.setattr(root, "PATIENCE", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(omniglot, "ADDRESS", f"http://127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(UsageError, match=r"cannot be downloaded from http.* \(timed out\): put the file there"):
                load_omniglot(tmp_path / "none")
        assert not list(tmp_path.iterdir())

    def test_an_archive_that_may_not_be_read_is_told(self, monkeypatch, tmp_path):
        def forbidden(path):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "images_background.zip").write_bytes(b"what is in it does not matter")
        monkeypatch.setattr(root, "_md5", forbidden)
        with pytest.raises(UsageError, match=r"background.zip cannot be read \(.*Permission denied\): give yourself"):
            load_omniglot(tmp_path)

    def test_a_download_that_breaks_off_is_told(self, monkeypatch, tmp_path):
        class Broken(io.BytesIO):
            def read(self, *size):
                raise http.client.IncompleteRead(b"half", 4)

        monkeypatch.setattr(root.urllib.request, "urlopen", lambda address, timeout: Broken())
        with pytest.raises(UsageError, match=r"cannot be downloaded from .* \(IncompleteRead.*\): put the file there"):
            load_omniglot(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_missing_file_says_how_to_get_it(self, monkeypatch, tmp_path):
        def offline(address, timeout):
            raise OSError("no network here")

        monkeypatch.setattr(root.urllib.request, "urlopen", offline)
        (tmp_path / "file").touch()
        for folder in ("none", "file"):
            with pytest.raises(
                UsageError,
                match=r"omniglot28.npz is not in .* cannot be made: images_background.zip is not in .* cannot be downloaded .*no network here",
            ):
                load_omniglot(tmp_path / folder)
        assert [one.name for one in tmp_path.iterdir()] == ["file"]  # no folder for a misspelt one

    def test_a_wrong_download_is_told_and_a_right_one_kept(self, monkeypatch, tmp_path):
        monkeypatch.setattr(root.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(b"other"))
        with pytest.raises(UsageError, match=r"sent is not images_background.zip: its MD5 was expected to be 68d2efa1"):
            load_omniglot(tmp_path)
        assert not list(tmp_path.iterdir())
        (tmp_path / "images_background.zip").write_bytes(b"other")
        with pytest.raises(UsageError, match=r"is damaged: its MD5 was expected to be 68d2efa1.* remove it"):
            load_omniglot(tmp_path)
        (tmp_path / "right").write_bytes(b"right")
        root.fetch("nowhere", tmp_path / "right", hashlib.md5(b"right").hexdigest())

    def test_official_archives_become_the_array(self, monkeypatch, tmp_path):
        from PIL import Image

        draw = np.random.default_rng(0)
        bitmaps = draw.random((2, 3, 105, 105)) < 0.8  # True is paper
        sums = {}
        for name, character in zip(omniglot.ARCHIVES, bitmaps, strict=True):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                for number, bitmap in enumerate(character):
                    data = io.BytesIO()
                    Image.fromarray(bitmap).save(data, "PNG")
                    archive.writestr(f"images/Alphabet/character01/{number:04}_01.png", data.getvalue())
            sums[name] = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setattr(omniglot, "ARCHIVES", sums)
        warned = pytest.warns(UserWarning, match="are not those of the documented figures .* instead of 8784741eae4c")
        with warned:
            images = load_omniglot(tmp_path)
        assert images.shape == (2, 3, 28, 28, 1)
        ink = 255 * (1 - bitmaps.mean((-2, -1)))
        np.testing.assert_allclose(images.squeeze(-1).double().mean((-2, -1)), ink, atol=1.5)  # averages keep the mean
        top_left = 255 * (1 - bitmaps[..., :4, :4].astype(float))
        weights = np.full(4, 0.25)  # whole pixels only
        np.testing.assert_allclose(images[..., 0, 0, 0], np.einsum("i,j,abij->ab", weights, weights, top_left), atol=1)
        assert (tmp_path / omniglot.FILE).is_file()
        with warned:  # each time, for figures of a later run are no more the documented ones
            assert torch.equal(load_omniglot(tmp_path), images)  # from the file, by the checksum that it was given

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"split": "offical"}, "data.split was expected to be 'official' or 'random', but is 'offical'"),
            (
                {"num_validation": 964},
                "data.num_validation was expected to be from 0 to 963, of the 964 training characters",
            ),
        ],
    )
    def test_a_split_that_there_is_not_is_told(self, omniglot_root, changes, sentence):
        with pytest.raises(UsageError, match=sentence):
            Omniglot(omniglot_root, **changes)
