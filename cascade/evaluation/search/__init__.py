"""The search for the exit that saves most at a target agreement."""
