"""One file for each paper: a recipe that turns layers and calibration into a plan."""
