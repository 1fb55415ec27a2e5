"""Models whose KV cannot go from one engine to the other: a worker serves them whole, on route ``cpu``.

Recurrent and hybrid ones keep a state of the last token alone, and latent attention keeps rows of another kind.
llama.cpp computes with each, and saves and loads what a sequence holds; what takes that apart, token by token, is off.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

from transfer.config import Decode
from transfer.errors import ConfigError, UnsplittableError
from transfer.geometry import NO_KV, KVGeometry

log = structlog.get_logger()


def geometry_or_no_kv(find: Callable[[], KVGeometry], *, export: bool) -> KVGeometry:
    """What ``find`` returns; ``NO_KV`` where it raises :class:`UnsplittableError` and no node is to ``export`` KV."""
    try:
        return find()
    except UnsplittableError as error:
        if export:
            raise
        log.info("this model is served whole: no prompt reuses KV and nothing is guessed", reason=error.reason)
        return NO_KV


def settings(decode: Decode) -> Decode:
    """``decode`` without what takes KV apart; :class:`ConfigError` if its cells are streams, for they do too."""
    if decode.cell_layout == "streams":
        raise ConfigError("KV of this model cannot be put into streams; set [decode] cell_layout to unified")
    return msgspec.structs.replace(
        decode, pool_mib=0, disk_pool_dir="", shared_pool_url="", speculate="off", draft_gguf=""
    )
