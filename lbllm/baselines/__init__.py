"""The weight-only quantization methods that LBLLM is compared with: one small file a method, no packed format.

    from lbllm.baselines.methods import METHODS, quantize_blocks

Each method is a pure function over one layer: weight (out, in), Hessian (in, in) and ``Settings`` give the dequantized
weight and the bits that storing it takes, see ``lbllm.baselines.layer``. They all get the same Hessian as stage 1, in
which a token of massive activation counts as ten usual ones; the published methods have no such bound.
"""
