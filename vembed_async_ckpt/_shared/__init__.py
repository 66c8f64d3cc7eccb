"""What the trainer and the writer process share: the memory of the arenas and the message protocol. Does not import torch."""
