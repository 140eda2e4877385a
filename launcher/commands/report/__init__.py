"""`shardlaunch report`: runs side by side on one page."""
