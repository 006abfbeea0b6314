"""The network of a drafter: its layer, its inputs, and the tokens that it can propose."""
