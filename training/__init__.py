"""Training state, loss, resuming, logging and signals."""
