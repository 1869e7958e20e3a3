"""Draw what D has learned: the filters of its first layer, and guided backpropagation.

    python -m pipeline.papers.guided_backprop --run runs/demo --out filters.png

The upper part of the figure shows the filters of D's first layer. The lower part has a row for each
of some features of D's last convolutional layer. A row shows the images of data.shards with the
largest response of this feature, and to the right of each the gradient of the response by guided
backpropagation (Springenberg et al. 2014, arXiv 1412.6806; Radford et al. 2016, section 6.2 and
figure 5). The left half is of the trained D, the right half of a D with random weights.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pipeline.papers.probe import MOST_IMAGES, add_pair_arguments
from pipeline.runtime import signals
from pipeline.runtime.arguments import HelpFormatter, file_ending_in, integer
from pipeline.runtime.errors import EvaluationError, exit_on_user_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Pixels = NDArray[np.uint8]

GAP = 8
"""Pixels between the parts of the figure, before ``--scale``; twice as many between the halves."""


def guided_gradients(D: nn.Module, images: Tensor, feature: int) -> tuple[Tensor, Tensor]:
    """Compute the responses of one feature of the last convolutional layer, and their gradients.

    The response to an image is the maximum of the feature map. Its gradient with respect to the
    image is computed by guided backpropagation: at each activation function, only the entries pass
    whose input and gradient are both positive.

    Args:
        D: a DCGAN discriminator with BatchNorm statistics, in eval mode.
        images: (N, C, S, S) float32 in [-1, 1].
        feature: channel of the last feature map.

    Returns:
        responses (N,) and gradients (N, C, S, S), both float32.
    """
    import torch
    from torch import nn

    from pipeline.models.dcgan import LEAK

    class GuidedLeakyReLU(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, h: Tensor) -> Tensor:
            context.save_for_backward(h)
            return nn.functional.leaky_relu(h, LEAK)

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> Tensor:
            (h,), (gradient,) = context.saved_tensors, gradients
            guided: Tensor = gradient * (h > 0) * (gradient > 0)
            return guided

    h = images.clone().requires_grad_()
    x = h
    for layer in list(D.layers)[:-1]:  # type: ignore[arg-type]
        h = GuidedLeakyReLU.apply(h) if isinstance(layer, nn.LeakyReLU) else layer(h)
    responses = h[:, feature].flatten(1).amax(1)
    (gradients,) = torch.autograd.grad(responses.sum(), x)
    return responses.detach(), gradients


def first_filters(D: nn.Module) -> Pixels:
    """Return the weights of the first layer as images, (ndf, k, k, C) uint8."""
    from pipeline.models.spectral_norm import unnormalised_weight

    first = next(iter(D.layers))  # type: ignore[arg-type]
    return _to_pixels(unnormalised_weight(first).detach())


def draw_top_images(D: nn.Module, images: Pixels, features: int, count: int) -> Pixels:
    """Draw the images with the largest responses, each with its gradient on its right.

    Args:
        D: as for ``guided_gradients``, on the CPU.
        images: (N, S, S, C) uint8 to choose from, N >= ``count``.
        features: number of features of the last layer; each is a row, the first ones are drawn.
        count: number of images in a row, by descending response.

    Returns:
        (features * S, 2 * count * S, C) uint8.
    """
    import numpy as np
    import torch

    from pipeline.data.loader import normalise
    from pipeline.models.noise import BLOCK
    from pipeline.models.sampling import image_grid

    x = normalise(torch.from_numpy(images), torch.device("cpu"))
    with torch.no_grad():
        maps = (D.layers[:-1](part)[:, :features] for part in x.split(BLOCK))  # type: ignore[operator, index]
        responses = torch.cat([each.flatten(2).amax(2) for each in maps])
    cells = []
    for feature in range(features):
        top = responses[:, feature].argsort(descending=True, stable=True)[:count]
        _, gradients = guided_gradients(D, x[top], feature)
        cells.append(np.stack([images[top.numpy()], _to_pixels(gradients)], 1))
    pairs = np.concatenate(cells)
    return image_grid(pairs.reshape(-1, *images.shape[1:]), columns=2 * count)


def _to_pixels(values: Tensor) -> Pixels:
    """Scale each image by its largest absolute value, so that 0 becomes grey.

    (N, C, H, W) float -> (N, H, W, C) uint8.
    """
    from pipeline.models.sampling import to_uint8

    largest = values.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    pixels: Pixels = to_uint8(values / largest).numpy()
    return pixels


def make_figure(options: argparse.Namespace) -> bytes:
    """Return the figure as PNG.

    Raises:
        UserError: run, checkpoint or shards that cannot be used, or options that do not fit them.
    """
    import numpy as np

    from pipeline.generation.figures import check_size, enlarge, png
    from pipeline.models.sampling import image_grid
    from pipeline.papers.linear_probe import read_images, set_batchnorm_statistics
    from pipeline.papers.probe import load_discriminators, read_index_for

    config, found, trained, random = load_discriminators(
        options.run, options.checkpoint, options.seed
    )
    index = read_index_for("--shards", options.shards or config.data.shards, config.model)
    images, _ = read_images(index, options.num_images, options.seed, config.data)
    if options.count > len(images):
        raise EvaluationError(
            f"--count ({options.count}): must be at most the number of images, which is "
            f"{len(images)}. Use a smaller --count, or more images (--num-images, --shards)."
        )
    last_width = config.model.ndf * config.model.image_size // 8  # channels of the last layer
    features = min(options.features, last_width)
    side = config.model.image_size * options.scale
    remedy = "a smaller --count, --features or --scale"
    check_size(4 * options.count * features * side**2 * config.model.channels, remedy)
    halves = []
    for D in (trained, random):
        set_batchnorm_statistics(D, images)
        below = draw_top_images(D, images, features, options.count)
        filters = enlarge(first_filters(D), 3)
        columns = max(1, below.shape[1] // (filters.shape[2] + 2))
        framed = np.pad(filters, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        empty = np.full((-len(framed) % columns, *framed.shape[1:]), 255, np.uint8)
        above = image_grid(np.concatenate([framed, empty]), columns)
        width = max(above.shape[1], below.shape[1])
        gap = np.full((GAP, width, images.shape[3]), 255, np.uint8)
        halves.append(np.concatenate([_pad_to(width, above), gap, _pad_to(width, below)]))
    gap = np.full((len(halves[0]), 2 * GAP, images.shape[3]), 255, np.uint8)
    print(f"{found.path.name}: left the trained D, right a D with random weights", flush=True)
    return png(enlarge(np.concatenate([halves[0], gap, halves[1]], 1)[None], options.scale)[0])


def _pad_to(width: int, pixels: Pixels) -> Pixels:
    """Pad (H, W, C) uint8 with white on the right."""
    import numpy as np

    missing = width - pixels.shape[1]
    return np.pad(pixels, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.papers.guided_backprop",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add_pair_arguments(parser)
    add = parser.add_argument
    png = file_ending_in(".png")
    add("--out", type=png, required=True, metavar="FILE.png", help="file to write the figure to")
    shards = "shards to choose images from; without it, data.shards of the run"
    add("--shards", metavar="SHARDS", help=shards)
    number = "number of images to choose from"
    add("--num-images", type=integer(64, MOST_IMAGES), default=2000, metavar="N", help=number)
    features = "number of features of the last layer to show, one a row"
    add("--features", type=integer(1, 2**16), default=6, metavar="N", help=features)
    count = "number of images to show for each feature"
    add("--count", type=integer(1, 2**16), default=5, metavar="N", help=count)
    scale = "factor by which the figure is enlarged"
    add("--scale", type=integer(1, 64), default=2, metavar="N", help=scale)
    return parser.parse_args(words)


def main() -> None:
    """Draw the figure that the command line asks for. Exit code 2 after a user's mistake."""
    options = parse(sys.argv[1:])
    with exit_on_user_error(), signals.exit_on_interrupt("interrupted: nothing was written"):
        from pipeline.runtime.files import check_output_path, write_results

        out = check_output_path(options.out)
        write_results({out: make_figure(options)})
        print(f"written: {options.out}", flush=True)


if __name__ == "__main__":
    main()
