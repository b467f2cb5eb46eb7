"""From decoded uint8 pixels to a training batch in one pass: gather, resize, mirror, move, recolour, normalise, cast.

Images and labels go together. A sample is a window of H x W pixels in an image that may be larger. It is resized to
`rows` x `columns` where it has another size, mirrored left-right where `mirror`, then moved by (dy, dx) whole pixels,
of which the top left `height` x `width` are kept; uncovered pixels are 0 (black, before normalisation) and VOID.
Resizing is that of `fastseg.pipelines.resize`, and looks at no pixel beside the window. Where a sample has a matrix of
colours, covered pixels become `recoloured` ones.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastseg.data.classes import VOID
from fastseg.kernels.launch import empty, operator
from fastseg.pipelines.resize import resize_image, resize_label


class Move(NamedTuple):
    """What happens to a sample: mirrored first, then moved down and to the right."""

    mirror: bool
    dy: int
    dx: int


def torch_augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    samples_B10: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
    resize: bool,
    colours_B12: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With PyTorch's operations, and NumPy's to resize: as `augment`."""
    device, all_images, all_labels = images.device, images.flatten(), labels.flatten()
    out = torch.zeros(len(samples_B10), height, width, 3, device=device)
    labels_out = torch.full((len(samples_B10), height, width), VOID, dtype=torch.uint8, device=device)
    for number, sample in enumerate(samples_B10.tolist()):
        image_at, label_at, H, W, pitch, rows, columns, mirror, dy, dx = sample
        image = all_images[image_at:].as_strided((H, W, 3), (3 * pitch, 3, 1))
        label = all_labels[label_at:].as_strided((H, W), (pitch, 1))
        if resize:
            image = torch.from_numpy(resize_image(image.cpu().numpy(), (rows, columns)).copy()).to(device)
            label = torch.from_numpy(resize_label(label.cpu().numpy(), (rows, columns))).to(device)
        if mirror:
            image, label = image.flip(1), label.flip(1)
        top, bottom, left, right = max(dy, 0), min(height, rows + dy), max(dx, 0), min(width, columns + dx)
        if top < bottom and left < right:
            from_image = slice(top - dy, bottom - dy), slice(left - dx, right - dx)
            pixels = image[from_image].float()
            out[number, top:bottom, left:right] = (
                pixels if colours_B12 is None else recolour(pixels, colours_B12[number])
            )
            labels_out[number, top:bottom, left:right] = label[from_image]
    return ((out - mean_3) / std_3).to(dtype).permute(0, 3, 1, 2), labels_out


def recolour(pixels_HW3: torch.Tensor, matrix_12: torch.Tensor) -> torch.Tensor:
    """Each channel m0 red + m1 green + m2 blue + m3, summed in this order in fp32, and cut off at 0 and 255."""
    red, green, blue = pixels_HW3.unbind(-1)
    rows = matrix_12.view(3, 4)
    return torch.stack([red * m0 + green * m1 + blue * m2 + m3 for m0, m1, m2, m3 in rows], -1).clamp(0, 255)


def augment_by_slices(
    sample: Callable[[int], tuple[np.ndarray, np.ndarray]],
    moves: Sequence[Move],
    mean_3: np.ndarray,
    std_3: np.ndarray,
    dtype: torch.dtype,
    height: int,
    width: int,
    run: Callable[[Callable[..., None], Iterable[Any]], Iterable[None]] = map,
    colours_B12: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `augment`, on a CPU: whole windows instead of a gather per pixel, sample by sample.

    NumPy does it, each call on the thread that makes it: torch's own threads would compete with those that decode.
    Lines of 3 W values keep the inner loops long, where 3 channels would make them short.

    Args:
        sample: gives an image uint8[H, W, 3] and its label uint8[H, W] by number, resized already.
        moves: of the samples by number.
        run: `map`, or that of a pool of threads.
        colours_B12: see `augment`.
    """
    images = torch.empty(len(moves), height, width, 3)
    labels = torch.empty(len(moves), height, width, dtype=torch.uint8)

    def one(number: int) -> None:
        out, moved = images[number].numpy(), labels[number].numpy()
        image, label = sample(number)
        (H, W), (mirror, dy, dx) = label.shape, moves[number]
        top, bottom, left, right = max(dy, 0), min(height, H + dy), max(dx, 0), min(width, W + dx)
        if (top, bottom, left, right) != (0, height, 0, width):
            out.fill(0)
            moved.fill(VOID)
        if top < bottom and left < right:
            rows, columns = slice(top - dy, bottom - dy), slice(left - dx, right - dx)
            if mirror:
                columns = slice(W - columns.stop, W - columns.start)
            image, label = image[rows, columns], label[rows, columns]
            moved[top:bottom, left:right] = label[:, ::-1] if mirror else label
            if colours_B12 is not None:
                recolour_into(out[top:bottom, left:right], image[:, ::-1] if mirror else image, colours_B12[number])
            else:
                out[top:bottom, left:right] = mirrored(image) if mirror else image
        normalise_in_place(out, mean_3, std_3)

    for _ in run(one, range(len(moves))):
        pass
    return images.to(dtype).permute(0, 3, 1, 2), labels


def normalise_in_place(pixels_HW3: np.ndarray, mean_3: np.ndarray, std_3: np.ndarray) -> None:
    """fp32 pixels become (pixel - mean) / std."""
    height, width, _ = pixels_HW3.shape
    lines = pixels_HW3.reshape(height, 3 * width)
    np.subtract(lines, np.tile(mean_3, width), out=lines)
    np.divide(lines, np.tile(std_3, width), out=lines)


def recoloured(image_HW3: np.ndarray, matrix_12: np.ndarray) -> np.ndarray:
    """float32[H, W, 3]: as `recolour`."""
    out = np.empty(image_HW3.shape, np.float32)
    recolour_into(out, image_HW3, matrix_12)
    return out


LINES = 64  # rows that are recoloured at once: what they take stays in a core's own cache


def recolour_into(out_HW3: np.ndarray, image_HW3: np.ndarray, matrix_12: np.ndarray) -> None:
    """As `recolour`, channel by channel, of an image of bytes into one of fp32."""
    height, width, _ = image_HW3.shape
    planes = np.empty((3, min(LINES, height), width), np.float32)
    total, product = np.empty_like(planes[0]), np.empty_like(planes[0])
    for top in range(0, height, LINES):
        lines = slice(top, min(top + LINES, height))
        count = lines.stop - lines.start
        (red, green, blue), sums, term = planes[:, :count], total[:count], product[:count]
        for channel in range(3):
            planes[channel, :count] = image_HW3[lines, :, channel]
        for channel, (m0, m1, m2, m3) in enumerate(matrix_12.reshape(3, 4)):
            np.multiply(red, m0, out=sums)
            sums += np.multiply(green, m1, out=term)
            sums += np.multiply(blue, m2, out=term)
            sums += m3
            np.clip(sums, 0, 255, out=out_HW3[lines, :, channel])


def mirrored(image_HW3: np.ndarray) -> np.ndarray:
    """An image left-right: channel by channel, five times as fast as by pixels of three bytes."""
    out = np.empty(image_HW3.shape, image_HW3.dtype)
    for channel in range(3):
        out[..., channel] = image_HW3[:, ::-1, channel]
    return out


def _fake_augment(images, labels, samples_B10, mean_3, std_3, dtype, height, width, resize, colours_B12=None):
    batch = samples_B10.shape[0]
    return empty((batch, 3, height, width), images, dtype), labels.new_empty((batch, height, width))


@operator(
    "augment(Tensor images, Tensor labels, Tensor samples, Tensor mean, Tensor std, ScalarType dtype, SymInt height, "
    "SymInt width, bool resize, Tensor? colours=None) -> (Tensor, Tensor)",
    fake=_fake_augment,
)
def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    samples_B10: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
    resize: bool,
    colours_B12: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `dtype`[B, 3, height, width], channels-last, and labels uint8[B, height, width].

    Args:
        images, labels: uint8, contiguous, of any shape: the bytes in which samples lie.
        samples_B10: int64[B, 10]: where the image's bytes begin, [H, W, 3], and the label's, [H, W]; H; W; how many
            pixels a row of both is after the one before it; rows; columns; mirror (0 or 1); dy; dx.
        mean_3, std_3: fp32, in 0..255.
        dtype: of the images.
        height, width: of the batch.
        resize: some sample has another size than its `rows` x `columns`; False promises that none has.
        colours_B12: fp32, the rows of a 3x4 matrix for each sample, see `recolour`; None leaves colours as they are.
    """
    return torch_augment(images, labels, samples_B10, mean_3, std_3, dtype, height, width, resize, colours_B12)
