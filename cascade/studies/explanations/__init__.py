"""Explanations of how a layer, or the final norm, changes the residual stream."""
