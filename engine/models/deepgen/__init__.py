"""DeepGen 1.0."""
