"""A training run: its set-up, its loop, its files, and where its weights come from."""
