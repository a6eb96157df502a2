"""The course: lessons on quantization whose every figure is computed from a real model and its checkpoint."""
