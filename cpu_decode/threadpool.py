"""ggml's thread pool with one processor for each thread, which llama-cpp-python does not bind.

Structs: ``ggml/include/ggml.h`` and ``ggml-cpu.h``. Built with OpenMP, as by default, ggml takes threads from the
OpenMP runtime and only their processors from the pool, anew at every graph; built without, the pool has threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from cpu_decode.llama import Context
from transfer.errors import ConfigError, EngineError

_MAX_THREADS = 512  # GGML_MAX_N_THREADS
_FOLDER = Path(llama_cpp.__file__).parent / "lib"


class _Params(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


class PinnedThreads:
    """Pins the threads that compute for ``context``, one to each of ``cpus``, from the next batch on.

    Batches of more than one token are computed on ``batch_cpus``. Close it after the context.
    """

    def __init__(self, context: Context, cpus: Sequence[int], batch_cpus: Sequence[int]) -> None:
        self._base, self._cpu, llama = _libraries()
        self._pools = [self._pool(each) for each in (cpus, batch_cpus)]
        llama.llama_attach_threadpool(context.handle, *self._pools)

    def close(self) -> None:
        """Free the pools."""
        for pool in self._pools:
            self._cpu.ggml_threadpool_free(pool)

    def _pool(self, cpus: Sequence[int]) -> int:
        if max(cpus) >= _MAX_THREADS:
            raise ConfigError(f"processor {max(cpus)} is above what llama.cpp can pin to; set [decode] numa to off")
        params = self._base.ggml_threadpool_params_default(len(cpus))
        for cpu in cpus:
            params.cpumask[cpu] = True
        params.strict_cpu = True
        pool = self._cpu.ggml_threadpool_new(ctypes.byref(params))
        if not pool:
            raise EngineError(f"llama.cpp cannot make a pool of {len(cpus)} threads")
        return int(pool)


def _libraries() -> tuple[Any, Any, Any]:
    # By the names that the loader knows: `.so` without a version would load second copies.
    base, cpu = (ctypes.CDLL(str(_FOLDER / f"{name}.so.0")) for name in ("libggml-base", "libggml-cpu"))
    base.ggml_threadpool_params_default.argtypes = [ctypes.c_int]
    base.ggml_threadpool_params_default.restype = _Params
    cpu.ggml_threadpool_new.argtypes = [ctypes.POINTER(_Params)]
    cpu.ggml_threadpool_new.restype = ctypes.c_void_p
    cpu.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
    llama = llama_cpp.llama_cpp._lib
    llama.llama_attach_threadpool.argtypes = [ctypes.c_void_p] * 3
    llama.llama_attach_threadpool.restype = None
    return base, cpu, llama
