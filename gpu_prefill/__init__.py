"""The vLLM side: a KV connector that exports each prompt's blocks while they are computed."""
