"""One shot on a model of the shape of wav2vec 2.0 that has learned a task of sound: which of eight notes is played."""

import copy

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import cofiprune

NOTES = (220.0, 277.2, 329.6, 415.3, 523.3, 659.3, 830.6, 1046.5)
RATE, LENGTH = 8000, 2000


def played(count: int, seed: int) -> list[dict[str, object]]:
    """A note with an overtone, at any phase, loudness and length, in noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(LENGTH) / RATE

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    found = []
    for index in range(count):
        label = index % len(NOTES)
        pitch = NOTES[label] * draw(0.97, 1.03)
        angle = 2 * torch.pi * pitch * time + draw(0, 6.28)
        sound = draw(0.5, 1.5) * (angle.sin() + draw(0, 0.5) * (2 * angle).sin())
        length = int(draw(0.5, 1) * LENGTH)
        sound = (sound + 0.7 * torch.randn(LENGTH, generator=generator))[:length]
        found.append({"input_values": ((sound - sound.mean()) / sound.std()).tolist(), "labels": label})
    return found


def model() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4), conv_stride=(5, 4, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        num_labels=len(NOTES), layerdrop=0.0, mask_time_prob=0.0, feat_extract_norm="layer",
        classifier_proj_size=32,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


@pytest.mark.slow
def test_one_shot_keeps_what_a_model_of_sound_has_learned() -> None:
    train, held_out = played(1600, 1), played(400, 2)
    dense = model()
    cofiprune.finetune(dense, train, epochs=6, learning_rate=1e-3, train_embeddings=True, progress=False, seed=0)
    found = {0.0: cofiprune.evaluate(dense, held_out)["accuracy"]}
    for share in (0.4, 0.6, 0.8):
        student = copy.deepcopy(dense)
        result = cofiprune.prune(student, train, target_sparsity=share, method="one-shot", progress=False, seed=0)
        assert abs(result.sparsity - share) <= 0.005
        found[share] = cofiprune.evaluate(result.compact(), held_out)["accuracy"]
    print("\n" + "  ".join(f"{share:.0%} removed: {value:.3f}" for share, value in found.items()))
    assert found[0.0] > 0.9
    assert found[0.6] > found[0.0] - 0.02
    assert found[0.8] > found[0.0] - 0.05
