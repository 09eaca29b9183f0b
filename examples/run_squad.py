"""Prune an encoder for question answering on SQuAD 1.1 or 2.0.

    python examples/run_squad.py --target-sparsity 0.9 --preset squad
    python examples/run_squad.py --data-dir DIR --version-2-with-negative --null-score-threshold 0.5

The questions come from the files train.* and validation.* (or dev.*) of a folder, or from the hub. Passages longer than
`--max-length` are cut into windows that overlap by `--doc-stride` tokens; the answer to a question is the best span of
all its windows. Exact match and F1 are SQuAD's own. The model is fine-tuned (or a teacher is loaded), a copy of it is
pruned, saved, loaded again, and measured next to the teacher. Every field of `cofiprune.PruneConfig` is an option too.
"""

import argparse
import copy
import json
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import PartialState
from bundled import minilm, tiny_bert
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import load_rows, tokenise

HUB_NAMES = {False: "rajpurkar/squad", True: "rajpurkar/squad_v2"}
TINY = "--epochs 1 --finetune-epochs 1 --batch-size 16 --learning-rate 1e-3 --finetune-learning-rate 3e-3"
Rows = list[dict[str, Any]]
Answer = tuple[float, str]
"""Score, the sum of the logits of its first and its last token, and text; an empty one is "there is no answer"."""
# Settings that say how a student learns; the teacher leaves them to their defaults.
STUDENT_ONLY = ("label_weight", "train_embeddings", "finetune_batch_size")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, cofiprune.PruneConfig]:
    """Read the command line; what is no option of this program is a setting of cofiprune."""
    epilog = "Every field of cofiprune.PruneConfig is an option too: --epochs 6 --units head intermediate."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", help="folder with train.* and validation.* or dev.* (default: the hub)")
    add("--version-2-with-negative", action="store_true", help="questions may have no answer, as in SQuAD 2.0")
    add("--null-score-threshold", type=float, default=0.0,
        help="no answer is given when its score is above the best answer's by more than this (default: 0)")  # fmt: skip
    add("--doc-stride", type=int, default=128, help="tokens of a passage that windows share (default: 128)")
    add("--n-best", type=int, default=20, help="first and last tokens that are considered per window (default: 20)")
    add("--max-answer-length", type=int, default=30, help="in tokens (default: 30)")
    add("--max-length", type=int, default=384, help="tokens of a window (default: 384)")
    add("--model", help="folder or hub name of an encoder (default: the packaged MiniLM-L6)")
    add("--target-sparsity", default="0.9", help="share of the layers' parameters to remove; none: fine-tune only")
    add("--teacher", help="folder or hub name; train (the default when pruning): fine-tune the model and prune a copy; "
        "self: a copy of the model as it comes; none: learn from labels alone")  # fmt: skip
    add("--teacher-epochs", type=float, default=2.0)
    add("--teacher-learning-rate", type=float, default=5e-5)
    add("--preset", choices=("squad",), help="the original's recipe; settings that are given go on top")
    add("--train-rows", type=int, help="training questions to use, chosen at random, always the same")
    add("--eval-rows", type=int, help="validation questions to use, the first ones")
    add("--output-dir", type=Path, default=Path("runs/squad"), help="where everything goes (default: runs/squad)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    words = sys.argv[1:] if argv is None else argv
    # Options may be spelled with underscores, as those of the original are.
    words = [re.sub("^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in words]
    options, settings = parser.parse_known_args(words)
    options.target_sparsity = None if options.target_sparsity == "none" else float(options.target_sparsity)
    options.teacher = options.teacher or ("none" if options.target_sparsity is None else "train")
    if options.tiny:
        options.teacher_epochs, options.teacher_learning_rate = 5, 5e-3
        options.train_rows, options.eval_rows = options.train_rows or 96, options.eval_rows or 32
        settings = [*TINY.split(), *settings]
    return options, cofiprune.PruneConfig.from_arguments(settings, preset=options.preset)


def load_questions(options: argparse.Namespace, *splits: str) -> Rows:
    """Return the questions to use of a split, from the hub where there is no folder."""
    version_2, folder = options.version_2_with_negative, options.data_dir
    if folder is not None:
        original = f"{splits[-1]}-{'v2.0' if version_2 else 'v1.1'}"  # as the published files are called
        rows = load_rows(folder, original, *splits)
    elif options.tiny:
        rows = made_up(0 if "train" in splits else 1, version_2=version_2)
    else:
        import datasets

        rows = list(datasets.load_dataset(HUB_NAMES[version_2], split=splits[0]))
    if not version_2 and not all(row["answers"]["text"] for row in rows):
        sys.exit("there are questions without an answer; --version-2-with-negative allows that, as in SQuAD 2.0")
    if "train" not in splits:
        return rows[: options.eval_rows]
    order = np.random.RandomState(1234).permutation(len(rows)) if options.train_rows else range(len(rows))
    return [rows[index] for index in order[: options.train_rows]]


def made_up(seed: int, *, version_2: bool) -> Rows:
    """Questions on a few made-up sentences for `--tiny`; every third one has no answer in SQuAD 2.0's manner."""
    draw, rows = random.Random(seed), []
    people = ("Ada", "Boris", "Chen", "Dora", "Emil", "Fatima")
    places = ("Lima", "Oslo", "Quito", "Riga", "Sofia", "Tunis")
    for index in range(128):
        names, towns = draw.sample(people, 4), draw.sample(places, 3)
        sentences = [f"{name} lives in the city of {town}." for name, town in zip(names, towns, strict=False)]
        sentences += draw.choices(("The weather was fine.", "There was music in the street."), k=draw.randint(1, 12))
        draw.shuffle(sentences)
        context, unanswered = " ".join(sentences), version_2 and index % 3 == 2
        answers = {"text": [towns[0]], "answer_start": [context.index(towns[0])]}
        answers = {"text": [], "answer_start": []} if unanswered else answers
        question = f"Where does {names[3 if unanswered else 0]} live?"
        rows.append({"question": question, "context": context, "answers": answers})
    return rows


def find_answers(questions: Rows, rows: Rows, starts: Any, ends: Any, options: argparse.Namespace) -> list[str]:
    """Return the best answer to each question; empty for "there is no answer".

    :param rows: windows of tokens, all of a question one after the other, as `tokenise` gives them.
    :param starts: [windows, tokens], logits of each token as the first of the answer; what stands after the last token
        of a window is not read.
    :param ends: likewise for the last token.
    """
    found = [""] * len(questions)
    for source, group in groupby(range(len(rows)), key=lambda index: rows[index]["example"]):
        windows = list(group)
        context = questions[source]["context"]
        spans = [
            span
            for index in windows
            for span in _spans(context, rows[index]["offsets"], starts[index], ends[index], options)
        ]
        best = max(spans, key=lambda answer: answer[0], default=(-np.inf, ""))
        # An answer in any window speaks against none.
        none = min(float(starts[index, 0] + ends[index, 0]) for index in windows)
        if not options.version_2_with_negative or none - best[0] <= options.null_score_threshold:
            found[source] = best[1]
    return found


def _spans(context: str, offsets: Any, starts: Any, ends: Any, options: argparse.Namespace) -> Iterator[Answer]:
    """The spans between the likeliest first and last tokens of one window."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    firsts = inside[np.argsort(-starts[inside], kind="stable")[: options.n_best]]
    lasts = inside[np.argsort(-ends[inside], kind="stable")[: options.n_best]]
    for first in firsts:
        for last in lasts:
            if first <= last < first + options.max_answer_length:
                yield float(starts[first] + ends[last]), context[offsets[first, 0] : offsets[last, 1]]


def squad_metrics(questions: Rows, predictions: Sequence[str], *, version_2: bool) -> dict[str, float]:
    """Return exact match and F1 by SQuAD's rules, as fractions.

    For SQuAD 2.0 also those of the questions that have an answer, and of those that have none.
    """
    answers = [row["answers"]["text"] for row in questions]
    scores = np.array([_score(*pair, version_2) for pair in zip(predictions, answers, strict=True)])
    parts = {"": np.full(len(answers), True)}
    if version_2:
        answered = np.array([bool(texts) for texts in answers])
        parts |= {"has_answer_": answered, "no_answer_": ~answered}
    return {
        f"{part}{name}": float(scores[chosen, column].mean())
        for part, chosen in parts.items()
        if chosen.any()
        for column, name in enumerate(("exact_match", "f1"))
    }


def _score(prediction: str, answers: Sequence[str], version_2: bool) -> tuple[float, float]:
    """Exact match and F1 of one question: the best over its answers."""
    if version_2:
        answers = [answer for answer in answers if normalised(answer)] or [""]
        if answers == [""]:
            return (float(not normalised(prediction)),) * 2
    return max(exact_match(prediction, answer) for answer in answers), max(f1(prediction, answer) for answer in answers)


def normalised(text: str) -> str:
    """Return a text without case, punctuation, articles and extra white space.

    >>> normalised("The  Cat's  hat, a hat.")
    'cats hat hat'
    """
    letters = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 where two texts are equal but for case, punctuation, articles and white space, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words that two texts have in common, in [0, 1]."""
    words, expected = normalised(prediction).split(), normalised(answer).split()
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def load_model(source: str | Path) -> PreTrainedModel:
    """Load a model, with a new head where it has none for questions."""
    return AutoModelForQuestionAnswering.from_pretrained(source).to(PartialState().device)


def main(argv: Sequence[str] | None = None) -> None:
    """Teach, prune, save, reload, measure."""
    options, config = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, say = options.output_dir, PartialState().print
    train, validation = load_questions(options, "train"), load_questions(options, "validation", "dev")
    say(f"{len(train):,} questions for training, {len(validation):,} for validation")
    if options.model is None:
        with PartialState().main_process_first():
            options.model = tiny_bert(folder / "tiny-model", config.seed) if options.tiny else minilm()
    transformers.set_seed(config.seed)  # of a new head
    model, tokenizer = load_model(options.model), AutoTokenizer.from_pretrained(options.model)
    teacher = None if options.teacher in ("train", "self", "none") else load_model(options.teacher)
    lengths = {"max_length": options.max_length, "stride": options.doc_stride}
    train = tokenise(train, tokenizer, model, **lengths, where="the training data")
    rows = tokenise(validation, tokenizer, model, **lengths, where="the validation data")

    def scores(seen: Any) -> dict[str, float]:
        answers = find_answers(validation, rows, *seen.predictions[:2], options)
        return squad_metrics(validation, answers, version_2=options.version_2_with_negative)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        found = cofiprune.evaluate(model, rows, compute_metrics=scores)
        return {name: value for name, value in found.items() if name.endswith(("exact_match", "f1"))}

    def place(folder: Path) -> dict[str, Any]:
        return {"output_dir": folder, "resume": "auto" if options.resume else False}

    watched = {"eval_dataset": rows, "compute_metrics": scores}
    if options.teacher == "train":
        say("Fine-tuning the teacher ...")
        rate = {"learning_rate": options.teacher_learning_rate, "lr_scheduler_type": "linear"}
        own = {"epochs": options.teacher_epochs, **dict.fromkeys(STUDENT_ONLY)}
        cofiprune.finetune(model, train, config=config, **rate, **own, **watched, **place(folder / "teacher"))
        save(model, tokenizer, folder / "teacher")
    dense = copy.deepcopy(model) if teacher is None else teacher
    if options.teacher in ("train", "self"):
        teacher = dense
    learning = {"teacher": teacher, "config": config, **watched, **place(folder)}
    if options.target_sparsity is None:
        say(f"Fine-tuning {options.model} ...")
        result = cofiprune.finetune(model, train, **learning)
    else:
        say(f"Pruning to a sparsity of {options.target_sparsity:g} ...")
        result = cofiprune.prune(model, train, target_sparsity=options.target_sparsity, **learning)
        model = result.compact()
    save(model, tokenizer, folder)
    if PartialState().is_main_process:
        report(dense, load_model(folder), evaluate, result, options)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model with its tokenizer, in one of the processes."""
    if PartialState().is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


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
        speed = cofiprune.benchmark(pruned, dense, seq_len=options.max_length, seconds=0.2 if options.tiny else 5.0)
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
