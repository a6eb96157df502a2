"""A report for people who decide: runs and checkpoints as one HTML page, with what has been measured of them."""
