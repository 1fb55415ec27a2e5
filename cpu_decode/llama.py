"""llama.cpp's low-level calls, typed, in one place; everything here belongs to the engine's thread.

A context has flash attention and one unified cache, into which KV is injected in chunks and in which sequences share
cells; ``streams.py`` has one with a cache for every sequence.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt
import structlog

from cpu_decode.state import ChunkState, StateBlob, is_quantized
from transfer.errors import CapacityError, ConfigError, EngineError, UnsplittableError
from transfer.geometry import KVGeometry
from transfer.layout import CELL_ROWS, CellType, RopeOrder

log = structlog.get_logger()

_ROPE_ORDER: dict[int, RopeOrder] = {0: "interleaved", 2: "half"}  # enum llama_rope_type: NORM, NEOX
_LOAD_MODE = {  # enum llama_load_mode by (mapped, locked)
    (False, False): 0,
    (True, False): 1,
    (False, True): 2,
    (True, True): 3,
}
_FLASH_ATTENTION = {False: 0, True: 1}  # enum llama_flash_attn_type
_NO_CELLS = 1  # what llama_decode returns then
_PIECE_BYTES = 256
_KNOWN_PIECES = 8192
_LOG_INFO_LEVEL, _LOG_ERROR_LEVEL = 2, 4
# llama_kv_cache says of K and of V whether it rotates what it keeps.
_ROTATION = re.compile(r"\battn_rot_([kv]) = ([01])")
_rotations: dict[str, bool] = {}
# struct llama_token_data: what samplers take.
TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

TokenData = npt.NDArray[np.void]
# Writes the state of some positions of a sequence into a buffer; see :meth:`Context.save`.
Saver = Callable[[range, npt.NDArray[np.uint8]], None]


# As a number: an object that points to the logits would be made, and looked into, at every step.
_logits_address = ctypes.CDLL(llama_cpp.llama_cpp._lib._name).llama_get_logits
_logits_address.argtypes, _logits_address.restype = (ctypes.c_void_p,), ctypes.c_void_p


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user: Any) -> None:
    if level == _LOG_ERROR_LEVEL:
        log.error("llama.cpp", text=text.decode(errors="replace").rstrip())
    if level == _LOG_INFO_LEVEL and (said := _ROTATION.search(text.decode(errors="replace"))):
        _rotations[said[1]] = said[2] == "1"


def log_errors_only() -> None:
    """Have llama.cpp say its errors in our log, and nothing else anywhere."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))


class Model:
    """A GGUF in memory and what its vocabulary says.

    Weights are the pages of the ``mapped`` file, or else a copy of their own; ``locked`` ones are not swapped out, as
    far as this process's limit allows.
    """

    def __init__(self, gguf: Path, *, mapped: bool = True, locked: bool = False) -> None:
        log_errors_only()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.load_mode = _LOAD_MODE[mapped, locked]
        self.gguf = gguf
        self.handle = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        if not self.handle:
            raise ConfigError(f"llama.cpp cannot load {gguf}")
        if llama_cpp.llama_model_has_encoder(self.handle) or not llama_cpp.llama_model_has_decoder(self.handle):
            raise ConfigError(f"{gguf} does not only decode: it has an encoder, which nothing here runs")
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.end_tokens = [t for t in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self.vocab, t)]
        self._piece = ctypes.create_string_buffer(_PIECE_BYTES)
        # Texts repeat their tokens, and llama.cpp is asked anew only after that many others.
        self.piece = lru_cache(_KNOWN_PIECES)(self._ask_piece)
        self._contexts = 0
        self._closed = False

    @property
    def rope_order(self) -> RopeOrder:
        """How this architecture pairs rotary elements; :class:`UnsplittableError` if its KV cannot be split."""
        if llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle):
            raise UnsplittableError(
                "recurrent and hybrid models keep state that is not attention KV; they cannot be split"
            )
        rope_type = int(llama_cpp.llama_model_rope_type(self.handle))
        if rope_type not in _ROPE_ORDER:
            raise UnsplittableError(f"rope type {rope_type} of this model cannot be split yet")
        return _ROPE_ORDER[rope_type]

    def checked(self, geometry: KVGeometry) -> KVGeometry:
        """``geometry``; :class:`UnsplittableError` if llama.cpp keeps KV otherwise than that says."""
        _ = self.rope_order
        window = int(llama_cpp.llama_model_n_swa(self.handle))
        if window != geometry.sliding_window:
            raise UnsplittableError(
                f"llama.cpp attends to a window of {window} positions in some layers of this model, where "
                f"{geometry.sliding_window} was expected; windows of this architecture cannot be split yet"
            )
        return geometry

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        return int(llama_cpp.llama_model_size(self.handle))

    def _ask_piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; control tokens stand for none."""
        length = llama_cpp.llama_token_to_piece(self.vocab, token, self._piece, _PIECE_BYTES, 0, False)
        if length < 0:
            larger = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self.vocab, token, larger, -length, 0, False)
            return larger.raw[:length]
        return self._piece.raw[:length]

    def tokenize(self, text: bytes) -> list[int]:
        """The tokens of ``text``, none of them added by the model and none of them control tokens."""
        # No token stands for less than a byte, but some vocabularies begin a text with a space of their own.
        tokens = (llama_cpp.llama_token * (len(text) + 1))()
        count = llama_cpp.llama_tokenize(self.vocab, text, len(text), tokens, len(tokens), False, False)
        return list(tokens[:count])

    def close(self) -> None:
        """Free the weights, once no context computes with them any more."""
        self._closed = True
        self._free_if_unused()

    def lend(self) -> None:
        """A context has been made of it."""
        self._contexts += 1

    def take_back(self) -> None:
        """A context has been freed."""
        self._contexts -= 1
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        # An engine may still run when a test's time is over: freed under it, the weights take the process along.
        if self._closed and not self._contexts:
            llama_cpp.llama_model_free(self.handle)


class Batch:
    """One llama_batch, filled row by row and reused for every step.

    Rows gather in lists and go into C's arrays at once: a step has few of them, and each array costs a call.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: tuple[list[int], ...] = ([], [], [], [])
        # Filled from lists by much less code than NumPy's, which a step finds outside every cache.
        ints, bytes_ = ctypes.c_int32 * capacity, ctypes.c_int8 * capacity
        tokens, positions, seq_ids, logits = ints(), ints(), ints(), bytes_()
        self._arrays: tuple[Any, ...] = (tokens, positions, seq_ids, logits)
        self._counts = ints(*[1] * capacity)
        start = ctypes.addressof(seq_ids)
        self._seq_pointers = (ctypes.c_void_p * capacity)(*range(start, start + 4 * capacity, 4))
        self._struct = llama_cpp.llama_batch(
            n_tokens=0,
            token=tokens,
            embd=None,
            pos=positions,
            n_seq_id=self._counts,
            seq_id=ctypes.cast(self._seq_pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=logits,
        )

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self._rows[0])

    def clear(self) -> None:
        """Forget the rows."""
        self._rows = ([], [], [], [])

    def add(self, seq_id: int, position: int, tokens: list[int], *, want_logits: int) -> int:
        """Append ``tokens`` of one sequence from ``position`` on; returns the row of the last one.

        Logits are computed of the last ``want_logits`` of them.
        """
        count = len(tokens)
        if self.size + count > self.capacity:
            raise EngineError(f"batch of {self.size + count} tokens is over its capacity of {self.capacity}")
        all_tokens, positions, seq_ids, logits = self._rows
        all_tokens += tokens
        positions += range(position, position + count)
        seq_ids += [seq_id] * count
        logits += [0] * (count - want_logits) + [1] * want_logits
        return self.size - 1

    def output(self, row: int) -> int:
        """Where the logits of ``row`` are among those that were asked for."""
        return sum(self._rows[3][:row])

    @property
    def outputs(self) -> int:
        """How many rows have logits."""
        return sum(self._rows[3])

    @property
    def struct(self) -> Any:
        """The C struct with the current rows."""
        size = self._struct.n_tokens = len(self._rows[0])
        for array, rows in zip(self._arrays, self._rows, strict=True):
            array[:size] = rows
        return self._struct


class Cells(NamedTuple):
    """How many there are in a context, how many of them one sequence may hold, and whether all sequences share them."""

    num_cells: int
    sequence_cells: int
    unified: bool


class Context:
    """Cells, and the calls that fill, read and free them. One sequence may hold all of them."""

    # Sequences share one cache: KV can be appended to what they hold, and lent.
    unified = True

    def __init__(
        self,
        model: Model,
        *,
        num_cells: int,
        max_sequences: int,
        batch_tokens: int,
        threads: int,
        cell_type: CellType,
        batch_threads: int = 0,
        flash_attention: bool = True,
    ) -> None:
        self.model = model
        self.num_cells = self.sequence_cells = num_cells
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_cells
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_seq_max = max_sequences + 1 if self.unified else max_sequences
        params.n_threads, params.n_threads_batch = threads, batch_threads or threads
        params.type_k, params.type_v = (row.ggml_type for row in CELL_ROWS[cell_type])
        params.flash_attn_type = _FLASH_ATTENTION[flash_attention]
        params.kv_unified = self.unified
        # Chunks land, and prefixes are reused, at positions that a window has left behind.
        params.swa_full = True
        params.no_perf = True
        _rotations.clear()
        self.handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ConfigError(
                f"llama.cpp cannot make a context of {num_cells} {cell_type} cells and {max_sequences} sequences"
            )
        model.lend()
        # Rows travel rotated where cells are quantized (``transfer/rows.py``); anything else gives wrong tokens.
        rotates = (_rotations.get("k", False), _rotations.get("v", False))
        if rotates != (is_quantized(cell_type),) * 2:
            self.close()
            raise ConfigError(
                f"llama.cpp rotates K and V of {cell_type} cells: {rotates}, where landed KV is the opposite; unset "
                "LLAMA_ATTN_ROT_DISABLE, or set [decode] cell_type to f16 or bf16"
            )
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._computed = Batch(0)
        self._place = (0, 0)
        self._outputs = np.empty((0, model.vocab_size), np.float32)
        # Of samplers, which run one after the other: fresh pages for every token would cost as much as the sampling.
        self.scratch = np.empty((2, model.vocab_size), np.float32)
        self.candidates: TokenData = np.zeros(model.vocab_size, TOKEN_DATA)
        self.candidates["id"] = np.arange(model.vocab_size)
        # Chunks land here first: setting a sequence's state clears what that sequence held.
        self._scratch = max_sequences

    @property
    def cells(self) -> Cells:
        """What there is; from any thread."""
        return Cells(self.num_cells, self.sequence_cells, self.unified)

    def decode(self, batch: Batch) -> None:
        """Compute one batch.

        Raises :class:`CapacityError` if there are too few free cells, and changes none; :class:`EngineError` if it
        fails, and the cells of the batch are then undefined.
        """
        code = llama_cpp.llama_decode(self.handle, batch.struct)
        if code == _NO_CELLS:
            raise CapacityError(f"no cells are free for a batch of {batch.size} tokens")
        if code:
            raise EngineError(f"llama_decode returned {code} for a batch of {batch.size} tokens")
        self._computed = batch
        if batch.outputs:
            self._find_outputs()

    def inject(self, chunk: ChunkState | StateBlob, seq_id: int) -> None:
        """Append ``chunk`` to the cells of ``seq_id``. Raises :class:`EngineError` and leaves no cell behind."""
        state = pointer(chunk.buffer)
        read = llama_cpp.llama_state_seq_set_data(self.handle, state, chunk.num_bytes, self._scratch)
        if read == chunk.num_bytes:
            end = chunk.start_token + chunk.num_tokens
            llama_cpp.llama_memory_seq_cp(self._memory, self._scratch, seq_id, chunk.start_token, end)
        llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if read != chunk.num_bytes:
            raise EngineError(f"llama.cpp took {read} of {chunk.num_bytes} bytes of state at token {chunk.start_token}")

    def save(self, seq_id: int, tokens: range, buffer: npt.NDArray[np.uint8]) -> None:
        """Write the state of the positions ``tokens`` of ``seq_id`` into ``buffer``, uint8, which it must fill.

        Raises :class:`EngineError` if it does not: a sliding window has left some of the cells to other tokens.
        """
        llama_cpp.llama_memory_seq_cp(self._memory, seq_id, self._scratch, tokens.start, tokens.stop)
        size = llama_cpp.llama_state_seq_get_size(self.handle, self._scratch)
        if size == buffer.size:
            llama_cpp.llama_state_seq_get_data(self.handle, pointer(buffer), size, self._scratch)
        llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if size != buffer.size:
            raise EngineError(f"llama.cpp holds {size} of {buffer.size} bytes of state at tokens {tokens}")

    def saver(self, seq_id: int) -> Saver:
        """:meth:`save` for several parts of what ``seq_id`` holds."""
        return partial(self.save, seq_id)

    def share(self, donor: int, seq_id: int, num_tokens: int) -> None:
        """Let ``seq_id`` hold the cells of the first ``num_tokens`` positions of ``donor`` too."""
        llama_cpp.llama_memory_seq_cp(self._memory, donor, seq_id, 0, num_tokens)

    def trim(self, seq_id: int, num_tokens: int) -> None:
        """Keep only the first ``num_tokens`` positions of ``seq_id``; 0 frees its cells."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, num_tokens, -1)

    def cached_tokens(self, seq_id: int) -> int:
        """Positions that ``seq_id`` holds, counted from 0."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id)) + 1

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the logits of batch row ``row``, fp32 ``[vocab_size]``."""
        return self.live_logits(row).copy()

    def live_logits(self, row: int) -> npt.NDArray[np.float32]:
        """The logits of batch row ``row`` that samplers read, fp32 ``[vocab_size]``; valid until the next batch."""
        logits: npt.NDArray[np.float32] = self._outputs[self._computed.output(row)]
        return logits

    def _find_outputs(self) -> None:
        """See where the logits of the last batch are: ``[outputs, vocab_size]``, in the order of its rows."""
        place = (_logits_address(self.handle), self._computed.outputs)
        if place != self._place:
            address, outputs = self._place = place
            # Much faster than np.ctypeslib.as_array.
            elements = (ctypes.c_float * (outputs * self.model.vocab_size)).from_address(address)
            self._outputs = np.frombuffer(memoryview(elements), np.float32).reshape(outputs, -1)

    def state(self, seq_id: int) -> npt.NDArray[np.uint8]:
        """The sequence's state, uint8, as llama.cpp writes it (format: ``cpu_decode/state.py``)."""
        size = llama_cpp.llama_state_seq_get_size(self.handle, seq_id)
        buffer = np.empty(size, np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self.handle, pointer(buffer), size, seq_id)
        return buffer[:written]

    def close(self) -> None:
        """Free the cells."""
        llama_cpp.llama_free(self.handle)
        self.model.take_back()


def pointer(buffer: npt.NDArray[np.uint8]) -> Any:
    """``buffer`` as llama.cpp takes it."""
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
