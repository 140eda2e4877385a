"""`python -m shardlaunch` is the command `shardlaunch`."""

from shardlaunch.launcher.commands.main import main

main()
