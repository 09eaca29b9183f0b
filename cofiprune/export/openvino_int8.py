"""int8 of OpenVINO's files by NNCF, behind the same gate: calibrated and scored on rows, in float where need be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from cofiprune.export.openvino import compiled_answers, openvino_answers
from cofiprune.export.quantisation import CALIBRATION_ROWS, Attempt, Quantised, calibration, figures, refused
from cofiprune.measure.answers import Scorer


def quantise_openvino(
    source: Path,
    target: Path,
    *,
    int8: bool | str = True,
    scorer: Scorer | None = None,
    max_drop: float | None = None,
) -> Quantised:
    """Write an int8 form of a float32 IR: `static` where rows are given, otherwise `weights`.

    :param source: the .xml file; its .bin stands beside it, as that of `target` will.
    :raises ExportError: when int8 costs more than `max_drop`. The file is not there then.
    """
    mode = ("weights" if scorer is None else "static") if int8 is True else str(int8)
    openvino, nncf = import_module("openvino"), import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    network = openvino.Core().read_model(str(source))
    forms: list[Callable[[], Any]]
    if mode == "weights":
        forms = [lambda: nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM)]
    else:
        assert scorer is not None
        forms = _calibrated(network, scorer, max_drop)
    attempts: list[Attempt] = []
    for form in forms:
        changed = form()
        openvino.save_model(changed, str(target), compress_to_fp16=False)
        found = _matrices(changed)
        if scorer is None:
            return Quantised(mode, len(found))
        in_float = tuple(name for name, kind in found.items() if kind.is_real())
        attempts.append(Attempt(mode, in_float, scorer.score(openvino_answers(target))))
        if max_drop is None or attempts[-1].score.value >= scorer.reference.value - max_drop - 1e-9:
            return Quantised(mode, len(found), in_float, figures(scorer, attempts))
    assert scorer is not None
    assert max_drop is not None
    for suffix in (".xml", ".bin"):
        target.with_suffix(suffix).unlink()
    raise refused(scorer, attempts, max_drop, "" if mode == "weights" else " int8='weights' computes in float.")


def _calibrated(network: Any, scorer: Scorer, max_drop: float | None) -> list[Callable[[], Any]]:
    """Return ways to make products of integers: of all, and of those that hold the floor, as NNCF finds them."""
    nncf = import_module("nncf")
    rows = nncf.Dataset(list(calibration(scorer.batches, {port.any_name for port in network.inputs})))
    how = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": CALIBRATION_ROWS,
    }

    def score(compiled: Any, batches: Collection[int]) -> tuple[float, None]:
        return scorer.score(compiled_answers(compiled), set(batches)).value, None

    def controlled() -> Any:
        batches = nncf.Dataset(range(len(scorer.batches)))
        return nncf.quantize_with_accuracy_control(network, rows, batches, score, max_drop=max_drop, **how)

    return [lambda: nncf.quantize(network, rows, **how), controlled]


def _matrices(network: Any) -> dict[str, Any]:
    """Constants that products and tables read, by the name of the operator, with the number format of each."""
    found = {}
    for operator in network.get_ordered_ops():
        kind = operator.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        value = operator.input_value(int(kind == "MatMul")).get_node()
        while value.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize"):
            value = value.input_value(0).get_node()
        if value.get_type_name() == "Constant" and len(value.get_output_shape(0)) == 2:
            found[operator.get_friendly_name()] = value.get_element_type()
    return found
