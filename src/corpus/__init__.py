"""Data: token files, authors' texts, triples, the tokenizer, and how units become micro-batches."""
