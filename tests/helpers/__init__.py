"""What tests share: whole runs, oracles, and processes to break."""
