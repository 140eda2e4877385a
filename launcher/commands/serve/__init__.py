"""`shardlaunch serve`: a small page and an HTTP endpoint on this machine, to try a model."""
