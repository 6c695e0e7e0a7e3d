"""What every script stands on: errors, flags, files, ranks, memory, and matrix products."""
