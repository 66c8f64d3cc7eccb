"""`vembed-ckpt report`: what the events of a run say, on one page that opens offline. Loads no torch."""
