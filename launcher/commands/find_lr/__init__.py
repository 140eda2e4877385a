"""`shardlaunch find-lr`: a learning rate from a short run in which it rises."""
