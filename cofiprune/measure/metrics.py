"""The default metrics of each task, counted batch by batch on the device of the predictions.

Nothing is read back before the end, so that no batch waits for the previous one.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cofiprune.data.tasks import IGNORED, Task

Counts = dict[str, Tensor]


class Metrics:
    """Loss and metrics over batches: `add` each, then read the `result`."""

    def __init__(self, task: Task) -> None:
        self.task: Task = task
        self._counts: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Any, batch: Mapping[str, Tensor]) -> None:
        """Count a batch.

        :param outputs: of a transformers model that was given labels.
        """
        counts = counted(self.task, outputs, batch)
        weight = counts.pop("weight")
        loss = outputs.get("loss")
        if loss is not None:
            # The mean over no labels at all is not a number; it has no weight either.
            counts["loss"] = torch.where(weight > 0, loss.float() * weight, 0.0)
            counts["loss_weight"] = weight
        for name, value in counts.items():
            self._counts[name].append(value)
        if self.task == "regression":
            self._pairs.append((outputs["logits"].detach().float(), batch["labels"].float()))

    def result(self) -> dict[str, float]:
        """Return the metrics by name."""
        sums = {name: torch.stack(values).cpu().double().sum().item() for name, values in self._counts.items()}
        found: dict[str, float] = {}
        if "loss" in sums:
            found["loss"] = _ratio(sums["loss"], sums["loss_weight"])
        for name in ("accuracy", "start_accuracy", "end_accuracy", "span_accuracy"):
            if f"{name}_right" in sums:
                found[name] = _ratio(sums[f"{name}_right"], sums[f"{name}_of"])
        if self.task == "multi-label":
            found["f1"] = _ratio(2 * sums["both"], sums["predicted"] + sums["true"])
        if self.task == "masked-lm" and "loss" in found:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        if self._pairs:
            found.update(_regression(self._pairs))
        return found


def counted(task: Task, outputs: Any, batch: Mapping[str, Tensor]) -> Counts:
    """Count a batch: scalar tensors to be summed over batches, and its `weight` in the mean loss."""
    logits, labels = outputs.get("logits"), batch.get("labels")
    if task == "question-answering":
        return _spans(outputs, batch)
    if labels is None or logits is None or task in ("other", "embedding", "regression"):
        first = next(iter(batch.values())) if labels is None else labels
        return {"weight": torch.tensor(len(first), device=first.device)}
    if task == "multi-label":
        predicted, true = logits > 0, labels.view_as(logits) > 0.5
        counts = {"both": (predicted & true).sum(), "predicted": predicted.sum(), "true": true.sum()}
        sizes = {"weight": len(labels), "accuracy_of": true.numel()}
        counts |= {name: torch.tensor(size, device=labels.device) for name, size in sizes.items()}
        return {**counts, "accuracy_right": (predicted == true).sum()}
    predicted = logits.argmax(-1)
    labels = labels.view_as(predicted)
    counts_for = labels != IGNORED
    right = ((predicted == labels) & counts_for).sum()
    return {"weight": counts_for.sum(), "accuracy_right": right, "accuracy_of": counts_for.sum()}


def _spans(outputs: Any, batch: Mapping[str, Tensor]) -> Counts:
    """Spans [B] against logits [B, T]; positions past the end of the batch are left out, as in the loss."""
    found: Counts = {}
    right, asked = [], []
    mask = batch.get("attention_mask")
    for end in ("start", "end"):
        logits: Tensor = outputs[f"{end}_logits"]
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)  # the padding holds no span
        position = batch[f"{end}_positions"].view(-1)
        asked.append(position < logits.shape[1])
        right.append((logits.argmax(-1) == position) & asked[-1])
        found[f"{end}_accuracy_right"] = right[-1].sum()
        found[f"{end}_accuracy_of"] = asked[-1].sum()
    both = asked[0] & asked[1]
    found["span_accuracy_right"] = (right[0] & right[1]).sum()
    found["span_accuracy_of"] = both.sum()
    found["weight"] = both.sum()
    return found


def _regression(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    predicted = torch.cat([p.reshape(len(p), -1) for p, _ in pairs]).double().cpu().numpy()
    true = torch.cat([t.reshape(len(t), -1) for _, t in pairs]).double().cpu().numpy()
    found = {"mse": float(((predicted - true) ** 2).mean())}
    if true.shape[1] == 1 and len(true) > 1:
        # Undefined for constant predictions or labels; 0 says that nothing was predicted.
        spread = predicted.std() * true.std()
        moment = float(((predicted - predicted.mean()) * (true - true.mean())).mean())
        found["pearson"] = moment / float(spread) if spread > 0 else 0.0
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
