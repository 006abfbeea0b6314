"""How a baseline moved: its versions in git, or the reports in a folder, compared in order."""
