"""Prune an image classifier: train a small ViT on handwritten digits, prune a copy, compact, save, reload, compare.

    python examples/run_vision.py
    python examples/run_vision.py --target-sparsity 0.9 --output-dir runs/digits-90
    python examples/run_vision.py --data-dir DIR --seed 1

The 1,797 images of 8 x 8 pixels come with scikit-learn, or from the file all.* of a folder (columns `pixels`, 64
numbers from 0 to 16, and `label`). 400 images chosen at random, always the same, are the test set: nothing is trained
on them and nothing is chosen by them. Of the other 1,397, 200 are for validation and 1,197 to learn from. On two CPU
cores it takes about two minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from common import Rows, Task, load_model, subset
from common import main as run_example
from numpy.typing import NDArray
from options import Defaults
from splits import need_columns, read_split
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import cofiprune
from cofiprune.cli.options import Parser
from cofiprune.errors import DataError

SIZE, LEVELS, CLASSES = 8, 16, 10
TEST, VALIDATION = 400, 200
SETTINGS = {
    "epochs": 15.0,
    # So many epochs leave gates the time to find out more by themselves.
    "one_shot_share": 0.75,
    "sparsity_warmup_epochs": 3.75,
    "freeze_epochs": 9.0,
    "finetune_epochs": 15.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "finetune_learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup_ratio": 0.1,
}
OPTIONS = {"teacher_epochs": 40.0, "teacher_learning_rate": 2e-3}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
TINY_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; a user's mistake ends in one line and exit code 2."""
    defaults = Defaults(new_vit, SETTINGS, OPTIONS)
    return run_example("run_vision", (__doc__ or "").partition("\n")[0], add_options, make_task, argv, defaults)


def add_options(parser: Parser) -> None:
    """Add the option of the images."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
        help="folder with all.* (parquet, json, jsonl; default: the digits that come with scikit-learn)")  # fmt: skip


def make_task(options: argparse.Namespace) -> Task:
    """Read and split the images, and say how a model is measured on them."""
    images, labels = load_digits(options.data_dir)
    order = np.random.RandomState(1234).permutation(len(images)).tolist()
    parts = order[TEST + VALIDATION :], order[TEST : TEST + VALIDATION], order[:TEST]
    if not parts[0]:
        raise DataError(
            f"{len(images)} images are too few: {TEST} test the result, and {VALIDATION} are for validation"
        )
    chosen = [subset(part, options, training=part is parts[0]) for part in parts]
    train, validation, test = (rows_of(images, labels, part) for part in chosen)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        found = {"accuracy": validation, "test_accuracy": test}
        return {name: cofiprune.evaluate(model, rows)["accuracy"] for name, rows in found.items()}

    return Task(
        name="digits",
        train=train,
        validation=validation,
        new_model=lambda source: load_model(source, "image-classification"),
        measure=measure,
        tokenizer=None,
        headline="test_accuracy",
    )


def load_digits(folder: Path | None) -> tuple[NDArray[np.float32], list[int]]:
    """The images [count, 1, 8, 8], from -1 to 1, and what they show.

    :raises DataError: when a file has other columns, or images of another size.
    """
    if folder is None:
        from sklearn.datasets import load_digits as load

        data = load()
        pixels, labels = data.data.tolist(), data.target.tolist()
    else:
        rows = read_split(folder, ("all",))
        need_columns(rows[0][1], ("pixels", "label"), rows[0][0])
        for where, row in rows:
            if len(row["pixels"]) != SIZE * SIZE or not 0 <= row["label"] < CLASSES:
                raise DataError(f"{where}: it takes {SIZE * SIZE} pixels and a label from 0 to {CLASSES - 1}")
        pixels, labels = [list(row["pixels"]) for _, row in rows], [int(row["label"]) for _, row in rows]
    return np.array(pixels, np.float32).reshape(-1, 1, SIZE, SIZE) / (LEVELS / 2) - 1, labels


def rows_of(images: NDArray[np.float32], labels: Sequence[int], chosen: Sequence[int]) -> Rows:
    """Rows of some of the images."""
    return [{"pixel_values": torch.from_numpy(images[index]), "labels": labels[index]} for index in chosen]


def new_vit(options: argparse.Namespace) -> str:
    """Make a ViT with random weights; return the folder that it is in."""
    folder: Path = options.output_dir / "untrained"
    if PartialState().is_main_process:
        transformers.set_seed(options.seed)
        config = ViTConfig(
            image_size=SIZE,
            patch_size=2,
            num_channels=1,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **(TINY_SIZES if options.tiny else SIZES),
        )
        ViTForImageClassification(config).save_pretrained(folder)
    PartialState().wait_for_everyone()
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
