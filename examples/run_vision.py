"""Prune an image classifier: train a small ViT on handwritten digits, prune a copy, compact, save, reload, compare.

    python examples/run_vision.py
    python examples/run_vision.py --target-sparsity 0.9 --output-dir runs/digits-90
    python examples/run_vision.py --data-dir DIR --seed 1

The 1,797 images of 8 x 8 pixels come with scikit-learn, or from the file all.* of a folder (columns `pixels`, 64
numbers from 0 to 16, and `label`). 400 images chosen at random, always the same, are the test set: nothing is trained
on them and nothing is chosen by them. Of the other 1,397, 200 are for validation and 1,197 to learn from. On two CPU
cores it takes about two minutes. Every field of `cofiprune.PruneConfig` is an option too.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

import cofiprune
from cofiprune.data import load_rows

SIZE, LEVELS, CLASSES = 8, 16, 10
TEST, VALIDATION = 400, 200
# So many epochs leave gates the time to find out more by themselves than they usually do.
SETTINGS = (
    "--epochs 15 --one-shot-share 0.75 --sparsity-warmup-epochs 3.75 --freeze-epochs 9 --finetune-epochs 15 "
    "--batch-size 32 --learning-rate 1e-3 --finetune-learning-rate 2e-3 --weight-decay 0.05 --warmup-ratio 0.1"
)
TINY = "--epochs 1 --finetune-epochs 1 --batch-size 16 --learning-rate 1e-3 --finetune-learning-rate 3e-3"
Rows = list[dict[str, Any]]
# Settings that say how a student learns; the teacher leaves them to their defaults.
STUDENT_ONLY = ("label_weight", "train_embeddings", "finetune_batch_size")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, cofiprune.PruneConfig]:
    """Read the command line; what is no option of this program is a setting of cofiprune."""
    epilog = "Every field of cofiprune.PruneConfig is an option too: --epochs 6 --units head intermediate."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", help="folder with all.* (default: the digits that come with scikit-learn)")
    add("--model", help="folder of a ViT for these images (default: a small one with random weights)")
    add("--target-sparsity", default="0.9", help="share of the layers' parameters to remove; none: train only")
    add("--teacher", help="folder; train (the default when pruning): train the model and prune a copy; self: a copy of "
        "the model as it comes; none: learn from labels alone")  # fmt: skip
    add("--teacher-epochs", type=float)
    add("--teacher-learning-rate", type=float)
    add("--output-dir", type=Path, default=Path("runs/vision"), help="where everything goes (default: runs/vision)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--tiny", action="store_true", help="a smaller model and few images: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    options, settings = parser.parse_known_args(argv)
    options.target_sparsity = None if options.target_sparsity == "none" else float(options.target_sparsity)
    options.teacher = options.teacher or ("none" if options.target_sparsity is None else "train")
    options.teacher_epochs = options.teacher_epochs or (3 if options.tiny else 40)
    options.teacher_learning_rate = options.teacher_learning_rate or (5e-3 if options.tiny else 2e-3)
    settings = [*(TINY if options.tiny else SETTINGS).split(), *settings]
    return options, cofiprune.PruneConfig.from_arguments(settings)


def load_images(folder: str | None) -> Rows:
    """Return the images, [1, 8, 8] from -1 to 1, and what they show."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = list(zip(digits.data, digits.target, strict=True))
    else:
        images = [(row["pixels"], row["label"]) for row in load_rows(folder, "all")]
    if len(images) <= TEST + VALIDATION:
        sys.exit(f"{len(images)} images are too few: {TEST} test the result, and {VALIDATION} are for validation")
    return [
        {
            "pixel_values": torch.tensor(np.reshape(pixels, (1, SIZE, SIZE)), dtype=torch.float32) / (LEVELS / 2) - 1,
            "labels": int(label),
        }
        for pixels, label in images
    ]


def split(rows: Rows, *, tiny: bool) -> dict[str, Rows]:
    """Return the images to learn from, to watch the training by, and to test the result on."""
    order = np.random.RandomState(1234).permutation(len(rows)).tolist()
    parts = {"train": order[TEST + VALIDATION :], "validation": order[TEST : TEST + VALIDATION], "test": order[:TEST]}
    most = {"train": 96, "validation": 32, "test": 32}
    return {name: [rows[index] for index in part[: most[name] if tiny else None]] for name, part in parts.items()}


def load_model(source: str | Path | None, options: argparse.Namespace) -> PreTrainedModel:
    """Load a model, or make a small ViT with random weights."""
    if source is not None:
        return AutoModelForImageClassification.from_pretrained(source).to(PartialState().device)
    width, layers = (32, 2) if options.tiny else (48, 3)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    images = {"image_size": SIZE, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}
    config = ViTConfig(
        **images, **sizes, intermediate_size=2 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return ViTForImageClassification(config).to(PartialState().device)


def main(argv: Sequence[str] | None = None) -> None:
    """Teach, prune, save, reload, measure."""
    options, config = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, say = options.output_dir, PartialState().print
    rows = split(load_images(options.data_dir), tiny=options.tiny)
    train = rows.pop("train")
    transformers.set_seed(config.seed)  # of random weights
    model = load_model(options.model, options)
    teacher = None if options.teacher in ("train", "self", "none") else load_model(options.teacher, options)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        return {f"{name} accuracy": cofiprune.evaluate(model, part)["accuracy"] for name, part in rows.items()}

    def place(folder: Path) -> dict[str, Any]:
        return {"output_dir": folder, "resume": "auto" if options.resume else False}

    watched = {"eval_dataset": rows["validation"]}
    if options.teacher == "train":
        say("Fine-tuning the teacher ...")
        rate = {"learning_rate": options.teacher_learning_rate, "lr_scheduler_type": "linear"}
        own = {"epochs": options.teacher_epochs, **dict.fromkeys(STUDENT_ONLY)}
        cofiprune.finetune(model, train, config=config, **rate, **own, **watched, **place(folder / "teacher"))
        save(model, folder / "teacher")
    dense = copy.deepcopy(model) if teacher is None else teacher
    if options.teacher in ("train", "self"):
        teacher = dense
    learning = {"teacher": teacher, "config": config, **watched, **place(folder)}
    if options.target_sparsity is None:
        say("Training ...")
        result = cofiprune.finetune(model, train, **learning)
    else:
        say(f"Pruning to a sparsity of {options.target_sparsity:g} ...")
        result = cofiprune.prune(model, train, target_sparsity=options.target_sparsity, **learning)
        model = result.compact()
    save(model, folder)
    if PartialState().is_main_process:
        report(dense, load_model(folder, options), evaluate, result, options)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a model, in one of the processes."""
    if PartialState().is_main_process:
        model.save_pretrained(folder)


def report(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    result: cofiprune.PruneResult,
    options: argparse.Namespace,
) -> None:
    """Print and write metrics, size and speed of the saved model next to those of the dense one."""
    size = cofiprune.summary(pruned)
    found = {"sparsity": size.sparsity, "seconds": result.seconds, "best_step": result.best_step}
    for name, model in (("dense", dense), ("pruned", pruned)):
        found[name] = {"layer_parameters": cofiprune.summary(model).layer_parameters, **evaluate(model)}
    if options.benchmark:
        speed = cofiprune.benchmark(pruned, dense, seconds=0.2 if options.tiny else 5.0)
        found["speed"] = speed.to_dict()
        print(speed)
    print(size)
    for name, value in found["dense"].items():
        print(f"{name:24}{round(value, 4):>14,}{round(found['pruned'][name], 4):>14,}")
    found |= {"options": vars(options), "settings": result.settings.model_dump(mode="json")}
    (options.output_dir / "result.json").write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    print(f"Saved in {options.output_dir}")


if __name__ == "__main__":
    main()
