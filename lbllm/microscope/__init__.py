"""The microscope: a packed checkpoint beside its teacher, from a map of all layers to the bits of one weight."""
