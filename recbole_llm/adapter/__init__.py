"""Personalised low-rank adapters: one formula, ``y = W0 x + s B M(z) A x``, for every method.

``config`` defines M(z), ``gate`` computes the weights from z, ``mixer`` applies them in rank space,
``layer`` plugs both into PEFT, ``personalized`` is what callers hold. This package knows torch and PEFT only.
"""
