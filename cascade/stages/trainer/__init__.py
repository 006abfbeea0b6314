"""Training internals of stages: the loss, the `transformers.Trainer` and the checkpoints."""
