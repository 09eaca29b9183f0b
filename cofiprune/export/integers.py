"""int8 in ONNX graphs: the matrices of a graph, what int8 does to the product of each, and the graph with int8 in it.

A matrix is a constant that a MatMul or a Gemm multiplies with, or a table that a Gather takes rows of. Weights are
symmetric, with a scale for each column of a product and each row of a table. Products of integers take 7 bits of them,
so that no sum of two products leaves 16 bits, where processors without VNNI would cut it off: what is scored on one
machine is what others compute. Their inputs are 8 bits, unsigned, with a zero point; scale and zero point are read off
calibration rows (`static`) or off each batch when it comes (`dynamic`). Or nothing but the file is int8 (`weights`):
the runtime makes float matrices of it, once, when it loads the file, and products are those of floats. Everything else
stays as it is: biases, norms, softmax, and products of two activations.

Shapes: T tokens of the calibration rows, K inputs and N outputs of a product, V rows of a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Feed = dict[str, Array]
"""Inputs of one row, by name, [1, ...]."""
Mode = Literal["static", "dynamic", "weights"]
Range = tuple[float, float]
"""Smallest and largest number that an input takes."""

_PRODUCT_LEVELS, _LEVELS, _INPUT_LEVELS = 63, 127, 255
_SMALLEST_TABLE = 32
"""Rows of a table below which int8 saves nothing."""
_TOKENS = 16
"""Tokens of each row on which products are compared; smallest and largest numbers are those of all."""
_AT_ONCE = 8
"""Inputs of products that are held in memory together."""
_CLIPPED = (0.0, 1e-4, 1e-3)
"""Shares of an input's numbers, at each end, that a range may leave out, where that makes the error smaller."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A constant matrix and the operator that reads it."""

    weight: str
    """Name of the constant."""
    output: str
    """Name of the operator's output, by which the operator is known."""
    reads: str
    """What is multiplied with it; for a table, the ids of rows."""
    kind: str
    """`MatMul`, `Gemm` or `Gather`."""
    values: Array
    """[K, N], or of a table [V, K]."""
    bias: str | None = None

    @property
    def table(self) -> bool:
        """True for a table, whose rows are taken and not multiplied."""
        return self.kind == "Gather"

    def in_steps(self, levels: int = _LEVELS) -> tuple[Array, Array]:
        """Return the matrix in steps of a scale, int8, and the scale: [1, N], or of a table [V, 1]."""
        largest = np.abs(self.values).max(axis=int(self.table), keepdims=True)
        scale = np.where(largest > 0, largest / levels, 1.0).astype(np.float32)
        return np.rint(self.values / scale).astype(np.int8), scale

    def as_int8(self, levels: int = _LEVELS) -> Array:
        """Return the matrix as int8 holds it."""
        integers, scale = self.in_steps(levels)
        return integers * scale


@dataclass(frozen=True)
class Effects:
    """What int8 does to each matrix, measured on rows."""

    ranges: Mapping[str, Range]
    """Of what products read, by name."""
    errors: Mapping[Mode, Mapping[str, float]]
    """Of each product, or table, as a share of its size, by the name of its output."""


def matrices(model: Any) -> list[Matrix]:
    """Return the float32 matrices of an ONNX model that can be int8, in the order of its operators."""
    onnx = import_module("onnx")
    constants = {value.name: value for value in model.graph.initializer if len(value.dims) == 2}
    constants = {name: value for name, value in constants.items() if value.data_type == onnx.TensorProto.FLOAT}
    turned = {node.output[0]: node.input[0] for node in model.graph.node if _turns(node) and node.input[0] in constants}
    found = []
    for node in model.graph.node:
        place = 0 if node.op_type == "Gather" else 1
        name = node.input[place] if len(node.input) > place else ""
        source = turned.get(name, name)
        if source not in constants or not _plain(node):
            continue
        values = onnx.numpy_helper.to_array(constants[source])
        if node.op_type == "Gather" and len(values) < _SMALLEST_TABLE:
            continue
        transposed = (name in turned) != (_attributes(node).get("transB", 0) == 1)
        bias = node.input[2] if len(node.input) > 2 else None
        values = values.T if transposed else values
        found.append(Matrix(source, node.output[0], node.input[1 - place], node.op_type, values, bias))
    return found


def _turns(node: Any) -> bool:
    return bool(node.op_type == "Transpose") and _attributes(node).get("perm", [1, 0]) == [1, 0]


def _plain(node: Any) -> bool:
    """Tell whether an operator is the product of its inputs, or the rows of a table, and nothing more."""
    attributes = _attributes(node)
    if node.op_type == "Gemm":
        return all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not attributes.get("transA", 0)
    return node.op_type == "MatMul" or (node.op_type == "Gather" and not attributes.get("axis", 0))


def _attributes(node: Any) -> dict[str, Any]:
    helper = import_module("onnx").helper
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


class _Writer:
    """Operators and constants of the graph that is being made."""

    def __init__(self, mode: Mode, ranges: Mapping[str, Range]) -> None:
        self._onnx = import_module("onnx")
        self._mode, self._ranges = mode, ranges
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._made: dict[str, tuple[str, ...]] = {}

    def constant(self, name: str, values: Array) -> str:
        """Add a constant, once, and return its name."""
        if name not in self.constants:
            self.constants[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def add(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Add an operator and return the name of its first output."""
        node = self._onnx.helper.make_node(kind, inputs, outputs, f"{outputs[0]}.{kind}", **attributes)
        self.nodes.append(node)
        return outputs[0]

    def _floats(self, integers: str, out: str) -> str:
        return self.add("Cast", [integers], [f"{out}.float"], to=self._onnx.TensorProto.FLOAT)

    def table(self, matrix: Matrix) -> None:
        """Take rows of integers, and their scales."""
        out = matrix.output
        rows, scale = (
            self.add("Gather", [self.constant(f"{matrix.weight}.{part}", values), matrix.reads], [f"{out}.{part}"])
            for part, values in zip(("integers", "scale"), matrix.in_steps(), strict=True)
        )
        self.add("Mul", [self._floats(rows, out), scale], [out])

    def product(self, matrix: Matrix) -> None:
        """Multiply with integers, or with what floats they stand for."""
        name = f"{matrix.weight}.columns"  # a tied table has integers of its own
        integers, scales = matrix.in_steps(_LEVELS if self._mode == "weights" else _PRODUCT_LEVELS)
        weight, scale = self.constant(f"{name}.integers", integers), self.constant(f"{name}.scale", scales[0])
        out = matrix.output if matrix.bias is None else f"{matrix.output}.product"
        if self._mode == "dynamic":
            self._dynamic(matrix.reads, weight, scale, out)
        elif self._mode == "weights":
            floats = self.add("Mul", [self._floats(weight, out), scale], [f"{out}.weight"])
            self.add("MatMul", [matrix.reads, floats], [out])
        else:
            # The form that runtimes know, and turn into products of integers.
            floats = self.add("DequantizeLinear", [weight, scale], [f"{out}.weight"], axis=1)
            self.add("MatMul", [self._rounded(matrix.reads, self._ranges[matrix.reads]), floats], [out])
        if matrix.bias is not None:
            self.add("Add", [out, matrix.bias], [matrix.output])

    def _dynamic(self, reads: str, weight: str, scale: str, out: str) -> None:
        if reads not in self._made:
            names = tuple(f"{reads}.{part}" for part in ("integers", "scale", "zero"))
            self.add("DynamicQuantizeLinear", [reads], names)
            self._made[reads] = names
        integers, input_scale, zero = self._made[reads]
        product = self.add("MatMulInteger", [integers, weight, zero], [f"{out}.integers"])
        scales = self.add("Mul", [input_scale, scale], [f"{out}.scale"])
        self.add("Mul", [self._floats(product, out), scales], [out])

    def _rounded(self, reads: str, limits: Range) -> str:
        if reads not in self._made:
            scale, zero = affine(*limits)
            form = [
                self.constant(f"{reads}.scale", np.array(scale, np.float32)),
                self.constant(f"{reads}.zero", np.array(zero, np.uint8)),
            ]
            integers = self.add("QuantizeLinear", [reads, *form], [f"{reads}.integers"])
            self._made[reads] = (self.add("DequantizeLinear", [integers, *form], [f"{reads}.rounded"]),)
        return self._made[reads][0]


def with_int8(model: Any, chosen: Collection[Matrix], mode: Mode, ranges: Mapping[str, Range]) -> Any:
    """Return a copy of an ONNX model with some matrices in int8.

    :param ranges: of what the products read, for `static`.
    """
    writer = _Writer(mode, ranges)
    by_output = {matrix.output: matrix for matrix in chosen}
    for node in model.graph.node:
        matrix = by_output.get(node.output[0])
        if matrix is None:
            writer.nodes.append(node)
        else:
            (writer.table if matrix.table else writer.product)(matrix)
    changed = type(model)()
    changed.CopyFrom(model)
    graph = changed.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(_used(writer.nodes, {value.name for value in graph.output}))
    used = {name for node in graph.node for name in _read_by(node)}
    for node in graph.node:
        del node.metadata_props[:]  # the lines of code that it comes from, which are half a megabyte of a small model
    constants = (*model.graph.initializer, *writer.constants.values())
    graph.initializer.extend(value for value in constants if value.name in used)
    return changed


def _used(nodes: Sequence[Any], wanted: set[str]) -> list[Any]:
    """Leave out what nothing reads any more, such as the transposition of a matrix."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(_read_by(node))
    return kept[::-1]


def _read_by(node: Any) -> set[str]:
    """Names that an operator reads, those of its branches included."""
    inner = (each for attribute in node.attribute if attribute.HasField("g") for each in attribute.g.node)
    return set(node.input).union(*map(_read_by, inner))


def affine(smallest: float, largest: float) -> tuple[float, int]:
    """Return scale and zero point of 8 bits for numbers in a range, in which 0 is exact."""
    smallest, largest = min(smallest, 0.0), max(largest, 0.0)
    scale = (largest - smallest) / _INPUT_LEVELS or 1.0
    return scale, round(-smallest / scale)


def rounded(values: Array, limits: Range) -> Array:
    """Return float numbers as 8 bits hold them."""
    scale, zero = affine(*limits)
    steps: Array = np.clip(np.rint(values / scale) + zero, 0, _INPUT_LEVELS)
    return (steps - zero) * scale


@dataclass(eq=False)
class _Seen:
    """Some tokens of what products read, and the range of each row."""

    tokens: list[Array]
    limits: list[Range]

    def add(self, values: Array) -> None:
        flat = values.reshape(-1, values.shape[-1])
        self.limits.append((float(flat.min()), float(flat.max())))
        self.tokens.append(flat[:: -(-len(flat) // _TOKENS)])


def effects(source: Path, found: Sequence[Matrix], feeds: Sequence[Feed]) -> Effects:
    """Run a float model on rows and measure what int8 makes of each product by itself.

    :param feeds: rows one by one, so that nothing is padded.
    """
    ranges: dict[str, Range] = {}
    alone = {matrix.output: _share(matrix.values, matrix.as_int8()) for matrix in found}
    errors: dict[Mode, dict[str, float]] = {"static": {**alone}, "dynamic": {**alone}, "weights": alone}
    readers: defaultdict[str, list[Matrix]] = defaultdict(list)
    for matrix in found:
        if not matrix.table:
            readers[matrix.reads].append(matrix)
    for name, seen in _seen(source, list(readers), feeds):
        tokens = np.concatenate(seen.tokens)
        smallest, largest = min(low for low, _ in seen.limits), max(high for _, high in seen.limits)
        pairs = [(tokens @ m.values, m.as_int8(_PRODUCT_LEVELS), m.output) for m in readers[name]]

        def of(inputs: Array, pairs: Sequence[tuple[Array, Array, str]] = pairs) -> dict[str, float]:
            return {output: _share(exact, inputs @ weight) for exact, weight, output in pairs}

        options: list[Range] = [(smallest, largest)]
        options += [tuple(np.quantile(tokens, (share, 1 - share)).tolist()) for share in _CLIPPED if share]
        tried = [(of(rounded(tokens, limits)), limits) for limits in options]
        best, ranges[name] = min(tried, key=lambda each: sum(each[0].values()))
        errors["static"].update(best)
        by_row = zip(seen.tokens, seen.limits, strict=True)
        errors["dynamic"].update(of(np.concatenate([rounded(part, limits) for part, limits in by_row])))
    return Effects(ranges, errors)


def _share(exact: Array, found: Array) -> float:
    """Size of an error as a share of the size of what is exact."""
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(found - exact)) / size if size else 0.0


def _seen(source: Path, names: Sequence[str], feeds: Sequence[Feed]) -> Iterator[tuple[str, _Seen]]:
    """Run a model and give what some of its operators read, a few at a time."""
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        with TemporaryDirectory() as folder:
            model = onnx.load(str(source))
            known = {value.name for value in model.graph.output}
            kind = onnx.TensorProto.FLOAT
            model.graph.output.extend(
                onnx.helper.make_tensor_value_info(name, kind, None) for name in part if name not in known
            )
            file = f"{folder}/model.onnx"
            onnx.save(model, file, save_as_external_data=True)
            session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        seen = {name: _Seen([], []) for name in part}
        for feed in feeds:
            for name, values in zip(part, session.run(list(part), feed), strict=True):
                seen[name].add(values)
        yield from seen.items()
