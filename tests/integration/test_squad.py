"""Question answering: SQuAD's measures, windows of tokens, and answers from logits."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

import cofiprune

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "squad"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def squad(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("squad")


@pytest.fixture(scope="module")
def data(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("squad_data")


@pytest.fixture(scope="module")
def tokenizer(example: Callable[[str], ModuleType]) -> Any:
    return AutoTokenizer.from_pretrained(str(example("quickstart_model").bundled_model()))


@pytest.fixture(scope="module")
def ask(squad: ModuleType) -> Callable[..., Any]:
    """Make a question on a context, with answers that are found in it."""

    def new(context: str, *answers: str, question: str = "Who won?") -> Any:
        return squad.Question("q", context, question, answers, tuple(context.index(text) for text in answers))

    return new


# Exact match and F1


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The cat", "cat", 1, 1),  # articles
        ("an apple, a day.", "Apple day", 1, 1),  # punctuation and case
        ("theatre", "atre", 0, 0),  # articles are whole words
        ("U.S.A.", "usa", 1, 1),
        ("New  York\n City", "new york city", 1, 1),
        ("red red car", "red car", 0, 0.8),  # repeats count as often as they are in both
        ("in the old town", "old town hall", 0, 2 / 3),
        ("x", "y", 0, 0),
        ("", "y", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either, so that they are equal and have no word in common
        ("10–a–20", "10– –20", 1, 1),  # an article gives way to a space
        ("10–20", "10 20", 0, 0),  # a dash beyond ASCII is no punctuation
    ],
)
def test_exact_match_and_f1_follow_the_official_rules(
    squad: ModuleType, prediction: str, answer: str, exact: float, f1: float
) -> None:
    assert squad.exact_match(prediction, answer) == exact
    assert squad.f1(prediction, answer) == pytest.approx(f1)
    assert squad.f1(answer, prediction) == pytest.approx(f1)


def test_scores_agree_with_those_of_transformers(squad: ModuleType) -> None:
    name = "transformers.data.metrics.squad_metrics"
    official = pytest.importorskip(name, reason="this version of transformers has SQuAD's measures no more")
    texts = ["The Cat.", "cat", "a cat on the mat", "mat cat", "on, on and on", "10–20 men", "10 men", "É é"]
    for prediction in texts:
        for answer in texts:
            assert squad.exact_match(prediction, answer) == official.compute_exact(answer, prediction)
            assert squad.f1(prediction, answer) == pytest.approx(official.compute_f1(answer, prediction))


def test_a_question_has_the_best_score_over_its_answers(squad: ModuleType, ask: Callable[..., Any]) -> None:
    questions = [ask("the red car won", "red", "red car"), ask("a dog won", "dog")]
    assert squad.squad_metrics(questions, ["the red car", "nobody"], version_2=False) == {"exact_match": 0.5, "f1": 0.5}
    partly = squad.squad_metrics(questions, ["car", ""], version_2=False)
    assert partly == pytest.approx({"exact_match": 0, "f1": (2 / 3) / 2})


def test_an_empty_prediction_is_right_where_there_is_no_answer(squad: ModuleType, ask: Callable[..., Any]) -> None:
    questions = [ask("a dog won"), ask("a dog won"), ask("a dog won", "dog"), ask("the a won", "the")]
    found = squad.squad_metrics(questions, ["", "dog", "dog", "."], version_2=True)
    assert found == {
        "exact_match": 0.75,  # an answer of which nothing is left counts as none, as in the official script
        "f1": 0.75,
        "has_answer_exact_match": 1,
        "has_answer_f1": 1,
        "no_answer_exact_match": 0.5,
        "no_answer_f1": 0.5,
    }


# Windows


CONTEXT = " ".join(f"Number {index} came from town {index % 7} on day {index % 5}." for index in range(60))


def in_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(("max_length", "stride"), [(48, 16), (64, 0), (96, 60), (512, 128)])
def test_windows_overlap_by_the_stride_and_cover_the_context(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any], max_length: int, stride: int
) -> None:
    question = ask(CONTEXT, "town 3")
    rows, windows = squad.encode([question], tokenizer, max_length=max_length, stride=stride)
    spans = [window.offsets[window.offsets[:, 0] >= 0] for window in windows]
    step = max_length - 3 - in_tokens(tokenizer, question.question) - stride

    assert all(
        len(row["input_ids"]) == len(window.offsets) <= max_length for row, window in zip(rows, windows, strict=True)
    )
    assert all(len(row["input_ids"]) == max_length for row in rows[:-1])
    joined = [tuple(span) for index, part in enumerate(spans) for span in part[stride if index else 0 :]]
    expected = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert joined == expected
    assert all(len(part) == step + stride for part in spans[:-1])


def test_positions_are_those_of_the_answer_where_a_window_holds_all_of_it(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    held = []
    for index in range(20, 40):
        question = ask(CONTEXT, f"Number {index} came from town {index % 7}")
        rows, windows = squad.encode([question], tokenizer, max_length=41, stride=4)
        begin, end = question.starts[0], question.starts[0] + len(question.answers[0])
        assert len(rows) > 10
        held.append(0)
        for row, window in zip(rows, windows, strict=True):
            first, last = row["start_positions"], row["end_positions"]
            inside = window.offsets[window.offsets[:, 0] >= 0]
            if inside[0, 0] <= begin and inside[-1, 1] >= end:
                held[-1] += 1
                assert CONTEXT[window.offsets[first, 0] : window.offsets[last, 1]] == question.answers[0]
            else:
                assert (first, last) == (0, 0)
    assert {0, 1} == set(held)  # six tokens are more than windows share: some answers are cut by all of them


def test_many_questions_are_tokenised_in_parts(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [ask(CONTEXT[: 200 + 40 * index], "town 3") for index in range(7)]
    rows, windows = squad.encode(questions, tokenizer, max_length=64, stride=16)
    monkeypatch.setattr(squad, "AT_ONCE", 3)
    again, same = squad.encode(questions, tokenizer, max_length=64, stride=16)
    assert [window.question for window in same] == [window.question for window in windows]
    assert {window.question for window in windows} == set(range(7))
    assert [list(row["input_ids"]) for row in again] == [list(row["input_ids"]) for row in rows]


def test_an_answer_that_is_a_part_of_a_word_is_the_tokens_that_hold_it(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    question = ask("They sold the golden ring.", "gold")
    ((row,), (window,)) = squad.encode([question], tokenizer)
    assert row["start_positions"] == row["end_positions"]
    begin, end = window.offsets[row["start_positions"]]
    assert question.context[begin:end] == "golden"


def test_a_question_without_an_answer_points_at_the_first_token(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    ((row,), _) = squad.encode([ask("A dog won.")], tokenizer)
    assert (row["start_positions"], row["end_positions"]) == (0, 0)
    assert row["input_ids"][0] == tokenizer.cls_token_id


def test_a_long_question_is_cut_and_leaves_room_for_the_context(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    question = ask(CONTEXT, "town 3", question="  Who " + "really " * 400 + "won?")
    rows, windows = squad.encode([question], tokenizer, max_length=64, stride=16)
    room = 64 - 3 - 16
    sizes = [(window.offsets[:, 0] < 0).sum() for window in windows]
    assert set(sizes) == {3 + room // 2}
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    (first, *_), _ = squad.encode([question], tokenizer, max_length=384, stride=128)
    assert list(first["input_ids"]).index(tokenizer.sep_token_id) == 1 + squad.LONGEST_QUESTION


@pytest.mark.parametrize(("max_length", "stride"), [(64, 64), (64, 100), (64, 60)])
def test_a_stride_that_leaves_no_room_is_refused(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any], max_length: int, stride: int
) -> None:
    question = ask(CONTEXT, "town 3")
    with pytest.raises(ValueError, match=f"--doc-stride {stride} leaves no room .* it can be 59 at most"):
        squad.encode([question], tokenizer, max_length=max_length, stride=stride)
    rows, _ = squad.encode([question], tokenizer, max_length=max_length, stride=59)
    assert len(rows) > 100


# Answers


def logits(windows: list[Any], *points: tuple[int, int, int, float], rest: float = 0.0) -> Any:
    """Logits for windows, padded as evaluation does; a point is (window, first token, last token, value)."""
    longest = max(len(window.offsets) for window in windows)
    starts, ends = np.full((2, len(windows), longest), -100.0, np.float32)
    for index, window in enumerate(windows):
        starts[index, : len(window.offsets)] = ends[index, : len(window.offsets)] = rest
    for window, first, last, value in points:
        starts[window, first] = ends[window, last] = value
    return starts, ends


def token_of(window: Any, character: int) -> int:
    """The token of a window that begins at a character of the context."""
    return int(np.flatnonzero(window.offsets[:, 0] == character)[0])


def test_the_answer_is_the_best_span_over_all_windows(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    questions = [ask(CONTEXT, "Number 57"), ask("A dog won.", "dog"), ask(CONTEXT, "Number 2")]
    rows, windows = squad.encode(questions, tokenizer, max_length=48, stride=16)
    points = [
        (index, row["start_positions"], row["end_positions"], 5.0 + index)
        for index, row in enumerate(rows)
        if row["start_positions"]
    ]
    decoy = token_of(windows[1], windows[1].offsets[30, 0])
    starts, ends = logits(windows, (1, decoy, decoy, 4.0), *points, rest=-50.0)
    answers = squad.find_answers(questions, windows, starts, ends)
    assert [best[0].text for best in answers] == ["Number 57", "dog", "Number 2"]
    assert all(len(best) == 20 for best in (answers[0], answers[2]))
    assert all([a.score for a in best] == sorted((a.score for a in best), reverse=True) for best in answers)
    second = next(answer.text for answer in answers[0] if answer.score == 8)
    assert second == CONTEXT[slice(*windows[1].offsets[decoy])]


def test_spans_are_in_the_context_in_order_and_not_too_long(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    question = ask("one two three four five six seven eight", "three")
    _, windows = squad.encode([question], tokenizer)
    at = {word: token_of(windows[0], question.context.index(word)) for word in question.context.split()}

    def best(starts: Any, ends: Any, **settings: Any) -> str:
        return str(squad.find_answers([question], windows, starts, ends, squad.SpanSettings(**settings))[0][0].text)

    starts, ends = logits(windows, (0, at["two"], at["seven"], 9.0))
    ends[0, at["three"]] = 3.0
    assert best(starts, ends) == "two three four five six seven"
    assert best(starts, ends, max_answer_length=6) == "two three four five six seven"
    assert best(starts, ends, max_answer_length=5) == "two three"
    starts[0, 1] = ends[0, 2] = starts[0, 0] = ends[0, 0] = 50.0  # the question and the first special token
    assert best(starts, ends) == "two three four five six seven"
    starts, ends = logits(windows, (0, at["six"], at["two"], 9.0))  # ends before it starts
    ends[0, at["seven"]] = 1.0
    assert best(starts, ends) == "six seven"
    assert best(starts, ends, n_best=1) == ""  # that one start and that one end are no span


def test_no_answer_is_given_when_its_score_is_above_the_best_by_more_than_the_threshold(
    squad: ModuleType, tokenizer: Any, ask: Callable[..., Any]
) -> None:
    question = ask(CONTEXT, "Number 57")
    _, windows = squad.encode([question], tokenizer, max_length=64, stride=16)
    starts, ends = logits(windows, (2, 30, 30, 2.0), *((index, 0, 0, 3.0) for index in range(len(windows))))

    def best(threshold: float = 0.0, version_2: bool = True) -> Any:
        settings = squad.SpanSettings(version_2=version_2, null_threshold=threshold)
        return squad.find_answers([question], windows, starts, ends, settings)[0]

    span = CONTEXT[slice(*windows[2].offsets[30])]
    assert [answer.text for answer in best()[:2]] == ["", span]  # 6 against 4
    assert best(1.9)[0].text == ""
    assert [answer.text for answer in best(2.0)[:2]] == [span, ""]
    assert best(version_2=False)[0].text == span
    starts[5, 0] = -10.0  # one window in which there seems to be an answer is enough
    assert best()[0].text == span


@pytest.mark.skipif(not REAL.is_dir(), reason="the real SQuAD is not here")
def test_right_positions_give_right_answers_on_the_real_data(
    data: ModuleType, squad: ModuleType, tokenizer: Any
) -> None:
    pytest.importorskip("pyarrow")
    train, validation = data.load_questions(REAL, version_2=False)
    assert (len(train), len(validation)) == (11259, 10570)
    chosen = validation[::10]
    for max_length, stride in ((384, 128), (96, 32)):
        rows, windows = squad.encode(chosen, tokenizer, max_length=max_length, stride=stride)
        points = [
            (index, row["start_positions"], row["end_positions"], 9.0 if row["start_positions"] else 1.0)
            for index, row in enumerate(rows)
        ]
        answers = squad.find_answers(chosen, windows, *logits(windows, *points))
        scores = squad.squad_metrics(chosen, [best[0].text for best in answers], version_2=False)
        assert 0.99 < scores["exact_match"] <= scores["f1"] < 1  # an answer may be a part of a token


def test_training_learns_to_find_answers(
    squad: ModuleType, data: ModuleType, tokenizer: Any, example: Callable[[str], ModuleType]
) -> None:
    """Rows, positions and answers fit together: a small model learns where the answer stands."""
    questions = [
        squad.Question(str(index), f"{' '.join(words)}", "Which number?", (number,), (" ".join(words).index(number),))
        for index in range(192)
        for number in [str(100 + index % 9)]
        for words in [["word"] * (index % 11) + [number] + ["other"] * (index % 7)]
    ]
    rows, windows = squad.encode(questions, tokenizer, max_length=32, stride=8)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForQuestionAnswering(config)
    cofiprune.finetune(model, rows, epochs=6, learning_rate=1e-2, batch_size=16, progress=False)
    spans = squad.SpanSettings()
    score = example("run_squad").score
    found = cofiprune.evaluate(
        model, rows, compute_metrics=lambda prediction: score(questions, windows, prediction, spans)
    )
    assert found["exact_match"] > 0.9
