"""Beam search: the search, the decoder that it asks, the head's best tokens, and the journal of a killed search."""
