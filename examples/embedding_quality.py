"""How close two embedding models are: their vectors, the similarities between these, and what is found by them.

Shapes: N texts, H and h dimensions of the teacher's and of the student's vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from embedding_texts import ScoredPairs, encode
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from cofiprune.hooks import evaluating

POOLING = ("mean", "cls")


@dataclass(frozen=True)
class Agreement:
    """Two models on the same texts; everything is 1 for a model and itself."""

    cosine: float
    """Mean cosine of the two vectors of a text. Dimensions that the student does not have count as 0."""
    cosine_p05: float
    """One text in twenty has a smaller one."""
    spearman: float
    """Rank correlation of the cosines of all pairs of texts."""
    same_neighbour: float
    """Share of texts whose nearest other text is the same one."""
    found_in_index: float | None
    """Share of texts that the student's vector finds first among the teacher's vectors: what becomes of an index
    that was filled before. None where the vectors have different dimensions."""


@dataclass(frozen=True)
class Encoder:
    """A model and how its vectors are made."""

    model: PreTrainedModel
    tokenizer: Any
    pooling: str
    """mean: over the tokens that are no padding; cls: the first token."""
    max_length: int

    def vectors(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """Return the embeddings of texts, of length 1: [N, H], on the CPU."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: list[Tensor] = []
        with evaluating(self.model), torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = encode(
                    [texts[index] for index in order[start : start + batch_size]], self.tokenizer, self.max_length
                )
                batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
                states = self.model(**batch).last_hidden_state.float()
                found.append(F.normalize(pooled(states, batch["attention_mask"], self.pooling), dim=-1).cpu())
        return torch.cat(found)[torch.tensor(order).argsort()]


def pooled(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return one vector per text: [N, H].

    :param states: [N, T, H]
    :param mask: [N, T], 0 at padding.
    """
    if how == "cls":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def agreement(teacher: Tensor, student: Tensor, kept: Sequence[int]) -> Agreement:
    """Compare the vectors of the same texts.

    :param teacher: [N, H], of length 1.
    :param student: [N, h], of length 1.
    :param kept: the teacher's dimensions that the student's are: h of them.
    """
    cosines = (teacher[:, list(kept)] * student).sum(-1)
    ours, theirs = student @ student.T, teacher @ teacher.T
    upper = torch.triu(torch.ones_like(ours, dtype=torch.bool), diagonal=1)
    nearest = [one.masked_fill(torch.eye(len(one), dtype=torch.bool), -2).argmax(1) for one in (ours, theirs)]
    found = None
    if student.shape == teacher.shape:
        found = float(((student @ teacher.T).argmax(1) == torch.arange(len(student))).float().mean())
    return Agreement(
        cosine=float(cosines.mean()),
        cosine_p05=float(np.percentile(cosines.numpy(), 5)),
        spearman=_spearman(ours[upper], theirs[upper]),
        same_neighbour=float((nearest[0] == nearest[1]).float().mean()),
        found_in_index=found,
    )


def similarity_score(encoder: Encoder, pairs: ScoredPairs) -> float:
    """Rank correlation of the cosines of pairs with the similarities that people gave them, as STS-B is scored."""
    first, second = encoder.vectors(pairs.first), encoder.vectors(pairs.second)
    return _spearman((first * second).sum(-1), torch.tensor(pairs.scores))


def _spearman(ours: Tensor, theirs: Tensor) -> float:
    return float(spearmanr(ours.numpy(), theirs.numpy()).statistic)
