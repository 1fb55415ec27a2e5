"""The llama.cpp side: KV chunks become sequence state, sequences decode in one batch."""
