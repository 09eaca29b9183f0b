"""Prune an encoder that is not in transformers: the encoder, its adapter, and a run that checks and uses them.

    python examples/custom_adapter.py

The encoder has pre-norm layers with one matrix for queries, keys and values. The adapter says which dimensions of its
parameters follow hidden dimensions, heads and feed-forward dimensions; see docs/how-to/add-an-adapter.md.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

import cofiprune
from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    embedding,
    family,
    linear,
    norm,
    projection,
)


class ToyConfig(PreTrainedConfig):
    """Its sizes."""

    model_type = "toy"
    vocab_size: int = 40
    hidden_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 48
    max_position_embeddings: int = 32
    pad_token_id: int = 0


class ToyAttention(nn.Module):
    """Self-attention without the residual."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(size, 3 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """:param states: [batch, tokens, hidden]; :param mask: [batch, 1, 1, tokens], True for a token to be read."""
        fused = self.in_proj(states).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(query, key, value, mask)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class ToyLayer(nn.Module):
    """Each block reads the states through its norm, and what it gives is added to them."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.attention_norm, self.mlp_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = ToyAttention(config)
        self.mlp = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The states after both blocks."""
        states = states + self.attention(self.attention_norm(states), mask)
        return states + self.mlp(self.mlp_norm(states))


class ToyModel(PreTrainedModel):
    """The bare encoder."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutput:
        """:param input_ids: [batch, tokens]; :param attention_mask: the same shape, 0 for padding."""
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.token_embeddings(input_ids) + self.position_embeddings(places)
        seen = [states]
        for layer in self.layers:
            states = layer(states, mask)
            seen.append(states)
        return BaseModelOutput(self.norm(states), hidden_states=tuple(seen) if output_hidden_states else None)


class ToyForSequenceClassification(PreTrainedModel):
    """The encoder with a head that reads the first token."""

    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """:param labels: [batch], the class of each text."""
        found = self.toy(input_ids, attention_mask, output_hidden_states)
        logits = self.classifier(found.last_hidden_state[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, found.hidden_states)


# What lets `from_pretrained` of the Auto classes find it.
AutoConfig.register("toy", ToyConfig)
AutoModel.register(ToyConfig, ToyModel)
AutoModelForSequenceClassification.register(ToyConfig, ToyForSequenceClassification)


ATTENTION = BlockTable(
    rows=(
        norm("attention_norm"),
        linear("attention.in_proj", reads=HIDDEN, writes=HEADS.times(3)),
        projection("attention.out_proj", reads=HEADS),
    ),
    exit=BlockExit("attention", residual=False),
    bypassed=("attention_norm",),
    attributes=(("attention", "num_heads", HEADS.of(1)),),
)
MLP = BlockTable(
    rows=(
        norm("mlp_norm"),
        linear("mlp.0", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.2", reads=INTERMEDIATE),
    ),
    exit=BlockExit("mlp", residual=False),
    bypassed=("mlp_norm",),
)


@family("toy")
def adapter(config: ToyConfig) -> Family:
    return Family(
        layers="layers",
        stem=(embedding("{token,position}_embeddings"), norm("norm")),
        attention=ATTENTION,
        ffn=MLP,
        heads={"ForSequenceClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),)},
    )


def main() -> None:
    """Check the adapter, register it, prune with it, save and load."""
    print(cofiprune.check_adapter(adapter))
    cofiprune.register_adapter(adapter)
    ids = torch.randint(1, 40, (256, 12), generator=torch.Generator().manual_seed(0))
    model = ToyForSequenceClassification(ToyConfig())
    rows = [{"input_ids": row, "labels": int(7 in row)} for row in ids]
    small = cofiprune.prune(model, rows, target_sparsity=0.6, epochs=2, finetune_epochs=1).compact()
    small.save_pretrained("runs/custom_adapter")
    small = AutoModelForSequenceClassification.from_pretrained("runs/custom_adapter")
    gap = (small(ids).logits - model.eval()(ids).logits).abs().max().item()
    print(f"{cofiprune.summary(small)}\nFrom the file: logits within {gap:.1g} of the masked model's.")


if __name__ == "__main__":
    main()
