"""Reading released checkpoints without running them, and writing our own folder format."""
