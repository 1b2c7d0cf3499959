"""The engines of the training loop: plain data parallelism, or DeepSpeed with sharded state.

Both have the same methods, which `fit` calls on every process, and return the optimizer state in
the same form, so that either can resume from the checkpoints of the other.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cldf_dist.config import Fit
from cldf_dist.system.distributed import accelerator, processes, zero_stage
from cldf_dist.training.checkpoint import Checkpoint, load_optimizer, optimizer_tensors

Losses = Mapping[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, beside its step
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(task: nn.Module, settings: Fit, mixed_precision: str) -> PlainEngine | ZeroEngine:
    """The engine for this launch. `task` must be on its device."""
    device = accelerator().device
    dtype = autocast_dtype(mixed_precision, device) if getattr(task, "autocast", True) else None
    module = _InPrecision(task, device, dtype)
    return ZeroEngine(module, settings) if zero_stage() else PlainEngine(module, settings)


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products; None is float32.

    `auto` is bf16 on GPUs: on CPUs without AMX its autocast is many times slower than float32.
    """
    if mixed_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return PRECISIONS.get(mixed_precision)


class PlainEngine:
    """One process, or several that each hold all weights and the whole optimizer state (DDP)."""

    def __init__(self, module: _InPrecision, settings: Fit) -> None:
        self.settings = settings
        self.parameters = list(module.parameters())
        self.optimizer = _adamw(module, settings)
        self.scaler = torch.amp.GradScaler(
            module.device.type, enabled=module.dtype is torch.float16
        )
        self.wrapped: Any = accelerator().prepare_model(module)

    def forward(self, batch: Mapping[str, Any]) -> Losses:
        """The losses of a micro-batch, by name."""
        losses: Losses = self.wrapped(batch)
        return losses

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Context of forward and backward: gradients are reduced in the last micro-batch only."""
        with contextlib.nullcontext() if last else accelerator().no_sync(self.wrapped):
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's loss."""
        scaled: Any = self.scaler.scale(loss / self.settings.gradient_accumulation_steps)
        scaled.backward()

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Update the weights unless the gradient is not finite.

        Returns the gradient's norm before clipping and whether the weights moved, both scalars on
        the device. Gradients are averaged over the processes, so that all decide alike.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm or math.inf)
        moved = torch.isfinite(norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # it checks for non-finite gradients itself
            self.scaler.update()
        else:
            optimizer: Any = self.optimizer
            optimizer.found_inf = 1.0 - moved.float()  # the fused kernel then leaves all as it is
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, moved

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint that is not tensors."""
        return {"scaler": self.scaler.state_dict() if self.scaler.is_enabled() else {}}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer state by `parameter number/name`."""
        return optimizer_tensors(self.optimizer)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the optimizer and the gradient scaler."""
        load_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
        if self.scaler.is_enabled() and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])

    def close(self) -> None:
        """Free what accelerate holds of the training."""
        accelerator().free_memory()


class ZeroEngine:
    """DeepSpeed's ZeRO: each process holds all weights and one shard of the optimizer state.

    Stage 2 shards the gradients too. Weights stay float32 and whole, so the moving average and the
    saved weights are those of plain data parallelism.
    """

    def __init__(self, module: _InPrecision, settings: Fit) -> None:
        if module.dtype is torch.float16:
            raise ValueError(
                "mixed_precision=fp16 is not supported with ZeRO; set mixed_precision=bf16"
            )
        if any(parameter.dim() == 0 for parameter in module.parameters()):
            raise ValueError(
                "DeepSpeed cannot hold a parameter without dimensions; give it the shape (1,), or "
                "use configs/accelerate/ddp.yaml"
            )
        self.device = module.device
        _tell_deepspeed(settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            self.engine, self.optimizer = accelerator().prepare(module, _adamw(module, settings))
        self._zero: Any = self.optimizer.optimizer
        self._adamw: Any = self._zero.optimizer

    def forward(self, batch: Mapping[str, Any]) -> Losses:
        """The losses of a micro-batch, by name."""
        if processes().world_size > 1:
            for buffer in self.engine.module.buffers():  # as DDP does: those of batch norm drift
                torch.distributed.broadcast(buffer, 0)
        losses: Losses = self.engine(batch)
        return losses

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Context of forward and backward: gradients are reduced in the last micro-batch only."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's loss."""
        self.engine.backward(loss)  # it divides by the number of micro-batches

    def step(self, lr: float) -> tuple[Tensor, Tensor]:
        """Update the weights as `PlainEngine.step` does, with the same results."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()  # clips, and skips what is not finite, on all processes alike
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device).float()
        return norm, torch.tensor(not self.optimizer.step_was_skipped, device=self.device)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint that is not tensors: none, there is no gradient scaler."""
        return {"scaler": {}}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer state in the form of `PlainEngine`, gathered parameter by parameter.

        Collective; whole on the main process.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for flat in self._flat_parameters():
            state = self._adamw.state.get(flat, {})
            if not state:  # before the first step
                return {}
            step = state["step"]
        for number, parameter in enumerate(self.engine.module.parameters()):
            if not _is_trained(parameter):
                continue
            for name in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, name)
                if processes().is_main:  # all took part, but one writes
                    found[f"{number}/{name}"] = whole.cpu()
            found[f"{number}/step"] = step.cpu()
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore this process's shard of the optimizer state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        stored = checkpoint.tensors["optimizer"]
        if not stored:
            return
        self._make_state(next(value for key, value in stored.items() if key.endswith("/step")))
        for number, parameter in enumerate(self.engine.module.parameters()):
            if f"{number}/step" not in stored:  # it never had a gradient: its moments are 0
                continue
            for name in MOMENTS:
                whole = stored[f"{number}/{name}"].to(self.device)
                safe_set_full_optimizer_state(parameter, whole, name)

    def _make_state(self, step: Tensor) -> None:
        """Create the state that AdamW creates at its first step, and DeepSpeed's views of it."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat, parameters in zip(self._flat_parameters(), self._zero.bit16_groups):
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            self._adamw.state[flat] = {"step": step.clone().to(self.device), **moments}
            lazy_init_hp_params_optimizer_state(parameters, flat, self._adamw.state)

    def _flat_parameters(self) -> list[Tensor]:
        """This process's shard of the weights, by group of parameters."""
        return [group["params"][0] for group in self._adamw.param_groups]

    def close(self) -> None:
        """Free what DeepSpeed and accelerate hold of the training."""
        self.engine.destroy()
        accelerator().free_memory()


def _is_trained(parameter: nn.Parameter) -> bool:
    """True if the optimizer keeps moments of the parameter."""
    return parameter.requires_grad and parameter.numel() > 0


class _InPrecision(nn.Module):
    """The task under autocast, within the module because DeepSpeed disables an outer autocast."""

    def __init__(self, task: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.task, self.device, self.dtype = task, device, dtype

    def forward(self, batch: Mapping[str, Any]) -> Losses:
        with autocast(self.device, self.dtype):
            losses: Losses = self.task(batch)
        return losses


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """An autocast context of `dtype`; disabled for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def _adamw(module: nn.Module, settings: Fit) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,  # also on CPUs: five times faster there, and it can skip a step by a flag
    )


def _tell_deepspeed(settings: Fit) -> None:
    """Set the batch sizes that accelerate would read from its own data loader; ours is another."""
    gradient_accumulation_steps, world_size = (
        settings.gradient_accumulation_steps,
        processes().world_size,
    )
    accelerator().gradient_accumulation_steps = gradient_accumulation_steps
    accelerator().state.deepspeed_plugin.deepspeed_config.update(
        train_batch_size=settings.batch_size,
        train_micro_batch_size_per_gpu=settings.batch_size
        // (gradient_accumulation_steps * world_size),
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_clipping=settings.clip_norm,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # it would be compiled now
    )
