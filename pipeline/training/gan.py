"""One adversarial pair in training: the two updates, the average, and what a checkpoint holds.

An optimizer step sees the global batch as ``world_size * accumulation`` micro-batches. BatchNorm
groups are micro-batches, so the same micro-batch means the same computation on any number of ranks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam

from pipeline.config.schema import Config
from pipeline.models.dcgan import init_weights, make_discriminator, make_generator, update_ema
from pipeline.models.noise import rng
from pipeline.models.spectral_norm import power_iterate
from pipeline.runtime.errors import ConfigError, NonFiniteLoss
from pipeline.training.cuda_graph import Replayed
from pipeline.training.diffaugment import augment
from pipeline.training.finite_guard import FiniteGuard
from pipeline.training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, gradient_penalty


class GAN:
    """G, D, G_ema and the optimizers of one rank.

    Args:
        config: the whole configuration; weights are a function of ``run.seed``.
        accelerator: places, wraps and scales.
        accumulation: micro-batches per optimizer step on this rank.
    """

    def __init__(self, config: Config, accelerator: Accelerator, accumulation: int) -> None:
        self.config, self.accelerator, self.accumulation = config, accelerator, accumulation
        self.G, self.D = make_generator(config.model), make_discriminator(config.model)
        init_weights(self.G, rng(config.run.seed, "weights of G"))
        init_weights(self.D, rng(config.run.seed, "weights of D"))
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        for network in (self.G, self.D):
            network.to(device=accelerator.device, memory_format=layout)  # type: ignore[call-overload]
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False)
        if config.train.sync_batchnorm and accelerator.num_processes > 1:
            if accelerator.device.type != "cuda":
                raise ConfigError(
                    "train.sync_batchnorm (true): PyTorch has it for GPUs only; must be false with "
                    f"{accelerator.num_processes} processes on CPUs."
                )
            self.G = nn.SyncBatchNorm.convert_sync_batchnorm(self.G)
            self.D = nn.SyncBatchNorm.convert_sync_batchnorm(self.D)
        self._captured = config.train.cuda_graph and accelerator.device.type == "cuda"
        adam: dict[str, Any] = {
            "betas": (config.optim.beta1, config.optim.beta2),
            "capturable": self._captured,
            "fused": True,
        }
        opt_G = Adam(self.G.parameters(), lr=config.optim.g_lr, **adam)
        opt_D = Adam(self.D.parameters(), lr=config.optim.d_lr, **adam)
        scaled = accelerator.scaler is not None
        self.guard = FiniteGuard(
            [] if scaled else [opt_G, opt_D],
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        # Wrapped for DDP where there are ranks; self.G and self.D stay the networks themselves.
        with warnings.catch_warnings():
            # torch 2.15 has a new name for the option that accelerate knows by its old one only.
            warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)
            prepared = accelerator.prepare(self.G, self.D, opt_G, opt_D)
        self._G, self._D, self.opt_G, self.opt_D = prepared
        if config.train.compile:
            self.G.compile()
            self.D.compile()
        self._loss_D = DISCRIMINATOR_LOSSES[config.model.loss]
        self._loss_G = GENERATOR_LOSSES[config.model.loss]
        self._policy = tuple(config.stability.augment)
        self._fakes: list[Tensor] = []
        if config.train.cuda_graph:
            if accelerator.num_processes > 1:
                raise ConfigError(
                    "train.cuda_graph (true): works with one process only; must be false with "
                    f"{accelerator.num_processes}."
                )
            pool = torch.cuda.graph_pool_handle() if self._captured else None
            self._replay_D, self._replay_G = (
                Replayed(lambda x, z, y: self._step_D(x, z, y, 0, 0), pool),
                Replayed(lambda z, y: self._step_G(z, y, 0), pool),
            )

    def update_D(
        self,
        real: Sequence[Tensor],
        z: Sequence[Tensor],
        step: int,
        y: Sequence[Tensor] | None = None,
        turn: int = 0,
    ) -> Tensor:
        """Step D up V(D, G): maximise log D(x) + log(1 - D(G(z))), or its configured objective.

        Args:
            real: micro-batches (m, C, S, S) float in [-1, 1].
            z: G's input for the same micro-batches, (m, z_dim + num_classes) float.
            step: the step of G that it belongs to, from 1.
            y: classes of the same micro-batches, (m,) int64 each; None without classes.
            turn: which of the ``d_steps`` of this step, from 0.

        Returns:
            (3,) float: loss, mean D(x), mean D(G(z)), over this rank's micro-batches; without R1.
        """
        self.guard.begin(step)
        if self.config.train.cuda_graph:
            return self._replay_D(real, z, y)
        return self._step_D(real, z, y, step, turn)

    def update_G(self, z: Sequence[Tensor], step: int, y: Sequence[Tensor] | None = None) -> Tensor:
        """Step G against the updated D, by the configured objective; returns the loss, a scalar.

        Args:
            z: G's input of the last ``update_D``. Algorithm 1 of the 2014 paper draws anew; its
                authors' code, and most since, use the same: G's forward pass serves both updates.
            step: from 1.
            y: its classes, as in ``update_D``.
        """
        self.guard.begin(step)
        if self.config.train.cuda_graph:
            return self._replay_G(z, y)
        return self._step_G(z, y, step)

    def update_average(self) -> None:
        """G_ema <- decay * G_ema + (1 - decay) * G."""
        update_ema(self.G_ema, self.G, self.config.train.ema_decay)

    def raise_if_weights_are_not_finite(self, step: int) -> None:
        """Keep a step that overflowed the weights, before any loss showed it, out of checkpoints.

        Raises:
            NonFiniteLoss: naming the step.
        """
        networks = (self.G, self.D, self.G_ema)
        sums = [p.detach().abs().max() for network in networks for p in network.parameters()]
        if not torch.isfinite(torch.stack(sums)).all():
            raise NonFiniteLoss(
                f"weights became NaN or infinite by step {step}; it is not saved and the last "
                "checkpoint is intact. Lower optim.d_lr and optim.g_lr in a new run.dir."
            )

    def networks(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""
        return {"G": self.G, "D": self.D, "G_ema": self.G_ema}

    def optimizers(self) -> dict[str, Any]:
        """Optimizers, and the gradient scaler where fp16 has one."""
        scaler = self.accelerator.scaler
        return {"G": self.opt_G, "D": self.opt_D} | ({"scaler": scaler} if scaler else {})

    def load(
        self, weights: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Any]
    ) -> None:
        """Take over the state of a checkpoint."""
        for name, network in self.networks().items():
            network.load_state_dict(weights[name])
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(optimizers[name])
        for optimizer in (self.opt_G, self.opt_D):
            for group in optimizer.param_groups:
                # A checkpoint brings the value it was written with; train.cuda_graph may change.
                group["capturable"] = self._captured

    def _step_D(
        self,
        real: Sequence[Tensor],
        z: Sequence[Tensor],
        y: Sequence[Tensor] | None,
        step: int,
        turn: int,
    ) -> Tensor:
        stability, smoothing = self.config.stability, self.config.stability.label_smoothing
        number = (step - 1) * self.config.optim.d_steps + turn + 1  # of D's updates, from 1
        penalised = stability.r1_gamma > 0 and number % stability.r1_every == 0
        totals = torch.zeros(3, device=self.accelerator.device)
        whole = torch.zeros((), device=self.accelerator.device)
        self._fakes.clear()
        for k, (x, noise) in enumerate(zip(real, z, strict=True)):
            fake = self._fake_for_D(noise, turn)
            draws, classes = self._micro_batch_rng("D", step, turn, k), y[k] if y else None
            x.requires_grad_(penalised)
            with self._no_sync_before_the_last(self._D, k):
                # Separate passes: BatchNorm must not mix real with generated statistics.
                real_logits = self._logits(self._D, x, classes, draws)
                fake_logits = self._logits(self._D, fake.detach(), classes, draws)
                loss = objective = self._loss_D(real_logits, fake_logits, smoothing)
                if penalised:  # half of gamma, for all the updates that go without
                    weight = stability.r1_gamma / 2 * stability.r1_every
                    objective = loss + weight * gradient_penalty(real_logits, x)
                self.accelerator.backward(objective / self.accumulation)
            with torch.no_grad():
                scores = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
                totals += torch.stack([loss, *scores]) / self.accumulation
                whole += objective / self.accumulation
        self.guard.check(whole, "D")
        self.opt_D.step()
        self.opt_D.zero_grad(set_to_none=True)
        power_iterate(self.D)
        return totals

    def _step_G(self, z: Sequence[Tensor], y: Sequence[Tensor] | None, step: int) -> Tensor:
        total = torch.zeros((), device=self.accelerator.device)
        # D only passes gradients through: its weight gradients are neither computed nor reduced.
        self.D.requires_grad_(False)
        for k, noise in enumerate(z):
            draws, classes = self._micro_batch_rng("G", step, 0, k), y[k] if y else None
            with self._no_sync_before_the_last(self._G, k):
                fake = self._fakes.pop() if self._fakes else self._G(noise)
                loss = self._loss_G(self._logits(self.D, fake, classes, draws))
                self.accelerator.backward(loss / self.accumulation)
            total += loss.detach() / self.accumulation
        self.D.requires_grad_(True)
        self.guard.check(total, "G")
        self.opt_G.step()
        self.opt_G.zero_grad(set_to_none=True)
        return total

    def _logits(
        self, D: nn.Module, images: Tensor, y: Tensor | None, draws: torch.Generator | None
    ) -> Tensor:
        """D's logits (m,) float32, of images as the configured augmentation changes them."""
        if draws is not None and self._policy:
            images = augment(images, self._policy, draws)
        logits: Tensor = D(images, y, draws)
        return logits.float()

    def _micro_batch_rng(
        self, purpose: str, step: int, turn: int, k: int
    ) -> torch.Generator | None:
        """What augmentation and dropout of a micro-batch draw from; None where nothing is drawn.

        A function of the micro-batch's place in the run, not of the rank that computes it.
        """
        if not (self._policy or self.config.model.dropout):
            return None
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        place = (step * self.config.optim.d_steps + turn) * ranks * self.accumulation
        index = place + rank * self.accumulation + k
        return rng(self.config.run.seed, f"draws for {purpose}", index)

    def _fake_for_D(self, noise: Tensor, turn: int) -> Tensor:
        """G(z), its graph kept for G's update when one micro-batch makes the step.

        With accumulation all graphs would have to live at once; there G runs again instead.
        """
        if self.accumulation > 1 or turn + 1 < self.config.optim.d_steps:
            with torch.no_grad():
                image: Tensor = self.G(noise)
            return image
        self._fakes.append(self._G(noise))
        return self._fakes[0]

    def _no_sync_before_the_last(self, network: nn.Module, k: int) -> AbstractContextManager[Any]:
        """Gradients travel once per step: with the last micro-batch."""
        if k + 1 == self.accumulation:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(network)
        return context
