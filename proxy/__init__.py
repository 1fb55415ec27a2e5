"""The client side: an OpenAI endpoint that hands requests from prefill to decode and keeps the ledger."""
