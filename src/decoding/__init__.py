"""Beam search: the search, the decoder that it asks, and the head's best tokens."""
