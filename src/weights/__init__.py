"""Weights in and out: this project's checkpoints and the files of others."""
