"""Why a layer, or the final norm, changes the residual stream as it does."""
