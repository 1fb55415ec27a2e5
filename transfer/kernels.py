"""The codecs' inner loops, compiled by numba without the GIL; ``tests/transfer/codec_reference.py`` has numpy's.

Elements are bit patterns in uint16 arrays. Each kernel returns the largest magnitude it met, as a bit pattern without
the sign, so that the caller can refuse infinities and NaNs without a second pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int32, njit, types, uint16, uint32
from numba.extending import intrinsic

from transfer.frames import Element

_BF16 = int(Element.BF16)


@intrinsic  # type: ignore[untyped-decorator]
def _float_of(_typing: Any, _bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _bits_of(_typing: Any, _value: Any) -> Any:
    """Reinterpret a float as 32 bits."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def _load_bf16(element):  # type: ignore[no-untyped-def]
    return _float_of(uint32(element) << uint32(16))


@njit(inline="always")
def _load_f16(element):  # type: ignore[no-untyped-def]
    # Exponent bias 127 - 15 as one multiplication, which is exact for subnormals too.
    magnitude = uint32(element & uint16(0x7FFF)) << uint32(13)
    scaled = _float_of(magnitude) * float32(2.0**112)
    return _float_of(_bits_of(scaled) | (uint32(element & uint16(0x8000)) << uint32(16)))


@njit(inline="always")
def _store_bf16(value):  # type: ignore[no-untyped-def]
    bits = _bits_of(value)
    rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
    return uint16(uint32(0x7FC0)) if is_nan else uint16(rounded)


@njit(inline="always")
def _store_f16(value):  # type: ignore[no-untyped-def]
    bits = _bits_of(value)
    sign = (bits >> uint32(16)) & uint32(0x8000)
    magnitude = bits & uint32(0x7FFFFFFF)
    normal = (magnitude - uint32(0x38000000) + uint32(0x0FFF) + ((magnitude >> uint32(13)) & uint32(1))) >> uint32(13)
    # Adding 0.5 lines a subnormal's bits up with the float's last mantissa bits, rounded by the addition itself.
    subnormal = _bits_of(_float_of(magnitude) + float32(0.5)) - uint32(0x3F000000)
    small = magnitude < uint32(0x38800000)
    large = magnitude >= uint32(0x47800000)
    half = subnormal if small else normal
    return uint16(sign | (uint32(0x7C00) if large else half))


@njit(nogil=True, cache=True)
def _largest(source):  # type: ignore[no-untyped-def]
    top = uint16(0)
    for i in range(source.size):
        top = max(top, source[i] & uint16(0x7FFF))
    return top


@njit(nogil=True, cache=True)
def _convert(source, out, source_is_bf16, out_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    if source_is_bf16 == out_is_bf16:
        for i in range(source.size):
            out[i] = source[i]
            top = max(top, source[i] & uint16(0x7FFF))
    elif source_is_bf16:
        for i in range(source.size):
            half = _store_f16(_load_bf16(source[i]))
            out[i] = half
            top = max(top, half & uint16(0x7FFF))
    else:
        for i in range(source.size):
            # An f16 infinity would load as a finite number, so the check must see the source.
            out[i] = _store_bf16(_load_f16(source[i]))
            top = max(top, source[i] & uint16(0x7FFF))
        top = uint16(0x7F80) if top >= uint16(0x7C00) else uint16(0)
    return top


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _merge(high, low, out, source_is_bf16):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        if source_is_bf16:
            sign = uint16(low[i] & uint16(0x80)) << uint16(8)
            out[i] = sign | (uint16(high[i]) << uint16(7)) | uint16(low[i] & uint16(0x7F))
        else:
            out[i] = (uint16(high[i]) << uint16(8)) | uint16(low[i])


@njit(nogil=True, cache=True)
def _quantize_q8(source, scales, codes, source_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    values = np.empty(32, np.float32)
    for block in range(scales.size):
        at = block * 32
        element_top = uint16(0)
        amax = float32(0.0)
        for i in range(32):
            element = source[at + i]
            element_top = max(element_top, element & uint16(0x7FFF))
            value = _load_bf16(element) if source_is_bf16 else _load_f16(element)
            values[i] = value
            amax = max(amax, abs(value))
        if element_top >= (uint16(0x7F80) if source_is_bf16 else uint16(0x7C00)):
            top = uint16(0x7FFF)
        scale = amax / float32(127.0)
        inverse = float32(1.0) / scale if scale > float32(0.0) else float32(0.0)
        half = _store_f16(scale)
        scales[block] = half
        top = max(top, half)
        for i in range(32):
            scaled = values[i] * inverse
            codes[at + i] = int32(scaled + (float32(0.5) if scaled >= float32(0.0) else float32(-0.5)))
    return top


@njit(nogil=True, cache=True)
def _dequantize_q8(scales, codes, out, out_is_bf16):  # type: ignore[no-untyped-def]
    top = uint16(0)
    for block in range(scales.size):
        scale = _load_f16(scales[block])
        at = block * 32
        for i in range(at, at + 32):
            value = scale * float32(codes[i])
            bits = _store_bf16(value) if out_is_bf16 else _store_f16(value)
            out[i] = bits
            top = max(top, bits & uint16(0x7FFF))
    return top


def largest(elements: Any) -> int:
    """Largest magnitude in ``elements``, uint16 ``[n]``."""
    return int(_largest(elements))


def convert(source: Any, out: Any, element: Element, cells: Element) -> int:
    """Write ``source``, uint16 ``[n]`` of type ``element``, to ``out`` as type ``cells``, rounding to nearest even."""
    return int(_convert(source, out, element == _BF16, cells == _BF16))


def split(source: Any, high: Any, low: Any, element: Element) -> int:
    """Split uint16 ``[n]`` into the two uint8 planes of codec ``lz4``."""
    return int(_split(source, high, low, element == _BF16))


def merge(high: Any, low: Any, out: Any, element: Element, cells: Element) -> int:
    """Undo :func:`split` into ``out`` of type ``cells``."""
    _merge(high, low, out, element == _BF16)
    return convert(out, out, element, cells)


def quantize_q8(source: Any, scales: Any, codes: Any, element: Element) -> int:
    """Fill ``scales``, uint16 ``[n / 32]`` f16 bits, and ``codes``, int8 ``[n]``; returns the largest scale."""
    return int(_quantize_q8(source, scales, codes, element == _BF16))


def dequantize_q8(scales: Any, codes: Any, out: Any, cells: Element) -> int:
    """Write ``scale * code`` to ``out``, uint16 ``[n]`` of type ``cells``."""
    return int(_dequantize_q8(scales, codes, out, cells == _BF16))
