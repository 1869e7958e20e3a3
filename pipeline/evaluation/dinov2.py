"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193) from a file of its published weights.

torch-fidelity loads it through torch.hub only, which needs the network and runs downloaded code.
Here the preprocessing is torch-fidelity's, and the network is defined below.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

HEAD = 64
"""Numbers of each attention head, in every published size."""
GRID_OFFSET = 0.1
"""Added to the number of patches a side in the resizing of the position embedding, as published."""
DIMS = {
    "dinov2-vit-s-14": 384,
    "dinov2-vit-b-14": 768,
    "dinov2-vit-l-14": 1024,
    "dinov2-vit-g-14": 1536,
}


class VisionTransformer(nn.Module):
    """The network of a state dict, whose shapes give its size.

    Args:
        weights: the published state dict.
        side: height and width of the images.
    """

    def __init__(self, weights: Mapping[str, Tensor], side: int) -> None:
        super().__init__()
        dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(weights["pos_embed"].shape))
        gated = "blocks.0.mlp.w3.weight" in weights
        last = weights[f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"]
        self.blocks = nn.ModuleList(_Block(dim, last.shape[1], gated) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.load_state_dict({k: v for k, v in weights.items() if k != "mask_token"})
        self.register_buffer("positions", self._positions(side // patch), persistent=False)

    def _positions(self, count: int) -> Tensor:
        """Return the position embedding of ``count`` patches a side: (1, 1 + count^2, dim)."""
        first, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        size = math.isqrt(table.shape[1])
        if size != count:
            grid = table.reshape(1, size, size, -1).permute(0, 3, 1, 2)
            scale = (count + GRID_OFFSET) / size
            grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
            table = grid.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([first, table], 1).detach()

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalized class token: (N, 3, side, side) float32 -> (N, dim)."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        x = x + self.get_buffer("positions")
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.norm(x)[:, 0]
        return found


class _Block(nn.Module):
    def __init__(self, dim: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.empty(dim)}) for _ in range(2))
        names = ("w12", "w3") if gated else ("fc1", "fc2")
        widths = (2 * hidden if gated else hidden, dim)
        self.mlp = nn.ModuleDict(
            {
                names[0]: nn.Linear(dim, widths[0]),
                names[1]: nn.Linear(hidden, widths[1]),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after attention and feed-forward layer: (N, T, dim) -> (N, T, dim)."""
        count, tokens, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(count, tokens, 3, dim // HEAD, HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q * HEAD**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        fed: Tensor = self.ls2["gamma"] * self._feed_forward(self.norm2(x))
        return x + fed

    def _feed_forward(self, x: Tensor) -> Tensor:
        first, second = self.mlp.values()
        hidden = first(x)
        if "w3" in self.mlp:  # SwiGLU, of the giant size
            gate, values = hidden.chunk(2, -1)
            hidden = F.silu(gate) * values
        else:
            hidden = F.gelu(hidden)
        found: Tensor = second(hidden)
        return found


class DinoV2(FeatureExtractorDinoV2):  # type: ignore[misc]
    """torch-fidelity's extractor with the network above; its one layer is ``dinov2``.

    Args:
        name: of ``DIMS``.
        features_list: layers to return.
        feature_extractor_weights_path: weights file, or an open one.
        kwargs: ignored.

    Raises:
        ValueError: the weights are not those of a network of this size.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Any,
        **kwargs: Any,
    ) -> None:
        FeatureExtractorBase.__init__(self, name, features_list)
        path = feature_extractor_weights_path
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            if weights["cls_token"].shape[-1] != DIMS[name]:
                raise ValueError(f"its width is not {DIMS[name]}")
            self.model = VisionTransformer(weights, self.INPUT_IMAGE_SIZE)
        except (UnpicklingError, EOFError, zipfile.BadZipFile):
            raise ValueError("it holds no tensors") from None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"it holds no DINOv2 network: {error}") from None
        self.feature_extractor_internal_dtype = torch.float32
        self.requires_grad_(False)
        self.eval()
