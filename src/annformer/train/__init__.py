"""Training; the only folder that imports Lightning, which takes seconds: import from its modules when there is something to train."""
