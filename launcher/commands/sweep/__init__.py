"""`shardlaunch sweep`: a search over options, whose trials are ordinary runs."""
