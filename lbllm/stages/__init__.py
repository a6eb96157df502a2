"""The stages of the method, each a plain function over one decoder block."""
