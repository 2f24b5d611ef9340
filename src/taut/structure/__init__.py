"""What a network is made of: tracing, statistics, and the only code that edits one."""
