"""What early exit is worth: operating points, calibration, search and verdict."""
