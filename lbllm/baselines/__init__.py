"""The weight-only quantization methods that LBLLM is compared with: one small file per method, no packed format.

    from lbllm.baselines.methods import METHODS, quantize_blocks

Each method is a pure function of one layer: from a weight (out, in), a Hessian (in, in) and ``Settings`` it computes
the dequantized weight and the number of stored bits, see ``lbllm.baselines.layer``. All methods get the same Hessian as
stage 1. In this Hessian a token with massive activations counts as much as ten usual tokens; the published methods do
not have this limit.
"""
