"""Codec ``kvz``: a uniform quantizer with an entropy coder behind it, for links that are slow next to the KV.

A plane is the K or V of one layer: ``[num_tokens, channels]``. The first four tokens of the prompt, where attention
rests, travel as they are. The other rows of each plane become

- ``mean``, f16 ``[channels]``: the mean of each channel, summed in f64 in token order;
- ``step``, f32: ratio * RMS(x - mean), summed in f64 channel by channel; each preset has a ratio for K and one for V;
- ``code``, uint8: q + 128 with q = (x - mean) / step in f32, rounded half to even, or 0 where |q| > 127 (an escape).

A decoded element is mean + (code - 128) * step in f32, rounded to the cells' type; an escape is the element itself.

Payload, little endian, for P planes:

- u32 E, the number of escapes;
- f32 [P] steps;
- u16 [channels of all planes] means;
- u16 elements of the first four tokens, plane by plane; none in a frame that starts later;
- u16 [E] elements of the escapes, in the order of the codes;
- one Zstandard frame (``transfer/entropy.py``) of the codes, plane by plane.

The means cost 16 bits for every channel of a frame, so short chunks cost more bits an element than long ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int32, intp, njit, types, uint8, uint16

from transfer import entropy, kernels
from transfer.errors import CodecError
from transfer.frames import Element
from transfer.kernels import BYTES_IN, BYTES_OUT, ELEMENTS_IN, ELEMENTS_OUT, load_bf16, load_f16, store_bf16, store_f16
from transfer.layout import Elements, Payload, Slab

SINK_TOKENS = 4
_ESCAPES = struct.Struct("<I")


class Ratios(NamedTuple):
    """Step over RMS, of keys and of values."""

    keys: float
    values: float


PRESETS = {"kvz1": Ratios(0.1, 0.2), "kvz2": Ratios(0.2, 0.2), "kvz3": Ratios(0.25, 0.5)}


class _Plane(NamedTuple):
    """Where a plane's parts lie: its elements in the frame, the rest in the payload's parts."""

    sinks: slice
    body: slice
    sink_part: slice
    mean_part: slice
    code_part: slice


def encode(ratios: Ratios, elements: Elements, element: Element, slab: Slab) -> Payload:
    """The payload of ``elements``; see :class:`transfer.codecs.Codec`."""
    kernels.require_finite(kernels.largest(elements), element)
    places = _places(slab.planes, slab.tokens)
    num_channels, num_sinks, num_codes = _ends(places)
    steps = np.zeros(len(places), np.dtype("<f4"))
    means, sinks = np.zeros(num_channels, np.dtype("<u2")), np.empty(num_sinks, np.dtype("<u2"))
    codes = np.empty(num_codes, np.uint8)
    for index, place in enumerate(places):
        body, plane_means = elements[place.body], means[place.mean_part]
        sinks[place.sink_part] = elements[place.sinks]
        if not body.size:
            continue
        is_bf16 = element == Element.BF16
        rms = _center(body, plane_means, is_bf16)
        kernels.require_finite(kernels.largest(plane_means), Element.F16)
        steps[index] = ratios[index % 2] * rms
        _quantize(body, plane_means, steps[index], codes[place.code_part], is_bf16)
    escapes = np.concatenate([elements[:0], *(elements[p.body][codes[p.code_part] == 0] for p in places)])
    parts = (steps, means, sinks, escapes.astype("<u2", copy=False))
    return b"".join([_ESCAPES.pack(escapes.size), *(part.tobytes() for part in parts), entropy.compress(codes)])


def decode(payload: Payload, element: Element, cells: Element, outs: Sequence[Elements], tokens: range) -> None:
    """Fill ``outs`` from ``payload``; see :class:`transfer.codecs.Codec`."""
    places = _places([out.size for out in outs], tokens)
    num_channels, num_sinks, num_codes = _ends(places)
    fixed_bytes = _ESCAPES.size + 4 * len(places) + 2 * (num_channels + num_sinks)
    if len(payload) < fixed_bytes:
        raise CodecError(f"kvz payload of {len(payload)} bytes is too short, its frame needs {fixed_bytes}")
    (num_escapes,) = _ESCAPES.unpack_from(payload)
    if num_escapes > num_codes or len(payload) < fixed_bytes + 2 * num_escapes:
        raise CodecError(f"kvz payload of {len(payload)} bytes cannot hold {num_escapes} escapes")
    steps = np.frombuffer(payload, np.dtype("<f4"), len(places), _ESCAPES.size)
    shorts = np.frombuffer(payload, np.dtype("<u2"), num_channels + num_sinks + num_escapes, 4 + steps.nbytes)
    means, sinks, escapes = np.split(shorts, [num_channels, num_channels + num_sinks])
    packed = memoryview(payload)[fixed_bytes + 2 * num_escapes :]
    codes = np.frombuffer(entropy.decompress(packed, num_codes), np.uint8)
    kernels.require_finite(kernels.largest(means), Element.F16)
    taken = first = 0
    for out, step, place in zip(outs, steps, places, strict=True):
        sink_size = place.sinks.stop - place.sinks.start
        out_sinks, body, plane_codes = out[:sink_size], out[sink_size:], codes[place.code_part]
        kernels.require_finite(kernels.convert(sinks[place.sink_part], out_sinks, element, cells), cells)
        if body.size:
            kernels.require_finite(
                _dequantize(plane_codes, means[place.mean_part], step, body, cells == Element.BF16), cells
            )
        escaped = np.flatnonzero(plane_codes == 0)
        first, taken = taken, taken + escaped.size
        if taken > num_escapes:
            break
        exact = np.empty(escaped.size, np.uint16)
        kernels.require_finite(kernels.convert(escapes[first:taken], exact, element, cells), cells)
        body[escaped] = exact
    if taken != num_escapes:
        raise CodecError(f"kvz payload has {num_escapes} escapes where its codes need another number")


def _places(planes: Sequence[int], tokens: range) -> list[_Plane]:
    if not tokens or any(plane % len(tokens) for plane in planes):
        raise CodecError(f"kvz needs planes of whole rows of {len(tokens)} tokens, not of {list(planes)} elements")
    return list(_laid_out(planes, tokens))


def _laid_out(planes: Sequence[int], tokens: range) -> Iterator[_Plane]:
    num_sinks = min(len(tokens), max(0, SINK_TOKENS - tokens.start))
    at = sink = mean = code = 0
    for plane in planes:
        channels = plane // len(tokens)
        split, body_size = at + num_sinks * channels, plane - num_sinks * channels
        yield _Plane(
            sinks=slice(at, split),
            body=slice(split, at + plane),
            sink_part=slice(sink, sink + num_sinks * channels),
            mean_part=slice(mean, mean + channels),
            code_part=slice(code, code + body_size),
        )
        at, sink, mean, code = at + plane, sink + num_sinks * channels, mean + channels, code + body_size


def _ends(places: list[_Plane]) -> tuple[int, int, int]:
    """Channels, elements of the first tokens and codes of all planes."""
    if not places:
        return 0, 0, 0
    return places[-1].mean_part.stop, places[-1].sink_part.stop, places[-1].code_part.stop


@njit(float64(ELEMENTS_IN, ELEMENTS_OUT, boolean), nogil=True, cache=True)
def _center(source, means, is_bf16):  # type: ignore[no-untyped-def]
    """Write the channels' means; returns the RMS of what is left."""
    rows = source.reshape(source.size // means.size, means.size)
    sums = np.zeros(means.size, np.float64)
    for t in range(rows.shape[0]):
        row = rows[t]
        for i in range(means.size):
            sums[i] += float64(load_bf16(row[i]) if is_bf16 else load_f16(row[i]))
    centers = np.empty(means.size, np.float32)
    for i in range(means.size):
        means[i] = store_f16(float32(sums[i] / rows.shape[0]))
        centers[i] = load_f16(means[i])
    sums[:] = 0
    for t in range(rows.shape[0]):
        row = rows[t]
        for i in range(means.size):
            deviation = float64((load_bf16(row[i]) if is_bf16 else load_f16(row[i])) - centers[i])
            sums[i] += deviation * deviation
    total = float64(0)
    for i in range(means.size):
        total += sums[i]
    return np.sqrt(total / source.size)


@njit(
    types.void(ELEMENTS_IN, ELEMENTS_IN, float32, BYTES_OUT, boolean),
    nogil=True,
    cache=True,
    error_model="numpy",  # a step of 0 makes escapes of what is not the mean
)
def _quantize(source, means, step, codes, is_bf16):  # type: ignore[no-untyped-def]
    rows = source.reshape(source.size // means.size, means.size)
    code_rows = codes.reshape(rows.shape)
    centers = np.empty(means.size, np.float32)
    for i in range(means.size):
        centers[i] = load_f16(means[i])
    for t in range(rows.shape[0]):
        row, code_row = rows[t], code_rows[t]
        for i in range(means.size):
            deviation = (load_bf16(row[i]) if is_bf16 else load_f16(row[i])) - centers[i]
            q = np.rint(deviation / step)
            q = q if deviation != float32(0) else float32(0)
            code_row[i] = uint8(int32(q) + int32(128)) if abs(q) <= float32(127) else uint8(0)


@njit(uint16(BYTES_IN, ELEMENTS_IN, float32, ELEMENTS_OUT, boolean), nogil=True, cache=True)
def _dequantize(codes, means, step, out, out_is_bf16):  # type: ignore[no-untyped-def]
    """Returns the largest magnitude written; escapes are given the mean."""
    top = uint16(0)
    code_rows = codes.reshape(codes.size // means.size, means.size)
    out_rows = out.reshape(code_rows.shape)
    centers = np.empty(means.size, np.float32)
    for i in range(means.size):
        centers[i] = load_f16(means[i])
    for t in range(intp(code_rows.shape[0])):
        code_row, out_row = code_rows[t], out_rows[t]
        for i in range(means.size):
            q = float32(int32(code_row[i]) - int32(128)) if code_row[i] else float32(0)
            value = centers[i] + q * step
            bits = store_bf16(value) if out_is_bf16 else store_f16(value)
            out_row[i] = bits
            top = max(top, uint16(bits & uint16(0x7FFF)))
    return top
