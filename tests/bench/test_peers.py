"""The peers of `fastseg bench data` do the same work as our tiers: nothing is compared with less."""

import itertools
import multiprocessing
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.bench import peers
from fastseg.data.layouts import Pair, find
from fastseg.environment import install

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZE = (96, 144)

# float32 around 1 / STD: the relative bound alone cannot hold for pixels close to the mean, which become almost 0.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=peers.PEERS)
def peer(request):
    found, missing = peers.available()
    if request.param in missing:
        pytest.skip(missing[request.param])
    return found[request.param]


@pytest.fixture
def pairs(street) -> list[Pair]:
    return list(find(street).splits["train"][:3])


def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    return np.array(Image.open(pair.image)), np.array(Image.open(pair.label))


def check_form(images: torch.Tensor, labels: torch.Tensor, batch: int, size: tuple[int, int]) -> None:
    assert (images.shape, images.dtype) == ((batch, 3, *size), torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.shape, labels.dtype) == ((batch, *size), torch.uint8)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_peer_gives_the_files_pixels_normalised_and_their_labels(peer, pairs, workers):
    wanted = {label.tobytes(): (image / 255 - MEAN) / STD for image, label in map(read, pairs)}
    assert len(wanted) == 3
    made, seen = peer(pairs, SIZE, 2, workers, augment=False), set()
    for images, labels in itertools.islice(made, 6):  # past the end of three epochs
        check_form(images, labels, 2, SIZE)
        for image, label in zip(images, labels, strict=True):
            seen.add(label.numpy().tobytes())
            np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), wanted[label.numpy().tobytes()], **CLOSE)
    made.close()
    assert seen == wanted.keys()


def test_a_batch_may_be_larger_than_the_data(peer, pairs):
    made = peer(pairs, SIZE, 7, 0)
    check_form(*next(made), 7, SIZE)
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_peer_mirrors_and_moves_image_and_label_alike(peer, pairs, workers):
    image, label = read(pairs[0])
    # All that a sample may be, by its label: cut out of the file with a border of black and void around it.
    allowed: dict[bytes, list[tuple[tuple[bool, int, int], np.ndarray]]] = {}
    for mirrored in (False, True):
        step = -1 if mirrored else 1
        wide_image = np.pad(image[:, ::step], ((10, 10), (10, 10), (0, 0)))
        wide_label = np.pad(label[:, ::step], 10, constant_values=255)
        for y, x in itertools.product(range(21), repeat=2):
            cut = (slice(y, y + 96), slice(x, x + 144))
            allowed.setdefault(wide_label[cut].tobytes(), []).append(((mirrored, y, x), wide_image[cut]))
    made, seen = peer(pairs[:1], SIZE, 1, workers), []
    for images, labels in itertools.islice(made, 24):
        check_form(images, labels, 1, SIZE)
        pixels = images[0].permute(1, 2, 0).numpy()
        cuts = allowed[labels[0].numpy().tobytes()]
        found = [how for how, cut in cuts if np.allclose(pixels, (cut / 255 - MEAN) / STD, **CLOSE)]
        assert len(found) == 1
        seen += found
    made.close()
    assert {mirrored for mirrored, _, _ in seen} == {False, True}
    for axis in (1, 2):
        assert len({how[axis] for how in seen}) > 6
    assert seen[::2] != seen[1::2]  # two workers take turns and must not draw the same


def test_a_peer_resizes_what_has_another_size(peer, pairs):
    values = {value for pair in pairs for value in np.unique(read(pair)[1])}
    made = peer(pairs, (48, 72), 3, 0, augment=False)
    images, labels = next(made)
    made.close()
    check_form(images, labels, 3, (48, 72))
    assert set(labels.unique().tolist()) <= values  # none is between two classes
    # A smaller copy has the mean of the whole.
    whole = np.mean([((read(pair)[0] / 255 - MEAN) / STD) for pair in pairs], axis=(0, 1, 2))
    np.testing.assert_allclose(images.mean((0, 2, 3)).numpy(), whole, atol=0.02)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_closing_a_peer_ends_its_workers(peer, pairs, workers):
    threads = set(threading.enumerate())
    made = peer(pairs, SIZE, 2, workers)
    next(made)
    if workers:
        assert multiprocessing.active_children() or set(threading.enumerate()) - threads
    made.close()
    assert multiprocessing.active_children() == []
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)  # the thread of a queue ends a moment later
        assert not thread.is_alive()


def asleep(*_):
    time.sleep(3)


def test_a_peer_whose_workers_hang_is_an_error(peer, pairs, monkeypatch):
    module = sys.modules[peer.__module__]
    monkeypatch.setattr(module.Pairs, "__getitem__", asleep)
    for waits in (peers, module):
        monkeypatch.setattr(waits, "STUCK", 0.5, raising=False)
    made = peer(pairs, SIZE, 1, 1)
    with pytest.raises(Exception, match=r"after 0\.5 sec"):
        next(made)
    assert multiprocessing.active_children() == []


def test_workers_take_as_much_shared_memory_as_was_reckoned(pairs, monkeypatch):
    if peers.shared_memory() is None:
        pytest.skip("no /dev/shm")
    assert peers.shared_bytes((96, 144), 2, 0) == 0
    assert peers.shared_bytes((96, 144), 2, 3) == 7 * 2 * 96 * 144 * 13
    (peer,) = [found for name, found in peers.available()[0].items() if "torchvision" in name]
    # Batches of 12.8 MB, so that other users of the machine's shared memory do not matter.
    size, batch, workers = (512, 640), 3, 2
    before = peers.shared_memory()[1]
    made, taken = peer(pairs, size, batch, workers), []
    for _ in range(4):
        kept = next(made)
        time.sleep(0.5)  # they make what they may
        taken.append(before - peers.shared_memory()[1])
    del kept
    made.close()
    assert 0.7 < max(taken) / peers.shared_bytes(size, batch, workers) < 1.15


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_an_error(peer, pairs, tmp_path, workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    made = peer([Pair("broken", str(broken), pairs[0].label)], SIZE, 1, workers)
    with pytest.raises(Exception, match=r"."):
        next(made)
    assert multiprocessing.active_children() == []


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
    order = list(itertools.islice(peers.shuffled(50), 150))
    epochs = [order[:50], order[50:100], order[100:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert len(set(map(tuple, epochs))) == 3


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found, missing = peers.available()
    assert list(found) == ["torchvision DataLoader"]
    assert missing == {
        "albumentations DataLoader": f"albumentations, cv2 not installed: {install('peers')}",
        "SPDL": f"albumentations, cv2, spdl not installed: {install('peers')}",
    }
