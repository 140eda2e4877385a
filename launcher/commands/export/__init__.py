"""`shardlaunch export`: whole models for other tools, compared in a fresh process with what they were made from."""
