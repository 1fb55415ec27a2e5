"""The codecs again, in numpy: slow, and plain enough to be checked by eye against the table in ``transfer/codecs.py``.

Elements are uint16 bit patterns; ``kind`` is ``"bf16"`` or ``"f16"``. Only finite input is defined here.
"""

import struct

import lz4.block
import msgspec
import numpy as np
import zstandard

from tests.golden.examples import GEOMETRY
from transfer.layout import Slab


def slab_of(planes, tokens):
    """The slab with these planes, K and V in turn, the same in every layer."""
    assert list(planes) == list(planes[:2]) * (len(planes) // 2)
    k_channels, v_channels = (plane // len(tokens) if tokens else plane for plane in planes[:2])
    geometry = msgspec.structs.replace(GEOMETRY, num_kv_heads=1, head_dim_k=k_channels, head_dim_v=v_channels)
    return Slab(geometry, len(planes) // 2, tokens)


def to_float(elements, kind):
    """Elements as float32, exactly."""
    if kind == "bf16":
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.view(np.float16).astype(np.float32)


def from_float(values, kind):
    """float32 as elements, rounded to the nearest, ties to the even bit pattern."""
    if kind == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    toward_zero = (bits >> 16).astype(np.uint16)
    away = toward_zero + np.uint16(1)
    exact = values.astype(np.float64)
    below = np.abs(exact - to_float(toward_zero, "bf16"))
    above = np.abs(to_float(away, "bf16").astype(np.float64) - exact)
    take_away = (above < below) | ((above == below) & (toward_zero % 2 == 1))
    return np.where(take_away, away, toward_zero)


def encode_raw(elements, _kind):
    return elements.astype("<u2").tobytes()


def decode_raw(payload, kind, cells):
    elements = np.frombuffer(payload, "<u2")
    return elements if kind == cells else from_float(to_float(elements, kind), cells)


def split(elements, kind):
    if kind == "bf16":
        sign, exponent, mantissa = elements >> 15, (elements >> 7) & 0xFF, elements & 0x7F
        high, low = exponent, sign << 7 | mantissa
    else:
        high, low = elements >> 8, elements & 0xFF
    return high.astype(np.uint8).tobytes(), low.astype(np.uint8).tobytes()


def merge(high, low, kind):
    high, low = np.frombuffer(high, np.uint8).astype(np.uint16), np.frombuffer(low, np.uint8).astype(np.uint16)
    return (low >> 7) << 15 | high << 7 | low & 0x7F if kind == "bf16" else high << 8 | low


def encode_lz4(elements, kind):
    high, low = split(elements, kind)
    packed = lz4.block.compress(high, store_size=False)
    return struct.pack("<I", len(packed)) + low + packed


def decode_lz4(payload, kind, cells):
    (length,) = struct.unpack_from("<I", payload)
    low, packed = payload[4 : len(payload) - length], payload[len(payload) - length :]
    high = lz4.block.decompress(packed, uncompressed_size=len(low))
    return decode_raw(merge(high, low, kind).tobytes(), kind, cells)


def compress_zstd(data):
    settings = zstandard.ZstdCompressionParameters(
        strategy=1, window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
    )
    return zstandard.ZstdCompressor(compression_params=settings).compress(data)


def encode_zstd(elements, kind):
    high, low = split(elements, kind)
    packed = compress_zstd(high)
    return struct.pack("<I", len(packed)) + low + packed


def decode_zstd(payload, kind, cells):
    (length,) = struct.unpack_from("<I", payload)
    low, packed = payload[4 : len(payload) - length], payload[len(payload) - length :]
    return decode_raw(merge(zstandard.decompress(packed), low, kind).tobytes(), kind, cells)


def quantize_q8(values):
    """f32 as f16 scales ``[blocks]`` and int8 codes ``[blocks, 32]``."""
    blocks = values.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, initial=0) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[np.isinf(inverse)] = 0
    scaled = (blocks * inverse[:, None]).astype(np.float64)
    return from_float(scale, "f16"), np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int8)


def encode_q8(elements, kind):
    scale, codes = quantize_q8(to_float(elements, kind))
    return scale.tobytes() + codes.tobytes()


def decode_q8(payload, _kind, cells):
    blocks = len(payload) // 34
    scale = to_float(np.frombuffer(payload, np.uint16, blocks), "f16")
    codes = np.frombuffer(payload, np.int8, offset=2 * blocks).reshape(blocks, 32)
    return from_float((scale[:, None] * codes.astype(np.float32)).reshape(-1), cells)


def quantize_q4(values):
    """f32 as f16 scales ``[blocks]`` and pairs of codes, uint8 ``[blocks, 16]``."""
    blocks = values.reshape(-1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = np.where(extreme == 0, np.float32(0), extreme) / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[np.isinf(inverse)] = 0
    codes = np.minimum(15, np.trunc(blocks * inverse + np.float32(8.5))).astype(np.uint8)
    return from_float(scale, "f16").reshape(-1), codes[:, :16] | codes[:, 16:] << 4


def encode_q4(elements, kind):
    scale, codes = quantize_q4(to_float(elements, kind))
    return scale.tobytes() + codes.tobytes()


def decode_q4(payload, _kind, cells):
    blocks = len(payload) // 18
    scale = to_float(np.frombuffer(payload, np.uint16, blocks), "f16")
    packed = np.frombuffer(payload, np.uint8, offset=2 * blocks).reshape(blocks, 16)
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return from_float((scale[:, None] * (codes - 8)).reshape(-1), cells)


def rotate(values, size):
    """Every ``size`` f32 through the Hadamard matrix over sqrt(size), which undoes itself."""
    distance = size // 2
    while distance:
        pairs = values.reshape(-1, 2, distance)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        distance //= 2
    return values.reshape(-1) * np.float32(1 / np.sqrt(size))


def rotation(head_dim):
    """Elements of a K head that are rotated together."""
    return max(size for size in (64, 128, 256, 512) if head_dim % size == 0)


ROW_FORMS = {"rows_q8_0": "88", "rows_k8v4": "84", "rows_q4_0": "44"}


def rows_of(values, form):
    """f32 as bytes of ``block_q8_0`` or ``block_q4_0``."""
    scale, codes = (quantize_q8 if form == "8" else quantize_q4)(values)
    return np.concatenate([scale[:, None].view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def encode_rows(name, elements, kind, slab):
    payload = b""
    for index, plane in enumerate(np.split(elements, np.cumsum(slab.planes)[:-1])):
        size = 64 if index % 2 else rotation(slab.geometry.head_dim_k)
        payload += rows_of(rotate(to_float(plane, kind), size), ROW_FORMS[name][index % 2])
    return payload


def one_layer(count):
    """``count`` elements, a multiple of 32, as one K plane and one V plane of whole blocks."""
    k_elements = count // 64 * 32
    return [k_elements, count - k_elements]


def encode_k8v4(elements, kind):
    """Of one layer."""
    k_elements, _ = one_layer(elements.size)
    return encode_q8(elements[:k_elements], kind) + encode_q4(elements[k_elements:], kind)


def decode_k8v4(payload, kind, cells):
    """Of one layer: 34 bytes a block of K, 18 a block of V, which has one block more if their number is odd."""
    k_bytes = len(payload) // 52 * 34
    return np.concatenate([decode_q8(payload[:k_bytes], kind, cells), decode_q4(payload[k_bytes:], kind, cells)])


def tokens_of(count):
    """Tokens that ``count`` elements of one plane can be rows of, two of them among the first four."""
    return range(2, 10) if count % 8 == 0 else range(2, 3)


def encode_kvz(ratios, elements, kind, planes, tokens):
    sinks_of_plane = max(0, min(4 - tokens.start, len(tokens)))
    steps, means, sinks, codes, escapes = [], [], [], [], []
    for index, plane in enumerate(np.split(elements, np.cumsum(planes)[:-1])):
        rows = plane.reshape(len(tokens), -1)
        sinks.append(rows[:sinks_of_plane].reshape(-1))
        rows = rows[sinks_of_plane:]
        values = to_float(rows, kind).reshape(rows.shape)
        if not rows.size:
            steps.append(0)
            means.append(np.zeros(rows.shape[1], np.uint16))
            continue
        mean = (0.0 + np.cumsum(values.astype(np.float64), axis=0)[-1]) / len(rows)  # a sum starts from +0
        means.append(from_float(mean.astype(np.float32), "f16"))
        deviation = values - to_float(means[-1], "f16")
        squares = np.cumsum(deviation.astype(np.float64) ** 2, axis=0)[-1]
        steps.append(np.float32(ratios[index % 2] * np.sqrt(np.cumsum(squares)[-1] / rows.size)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            q = np.where(deviation == 0, 0, np.rint(deviation / steps[-1]))
        escaped = np.abs(q) > 127
        codes.append(np.where(escaped, 0, np.where(escaped, 0, q) + 128).astype(np.uint8).reshape(-1))
        escapes.append(rows[escaped])
    codes, escapes = (np.concatenate([np.empty(0, kind), *parts]) for kind, parts in (("u1", codes), ("u2", escapes)))
    head = struct.pack("<I", escapes.size) + np.array(steps, "<f4").tobytes()
    shorts = [part.astype("<u2").tobytes() for part in (*means, *sinks, escapes)]
    return b"".join([head, *shorts, compress_zstd(codes.tobytes())])


def decode_kvz(payload, kind, cells, planes, tokens):
    sinks_of_plane = max(0, min(4 - tokens.start, len(tokens)))
    (num_escapes,) = struct.unpack_from("<I", payload)
    steps = np.frombuffer(payload, "<f4", len(planes), 4)
    channels = [plane // len(tokens) for plane in planes]
    sizes = [*channels, *(sinks_of_plane * count for count in channels), num_escapes]
    shorts = np.frombuffer(payload, "<u2", sum(sizes), 4 + steps.nbytes)
    *shorts, escapes = np.split(shorts, np.cumsum(sizes)[:-1])
    codes = np.frombuffer(zstandard.decompress(payload[4 + steps.nbytes + 2 * sum(sizes) :]), np.uint8)
    rows = len(tokens) - sinks_of_plane
    outs = []
    for index, plane_codes in enumerate(np.split(codes, np.cumsum([rows * count for count in channels])[:-1])):
        mean, sinks = to_float(shorts[index], "f16"), shorts[len(planes) + index]
        q = plane_codes.reshape(rows, channels[index]).astype(np.float32) - 128
        body = from_float((mean + q * steps[index]).reshape(-1), cells)
        escaped = np.flatnonzero(plane_codes == 0)
        body[escaped] = decode_raw(escapes[: escaped.size].tobytes(), kind, cells)
        escapes = escapes[escaped.size :]
        outs += [decode_raw(sinks.tobytes(), kind, cells), body]
    return np.concatenate(outs)


ENCODE = {"raw": encode_raw, "lz4": encode_lz4, "q8": encode_q8, "zstd": encode_zstd, "k8v4": encode_k8v4}
DECODE = {"raw": decode_raw, "lz4": decode_lz4, "q8": decode_q8, "zstd": decode_zstd, "k8v4": decode_k8v4}
