"""Train one pair G and D on this rank: the two updates, and the moving average of G.

An optimizer step sees the global batch as ``world_size * accumulation`` micro-batches. BatchNorm
normalises each micro-batch by itself, so that the same ``train.micro_batch`` computes the same on
any number of ranks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Adam

from pipeline.config.schema import Config
from pipeline.models.dcgan import init_weights, make_discriminator, make_generator, update_ema
from pipeline.models.noise import rng
from pipeline.models.spectral_norm import power_iterate
from pipeline.runtime import compile_cache
from pipeline.runtime.errors import ConfigError
from pipeline.runtime.ranks import node_name
from pipeline.training.diffaugment import augment
from pipeline.training.finite_guard import FiniteGuard
from pipeline.training.gradients import (
    ExactMean,
    FloatMean,
    distribute,
    settle_buckets,
)
from pipeline.training.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PAIRED
from pipeline.training.penalties import PENALTIES, UNCOMPILED
from pipeline.training.restore import restore
from pipeline.training.schedules import Schedules
from pipeline.training.watch import Watch

log = logging.getLogger("pipeline")


class GAN:
    """G, D, G_ema and the optimizers of one rank.

    ``G`` and ``D`` are the bare networks. The updates go through ``_G`` and ``_D``: their DDP
    wrappers, which all-reduce gradients, or with ``train.exact_sum`` the networks themselves.

    Args:
        config: the whole configuration; the first weights are a function of ``run.seed``.
        accelerator: places the networks on the device, wraps them in DDP, and scales fp16 losses.
        accumulation: micro-batches per optimizer step on this rank.

    Raises:
        ConfigError: ``train.sync_batchnorm`` with several processes on CPUs.
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
        betas = (config.optim.beta1, config.optim.beta2)
        opt_G = Adam(self.G.parameters(), lr=config.optim.g_lr, betas=betas, fused=True)
        opt_D = Adam(self.D.parameters(), lr=config.optim.d_lr, betas=betas, fused=True)
        scaled = accelerator.scaler is not None
        self.guard = FiniteGuard(
            [] if scaled else [opt_G, opt_D],
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self._G, self._D = (distribute(accelerator, n, config.train) for n in (self.G, self.D))
        model, device = config.model, accelerator.device
        images = torch.zeros(
            2, *(model.channels, model.image_size, model.image_size), device=device
        )
        y = [torch.zeros(2, dtype=torch.int64, device=device)] if model.num_classes else []
        settle_buckets(self._G, torch.zeros(2, model.z_dim + model.num_classes, device=device))
        settle_buckets(self._D, images, *y)
        self.opt_G, self.opt_D = accelerator.prepare(opt_G, opt_D)
        mean = ExactMean if config.train.exact_sum else FloatMean
        self._mean_G = mean(accelerator, self._G, accumulation, num_terms=1)
        self._mean_D = mean(accelerator, self._D, accumulation, num_terms=3)
        if config.train.compile:
            if line := compile_cache.use(Path(config.run.dir).expanduser(), node_name()):
                log.warning(line)
            # The networks, not their DDP wrappers: update_G and the penalties call the same graphs,
            # and reduce-overhead replays each whole. Compiling the wrapper would cut a network at
            # DDP's buckets. The price: gradients are sent after the backward pass, not during it
            # (pytorch#109774).
            # Batches have one size. G and D share the code of Accelerate's wrapper, whose second
            # caller would be compiled for any batch, channels and size without dynamic=False.
            for network in (self.G, self.D):
                network.compile(mode=config.train.compile_mode, dynamic=False)
        self._loss_D = DISCRIMINATOR_LOSSES[config.model.loss]
        self._loss_G = GENERATOR_LOSSES[config.model.loss]
        self._is_paired = config.model.loss in PAIRED
        self._policy = tuple(config.stability.augment)
        self.schedules, self.watch = Schedules(config), Watch(config, accelerator)
        self._fake: Tensor | None = None

    def update_D(
        self,
        real: Sequence[Tensor],
        z: Sequence[Tensor],
        step: int,
        y: Sequence[Tensor] | None = None,
        turn: int = 0,
    ) -> Tensor:
        """Update D by the configured objective; by default maximise log D(x) + log(1 - D(G(z))).

        Args:
            real: micro-batches (m, C, S, S) float32 in [-1, 1].
            z: G's input for the same micro-batches, (m, z_dim + num_classes) float32.
            step: number of the step of G that this update belongs to, from 1.
            y: classes of the same micro-batches, (m,) int64 each; None without classes.
            turn: number of this update among the ``optim.d_steps`` of the step, from 0.

        Returns:
            (3,) float32 on the device: D's loss without the penalties R1 and R2, mean D(x) and mean
            D(G(z)), each averaged over the micro-batches of this rank, or with ``train.exact_sum``
            of all ranks.

        Raises:
            NonFiniteLoss: the objective is NaN or infinite on any rank, or with ``train.exact_sum``
                a gradient does not fit; D is unchanged. On a GPU ``guard.raise_if_tripped`` raises
                it later.
        """
        if self.config.train.compile and self.config.train.compile_mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        stability = self.config.stability
        number = (step - 1) * self.config.optim.d_steps + turn + 1  # of D's updates, from 1
        # Times r1_every, for the updates that leave the penalties out.
        weight = 0 if number % stability.r1_every else stability.r1_every / 2
        r1_weight = weight * self.schedules.at("stability.r1_gamma", step)
        r2_weight = weight * self.schedules.at("stability.r2_gamma", step)
        self._fake = None
        for k, (x, noise) in enumerate(zip(real, z, strict=True)):
            fake = self._generate_for_D(noise, turn).detach()
            generator, classes = self._draws("D", step, turn, k), y[k] if y else None
            directions = None
            if r1_weight or r2_weight:
                directions = self._micro_batch_rng("directions", step, turn, k)
            place = classes, generator, directions
            with self._mean_D.micro_batch(k):
                # Two passes: BatchNorm must not mix the statistics of real and generated images.
                # One block of autocast: it casts D's weights once for both.
                with self.accelerator.autocast() if directions is None else nullcontext():
                    real_logits, r1 = self._penalised(x, *place, r1_weight)
                    fake_logits, r2 = self._penalised(fake, *place, r2_weight)
                loss = self._loss_D(real_logits, fake_logits, stability.label_smoothing)
                scores = torch.stack([real_logits, fake_logits]).detach().sigmoid().mean(1)
                objective = loss if directions is None else loss + r1 + r2
                self._mean_D.backward(objective, loss.detach(), *scores)
            if self.watch.due(step):
                logits = real_logits, fake_logits
                self.watch.see_images(k, (x, fake), classes, logits, loss, self.D)
        mean, terms, peak = self._mean_D.finish()
        self.guard.check(mean, "D", step, peak)
        if self.watch.due(step):
            self.watch.see_update("D", self.D)
        self.schedules.set_rates(self.opt_D, "optim.d_lr", step)
        self.opt_D.step()
        self.opt_D.zero_grad(set_to_none=True)
        power_iterate(self.D)
        return terms

    def update_G(
        self,
        z: Sequence[Tensor],
        step: int,
        y: Sequence[Tensor] | None = None,
        real: Sequence[Tensor] = (),
    ) -> Tensor:
        """Update G by the configured objective; by default maximise log D(G(z)).

        Args:
            z: G's input of the last ``update_D``. Algorithm 1 of Goodfellow et al. 2014 draws z
                anew. Their code, like most since, takes the same z: one forward pass of G then
                serves both updates.
            step: number of the step, from 1.
            y: classes of the same micro-batches, as for ``update_D``.
            real: the images of the last ``update_D``. Only a relativistic loss needs them: image i
                is paired with G(z) of row i.

        Returns:
            G's loss, a float32 scalar on the device, averaged as the terms of ``update_D`` are.

        Raises:
            NonFiniteLoss: as ``update_D``; G is unchanged.
        """
        # D passes gradients on to G. Its own weights' gradients are not computed or all-reduced.
        self.D.requires_grad_(False)
        for k, noise in enumerate(z):
            generator, classes = self._draws("G", step, 0, k), y[k] if y else None
            with self._mean_G.micro_batch(k):
                pair = (self._judge_real(real[k], classes, generator),) if self._is_paired else ()
                fake = self._G(noise) if self._fake is None else self._fake
                loss = self._loss_G(self._logits(self.D, fake, classes, generator), *pair)
                self._mean_G.backward(loss, loss.detach())
        self._fake = None
        self.D.requires_grad_(True)
        mean, terms, peak = self._mean_G.finish()
        self.guard.check(mean, "G", step, peak)
        if self.watch.due(step):
            self.watch.see_update("G", self.G)
        self.schedules.set_rates(self.opt_G, "optim.g_lr", step)
        self.opt_G.step()
        self.opt_G.zero_grad(set_to_none=True)
        return terms[0]

    def update_average(self, step: int) -> None:
        """Update the moving average: G_ema <- decay * G_ema + (1 - decay) * G."""
        update_ema(self.G_ema, self.G, self.schedules.ema_decay(step))

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks that a checkpoint holds, by name."""
        return {"G": self.G, "D": self.D, "G_ema": self.G_ema}

    def optimizers(self) -> dict[str, Any]:
        """Return the optimizers by name, and the gradient scaler of fp16 as ``scaler``."""
        scaler = self.accelerator.scaler
        return {"G": self.opt_G, "D": self.opt_D} | ({"scaler": scaler} if scaler else {})

    def load(
        self, weights: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Any]
    ) -> None:
        """Load the weights and optimizer states of a checkpoint, by the names it has them under.

        Learning rates and betas stay those of the configuration: a fork may have other ones.

        Raises:
            ValueError: something is missing, or of another shape or type.
        """
        restore(self.networks(), self.optimizers(), weights, optimizers)

    def _logits(
        self, D: nn.Module, images: Tensor, y: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Return D's logits (m,) float32 of the images after the configured augmentation."""
        if generator is not None and self._policy:
            images = augment(images, self._policy, generator)
        logits: Tensor = D(images, y, generator)
        return logits.float()

    def _penalised(
        self,
        images: Tensor,
        y: Tensor | None,
        generator: torch.Generator | None,
        directions: torch.Generator | None,
        weight: float,
    ) -> tuple[Tensor, Tensor | float]:
        """Return D's logits (m,) of the images, and their penalty times ``weight`` (0: none).

        The penalty is of the first ``stability.penalty_share`` of the images. It is taken with
        respect to the images before their augmentation.
        """
        if not weight or directions is None:
            return self._logits(self._D, images, y, generator), 0.0
        stability, compiled = self.config.stability, self.config.train.compile
        count = max(1, round(stability.penalty_share * len(images)))
        draws = None if generator is None else generator.get_state()
        classes = None if y is None else y[:count]

        def judge(images: Tensor) -> Tensor:
            if generator is not None and draws is not None:
                generator.set_state(draws)  # the same augmentation and dropout in every pass
            return self._logits(self._D, images, classes, generator)

        eager = compiled and stability.penalty in UNCOMPILED
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            logits, penalty = PENALTIES[stability.penalty](judge, images[:count], directions)
        if count < len(images):
            rest = None if y is None else y[count:]
            others = self._logits(self._D, images[count:], rest, generator)
            logits = torch.cat([logits, others])
        return logits, weight * penalty

    @torch.no_grad()
    def _judge_real(
        self, images: Tensor, y: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Return D's logits (m,) of real images for a relativistic loss of G, as constants."""
        return self._logits(self.D, images, y, generator)

    def _draws(self, network: str, step: int, turn: int, k: int) -> torch.Generator | None:
        """Return the generator for augmentation and dropout of a micro-batch; None without both."""
        if not (self._policy or self.config.model.dropout):
            return None
        return self._micro_batch_rng(f"draws for {network}", step, turn, k)

    def _micro_batch_rng(self, purpose: str, step: int, turn: int, k: int) -> torch.Generator:
        """Return a generator seeded by the micro-batch's place in the run, not by the rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        place = (step * self.config.optim.d_steps + turn) * ranks * self.accumulation
        return rng(self.config.run.seed, purpose, place + rank * self.accumulation + k)

    def _generate_for_D(self, noise: Tensor, turn: int) -> Tensor:
        """Return G(z); keep its graph for ``update_G`` if the step has one micro-batch.

        With accumulation the graphs of all micro-batches would have to be in memory at once, so
        ``update_G`` runs G again.
        """
        if self.accumulation > 1 or turn + 1 < self.config.optim.d_steps:
            with torch.no_grad():
                images: Tensor = self.G(noise)
            return images
        self._fake = self._G(noise)
        return self._fake
