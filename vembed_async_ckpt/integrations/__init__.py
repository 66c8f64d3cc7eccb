"""Adapters for existing training loops."""
