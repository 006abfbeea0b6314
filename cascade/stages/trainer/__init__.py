"""How a stage is trained on stored states: its loss, its `transformers.Trainer`, checkpoints."""
