"""Average the gradients and the loss of an update over its micro-batches and ranks.

``FloatMean`` leaves that to DDP. A sum of floats depends on its order, so the last bits depend on
the number of ranks. ``ExactMean`` sums integers, which have no such order: the same micro-batches
give the same bits on any number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import TrainConfig

FRACTION_BITS = 50
"""A mean is a multiple of 2^-50, or of 2^-49 and so on if that is below fp32's own resolution."""
BUCKET = 2**20
"""Numbers that are sent at once, while earlier layers still compute their gradients."""
CHUNK = 2**16
"""Numbers that a CPU converts at once: they stay in its cache, which makes it four times faster."""


def distribute(accelerator: Accelerator, network: nn.Module, train: TrainConfig) -> nn.Module:
    """Return a network in the wrapper through which it is trained.

    On several ranks that is DDP, which sends gradients during the backward pass. With
    ``train.exact_sum`` it is not: ``ExactMean`` sends them.

    Args:
        accelerator: the ranks; the wrapper casts for its mixed precision.
        network: on the device.
        train: ``exact_sum``, and ``grad_dtype``, in which DDP sends.
    """
    with warnings.catch_warnings():
        # torch 2.15 renamed this option of DDP; accelerate passes it by the old name.
        warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)
        # In evaluation mode Accelerate does not wrap in DDP.
        wrapped = accelerator.prepare_model(network, evaluation_mode=train.exact_sum)
    if isinstance(wrapped, DistributedDataParallel) and train.grad_dtype == "bf16":
        # By its own name DDP takes the hook for NCCL alone, but gloo adds bf16 too.
        wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return wrapped  # type: ignore[no-any-return]


def settle_buckets(network: nn.Module, *inputs: Tensor) -> None:
    """Let DDP choose its buckets by a pass whose gradients are dropped; no-op without DDP.

    By default DDP chooses them after the first backward pass of the process. The first step of a
    resumed run would then have other buckets than the same step of a run that went on, and with
    three ranks or more the bits of a sum depend on the buckets.

    Args:
        network: in its wrapper.
        inputs: two of each that it takes, zeros.
    """
    if isinstance(network, DistributedDataParallel):
        before = [(buffer, buffer.clone()) for buffer in network.buffers()]
        network(*inputs).sum().backward()
        network.zero_grad(set_to_none=True)
        for buffer, values in before:  # spectral norm's vectors, which a pass changes
            buffer.data.copy_(values)


class FloatMean:
    """The mean over micro-batches by autograd, and over ranks by DDP.

    Args:
        accelerator: the ranks; scales fp16 losses.
        network: whose gradients are averaged, in its DDP wrapper if there are several ranks.
        accumulation: micro-batches per update on this rank.
        num_terms: scalars that are logged per micro-batch.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, accumulation: int, num_terms: int
    ) -> None:
        self._accelerator, self._network, self._accumulation = accelerator, network, accumulation
        self._means = torch.zeros(1 + num_terms, device=accelerator.device)

    def micro_batch(self, k: int) -> AbstractContextManager[Any]:
        """Return the context for the passes of micro-batch k: DDP sends after the last one only."""
        self._k = k
        if k + 1 == self._accumulation:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._network)
        return context

    def backward(self, objective: Tensor, *terms: Tensor) -> None:
        """Add the gradients of a micro-batch's objective, and the terms that are logged.

        Args:
            objective: float scalar.
            terms: ``num_terms`` float scalars.
        """
        values = torch.stack([objective.detach(), *terms])
        if self._accumulation > 1:  # a kernel each that one micro-batch does not need
            objective, values = objective / self._accumulation, values / self._accumulation
        self._means = values if self._k == 0 else self._means + values
        self._accelerator.backward(objective)

    def finish(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Leave the mean gradients in the parameters.

        Returns:
            objective: its mean over the micro-batches of this rank, a scalar, for the guard.
            terms: their means over the micro-batches of this rank, (num_terms,) float32.
            peak: None; ``ExactMean`` has one.
        """
        return self._means[0], self._means[1:], None


@dataclass(eq=False)
class _Bucket:
    """Numbers that are summed and sent together: a slice for each of some tensors."""

    values: Tensor  # (n,) float32: of one micro-batch, and in the end the means
    sums: Tensor  # (n,) int64
    tensors: int = 0
    missing: int = 0  # tensors that this micro-batch has not filled yet
    sending: Any = None
    ranges: list[Tensor] = field(default_factory=list)  # smallest and largest value


class ExactMean:
    """The mean over all micro-batches of all ranks, by sums of 64-bit integers.

    Each micro-batch's gradient is multiplied by a power of two, which is exact in fp32, and rounded
    to an integer. The integers are added over micro-batches and ranks, which is exact, and the sum
    is divided once. The power is 2^50 over the number of micro-batches (rounded up to a power of
    two). So no sum of numbers below ``finite_guard.LIMIT`` overflows. Rounding changes a gradient
    by at most 2^-51 times that number, and one above 2^-27 times that number not at all.

    A bucket is sent as soon as the last micro-batch has filled it, while the backward pass goes on.
    Which bucket a number is in does not change its sum.

    Args:
        accelerator: the ranks; the network is not to be wrapped in DDP.
        network: whose gradients are averaged; each parameter must take part in each objective.
        accumulation: micro-batches per update on this rank.
        num_terms: scalars that are logged per micro-batch; they travel with the gradients.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, accumulation: int, num_terms: int
    ) -> None:
        self._accelerator, self._accumulation = accelerator, accumulation
        count = accumulation * accelerator.num_processes
        self._scale = 2.0 ** (FRACTION_BITS - (count - 1).bit_length())
        self._divisor = self._scale * count
        self._terms = torch.zeros(num_terms, device=accelerator.device)
        self._parameters = list(network.parameters())
        # The backward pass reaches the last layers first.
        self._buckets: list[_Bucket] = []
        self._places: dict[Tensor, tuple[_Bucket, Tensor]] = {}
        for tensors in _fill([*reversed(self._parameters), self._terms]):
            self._buckets.append(self._make_bucket(tensors))
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._take)
        self._k, self._unsent = 0, list[_Bucket]()

    def _make_bucket(self, tensors: list[Tensor]) -> _Bucket:
        size, device = sum(one.numel() for one in tensors), self._accelerator.device
        sums = torch.zeros(size, dtype=torch.int64, device=device)
        bucket = _Bucket(torch.zeros(size, device=device), sums, len(tensors))
        start = 0
        for one in tensors:
            # In the memory format of the parameter, which is that of its gradient.
            view = bucket.values.as_strided(one.size(), one.stride(), start)
            self._places[one] = bucket, view
            start += one.numel()
        return bucket

    def micro_batch(self, k: int) -> AbstractContextManager[Any]:
        """Begin micro-batch k of this rank, from 0; return an empty context."""
        self._k = k
        if k == 0:
            self._objective = torch.zeros((), device=self._accelerator.device)
            self._unsent = list(self._buckets)
        for bucket in self._buckets:
            bucket.missing = bucket.tensors
        return nullcontext()

    def backward(self, objective: Tensor, *terms: Tensor) -> None:
        """Add the gradients of a micro-batch's objective, and its terms, as ``FloatMean`` does."""
        self._objective += objective.detach()
        self._add(self._terms, torch.stack(terms).detach())
        self._accelerator.backward(objective)
        assert not any(bucket.missing for bucket in self._buckets), "a parameter has no gradient"

    def finish(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Wait for the other ranks, and leave the mean gradients in the parameters.

        Returns:
            objective: its sum over the micro-batches of this rank, a scalar, for the guard.
            terms: their means over all micro-batches of all ranks, (num_terms,) float32.
            peak: the largest absolute value of this rank, a scalar. The means are meaningless if it
                is not below the guard's ``LIMIT``.
        """
        for bucket in self._buckets:
            if bucket.sending is not None:
                bucket.sending.wait()
                bucket.sending = None
            for values, sums in _chunks(bucket):
                values.copy_(sums).div_(self._divisor)
        ranges = torch.stack([one for bucket in self._buckets for one in bucket.ranges])
        for bucket in self._buckets:
            bucket.ranges.clear()
        for parameter in self._parameters:
            parameter.grad = self._places[parameter][1]
        return self._objective, self._places[self._terms][1].clone(), ranges.abs().max()

    def _take(self, parameter: Tensor) -> None:
        """Add the gradient that the backward pass just left in a parameter, and remove it there."""
        assert parameter.grad is not None
        self._add(parameter, parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def _add(self, tensor: Tensor, values: Tensor) -> None:
        bucket, view = self._places[tensor]
        view.copy_(values)
        bucket.missing -= 1
        if bucket.missing:
            return
        bucket.ranges.extend(torch.aminmax(bucket.values))
        for numbers, sums in _chunks(bucket):
            numbers.mul_(self._scale).round_()
            if self._k == 0:
                sums.copy_(numbers)
            else:
                sums.add_(numbers.to(torch.int64))
        if self._k + 1 == self._accumulation and self._accelerator.num_processes > 1:
            self._send()

    def _send(self) -> None:
        """Send the buckets that are full, in the same order on every rank."""
        while self._unsent and not self._unsent[0].missing:
            bucket = self._unsent.pop(0)
            bucket.sending = dist.all_reduce(bucket.sums, async_op=True)


def _fill(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors into lists of at most ``BUCKET`` numbers, or of one tensor."""
    bucket: list[Tensor] = []
    for one in tensors:
        if bucket and sum(other.numel() for other in bucket) + one.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(one)
    yield bucket


def _chunks(bucket: _Bucket) -> Iterator[tuple[Tensor, Tensor]]:
    """Return views of values and sums, in pieces that fit a CPU's cache."""
    size = CHUNK if bucket.values.device.type == "cpu" else len(bucket.values)
    yield from zip(bucket.values.split(size), bucket.sums.split(size), strict=True)
