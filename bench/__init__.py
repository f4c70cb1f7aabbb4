"""Measurements: parity with recorded runs, latency, peak memory."""
