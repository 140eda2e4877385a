"""The commands `shardlaunch ckpt`: list, verify, show, diff, export, average, prune and copy checkpoints."""
