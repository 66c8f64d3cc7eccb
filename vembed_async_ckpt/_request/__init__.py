"""From the host's objects (models, optimizers, processors, configs) to one request: contents, tensors, and what was true then."""
