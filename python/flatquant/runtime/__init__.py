"""Modules of a quantized model: they call `flatquant_cuda` ops."""
