"""Sends committed checkpoints elsewhere, and reads them from there. No torch."""
