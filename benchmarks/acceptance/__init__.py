"""The parts of gpu_acceptance.py, each run in a process of its own."""
