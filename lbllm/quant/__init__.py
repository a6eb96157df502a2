"""The format: levels, packing, activations, KV cache, and the layers that use them."""
