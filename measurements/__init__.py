"""Questions put to this host, one module each; ``METHODOLOGY.md`` says how they are asked."""
