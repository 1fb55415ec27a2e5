"""KV below the cells: what lies on disk and on a shared server, how it gets there and how it comes back."""
