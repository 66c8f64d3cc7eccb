"""Put a checkpoint back: each module plans what one kind of object gets, before anything is changed."""
