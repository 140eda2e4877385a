"""The console command `shardlaunch` and its subcommands."""
