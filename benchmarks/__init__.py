"""How fast and how small the hot paths are: side by side in one run, as ratios to a limit and to what others use."""
