"""What two nodes must agree on: geometry, layout, codecs, frames, messages, errors, configuration."""
