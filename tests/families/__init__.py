"""Model families in miniature: random weights as a Hugging Face directory and as a GGUF, through the real engines."""
