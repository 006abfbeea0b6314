"""Layers compiled from C: all of a pass is one call, which reads every weight once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cascade.decoding.engine.codes import Codes, codes_of
from cascade.decoding.engine.compiler import CompilerError, compiled_library
from cascade.decoding.engine.modules import LayerModules
from cascade.decoding.engine.rounding import differs_from_attention, differs_from_norm
from cascade.decoding.engine.rows import MAX_ROWS, Rows
from cascade.decoding.kv_cache import KeyValueCache

#: Names of activations in configs -> their numbers in `layers_fp32.c`.
_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu": 2,
    "relu": 3,
}


#: The names of the sources by dtype.
_SOURCES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
_NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")


# The structures of `layers.h`.


class _Sizes(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in (
                "width",
                "inner",
                "heads",
                "key_heads",
                "head_dim",
                "activation",
                "capacity",
                "threads",
            )
        ],
        ("activations", ctypes.c_void_p),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "bias", "codes", "coded")],
        ("bits", ctypes.c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, _Matrix) for name in _PROJECTIONS],
        *[(name, ctypes.c_void_p) for name in (*_NORMS, "keys", "values")],
        *[
            (name, ctypes.c_double)
            for name in ("attention_epsilon", "mlp_epsilon", "head_epsilon", "scaling")
        ],
        ("rotates", ctypes.c_int64),
        ("window", ctypes.c_int64),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        *[
            (name, ctypes.c_void_p)
            for name in ("sequence", "column", "first", "base", "position", "sees", "cos", "sin")
        ],
    ]


class CompiledLayers:
    """Decoder layers that read the model's own weights, or exact codes of them.

    Codes are made where they give the same weights to the bit; see `Codes`. Otherwise there is no
    second copy.

    In bfloat16, they compute bit for bit what PyTorch computes on processors with AMX, and on those
    with AVX2 and without instructions for bfloat16. On other processors, tests find a difference.

    Args:
        layers: The layers.
        others: Further projections that `linear` computes, of which codes are made.

    Raises:
        CompilerError: They cannot be compiled on this machine, or use a norm or an activation that
            the C code lacks.
    """

    def __init__(self, layers: Sequence[LayerModules], others: Sequence[nn.Linear] = ()) -> None:
        first = layers[0]
        self._dtype = first.query.weight.dtype
        if self._dtype not in _SOURCES:
            raise CompilerError(f"layers in {str(self._dtype).split('.')[1]} are not compiled")
        self._activations: Tensor | None = None
        if self._dtype != torch.float32:
            # Of all numbers that there are.
            everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
            self._activations = first.act(everything.view(self._dtype)).contiguous()
        elif first.act_name not in _ACTIVATIONS:
            raise CompilerError(f"the activation {first.act_name} is not compiled")
        self._library = compiled_library(_SOURCES[self._dtype])
        for name in ("cascade_scratch", "cascade_linear_scratch", "cascade_encode"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._layers = tuple(layers)
        modules = [module for layer in layers for module in layer.projections]
        self._codes = self._codes_of([*modules, *others])
        self._table = (_Layer * len(layers))()
        for entry, layer in zip(self._table, layers, strict=True):
            _fill(entry, layer)
            for name in _PROJECTIONS:
                setattr(entry, name, self._matrix(getattr(layer, name)))
        self._sizes = {
            "width": first.query.in_features,
            "inner": first.gate.out_features,
            "heads": first.heads,
            "key_heads": first.key_heads,
            "head_dim": first.head_dim,
            "activation": _ACTIVATIONS.get(first.act_name, 0),
        }
        if any(_shapes(layer) != _shapes(first) for layer in layers):
            raise CompilerError("layers differ in their shapes")
        if not _fit_together(first):
            raise CompilerError("its projections have other shapes than Llama's")
        if self._dtype != torch.float32:
            self._check_rounding(first)

    @torch.no_grad()
    def _check_rounding(self, layer: LayerModules) -> None:
        if differs_from_attention(self._library, layer.head_dim):
            raise CompilerError("PyTorch rounds attention in another way on this machine")
        norm = layer.attention_norm
        if differs_from_norm(self._library, norm, _epsilon(norm)):
            raise CompilerError("PyTorch rounds norms in another way on this machine")

    @property
    def copied_bytes(self) -> int:
        """The memory of exact codes of weights, in bytes."""
        return sum(codes.nbytes for codes in self._codes.values())

    @property
    def description(self) -> str:
        """What computes the layers, for records."""
        bits = sorted({codes.bits for codes in self._codes.values()})
        return f"compiled, {'- and '.join(map(str, bits))}-bit codes" if bits else "compiled"

    def _codes_of(self, modules: Sequence[nn.Linear]) -> dict[int, Codes]:
        """Return the codes of those projections that have some, by the address of the weight."""
        found: dict[int, Codes] = {}
        for module in modules:
            weight = module.weight.detach()
            if weight.dtype == self._dtype and weight.device.type == "cpu":
                codes = codes_of(self._library, weight)
                if codes is not None:
                    found[weight.data_ptr()] = codes
        return found

    def _matrix(self, module: nn.Linear) -> _Matrix:
        """Return the structure of a projection."""
        address, bias = module.weight.data_ptr(), module.bias
        codes = self._codes.get(address)
        return _Matrix(
            weight=address,
            bias=None if bias is None else bias.data_ptr(),
            codes=None if codes is None else codes.codes.data_ptr(),
            coded=None if codes is None else codes.coded.data_ptr(),
            bits=0 if codes is None else codes.bits,
        )

    def run(
        self,
        below: int,
        last: int,
        hidden: Tensor,
        rows: Rows,
        tables: tuple[Tensor, Tensor],
        cache: KeyValueCache,
    ) -> Tensor:
        """Return the output of layers below + 1 to last, `[R, D]`; write keys and values.

        Args:
            below: The layer whose output is given, 0..N-1.
            last: The last layer, 1..N.
            hidden: `[R, D]`.
            rows: The rows.
            tables: Cosines and sines of the rows' positions, `[R, head_dim]`.
            cache: The KV cache.
        """
        sizes = self._sizes
        # Nothing checks addresses in C.
        if len(rows) > MAX_ROWS or not 0 <= below < last <= len(self._layers):
            raise ValueError(f"cannot run {len(rows)} rows from layer {below} to {last}")
        if int(rows.column.max()) >= cache.capacity or int(rows.sequence.max()) >= cache.batch:
            raise IndexError(f"the rows exceed the KV cache, {cache.batch} x {cache.capacity}")
        if hidden.dtype != self._dtype or hidden.shape != (len(rows), sizes["width"]):
            raise ValueError(f"cannot run states of shape {tuple(hidden.shape)} in {hidden.dtype}")
        if hidden.device.type != "cpu" or rows.sequence.device.type != "cpu":
            raise ValueError("cannot run rows on another device than the CPU")
        cache.allocate(sizes["key_heads"], sizes["head_dim"], hidden)
        count = last - below
        table = (_Layer * count)()
        ctypes.memmove(
            table,
            ctypes.addressof(self._table) + below * ctypes.sizeof(_Layer),
            ctypes.sizeof(table),
        )
        for number, entry in enumerate(table, start=below):
            keys, values = cache.buffers(number)
            entry.keys, entry.values = keys.data_ptr(), values.data_ptr()
        cos, sin = (values.contiguous() for values in tables)
        if any(values.shape != (len(rows), sizes["head_dim"]) for values in tables):
            raise ValueError(f"cannot rotate by tables of shape {tuple(cos.shape)}")
        given = _Rows(
            len(rows),
            *(
                values.data_ptr()
                for values in (
                    rows.sequence,
                    rows.column,
                    rows.first,
                    rows.base,
                    rows.position,
                    rows.sees,
                    cos,
                    sin,
                )
            ),
        )
        size = _Sizes(
            **sizes,
            capacity=cache.capacity,
            threads=torch.get_num_threads(),
            activations=None if self._activations is None else self._activations.data_ptr(),
        )
        needed = self._library.cascade_scratch(ctypes.byref(size), ctypes.c_int64(len(rows)))
        scratch = torch.empty(needed, dtype=torch.uint8, device="cpu")
        made = hidden.clone(memory_format=torch.contiguous_format)
        self._library.cascade_layers(
            ctypes.byref(size),
            table,
            ctypes.c_int64(count),
            ctypes.byref(given),
            ctypes.c_void_p(made.data_ptr()),
            ctypes.c_void_p(scratch.data_ptr()),
        )
        return made

    def linear(self, module: nn.Linear, rows: Tensor) -> Tensor:
        """Return `module(rows)`, `[R, outputs]`.

        Args:
            module: The projection.
            rows: `[R, inputs]`.
        """
        rows = rows.contiguous()
        made = rows.new_empty((len(rows), module.out_features))
        threads = torch.get_num_threads()
        floats = self._library.cascade_linear_scratch(
            *(ctypes.c_int64(value) for value in (module.in_features, len(rows), threads))
        )
        scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
        self._library.cascade_linear(
            ctypes.byref(self._matrix(module)),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(module.in_features),
            ctypes.c_int64(module.out_features),
            ctypes.c_int64(len(rows)),
            ctypes.c_void_p(made.data_ptr()),
            ctypes.c_int64(threads),
            ctypes.c_void_p(scratch.data_ptr()),
        )
        return made


def _shapes(layer: LayerModules) -> tuple[Any, ...]:
    modules = (*layer.projections, *layer.norms)
    about = [(module.weight.shape, module.weight.dtype) for module in modules]
    return layer.head_dim, layer.act_name, *about


def _fit_together(layer: LayerModules) -> bool:
    """Return whether the shapes of all weights follow from those that `Sizes` has."""
    width, inner = layer.query.in_features, layer.gate.out_features
    queries, known = layer.heads * layer.head_dim, layer.key_heads * layer.head_dim
    outputs = (queries, known, known, width, inner, inner, width)
    inputs = (width, width, width, queries, width, width, inner)
    shapes = [tuple(module.weight.shape) for module in layer.projections]
    norms: list[tuple[Any, int]] = [(layer.attention_norm, width), (layer.mlp_norm, width)]
    norms += [(norm, layer.head_dim) for norm in (layer.query_norm, layer.key_norm) if norm]
    return (
        shapes == list(zip(outputs, inputs, strict=True))
        and layer.heads % layer.key_heads == 0
        and layer.head_dim % 2 == 0
        and all(tuple(norm.weight.shape) == (size,) for norm, size in norms)
    )


def _fill(entry: Any, layer: LayerModules) -> None:
    """Fill a structure with the addresses and settings of a layer."""
    for name in _NORMS:
        norm = getattr(layer, name)
        setattr(entry, name, None if norm is None else norm.weight.data_ptr())
    entry.attention_epsilon = _epsilon(layer.attention_norm)
    entry.mlp_epsilon = _epsilon(layer.mlp_norm)
    entry.head_epsilon = 0.0 if layer.query_norm is None else _epsilon(layer.query_norm)
    if layer.key_norm is not None and _epsilon(layer.key_norm) != entry.head_epsilon:
        raise CompilerError("the norms of queries and keys differ")
    entry.scaling = layer.scaling
    entry.rotates = layer.rotates
    entry.window = layer.window or 0


def _epsilon(norm: Any) -> float:
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        raise CompilerError(f"the norm {type(norm).__name__} is not compiled")
    return float(epsilon)
