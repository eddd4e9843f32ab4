"""Models: loading, adapters, quantization, tokenizers, devices."""
