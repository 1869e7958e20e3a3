"""What D has learned to see, as a picture: its first filters, and guided backpropagation.

    python -m pipeline.papers.guided_backprop --run runs/demo --out filters.png

Above, the filters of D's first layer. Below, for features of D's last convolutional layer, the
images of data.shards that excite each most, and beside each what in it does so (guided
backpropagation, Springenberg et al. 2014, arXiv 1412.6806; Radford et al. 2016, section 6.2 and
figure 5). On the left D, on the right a D that was never trained, for comparison.
"""

from __future__ import annotations

from pipeline import require_own_package

if __name__ == "__main__":
    require_own_package(__file__)

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime import signals
from pipeline.runtime.errors import EvaluationError, exit_on_user_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Pixels = NDArray[np.uint8]

GAP = 8


def guided_gradients(D: nn.Module, images: Tensor, feature: int) -> tuple[Tensor, Tensor]:
    """(responses, gradients) of one feature of the last convolutional layer.

    An image's response is its largest over all places; the gradient of it with respect to the image
    flows through a unit only where the unit is active and the gradient positive.

    Args:
        D: a DCGAN discriminator with standing statistics.
        images: (N, C, S, S) float in [-1, 1].
        feature: channel of the last feature map.

    Returns:
        responses (N,) and gradients (N, C, S, S), both float32.
    """
    import torch
    from torch import nn

    from pipeline.models.dcgan import LEAK

    class Guided(torch.autograd.Function):
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
        h = Guided.apply(h) if isinstance(layer, nn.LeakyReLU) else layer(h)
    responses = h[:, feature].flatten(1).amax(1)
    (gradients,) = torch.autograd.grad(responses.sum(), x)
    return responses.detach(), gradients


def first_filters(D: nn.Module) -> Pixels:
    """(ndf, k, k, C) uint8: the first layer's weights, each scaled to the whole range."""
    from pipeline.models.spectral_norm import unnormalised_weight

    first = next(iter(D.layers))  # type: ignore[arg-type]
    return _as_pixels(unnormalised_weight(first).detach())


def excited(D: nn.Module, images: Pixels, features: int, count: int) -> Pixels:
    """A picture: a row for each of the first features, with its ``count`` most exciting images and
    what in them excites it, side by side.

    Args:
        D: with standing statistics.
        images: (N, S, S, C) uint8 to choose from.
        features: rows.
        count: pairs in a row.
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
        cells.append(np.stack([images[top.numpy()], _as_pixels(gradients)], 1))
    pairs = np.concatenate(cells)
    return image_grid(pairs.reshape(-1, *images.shape[1:]), columns=2 * count)


def _as_pixels(values: Tensor) -> Pixels:
    """(N, C, H, W) float -> (N, H, W, C) uint8: 0 is grey, the largest of each white or black."""
    from pipeline.models.sampling import to_uint8

    largest = values.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    pixels: Pixels = to_uint8(values / largest).numpy()
    return pixels


def picture(options: argparse.Namespace) -> bytes:
    """The PNG that the command line asks for."""
    import numpy as np

    from pipeline.generation.figures import check_size, enlarge, png
    from pipeline.models.sampling import image_grid
    from pipeline.papers.linear_probe import chosen, set_batchnorm_statistics
    from pipeline.papers.probe import open_pair, open_shards

    config, found, trained, random = open_pair(options.run, options.checkpoint, options.seed)
    index = open_shards("--shards", options.shards or config.data.shards, config.model)
    images, _ = chosen(index, options.num_images, options.seed, config.data)
    if options.count > len(images):
        raise EvaluationError(
            f"--count ({options.count}): must be at most the number of images, {len(images)} here; "
            "see --num-images."
        )
    last = config.model.ndf * config.model.image_size // 8
    features = min(options.features, last)
    side = config.model.image_size * options.scale
    remedy = "a smaller --count, --features or --scale"
    check_size(4 * options.count * features * side**2 * config.model.channels, remedy)
    columns = []
    for D in (trained, random):
        set_batchnorm_statistics(D, images)
        below = excited(D, images, features, options.count)
        filters = enlarge(first_filters(D), 3)
        across = max(1, below.shape[1] // (filters.shape[2] + 2))
        framed = np.pad(filters, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        above = image_grid(framed, across)
        width = max(above.shape[1], below.shape[1])
        parts = [_padded(part, width) for part in (above, below)]
        gap = np.full((GAP, width, images.shape[3]), 255, np.uint8)
        columns.append(np.concatenate([parts[0], gap, parts[1]]))
    gap = np.full((len(columns[0]), 2 * GAP, images.shape[3]), 255, np.uint8)
    print(f"{found.path.name}: D on the left, a D that was never trained on the right", flush=True)
    return png(enlarge(np.concatenate([columns[0], gap, columns[1]], 1)[None], options.scale)[0])


def _padded(pixels: Pixels, width: int) -> Pixels:
    import numpy as np

    missing = width - pixels.shape[1]
    return np.pad(pixels, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def parse(words: list[str]) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.papers.guided_backprop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="run folder")
    add("--checkpoint", type=Path, metavar="DIR", help="this one of checkpoints/ (the newest)")
    add("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    add("--shards", metavar="SHARDS", help="images to look at (data.shards)")
    add("--num-images", type=int, default=2000, help="of them (2000)")
    add("--features", type=int, default=6, help="of the last layer (6)")
    add("--count", type=int, default=5, help="images for each (5)")
    add("--scale", type=int, default=2, help="side of the square a pixel becomes (2)")
    add("--seed", type=int, default=0, help="of the choice of images and of the random D (0)")
    options = parser.parse_args(words)
    for name, low, high in (
        ("num_images", 64, 2**40),
        ("features", 1, 2**16),
        ("count", 1, 2**16),
        ("scale", 1, 64),
        ("seed", 0, 2**63 - 1),
    ):
        if not low <= getattr(options, name) <= high:
            field, value = name.replace("_", "-"), getattr(options, name)
            parser.error(f"--{field} ({value}): must be between {low} and {high}")
    if options.out.suffix != ".png":
        parser.error(f"--out ({options.out}): must end in .png")
    return options


def main() -> None:
    """Parse the command line and draw; exit code 2 on a user's mistake."""
    options = parse(sys.argv[1:])
    with exit_on_user_error(), signals.exit_on_interrupt("interrupted: nothing was written"):
        from pipeline.runtime.files import check_output_path, write_results

        out = check_output_path(options.out)
        write_results({out: picture(options)})
        print(f"written: {options.out}", flush=True)


if __name__ == "__main__":
    main()
