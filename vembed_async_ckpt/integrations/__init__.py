"""Drop-ins for the training loops people already have."""
