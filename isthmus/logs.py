"""How Isthmus logs: readable lines on a terminal, JSON lines everywhere else."""

from __future__ import annotations

import logging
import os
import sys

import structlog

from transfer.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def configure() -> None:
    """Set up structlog for this process, on stderr, from level ``ISTHMUS_LOG`` (info) upwards.

    Raises :class:`ConfigError` for a level that does not exist.
    """
    level = os.environ.get("ISTHMUS_LOG", "info").lower()
    if level not in LEVELS:
        raise ConfigError(f"ISTHMUS_LOG is {level!r}; it must be one of {', '.join(LEVELS)}")
    terminal = sys.stderr.isatty()
    renderers = (
        # Its own tracebacks would show local variables, prompts among them.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
