"""The command `shardlaunch doctor`: what machine and environment mean for the command that follows."""
