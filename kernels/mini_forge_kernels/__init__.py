"""Fused versions of the decoder's functions: same names, signatures and results as `mini_forge.model.functional`.

Each file: the equation and what it costs, the reference, the hand-written forward and backward, the public function.
These are plain torch and run everywhere; each is tested against its reference in value and in all gradients.
"""
