"""The privacy of a run: the plan, and the sampler, clipper, noise, accounting and ledger that it alone may use."""
