"""Checks of what a caller hands to the loss; every message has value, rule and remedy."""

import math
from typing import Literal, NoReturn, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Negatives = Literal["all", "other"]
Reduction = Literal["mean", "sum", "none"]
Precision = Literal["auto", "fp32", "tf32", "fp16", "bf16"]
Backend = Literal["auto", "triton", "torch", "reference"]

MAX_FEATURES = 256
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_TYPES = (torch.int32, torch.int64)


def check_settings(
    *,
    negatives: Negatives,
    reduction: Reduction,
    precision: Precision,
    backend: Backend,
    deterministic: bool,
    process_group: dist.ProcessGroup | None,
) -> None:
    """Raise TypeError or ValueError unless the settings are what their names allow."""
    _check_choice("negatives", negatives, get_args(Negatives))
    _check_choice("reduction", reduction, get_args(Reduction))
    _check_choice("precision", precision, get_args(Precision))
    _check_choice("backend", backend, get_args(Backend))
    if not isinstance(deterministic, bool):
        raise TypeError(f"supcon_loss: deterministic must be True or False, got {deterministic!r}")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "supcon_loss: process_group must be a torch.distributed.ProcessGroup that holds this "
            f"rank, or None, got {process_group!r}"
        )


def check_temperature(temperature: float | Tensor) -> float:
    """The temperature as a number; raises TypeError or ValueError unless it is one above 0."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.dtype not in FLOAT_TYPES:
            raise TypeError(
                "supcon_loss: a temperature tensor must hold one floating point number, got "
                f"{temperature.dtype} of shape {tuple(temperature.shape)}"
            )
        value = float(temperature.detach())
    elif isinstance(temperature, bool) or not isinstance(temperature, (float, int)):
        raise TypeError(
            "supcon_loss: temperature must be a float, or a tensor of one number to be learnt, "
            f"got {type(temperature).__name__}"
        )
    else:
        value = float(temperature)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"supcon_loss: temperature must be finite and > 0, got {value}; learn its logarithm "
            "where an optimizer moves it: temperature=log_temperature.exp()"
        )
    return value


def check_pixels(z: Tensor, labels: Tensor, weight: Tensor | None, group: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the per-pixel tensors fit together.

    Nothing is read from the device: the values of `weight` are for `weight_breaks_rule`.
    """
    _check_tensor("z", z)
    if z.dtype not in FLOAT_TYPES:
        raise TypeError(f"supcon_loss: z must be floating point, got {z.dtype}; use z.float()")
    if z.ndim != 2 or not 1 <= z.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"supcon_loss: z must be (pixels, features) with 1 to {MAX_FEATURES} features, "
            f"got shape {tuple(z.shape)}; flatten the pixels, project the features"
        )
    _check_ids("labels", labels, z)
    if group is not None:
        _check_ids("group", group, z)
    if weight is not None:
        _check_weight(weight, z)


def check_bank(z: Tensor, bank: Tensor | None, bank_labels: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the bank is absent or complete and constant."""
    if bank is None and bank_labels is None:
        return
    if bank is None or bank_labels is None:
        missing = "bank" if bank is None else "bank_labels"
        raise ValueError(f"supcon_loss: {missing} is missing; give bank and bank_labels together")
    _check_tensor("bank", bank)
    if bank.dtype != z.dtype:
        raise TypeError(
            f"supcon_loss: bank must have the dtype of z, got {bank.dtype} and {z.dtype}; "
            "use bank.to(z.dtype)"
        )
    if bank.ndim != 2 or bank.shape[1] != z.shape[1]:
        raise ValueError(
            f"supcon_loss: bank must be (entries, {z.shape[1]}) like z, "
            f"got shape {tuple(bank.shape)}"
        )
    if bank.requires_grad:
        raise ValueError("supcon_loss: bank gets no gradient; pass bank.detach()")
    _check_ids("bank_labels", bank_labels, bank)
    _check_device("bank", bank, z)


def weight_breaks_rule(weight: Tensor) -> Tensor:
    """Which weights are negative or not finite: true or false, on the device."""
    return ~((weight >= 0) & (weight < math.inf))  # NaN too


def refuse_weight(weight: Tensor) -> NoReturn:
    """Raise ValueError for a weight that breaks its rule."""
    raise ValueError(
        f"supcon_loss: weight must be finite and >= 0, got {weight.min():g} to "
        f"{weight.max():g}; use weight.clamp_min(0)"
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"supcon_loss: {name} must be one of {listed}, got {value!r}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"supcon_loss: {name} must be a tensor, got {type(value).__name__}; "
            f"use torch.as_tensor({name})"
        )


def _check_ids(name: str, ids: Tensor, rows: Tensor) -> None:
    _check_tensor(name, ids)
    if ids.dtype not in INTEGER_TYPES:
        raise TypeError(
            f"supcon_loss: {name} must be int32 or int64, got {ids.dtype}; use {name}.long()"
        )
    _check_length(name, ids, rows)
    _check_device(name, ids, rows)


def _check_weight(weight: Tensor, z: Tensor) -> None:
    _check_tensor("weight", weight)
    if weight.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"supcon_loss: weight must be floating point, got {weight.dtype}; use weight.float()"
        )
    _check_length("weight", weight, z)
    _check_device("weight", weight, z)
    if weight.requires_grad:
        raise ValueError("supcon_loss: weight gets no gradient; pass weight.detach()")


def _check_length(name: str, values: Tensor, rows: Tensor) -> None:
    if values.shape != rows.shape[:1]:
        raise ValueError(
            f"supcon_loss: {name} must have one value per row, shape ({rows.shape[0]},), "
            f"got {tuple(values.shape)}; flatten it like the pixels"
        )


def _check_device(name: str, values: Tensor, z: Tensor) -> None:
    if values.device != z.device:
        raise ValueError(
            f"supcon_loss: {name} is on {values.device} but must be on {z.device} like its rows; "
            f"use {name}.to(z.device)"
        )
