"""The console command `shardlaunch` and what its subcommands do."""
