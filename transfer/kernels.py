"""The codecs' inner loops, compiled by numba without the GIL; ``tests/transfer/codec_reference.py`` has numpy's.

Elements are bit patterns in contiguous uint16 arrays. Each kernel returns the largest magnitude it met, as a bit
pattern without the sign, so that the caller can refuse infinities and NaNs without a second pass.

Signatures are explicit so that the compiler runs (and fills its cache) when a node starts, not inside its first
request. The loops are shaped for vector code: 16-bit integers, and rows of 32 in place of computed indices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import boolean, float32, int8, int32, njit, types, uint8, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from transfer.errors import CodecError
from transfer.frames import Element

_BF16 = int(Element.BF16)
BLOCK = 32


def _array(dtype: Any, *, readonly: bool) -> Any:
    # Payloads may start at an odd address: ZeroMQ hands out the middle of its own buffers.
    return types.Array(dtype, 1, "C", readonly=readonly, aligned=False)


ELEMENTS_IN, ELEMENTS_OUT = _array(uint16, readonly=True), _array(uint16, readonly=False)
BYTES_IN, BYTES_OUT = _array(uint8, readonly=True), _array(uint8, readonly=False)
_CODES_IN, _CODES_OUT = _array(int8, readonly=True), _array(int8, readonly=False)


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_typing: Any, _bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_typing: Any, _value: Any) -> Any:
    """Reinterpret a float as 32 bits."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _block_top(_typing: Any, source: Any, _first: Any) -> Any:
    """Largest magnitude of ``source[first : first + BLOCK]``, uint16; the caller keeps within bounds.

    As one vector: the compiler makes a loop over so few elements a chain of comparisons.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element, vector = ir.IntType(16), ir.VectorType(ir.IntType(16), BLOCK)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        magnitudes = builder.and_(builder.load(place, align=1), ir.Constant(vector, [0x7FFF] * BLOCK))
        reduce = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(element, [vector]), f"llvm.vector.reduce.umax.v{BLOCK}i16"
        )
        return builder.call(reduce, [magnitudes])

    return types.uint16(source, types.intp), codegen


@njit(inline="always")
def load_bf16(element):  # type: ignore[no-untyped-def]
    """The float that a bf16 pattern stands for."""
    return float_of(uint32(element) << uint32(16))


@njit(inline="always")
def load_f16(element):  # type: ignore[no-untyped-def]
    """The float that a finite f16 pattern stands for; an infinity or NaN loads as a finite number."""
    # Exponent bias 127 - 15 as one multiplication, which is exact for subnormals too.
    magnitude = uint32(element & uint16(0x7FFF)) << uint32(13)
    scaled = float_of(magnitude) * float32(2.0**112)
    return float_of(bits_of(scaled) | (uint32(element & uint16(0x8000)) << uint32(16)))


@njit(inline="always")
def store_bf16(value):  # type: ignore[no-untyped-def]
    """The bf16 pattern nearest to a float, ties to even."""
    bits = bits_of(value)
    # Sums of 32 bits are 64 bits wide to numba; kept at 32, twice as many fit a vector.
    rounded = uint32(bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    is_nan = uint32(bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
    return uint16(uint32(0x7FC0)) if is_nan else uint16(rounded)


@njit(inline="always")
def store_f16(value):  # type: ignore[no-untyped-def]
    """The f16 pattern nearest to a float, ties to even; what is too large, and NaN, becomes an infinity."""
    bits = bits_of(value)
    sign = (bits >> uint32(16)) & uint32(0x8000)
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    rounded = uint32(magnitude - uint32(0x38000000) + uint32(0x0FFF) + ((magnitude >> uint32(13)) & uint32(1)))
    normal = uint32(rounded >> uint32(13))
    # Adding 0.5 lines a subnormal's bits up with the float's last mantissa bits, rounded by the addition itself.
    subnormal = uint32(bits_of(float_of(magnitude) + float32(0.5)) - uint32(0x3F000000))
    small = magnitude < uint32(0x38800000)
    large = magnitude >= uint32(0x47800000)
    half = subnormal if small else normal
    return uint16(sign | (uint32(0x7C00) if large else half))


@njit(uint16(ELEMENTS_IN), nogil=True, cache=True)
def _largest(source):  # type: ignore[no-untyped-def]
    top = uint16(0)
    for i in range(source.size):
        top = max(top, source[i] & uint16(0x7FFF))
    return top


@njit(uint16(ELEMENTS_IN, ELEMENTS_OUT, boolean, boolean), nogil=True, cache=True)
def _convert(source, out, source_is_bf16, out_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    if source_is_bf16 == out_is_bf16:
        for i in range(source.size):
            out[i] = source[i]
            top = max(top, source[i] & uint16(0x7FFF))
    elif source_is_bf16:
        for i in range(source.size):
            half = store_f16(load_bf16(source[i]))
            out[i] = half
            top = max(top, half & uint16(0x7FFF))
    else:
        for i in range(source.size):
            # An f16 infinity loads as a finite number, so the check must see the source.
            element = source[i]
            out[i] = store_bf16(load_f16(element))
            top = max(top, element & uint16(0x7FFF))
        top = uint16(0x7F80) if top >= uint16(0x7C00) else uint16(0)
    return top


@njit(uint16(ELEMENTS_IN, BYTES_OUT, BYTES_OUT, boolean), nogil=True, cache=True)
def _split(source, high, low, source_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    for i in range(source.size):
        element = source[i]
        top = max(top, element & uint16(0x7FFF))
        if source_is_bf16:
            high[i] = (element >> uint16(7)) & uint16(0xFF)
            low[i] = (element & uint16(0x7F)) | ((element >> uint16(8)) & uint16(0x80))
        else:
            high[i] = element >> uint16(8)
            low[i] = element & uint16(0xFF)
    return top


@njit(inline="always")
def _join_bf16(high, low):  # type: ignore[no-untyped-def]
    sign = uint16(low & uint16(0x80)) << uint16(8)
    return uint16(sign | (uint16(high) << uint16(7)) | uint16(low & uint16(0x7F)))


@njit(inline="always")
def _join_f16(high, low):  # type: ignore[no-untyped-def]
    return uint16((uint16(high) << uint16(8)) | uint16(low))


@njit(uint16(BYTES_IN, BYTES_IN, ELEMENTS_OUT, boolean, boolean), nogil=True, cache=True)
def _merge(high, low, out, source_is_bf16, out_is_bf16):  # type: ignore[no-untyped-def]
    # In one pass: a conversion in place would not become vector code.
    top = uint16(0)
    if source_is_bf16 and out_is_bf16:
        for i in range(out.size):
            element = _join_bf16(high[i], low[i])
            out[i] = element
            top = max(top, uint16(element & uint16(0x7FFF)))
    elif source_is_bf16:
        for i in range(out.size):
            half = store_f16(load_bf16(_join_bf16(high[i], low[i])))
            out[i] = half
            top = max(top, uint16(half & uint16(0x7FFF)))
    elif out_is_bf16:
        for i in range(out.size):
            element = _join_f16(high[i], low[i])
            out[i] = store_bf16(load_f16(element))
            top = max(top, uint16(element & uint16(0x7FFF)))
        top = uint16(0x7F80) if top >= uint16(0x7C00) else uint16(0)
    else:
        for i in range(out.size):
            element = _join_f16(high[i], low[i])
            out[i] = element
            top = max(top, uint16(element & uint16(0x7FFF)))
    return top


@njit(inline="always")
def round_away(value):  # type: ignore[no-untyped-def]
    """The integer nearest to a float, half away from zero."""
    # Without a branch: a half takes the sign of the value; the float below 0.5, or 0.49999997 would become 1.
    return int32(value + float_of((bits_of(value) & uint32(0x80000000)) | uint32(0x3EFFFFFF)))


@njit(
    uint16(ELEMENTS_IN, ELEMENTS_OUT, _CODES_OUT, boolean),
    nogil=True,
    cache=True,
    error_model="numpy",  # 1 / 0 is infinity
)
def _quantize_q8(source, scales, codes, source_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    infinity = uint16(0x7F80) if source_is_bf16 else uint16(0x7C00)
    rows = source.reshape(scales.size, BLOCK)
    code_rows = codes.reshape(scales.size, BLOCK)
    for block in range(scales.size):
        row, code_row = rows[block], code_rows[block]
        block_top = _block_top(source, block * BLOCK)
        amax = load_bf16(block_top) if source_is_bf16 else load_f16(block_top)
        scale = amax / float32(127.0)
        inverse = float32(1.0) / scale
        if inverse == float32(np.inf):  # no element would survive the f16 scale
            inverse = float32(0.0)
        half = store_f16(scale)
        scales[block] = half
        top = max(top, uint16(0x7FFF) if block_top >= infinity else half)
        if source_is_bf16:
            for i in range(BLOCK):
                code_row[i] = round_away(load_bf16(row[i]) * inverse)
        else:
            for i in range(BLOCK):
                code_row[i] = round_away(load_f16(row[i]) * inverse)
    return top


@njit(uint16(ELEMENTS_IN, _CODES_IN, ELEMENTS_OUT, boolean), nogil=True, cache=True)
def _dequantize_q8(scales, codes, out, out_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    code_rows = codes.reshape(scales.size, BLOCK)
    out_rows = out.reshape(scales.size, BLOCK)
    for block in range(scales.size):
        code_row, out_row = code_rows[block], out_rows[block]
        scale = load_f16(scales[block])
        if out_is_bf16:
            for i in range(BLOCK):
                bits = store_bf16(scale * float32(code_row[i]))
                out_row[i] = bits
                top = max(top, uint16(bits & uint16(0x7FFF)))
        else:
            for i in range(BLOCK):
                bits = store_f16(scale * float32(code_row[i]))
                out_row[i] = bits
                top = max(top, uint16(bits & uint16(0x7FFF)))
    return top


@njit(
    uint16(ELEMENTS_IN, ELEMENTS_OUT, BYTES_OUT, boolean),
    nogil=True,
    cache=True,
    error_model="numpy",  # 1 / 0 is infinity
)
def _quantize_q4(source, scales, codes, source_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    infinity = uint16(0x7F80) if source_is_bf16 else uint16(0x7C00)
    rows = source.reshape(scales.size, BLOCK)
    code_rows = codes.reshape(scales.size, BLOCK // 2)
    for block in range(scales.size):
        row, code_row = rows[block], code_rows[block]
        # Magnitude above, place from the end below: the largest key is the first of the largest elements.
        key = uint32(0)
        for i in range(BLOCK):
            key = max(key, uint32((uint32(row[i] & uint16(0x7FFF)) << uint32(5)) | uint32(BLOCK - 1 - i)))
        block_top, first = uint16(key >> uint32(5)), BLOCK - 1 - (key & uint32(BLOCK - 1))
        # A block of zeros has a negative scale whatever their signs.
        extreme = row[first] if block_top > uint16(0) else uint16(0)
        scale = (load_bf16(extreme) if source_is_bf16 else load_f16(extreme)) / float32(-8.0)
        inverse = float32(1.0) / scale
        if abs(inverse) == float32(np.inf):  # no element would survive the f16 scale
            inverse = float32(0.0)
        half = store_f16(scale)
        scales[block] = half
        top = max(top, uint16(0x7FFF) if block_top >= infinity else uint16(half & uint16(0x7FFF)))
        if source_is_bf16:
            for i in range(BLOCK // 2):
                low = min(int32(15), int32(load_bf16(row[i]) * inverse + float32(8.5)))
                high = min(int32(15), int32(load_bf16(row[i + BLOCK // 2]) * inverse + float32(8.5)))
                code_row[i] = low | (high << int32(4))
        else:
            for i in range(BLOCK // 2):
                low = min(int32(15), int32(load_f16(row[i]) * inverse + float32(8.5)))
                high = min(int32(15), int32(load_f16(row[i + BLOCK // 2]) * inverse + float32(8.5)))
                code_row[i] = low | (high << int32(4))
    return top


@njit(uint16(ELEMENTS_IN, BYTES_IN, ELEMENTS_OUT, boolean), nogil=True, cache=True)
def _dequantize_q4(scales, codes, out, out_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    code_rows = codes.reshape(scales.size, BLOCK // 2)
    out_rows = out.reshape(2 * scales.size, BLOCK // 2)
    for block in range(scales.size):
        code_row = code_rows[block]
        scale = load_f16(scales[block])
        # A loop for each half: one that writes to two rows does not become vector code.
        for half in range(2):
            out_row, shift = out_rows[2 * block + half], uint8(4 * half)
            if out_is_bf16:
                for i in range(BLOCK // 2):
                    bits = store_bf16(scale * float32(int32((code_row[i] >> shift) & uint8(15)) - int32(8)))
                    out_row[i] = bits
                    top = max(top, uint16(bits & uint16(0x7FFF)))
            else:
                for i in range(BLOCK // 2):
                    bits = store_f16(scale * float32(int32((code_row[i] >> shift) & uint8(15)) - int32(8)))
                    out_row[i] = bits
                    top = max(top, uint16(bits & uint16(0x7FFF)))
    return top


def require_finite(largest: int, kind: Element) -> None:
    """Raise :class:`CodecError` if ``largest``, a magnitude of type ``kind``, is an infinity or NaN."""
    if largest >= (0x7F80 if kind == Element.BF16 else 0x7C00):
        raise CodecError(f"KV holds an infinity, a NaN or a value too large for {kind.name.lower()}")


def largest(elements: Any) -> int:
    """Largest magnitude in ``elements``, uint16 ``[n]``."""
    return int(_largest(elements))


def convert(source: Any, out: Any, element: Element, cells: Element) -> int:
    """Write ``source``, uint16 ``[n]`` of type ``element``, to ``out`` as type ``cells``, rounding to nearest even."""
    return int(_convert(source, out, element == _BF16, cells == _BF16))


def split(source: Any, high: Any, low: Any, element: Element) -> int:
    """Split uint16 ``[n]`` into the two uint8 planes of codecs ``lz4`` and ``zstd``."""
    return int(_split(source, high, low, element == _BF16))


def merge(high: Any, low: Any, out: Any, element: Element, cells: Element) -> int:
    """Undo :func:`split` into ``out`` of type ``cells``."""
    return int(_merge(high, low, out, element == _BF16, cells == _BF16))


def quantize_q8(source: Any, scales: Any, codes: Any, element: Element) -> int:
    """Fill ``scales``, uint16 ``[n / 32]`` f16 bits, and ``codes``, int8 bits in uint8 ``[n]``; returns the largest."""
    return int(_quantize_q8(source, scales, codes.view(np.int8), element == _BF16))


def dequantize_q8(scales: Any, codes: Any, out: Any, cells: Element) -> int:
    """Write ``scale * code`` to ``out``, uint16 ``[n]`` of type ``cells``."""
    return int(_dequantize_q8(scales, codes.view(np.int8), out, cells == _BF16))


def quantize_q4(source: Any, scales: Any, codes: Any, element: Element) -> int:
    """Fill ``scales``, uint16 ``[n / 32]`` f16 bits, and ``codes``, uint8 ``[n / 2]``; returns the largest scale."""
    return int(_quantize_q4(source, scales, codes, element == _BF16))


def dequantize_q4(scales: Any, codes: Any, out: Any, cells: Element) -> int:
    """Write ``scale * (code - 8)`` to ``out``, uint16 ``[n]`` of type ``cells``."""
    return int(_dequantize_q4(scales, codes, out, cells == _BF16))
