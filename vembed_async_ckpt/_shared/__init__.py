"""What the trainer and the writer process share: the arena's memory and the messages between them. Loads no torch."""
