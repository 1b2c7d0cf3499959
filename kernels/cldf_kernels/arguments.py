"""The arguments of the loss and their rules; every message has value, rule and remedy."""

import math
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

Negatives = Literal["all", "other"]
Reduction = Literal["mean", "sum", "none"]
Precision = Literal["auto", "fp32", "tf32", "fp16", "bf16"]
Backend = Literal["auto", "triton", "torch", "reference"]

MAX_FEATURES = 256
HALF_TYPES = (torch.float16, torch.bfloat16)
FLOAT_TYPES = (*HALF_TYPES, torch.float32, torch.float64)
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
    if backend == "reference" and process_group is not None:
        raise ValueError(
            'supcon_loss: backend="reference" knows one process only, got a process_group; '
            'use backend="auto"'
        )


@dataclass(frozen=True)
class Batch:
    """The tensors of one loss."""

    embeddings: Float[Tensor, "pixels features"]
    labels: Int[Tensor, " pixels"]
    weight: Float[Tensor, " pixels"] | None
    group: Int[Tensor, " pixels"] | None
    bank: Float[Tensor, "entries features"] | None
    bank_labels: Int[Tensor, " entries"] | None


def check_batch(batch: Batch) -> None:
    """Raise TypeError or ValueError unless the tensors fit together.

    Nothing is read from the device: the values of `weight` are for `weight_breaks_rule`.
    """
    embeddings = batch.embeddings
    _check_tensor("embeddings", embeddings)
    if embeddings.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"supcon_loss: embeddings must be floating point, got {embeddings.dtype}; use "
            "embeddings.float()"
        )
    if embeddings.ndim != 2 or not 1 <= embeddings.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"supcon_loss: embeddings must be (pixels, features) with 1 to {MAX_FEATURES} "
            f"features, got shape {tuple(embeddings.shape)}; flatten the pixels, project the "
            "features"
        )
    _check_ids("labels", batch.labels, embeddings)
    if batch.group is not None:
        _check_ids("group", batch.group, embeddings)
    if batch.weight is not None:
        _check_weight(batch.weight, embeddings)
    _check_bank(embeddings, batch.bank, batch.bank_labels)


def weight_breaks_rule(weight: Float[Tensor, " pixels"]) -> Bool[Tensor, " pixels"]:
    """Return true for each weight that is negative or not finite; nothing is read by the host."""
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


def _check_weight(weight: Tensor, embeddings: Tensor) -> None:
    _check_tensor("weight", weight)
    if weight.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"supcon_loss: weight must be floating point, got {weight.dtype}; use weight.float()"
        )
    _check_length("weight", weight, embeddings)
    _check_device("weight", weight, embeddings)
    if weight.requires_grad:
        raise ValueError("supcon_loss: weight gets no gradient; pass weight.detach()")


def _check_bank(embeddings: Tensor, bank: Tensor | None, bank_labels: Tensor | None) -> None:
    if bank is None and bank_labels is None:
        return
    if bank is None or bank_labels is None:
        missing = "bank" if bank is None else "bank_labels"
        raise ValueError(f"supcon_loss: {missing} is missing; give bank and bank_labels together")
    _check_tensor("bank", bank)
    if bank.dtype != embeddings.dtype:
        raise TypeError(
            f"supcon_loss: bank must have the dtype of embeddings, got {bank.dtype} and "
            f"{embeddings.dtype}; use bank.to(embeddings.dtype)"
        )
    if bank.ndim != 2 or bank.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"supcon_loss: bank must be (entries, {embeddings.shape[1]}) like embeddings, "
            f"got shape {tuple(bank.shape)}"
        )
    if bank.requires_grad:
        raise ValueError("supcon_loss: bank gets no gradient; pass bank.detach()")
    _check_ids("bank_labels", bank_labels, bank)
    _check_device("bank", bank, embeddings)


def _check_length(name: str, values: Tensor, rows: Tensor) -> None:
    if values.shape != rows.shape[:1]:
        raise ValueError(
            f"supcon_loss: {name} must have one value per row, shape ({rows.shape[0]},), "
            f"got {tuple(values.shape)}; flatten it like the pixels"
        )


def _check_device(name: str, values: Tensor, rows: Tensor) -> None:
    if values.device != rows.device:
        raise ValueError(
            f"supcon_loss: {name} is on {values.device} but must be on {rows.device} like its "
            f"rows; use {name}.to({str(rows.device)!r})"
        )
